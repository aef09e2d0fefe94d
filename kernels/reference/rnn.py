"""One direction of one Elman RNN layer: the definition, in plain PyTorch. The contract is that of :mod:`.lstm`.

h' = act(W x + b + W' h + b') with act "tanh" or "relu", as in torch.nn.RNN.

Source: Elman, "Finding Structure in Time" (1990).
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
    """The layer's output and final state; backward needs nothing more. c0 and weight_hr are None."""
    del c0, weight_hr, saves
    sizes = recurrent.step_sizes(x, batch_sizes)
    dtype = accumulate_dtype(x.dtype)
    act = torch.relu if activation == "relu" else torch.tanh
    recurrent_weight = weight_hh.to(dtype).t()
    inputs = recurrent.rows_of(x).to(dtype) @ weight_ih.to(dtype).t()
    if bias_ih is not None and bias_hh is not None:
        inputs = inputs + (bias_ih.to(dtype) + bias_hh.to(dtype))
    states = (recurrent.initial(h0, max(sizes), weight_hh.size(1), inputs),)

    def step(row: Tensor, before: States) -> tuple[States, tuple[Tensor, ...]]:
        h = act(row + before[0] @ recurrent_weight)
        return (h,), (h,)

    (h_n,), (output,) = recurrent.scan(step, inputs, states, sizes, reverse)
    return Forward(recurrent.like_sequence(output, x).to(x.dtype), h_n.to(x.dtype))


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
    gates: Tensor | None,
    cells: Tensor | None,
    extra: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    needs: Needs,
) -> Gradients:
    """Gradients as in :mod:`.lstm`; those of c0 and weight_hr are None."""
    del grad_c_n, c0, weight_hr, gates, cells, extra
    sizes = recurrent.step_sizes(x, batch_sizes)
    rows_out = recurrent.rows_of(output).to(accumulate_dtype(x.dtype))
    recurrent_weight = weight_hh.to(rows_out.dtype)
    grad_rows = None if grad_output is None else recurrent.rows_of(grad_output).to(rows_out.dtype)
    states = (recurrent.initial(grad_h_n, max(sizes), weight_hh.size(1), rows_out),)

    def step(rows: slice, grads: States) -> tuple[States, tuple[Tensor, ...]]:
        grad_h = grads[0] if grad_rows is None else grads[0] + grad_rows[rows]
        y = rows_out[rows]
        grad_gates = grad_h * (y > 0) if activation == "relu" else grad_h * (1 - y * y)
        return (grad_gates @ recurrent_weight,), (grad_gates,)

    (grad_h0,), (grad_gates,) = recurrent.scan_back(step, states, sizes, reverse)
    dx, dw_ih, dw_hh, db_ih, db_hh = recurrent.finish(
        x, lambda: recurrent.before(rows_out, h0, sizes, reverse), grad_gates, grad_gates, weight_ih, needs
    )
    return recurrent.narrowed((dx, grad_h0, None, dw_ih, dw_hh, db_ih, db_hh, None), needs, x.dtype)
