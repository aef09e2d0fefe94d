"""Launchers of csrc/cpu/batch_norm_act.cpp; the contract is that of kernels/reference/batch_norm_act.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import layout
from ..activation import CODES, Activation
from ..reference.batch_norm_act import Request
from . import _C, DTYPES, address, refuses


def supports(request: Request) -> str | None:
    """None where the extension is there and the tensors are on the CPU, else the reason in words."""
    reason = refuses(request.device, (request.dtype, request.param_dtype))
    if reason is not None:
        return reason
    if request.activation not in CODES:
        return f"the cpu backend has no activation {request.activation!r}"
    return None


def _parameter(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _param_dtype(x: Tensor, *parameters: Tensor | None) -> int:
    for p in parameters:
        if p is not None:
            return DTYPES[p.dtype]
    return DTYPES[x.dtype]


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    batch_stats: bool,
    momentum: float,
    eps: float,
    activation: Activation,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """act((x - mean) * invstd * weight + bias + residual); y, mean and invstd.

    ``out``: where y goes, like x in shape and dtype: channels of a dense map that has more, of x's memory format. By
    running statistics it may be x itself.
    """
    if running_mean is None and not batch_stats:
        raise ValueError("running statistics are needed where batch statistics are not used")
    x = layout.dense(x)
    view = layout.of(x)
    in_place = out is not None and layout.is_part(out, view)
    y = out if in_place else torch.empty_like(x)
    assert y is not None
    y_step = layout.step(y, view) if in_place else view.channels * view.inner
    channels = x.size(1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = torch.empty(channels, dtype=wide, device=x.device)
    invstd = torch.empty(channels, dtype=wide, device=x.device)
    if x.numel() == 0:
        return y, mean.zero_(), invstd.zero_()
    if residual is not None:
        residual = layout.like(residual, x)
    weight, bias = _parameter(weight), _parameter(bias)
    # Strided running statistics are moved in a copy, which is copied back.
    mean_in, var_in = _parameter(running_mean), _parameter(running_var)
    _C.batch_norm_act_forward(
        x.data_ptr(),
        address(weight),
        address(bias),
        address(residual),
        address(mean_in),
        address(var_in),
        y.data_ptr(),
        mean.data_ptr(),
        invstd.data_ptr(),
        DTYPES[x.dtype],
        _param_dtype(x, weight, bias, mean_in),
        *view,
        batch_stats,
        momentum,
        eps,
        CODES[activation.name],
        activation.param,
        y_step,
        torch.get_num_threads(),
    )
    if batch_stats:
        for statistic, moved in ((running_mean, mean_in), (running_var, var_in)):
            if moved is not statistic:
                statistic.copy_(moved)
    if out is not None and not in_place:
        y = out.copy_(y)
    return y, mean, invstd


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    *,
    batch_stats: bool,
    activation: Activation,
    needs_x: bool,
    needs_params: bool,
    needs_residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and residual (None where not needed)."""
    x = layout.dense(x)
    grad_x = torch.empty_like(x) if needs_x else None
    grad_residual = torch.empty_like(x) if needs_residual else None
    grad_weight = grad_bias = None
    if needs_params:
        grad_weight = torch.empty_like(mean, dtype=mean.dtype if weight is None else weight.dtype)
        grad_bias = torch.empty_like(mean, dtype=mean.dtype if bias is None else bias.dtype)
    if x.numel() == 0:
        zeros = (None if g is None else g.zero_() for g in (grad_x, grad_weight, grad_bias, grad_residual))
        return tuple(zeros)  # type: ignore[return-value]
    if not (needs_x or needs_params or needs_residual):
        return None, None, None, None
    if residual is not None:
        residual = layout.like(residual, x)
    if y is not None:
        y = layout.like(y, x)
    weight, bias = _parameter(weight), _parameter(bias)
    view = layout.of(x)
    grad_step = view.channels * view.inner
    if grad_y.stride() != x.stride() and layout.is_part(grad_y, view):
        grad_step = layout.step(grad_y, view)
    else:
        grad_y = layout.like(grad_y, x)
    _C.batch_norm_act_backward(
        grad_y.data_ptr(),
        x.data_ptr(),
        address(weight),
        address(bias),
        address(residual),
        address(y),
        mean.data_ptr(),
        invstd.data_ptr(),
        address(grad_x),
        address(grad_weight),
        address(grad_bias),
        address(grad_residual),
        DTYPES[x.dtype],
        _param_dtype(x, weight, bias),
        *view,
        batch_stats,
        CODES[activation.name],
        activation.param,
        grad_step,
        torch.get_num_threads(),
    )
    return grad_x, grad_weight, grad_bias, grad_residual
