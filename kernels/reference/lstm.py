"""One direction of one LSTM layer: the definition, in plain PyTorch. Shapes are those of :mod:`.recurrent`.

i, f, o = sigmoid(W x + b + W' h + b'), g = tanh(...); c' = f c + i g; h' = o tanh(c'), or W_hr (o tanh(c')).

Sources: Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997); Gers et al. (2000) for the forget gate; Sak et
al. (2014) for the projection. Gate order and the two biases are those of torch.nn.LSTM. Variants and their sources:
:mod:`.recurrent_variants`.
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


class _Cell:
    """What the state c goes through within a step: peepholes, and c's way to h."""

    def __init__(self, extras: Extras, activation: str, dtype: torch.dtype) -> None:
        self.activation = activation
        self.peephole = None if extras.peephole is None else extras.peephole.to(dtype).chunk(3)
        self.norm = None
        if extras.norm_c is not None and extras.norm_c_bias is not None:
            self.norm = extras.norm_c.to(dtype), extras.norm_c_bias.to(dtype)

    def seen(self, sums: Tensor, gate: int, c: Tensor) -> Tensor:
        return sums if self.peephole is None else sums + self.peephole[gate] * c

    def out(self, c: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """act(c) as h has it, and with a layer norm the normalised c and its inverse spread."""
        normal = inverse = None
        if self.norm is not None:
            normal, inverse = variants.normalise(c)
            c = normal * self.norm[0] + self.norm[1]
        return variants.activate(c, self.activation), normal, inverse

    def out_backward(
        self, grad: Tensor, bent: Tensor, normal: Tensor | None, inverse: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradients of c and of the normalised c, from that of ``bent``, which ``out`` returned."""
        grad = grad * variants.slope(bent, self.activation)
        if self.norm is None or normal is None or inverse is None:
            return grad, grad
        return variants.normalise_backward(grad * self.norm[0], normal, inverse), grad


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
    """The layer's output and final states, and with ``saves`` what backward needs."""
    sizes = recurrent.step_sizes(x, batch_sizes)
    dtype = accumulate_dtype(x.dtype)
    recurrence = variants.Recurrence(weight_hh, bias_hh, extras, dtype)
    cell = _Cell(extras, activation, dtype)
    projection = None if weight_hr is None else weight_hr.to(dtype).t()
    inputs = recurrent.project(x, weight_ih, bias_ih, dtype)
    hidden, batch = weight_hh.size(0) // 4, max(sizes)
    states = (
        recurrent.initial(h0, batch, weight_hh.size(1), inputs),
        recurrent.initial(c0, batch, hidden, inputs),
    )

    def step(rows: slice, before: States) -> tuple[States, tuple[Tensor | None, ...]]:
        h, c = before
        sums, normal, inverse = recurrence.forward(h)
        i, f, g, o = (inputs[rows] + sums).chunk(4, 1)
        i = variants.activate(cell.seen(i, 0, c), recurrent_activation)
        f = variants.activate(cell.seen(f, 1, c), recurrent_activation)
        g = variants.activate(g, activation)
        c = f * c + i * g
        o = variants.activate(cell.seen(o, 2, c), recurrent_activation)
        made = o * cell.out(c)[0]
        h = recurrence.keep(made if projection is None else made @ projection, h, rows)
        return (h, c), (h, torch.cat([i, f, g, o], 1), c, made, normal, inverse)

    (h_n, c_n), (output, gates, cells, made, normal, inverse) = recurrent.scan(step, states, sizes, reverse)
    kept = (gates, cells, None if projection is None else made, normal, inverse) if saves else ()
    return Forward(recurrent.like_sequence(output, x).to(x.dtype), h_n.to(x.dtype), c_n.to(x.dtype), *kept)


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
    """Gradients in the order of ``Needs`` (None where not needed).

    Gradients come in with any strides, ``grad_cells`` like ``kept.cells``; None stands for zero.
    """
    gates, cells = kept.gates, kept.cells
    if gates is None or cells is None:
        raise ValueError("gates and cells: expected what forward kept of an LSTM, got None")
    sizes = recurrent.step_sizes(x, batch_sizes)
    batch, (width, outputs) = max(sizes), weight_hh.shape
    recurrence = variants.Recurrence(weight_hh, None, extras, gates.dtype)
    cell = _Cell(extras, activation, gates.dtype)
    projection = None if weight_hr is None else weight_hr.to(gates.dtype)
    grad_rows = None if grad_output is None else recurrent.rows_of(grad_output).to(gates.dtype)
    cells_before = recurrent.before(cells, c0, sizes, reverse)
    states = (
        recurrent.initial(grad_h_n, batch, outputs, gates),
        recurrent.initial(grad_c_n, batch, width // 4, gates),
    )

    def step(rows: slice, grads: States) -> tuple[States, tuple[Tensor | None, ...]]:
        grad_h, grad_c = grads
        grad_h = grad_h if grad_rows is None else grad_h + grad_rows[rows]
        grad_h, passing = recurrence.keep_backward(grad_h, rows)
        grad_made = grad_h if projection is None else grad_h @ projection
        i, f, g, o = gates[rows].chunk(4, 1)
        bent, *normalised = cell.out(cells[rows])
        grad_o = grad_made * bent * variants.slope(o, recurrent_activation)
        grad_out, grad_normal = cell.out_backward(grad_made * o, bent, *normalised)
        grad_c = cell.seen(grad_c + grad_out, 2, grad_o)
        if grad_cells is not None:
            grad_c = grad_c + grad_cells[rows]
        grad_i = grad_c * g * variants.slope(i, recurrent_activation)
        grad_f = grad_c * cells_before[rows] * variants.slope(f, recurrent_activation)
        grad_gates = torch.cat([grad_i, grad_f, grad_c * i * variants.slope(g, activation), grad_o], 1)
        moved, product = recurrence.backward(
            grad_gates, variants.rows_of(kept.normal, rows), variants.rows_of(kept.inverse, rows)
        )
        grad_c = cell.seen(cell.seen(grad_c * f, 0, grad_i), 1, grad_f)
        return (moved if passing is None else moved + passing, grad_c), (grad_gates, product, grad_h, grad_normal)

    (grad_h0, grad_c0), (grad_gates, grad_product, grad_h, grad_normal) = recurrent.scan_back(
        step, states, sizes, reverse
    )

    def h_before() -> Tensor:
        h = recurrent.before(recurrent.rows_of(kept.output).to(gates.dtype), h0, sizes, reverse)
        return variants.dropped(h, extras.dropout, sizes)

    found = recurrent.finish(x, h_before, grad_gates, grad_gates, grad_product, weight_ih, needs)
    dx, dw_ih, dw_hh, db_ih, db_hh = found
    dw_hr = grad_h.t() @ kept.extra if needs.weight_hr and kept.extra is not None else None
    of_variant = variants.gradients(grad_gates, cells_before, cells, kept.normal, grad_normal, needs)
    return recurrent.narrowed((dx, grad_h0, grad_c0, dw_ih, dw_hh, db_ih, db_hh, dw_hr, *of_variant), needs, x.dtype)
