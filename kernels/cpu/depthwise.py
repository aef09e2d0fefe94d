"""Launchers of csrc/cpu/depthwise.cpp; the contract is that of kernels/reference/depthwise.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import layout
from ..activation import CODES, Activation
from ..reference.batch_norm_act import accumulate_dtype
from ..reference.depthwise import Padding, Request, channels_last, gradient_as, memory_format, output_size
from . import _C, DTYPES, address, refuses

_LARGEST = 31


def supports(request: Request) -> str | None:
    """None where the extension is there, and has kernels for the request, else the reason in words."""
    reason = refuses(request.device, (request.dtype,))
    if reason is not None:
        return reason
    if request.activation not in CODES:
        return f"the cpu backend has no activation {request.activation!r}"
    if max(request.kernel) > _LARGEST:
        return f"the cpu backend has depthwise kernels of up to {_LARGEST} x {_LARGEST}, not {request.kernel}"
    return None


def _geometry(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
) -> tuple[Any, ...]:
    """What both functions of the extension take after the addresses."""
    return (
        DTYPES[x.dtype],
        channels_last(x),
        tuple(x.shape),
        output_size(x, weight, stride, padding, dilation)[1:],
        tuple(weight.shape[2:]),
        tuple(stride),
        tuple(dilation),
        (padding[0], padding[2]),
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
    activation: Activation,
    statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """activation(conv2d(x, weight) + bias), and with ``statistics`` the mean and biased variance of its channels."""
    x, weight = layout.dense(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    shape = output_size(x, weight, stride, padding, dilation)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    mean = var = None
    if statistics:
        mean = torch.empty(shape[1], dtype=accumulate_dtype(x.dtype), device=x.device)
        var = torch.empty_like(mean)
    _C.depthwise_forward(
        x.data_ptr(),
        weight.data_ptr(),
        address(bias),
        y.data_ptr(),
        address(mean),
        address(var),
        *_geometry(x, weight, stride, padding, dilation),
        CODES[activation.name],
        activation.param,
        torch.get_num_threads(),
    )
    return y, mean, var


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    stride: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias (None where not needed)."""
    if not (needs_x or needs_weight or needs_bias):
        return None, None, None
    x, weight = layout.dense(x), weight.contiguous()
    grad_y = gradient_as(grad_y, x)
    grad_x = torch.empty_like(x) if needs_x else None
    grad_weight = torch.empty_like(weight) if needs_weight else None
    grad_bias = torch.empty(weight.size(0), dtype=weight.dtype, device=weight.device) if needs_bias else None
    _C.depthwise_backward(
        grad_y.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        address(grad_x),
        address(grad_weight),
        address(grad_bias),
        *_geometry(x, weight, stride, padding, dilation),
        torch.get_num_threads(),
    )
    return grad_x, grad_weight, grad_bias
