"""One direction of one LSTM layer: the definition, in plain PyTorch. Shapes are those of :mod:`.recurrent`.

i, f, o = sigmoid(W x + b + W' h + b'), g = tanh(...); c' = f c + i g; h' = o tanh(c'), or W_hr (o tanh(c')).

Sources: Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997); Gers et al. (2000) for the forget gate; Sak et
al. (2014) for the projection. Gate order and the two biases are those of torch.nn.LSTM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import recurrent
from .batch_norm_act import accumulate_dtype
from .recurrent import Forward, Gradients, Needs, States, supports

__all__ = ["backward", "forward", "supports"]


def forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    saves: bool,
) -> Forward:
    """The layer's output and final states, and with ``saves`` what backward needs."""
    del activation  # "tanh"
    sizes = recurrent.step_sizes(x, batch_sizes)
    dtype = accumulate_dtype(x.dtype)
    recurrent_weight = weight_hh.to(dtype).t()
    projection = None if weight_hr is None else weight_hr.to(dtype).t()
    inputs = recurrent.rows_of(x).to(dtype) @ weight_ih.to(dtype).t()
    if bias_ih is not None and bias_hh is not None:
        inputs = inputs + (bias_ih.to(dtype) + bias_hh.to(dtype))
    hidden, batch = weight_hh.size(0) // 4, max(sizes)
    states = (
        recurrent.initial(h0, batch, weight_hh.size(1), inputs),
        recurrent.initial(c0, batch, hidden, inputs),
    )

    def step(row: Tensor, before: States) -> tuple[States, tuple[Tensor, ...]]:
        h, c = before
        sums = (row + h @ recurrent_weight).chunk(4, 1)
        i, f, g, o = (torch.tanh(s) if k == 2 else torch.sigmoid(s) for k, s in enumerate(sums))
        c = f * c + i * g
        made = o * torch.tanh(c)
        h = made if projection is None else made @ projection
        return (h, c), (h, torch.cat([i, f, g, o], 1), c, made)

    (h_n, c_n), (output, gates, cells, made) = recurrent.scan(step, inputs, states, sizes, reverse)
    kept = (gates, cells, None if projection is None else made) if saves else (None, None, None)
    return Forward(recurrent.like_sequence(output, x).to(x.dtype), h_n.to(x.dtype), c_n.to(x.dtype), *kept)


def backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor | None,
    extra: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    needs: Needs,
) -> Gradients:
    """Gradients of x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh and weight_hr (None where not needed).

    Gradients come in with any strides; None stands for zero. ``output`` and what follows it are forward's.
    """
    del activation
    if cells is None:
        raise ValueError("cells: expected what forward kept of an LSTM, got None")
    sizes = recurrent.step_sizes(x, batch_sizes)
    batch, (width, outputs) = max(sizes), weight_hh.shape
    recurrent_weight = weight_hh.to(gates.dtype)
    projection = None if weight_hr is None else weight_hr.to(gates.dtype)
    grad_rows = None if grad_output is None else recurrent.rows_of(grad_output).to(gates.dtype)
    cells_before = recurrent.before(cells, c0, sizes, reverse)
    states = (
        recurrent.initial(grad_h_n, batch, outputs, gates),
        recurrent.initial(grad_c_n, batch, width // 4, gates),
    )

    def step(rows: slice, grads: States) -> tuple[States, tuple[Tensor, ...]]:
        grad_h, grad_c = grads
        grad_h = grad_h if grad_rows is None else grad_h + grad_rows[rows]
        grad_made = grad_h if projection is None else grad_h @ projection
        i, f, g, o = gates[rows].chunk(4, 1)
        bent = torch.tanh(cells[rows])
        grad_c = grad_c + grad_made * o * (1 - bent * bent)
        grad_gates = torch.cat(
            [
                grad_c * g * i * (1 - i),
                grad_c * cells_before[rows] * f * (1 - f),
                grad_c * i * (1 - g * g),
                grad_made * bent * o * (1 - o),
            ],
            1,
        )
        return (grad_gates @ recurrent_weight, grad_c * f), (grad_gates, grad_h)

    (grad_h0, grad_c0), (grad_gates, grad_h) = recurrent.scan_back(step, states, sizes, reverse)
    dx, dw_ih, dw_hh, db_ih, db_hh = recurrent.finish(
        x,
        lambda: recurrent.before(recurrent.rows_of(output).to(gates.dtype), h0, sizes, reverse),
        grad_gates,
        grad_gates,
        weight_ih,
        needs,
    )
    dw_hr = grad_h.t() @ extra if needs.weight_hr and extra is not None else None
    return recurrent.narrowed((dx, grad_h0, grad_c0, dw_ih, dw_hh, db_ih, db_hh, dw_hr), needs, x.dtype)
