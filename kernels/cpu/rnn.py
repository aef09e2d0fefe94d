"""rnn on the CPU; the contract is that of kernels/reference/rnn.py."""

from __future__ import annotations

from torch import Tensor

from ..reference.recurrent import Forward, Gradients, Needs
from . import recurrent
from .recurrent import supports

__all__ = ["backward", "forward", "supports"]

_CELLS = {"tanh": recurrent.RNN_TANH, "relu": recurrent.RNN_RELU}


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
    return recurrent.forward(
        _CELLS[activation], x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, reverse, saves
    )


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
    """Gradients of x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh and weight_hr (None where not needed)."""
    return recurrent.backward(
        _CELLS[activation], grad_output, grad_h_n, grad_c_n, x, h0, c0, weight_ih, weight_hh, weight_hr, batch_sizes,
        output, gates, cells, extra, reverse, needs,
    )  # fmt: skip
