"""act(batch_norm(x) + residual): the definition, in plain PyTorch.

The signatures here are the contract of every implementation of the op. Shapes: x, residual, y and
their gradients are (N, C, *); weight, bias, running statistics, mean and invstd are (C,). mean,
invstd and everything accumulated are float32, or float64 where x is.

Source: Ioffe and Szegedy, "Batch Normalization" (2015), with the conventions of
torch.nn.BatchNorm2d: the biased variance normalises, the unbiased one enters running_var.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import layout
from ..activation import Activation
from . import activation as act


class Request(NamedTuple):
    """What an implementation is asked to do; ``supports`` answers to it.

    ``device`` is a torch device type; ``param_dtype`` is that of weight, bias and running
    statistics (x's dtype where there are none); ``batch_stats`` tells batch from running statistics.
    """

    device: str
    dtype: torch.dtype
    param_dtype: torch.dtype
    channels_last: bool
    batch_stats: bool
    residual: bool
    activation: str


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of data of ``dtype`` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def supports(request: Request) -> str | None:
    """The reference runs everything."""
    del request
    return None


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """v (C,) shaped to broadcast against x (N, C, *)."""
    return v.view(1, -1, *([1] * (x.dim() - 2)))


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and 1 / sqrt(variance + eps) of each channel of x, differentiably."""
    dims = [0, *range(2, x.dim())]
    wide = x.to(accumulate_dtype(x.dtype))
    mean = wide.mean(dims)
    variance = (wide - per_channel(mean, x)).square().mean(dims)
    return mean, variance, torch.rsqrt(variance + eps)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """act((x - mean) * invstd * weight + bias + residual).

    With ``batch_stats`` the statistics are x's own, and running statistics, where given, move
    towards them by ``momentum`` in place; without it the running statistics normalise.

    Returns y (x's dtype; x's strides where x is contiguous or channels_last, else contiguous), and
    the mean and invstd that were used.
    """
    x = layout.dense(x)
    wide_dtype = accumulate_dtype(x.dtype)
    if batch_stats:
        mean, variance, invstd = statistics(x, eps)
        if running_mean is not None and running_var is not None:
            count = x.numel() // x.size(1)
            unbiased = variance * (count / max(count - 1, 1))
            running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
            running_var.mul_(1 - momentum).add_(unbiased.to(running_var.dtype), alpha=momentum)
    else:
        if running_mean is None or running_var is None:
            raise ValueError("running statistics are needed where batch statistics are not used")
        mean = running_mean.to(wide_dtype, copy=True)
        invstd = torch.rsqrt(running_var.to(wide_dtype) + eps)
    z = preactivation(x, weight, bias, residual, mean, invstd)
    y = torch.empty_like(x)
    y.copy_(act.forward(z, activation))
    return y, mean, invstd


def preactivation(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mean: Tensor, invstd: Tensor
) -> Tensor:
    """(x - mean) * invstd * weight + bias + residual, in the accumulation dtype."""
    z = (x.to(mean.dtype) - per_channel(mean, x)) * per_channel(invstd, x)
    if weight is not None:
        z = z * per_channel(weight.to(z.dtype), x)
    if bias is not None:
        z = z + per_channel(bias.to(z.dtype), x)
    if residual is not None:
        z = z + residual.to(z.dtype)
    return z


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
    """Gradients of x, weight, bias and residual (None where not needed).

    The activation's derivative comes from y where y is given (the forward added a residual and
    ``gradient_from_output(activation)`` holds), else from the pre-activation, computed again from
    x and, where the forward had one, residual. ``grad_y`` may have any strides; the gradients of x and
    residual have the strides of ``layout.dense(x)``. The gradient of
    weight and bias is in their own dtype (x's accumulation dtype where they are None).
    """
    x = layout.dense(x)
    wide = grad_y.to(mean.dtype)
    if y is not None:
        dz = wide * act.derivative_from_output(y.to(mean.dtype), activation)
    else:
        dz = wide * act.derivative(preactivation(x, weight, bias, residual, mean, invstd), activation)
    dims = [0, *range(2, x.dim())]
    normalised = (x.to(mean.dtype) - per_channel(mean, x)) * per_channel(invstd, x)
    grad_bias = dz.sum(dims)
    grad_weight = (dz * normalised).sum(dims)
    grad_x = None
    if needs_x:
        centred = dz
        if batch_stats:
            count = x.numel() // x.size(1)
            centred = dz - per_channel(grad_bias / count, x) - normalised * per_channel(grad_weight / count, x)
        scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
        grad_x = layout.like((centred * per_channel(scale, x)).to(x.dtype), x)
    return (
        grad_x,
        grad_weight.to(weight.dtype if weight is not None else mean.dtype) if needs_params else None,
        grad_bias.to(bias.dtype if bias is not None else mean.dtype) if needs_params else None,
        layout.like(dz.to(x.dtype), x) if needs_residual else None,
    )
