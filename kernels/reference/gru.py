"""One direction of one GRU layer: the definition, in plain PyTorch. The contract is that of :mod:`.lstm`.

r, z = sigmoid(W x + b + W' h + b'); n = tanh(W_n x + b_n + r (W'_n h + b'_n)); h' = (1 - z) n + z h.

Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (2014), with the reset gate after the
product as in torch.nn.GRU, whose gate order this is.
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
    """The layer's output and final state, and with ``saves`` what backward needs; c0 and weight_hr are None."""
    del c0, weight_hr, activation
    sizes = recurrent.step_sizes(x, batch_sizes)
    dtype = accumulate_dtype(x.dtype)
    recurrent_weight = weight_hh.to(dtype).t()
    recurrent_bias = None if bias_hh is None else bias_hh.to(dtype)
    inputs = recurrent.rows_of(x).to(dtype) @ weight_ih.to(dtype).t()
    if bias_ih is not None:
        inputs = inputs + bias_ih.to(dtype)
    states = (recurrent.initial(h0, max(sizes), weight_hh.size(1), inputs),)

    def step(row: Tensor, before: States) -> tuple[States, tuple[Tensor, ...]]:
        (h,) = before
        product = h @ recurrent_weight
        if recurrent_bias is not None:
            product = product + recurrent_bias
        (x_r, x_z, x_n), (h_r, h_z, part) = row.chunk(3, 1), product.chunk(3, 1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * part)
        h = n + z * (h - n)
        return (h,), (h, torch.cat([r, z, n], 1), part)

    (h_n,), (output, gates, part) = recurrent.scan(step, inputs, states, sizes, reverse)
    kept = (gates, None, part) if saves else (None, None, None)
    return Forward(recurrent.like_sequence(output, x).to(x.dtype), h_n.to(x.dtype), None, *kept)


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
    """Gradients as in :mod:`.lstm`; those of c0 and weight_hr are None."""
    del grad_c_n, c0, weight_hr, cells, activation
    if extra is None:
        raise ValueError("extra: expected what forward kept of a GRU, got None")
    sizes = recurrent.step_sizes(x, batch_sizes)
    recurrent_weight = weight_hh.to(gates.dtype)
    grad_rows = None if grad_output is None else recurrent.rows_of(grad_output).to(gates.dtype)
    h_before = recurrent.before(recurrent.rows_of(output).to(gates.dtype), h0, sizes, reverse)
    states = (recurrent.initial(grad_h_n, max(sizes), weight_hh.size(1), gates),)

    def step(rows: slice, grads: States) -> tuple[States, tuple[Tensor, ...]]:
        grad_h = grads[0] if grad_rows is None else grads[0] + grad_rows[rows]
        r, z, n = gates[rows].chunk(3, 1)
        grad_n = grad_h * (1 - z) * (1 - n * n)
        grad_z = grad_h * (h_before[rows] - n) * z * (1 - z)
        grad_r = grad_n * extra[rows] * r * (1 - r)
        grad_recurrent = torch.cat([grad_r, grad_z, grad_n * r], 1)
        moved = grad_h * z + grad_recurrent @ recurrent_weight
        return (moved,), (torch.cat([grad_r, grad_z, grad_n], 1), grad_recurrent)

    (grad_h0,), (grad_gates, grad_recurrent) = recurrent.scan_back(step, states, sizes, reverse)
    dx, dw_ih, dw_hh, db_ih, db_hh = recurrent.finish(x, lambda: h_before, grad_gates, grad_recurrent, weight_ih, needs)
    return recurrent.narrowed((dx, grad_h0, None, dw_ih, dw_hh, db_ih, db_hh, None), needs, x.dtype)
