"""What forward would have kept for backward, made again from h and c of all steps: two products over all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import recurrent
from . import recurrent_variants as variants
from .batch_norm_act import accumulate_dtype
from .recurrent import Kept
from .recurrent_variants import Extras


def kept(
    family: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    rest: Kept,
    extras: Extras,
    *,
    activation: str,
    recurrent_activation: str,
    reverse: bool,
) -> Kept:
    """All of ``Kept``, from its output and, for an LSTM, its cells; arguments are those of forward."""
    output = recurrent.rows_of(rest.output)
    dtype = accumulate_dtype(x.dtype)
    sizes = recurrent.step_sizes(x, batch_sizes)
    inputs = recurrent.project(x, weight_ih, bias_ih, dtype)
    h_before = recurrent.before(output.to(dtype), h0, sizes, reverse)
    plain = variants.Recurrence(weight_hh, bias_hh, extras._replace(zoneout=None, dropout=None), dtype)
    sums, normal, inverse = plain.forward(variants.dropped(h_before, extras.dropout, sizes))
    extra = None
    if family == "lstm":
        cells = rest.cells
        if cells is None:
            raise ValueError("cells: expected those that forward kept of an LSTM, got None")
        parts = list((inputs + sums).chunk(4, 1))
        if extras.peephole is not None:
            see_i, see_f, see_o = extras.peephole.to(dtype).chunk(3)
            cells_before = recurrent.before(cells, c0, sizes, reverse)
            parts[0] = parts[0] + see_i * cells_before
            parts[1] = parts[1] + see_f * cells_before
            parts[3] = parts[3] + see_o * cells
        names = (recurrent_activation, recurrent_activation, activation, recurrent_activation)
        made = [variants.activate(part, name) for part, name in zip(parts, names, strict=True)]
        gates = torch.cat(made, 1)
        if weight_hr is not None:
            if extras.norm_c is not None and extras.norm_c_bias is not None:
                cells = variants.normalise(cells)[0] * extras.norm_c.to(dtype) + extras.norm_c_bias.to(dtype)
            extra = made[3] * variants.activate(cells, activation)
    elif family == "gru":
        (x_r, x_z, x_n), (h_r, h_z, extra) = inputs.chunk(3, 1), sums.chunk(3, 1)
        r, z = (variants.activate(part, recurrent_activation) for part in (x_r + h_r, x_z + h_z))
        gates = torch.cat([r, z, variants.activate(x_n + r * extra, activation)], 1)
        extra = extra.contiguous()
    else:
        gates = None if extras.zoneout is None else variants.activate(inputs + sums, activation)
    return Kept(rest.output, gates, rest.cells, extra, normal, inverse)
