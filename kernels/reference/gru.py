"""One direction of one GRU layer: the definition, in plain PyTorch. The contract is that of :mod:`.lstm`.

r, z = sigmoid(W x + b + W' h + b'); n = tanh(W_n x + b_n + r (W'_n h + b'_n)); h' = (1 - z) n + z h.

Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (2014), with the reset gate after the
product as in torch.nn.GRU, whose gate order this is. Variants and their sources: :mod:`.recurrent_variants`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import recurrent
from . import recurrent_variants as variants
from .batch_norm_act import accumulate_dtype
from .recurrent import Forward, Gradients, Kept, Needs, States, supports
from .recurrent_variants import PLAIN, Extras

__all__ = ["backward", "forward", "supports"]


def forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    extras: Extras = PLAIN,
    *,
    activation: str,
    recurrent_activation: str = "sigmoid",
    reverse: bool,
    saves: bool,
) -> Forward:
    """The layer's output and final state, and with ``saves`` what backward needs; c0 and weight_hr are None."""
    del c0, weight_hr
    sizes = recurrent.step_sizes(x, batch_sizes)
    dtype = accumulate_dtype(x.dtype)
    recurrence = variants.Recurrence(weight_hh, bias_hh, extras, dtype)
    inputs = recurrent.project(x, weight_ih, bias_ih, dtype)
    states = (recurrent.initial(h0, max(sizes), weight_hh.size(1), inputs),)

    def step(rows: slice, before: States) -> tuple[States, tuple[Tensor | None, ...]]:
        (h,) = before
        sums, normal, inverse = recurrence.forward(h)
        (x_r, x_z, x_n), (h_r, h_z, part) = inputs[rows].chunk(3, 1), sums.chunk(3, 1)
        r = variants.activate(x_r + h_r, recurrent_activation)
        z = variants.activate(x_z + h_z, recurrent_activation)
        n = variants.activate(x_n + r * part, activation)
        h = recurrence.keep(n + z * (h - n), h, rows)
        return (h,), (h, torch.cat([r, z, n], 1), part, normal, inverse)

    (h_n,), (output, gates, part, normal, inverse) = recurrent.scan(step, states, sizes, reverse)
    kept = (gates, None, part, normal, inverse) if saves else ()
    return Forward(recurrent.like_sequence(output, x).to(x.dtype), h_n.to(x.dtype), None, *kept)


def backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    kept: Kept,
    extras: Extras = PLAIN,
    *,
    activation: str,
    recurrent_activation: str = "sigmoid",
    reverse: bool,
    needs: Needs,
) -> Gradients:
    """Gradients as in :mod:`.lstm`; what belongs to an LSTM alone is None."""
    del grad_c_n, grad_cells, c0, weight_hr
    gates, part = kept.gates, kept.extra
    if gates is None or part is None:
        raise ValueError("gates and extra: expected what forward kept of a GRU, got None")
    sizes = recurrent.step_sizes(x, batch_sizes)
    recurrence = variants.Recurrence(weight_hh, None, extras, gates.dtype)
    grad_rows = None if grad_output is None else recurrent.rows_of(grad_output).to(gates.dtype)
    h_before = recurrent.before(recurrent.rows_of(kept.output).to(gates.dtype), h0, sizes, reverse)
    states = (recurrent.initial(grad_h_n, max(sizes), weight_hh.size(1), gates),)

    def step(rows: slice, grads: States) -> tuple[States, tuple[Tensor | None, ...]]:
        grad_h = grads[0] if grad_rows is None else grads[0] + grad_rows[rows]
        grad_h, passing = recurrence.keep_backward(grad_h, rows)
        r, z, n = gates[rows].chunk(3, 1)
        grad_n = grad_h * (1 - z) * variants.slope(n, activation)
        grad_z = grad_h * (h_before[rows] - n) * variants.slope(z, recurrent_activation)
        grad_r = grad_n * part[rows] * variants.slope(r, recurrent_activation)
        grad_recurrent = torch.cat([grad_r, grad_z, grad_n * r], 1)
        moved, product = recurrence.backward(
            grad_recurrent, variants.rows_of(kept.normal, rows), variants.rows_of(kept.inverse, rows)
        )
        moved = grad_h * z + moved
        moved = moved if passing is None else moved + passing
        return (moved,), (torch.cat([grad_r, grad_z, grad_n], 1), grad_recurrent, product)

    (grad_h0,), (grad_gates, grad_recurrent, grad_product) = recurrent.scan_back(step, states, sizes, reverse)
    found = recurrent.finish(
        x,
        lambda: variants.dropped(h_before, extras.dropout, sizes),
        grad_gates,
        grad_recurrent,
        grad_product,
        weight_ih,
        needs,
    )
    dx, dw_ih, dw_hh, db_ih, db_hh = found
    of_variant = variants.gradients(grad_recurrent, None, None, kept.normal, None, needs)
    return recurrent.narrowed((dx, grad_h0, None, dw_ih, dw_hh, db_ih, db_hh, None, *of_variant), needs, x.dtype)
