"""One direction of one Elman RNN layer: the definition, in plain PyTorch. The contract is that of :mod:`.lstm`.

h' = act(W x + b + W' h + b') with act "tanh" or "relu", as in torch.nn.RNN. Variants and their sources:
:mod:`.recurrent_variants`.

Source: Elman, "Finding Structure in Time" (1990).
"""

from __future__ import annotations

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
    del c0, weight_hr, recurrent_activation
    sizes = recurrent.step_sizes(x, batch_sizes)
    dtype = accumulate_dtype(x.dtype)
    recurrence = variants.Recurrence(weight_hh, bias_hh, extras, dtype)
    inputs = recurrent.project(x, weight_ih, bias_ih, dtype)
    states = (recurrent.initial(h0, max(sizes), weight_hh.size(1), inputs),)

    def step(rows: slice, before: States) -> tuple[States, tuple[Tensor | None, ...]]:
        sums, normal, inverse = recurrence.forward(before[0])
        made = variants.activate(inputs[rows] + sums, activation)
        h = recurrence.keep(made, before[0], rows)
        return (h,), (h, made, normal, inverse)

    (h_n,), (output, made, normal, inverse) = recurrent.scan(step, states, sizes, reverse)
    kept = (made if extras.zoneout is not None else None, None, None, normal, inverse) if saves else ()
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
    del grad_c_n, grad_cells, c0, weight_hr, recurrent_activation
    sizes = recurrent.step_sizes(x, batch_sizes)
    rows_out = recurrent.rows_of(kept.output).to(accumulate_dtype(x.dtype))
    made = rows_out if kept.gates is None else kept.gates
    recurrence = variants.Recurrence(weight_hh, None, extras, rows_out.dtype)
    grad_rows = None if grad_output is None else recurrent.rows_of(grad_output).to(rows_out.dtype)
    states = (recurrent.initial(grad_h_n, max(sizes), weight_hh.size(1), rows_out),)

    def step(rows: slice, grads: States) -> tuple[States, tuple[Tensor | None, ...]]:
        grad_h = grads[0] if grad_rows is None else grads[0] + grad_rows[rows]
        grad_h, passing = recurrence.keep_backward(grad_h, rows)
        grad_gates = grad_h * variants.slope(made[rows], activation)
        moved, product = recurrence.backward(
            grad_gates, variants.rows_of(kept.normal, rows), variants.rows_of(kept.inverse, rows)
        )
        return (moved if passing is None else moved + passing,), (grad_gates, product)

    def h_before() -> Tensor:
        return variants.dropped(recurrent.before(rows_out, h0, sizes, reverse), extras.dropout, sizes)

    (grad_h0,), (grad_gates, grad_product) = recurrent.scan_back(step, states, sizes, reverse)
    found = recurrent.finish(x, h_before, grad_gates, grad_gates, grad_product, weight_ih, needs)
    dx, dw_ih, dw_hh, db_ih, db_hh = found
    of_variant = variants.gradients(grad_gates, None, None, kept.normal, None, needs)
    return recurrent.narrowed((dx, grad_h0, None, dw_ih, dw_hh, db_ih, db_hh, None, *of_variant), needs, x.dtype)
