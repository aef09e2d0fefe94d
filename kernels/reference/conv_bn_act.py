"""act(batch_norm(conv2d(x, weight) + bias) + residual): the definition, in plain PyTorch.

The signatures here are the contract of every implementation of the op. Shapes: x (N, C, H, W); weight
(K, C / groups, R, S); bias, bn_weight, bn_bias and statistics (K,); residual, y and the convolution's output c
(N, K, OH, OW). x, weight, bias, residual, y and c have one dtype; the batch norm's parameters have that dtype, or
float32 beside a half one. mean and invstd are float32, or float64 where x is.

Without a batch norm (``norm`` "none") the op is act(conv2d(x, weight) + bias + residual).
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation import Activation
from . import activation as act
from . import batch_norm_act
from .batch_norm_act import accumulate_dtype

#: What stands between convolution and activation: nothing, a batch norm by running statistics, one by the batch's.
NORMS = ("none", "running", "batch")


class Convolution(NamedTuple):
    """The geometry of a 2d convolution; padding is zeros, the same on both sides."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        """(N, K, OH, OW)."""
        n, _, height, width = x.shape
        k, _, r, s = weight.shape
        (step_h, step_w), (pad_h, pad_w), (spread_h, spread_w), _ = self
        return (
            n,
            k,
            (height + 2 * pad_h - spread_h * (r - 1) - 1) // step_h + 1,
            (width + 2 * pad_w - spread_w * (s - 1) - 1) // step_w + 1,
        )


class Request(NamedTuple):
    """What an implementation is asked to do; ``supports`` answers to it.

    ``device`` is a torch device type; ``param_dtype`` is that of the batch norm's parameters (x's dtype without
    one); ``pixels`` is N * OH * OW rounded up to a power of two, or 0 where it is not known (torch.compile);
    ``saves`` tells whether backward will be called.
    """

    device: str
    dtype: torch.dtype
    param_dtype: torch.dtype
    channels_last: bool
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    kernel: tuple[int, int]
    in_channels: int
    out_channels: int
    pixels: int
    norm: str
    saves: bool
    residual: bool
    activation: str


class Needs(NamedTuple):
    """Which gradients backward makes; ``norm`` is bn_weight's and bn_bias's."""

    x: bool
    weight: bool
    bias: bool
    norm: bool
    residual: bool


def supports(request: Request) -> str | None:
    """The reference runs everything."""
    del request
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    convolution: Convolution,
    norm: str,
    momentum: float,
    eps: float,
    activation: Activation,
    saves: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, c, mean and invstd.

    c, the convolution's output with its bias, is what backward needs: None where ``saves`` is False. mean
    and invstd are None without a batch norm. Running statistics move with ``norm`` "batch".
    """
    return compose_forward(
        batch_norm_act, x, weight, bias, bn_weight, bn_bias, residual, running_mean, running_var,
        convolution, norm, momentum, eps, activation, saves,
    )  # fmt: skip


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    c: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    *,
    convolution: Convolution,
    norm: str,
    activation: Activation,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias, bn_weight, bn_bias and residual (None where not needed).

    y is given in place of residual where ``gradient_from_output(activation)`` holds, as in batch_norm_act.
    """
    return compose_backward(
        batch_norm_act, grad_y, x, weight, bias, bn_weight, bn_bias, residual, y, c, mean, invstd,
        convolution, norm, activation, needs,
    )  # fmt: skip


# ------------------------------------------------- PyTorch's convolution and an implementation of batch_norm_act
def compose_forward(
    normalise: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    convolution: Convolution,
    norm: str,
    momentum: float,
    eps: float,
    activation: Activation,
    saves: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``forward`` of PyTorch's convolution with ``normalise``, an implementation of batch_norm_act, behind it."""
    c = F.conv2d(x, weight, bias, *convolution)
    kept = c if saves else None
    if norm == "none":
        z = c if residual is None else c + residual
        return act.forward(z.to(accumulate_dtype(z.dtype)), activation).to(z.dtype), kept, None, None
    y, mean, invstd = normalise.forward(
        c,
        bn_weight,
        bn_bias,
        residual,
        running_mean,
        running_var,
        batch_stats=norm == "batch",
        momentum=momentum,
        eps=eps,
        activation=activation,
    )
    return y, kept, mean, invstd


def compose_backward(
    normalise: ModuleType,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    c: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    convolution: Convolution,
    norm: str,
    activation: Activation,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``backward`` of the same."""
    if mean is None or invstd is None:
        mean = c.new_zeros(c.size(1), dtype=accumulate_dtype(c.dtype))
        invstd = torch.ones_like(mean)
    dc, dbn_weight, dbn_bias, dresidual = normalise.backward(
        grad_y,
        c,
        bn_weight,
        bn_bias,
        residual,
        y,
        mean,
        invstd,
        batch_stats=norm == "batch",
        activation=activation,
        needs_x=needs.x or needs.weight or needs.bias,
        needs_params=needs.norm,
        needs_residual=needs.residual,
    )
    dx, dweight, dbias = convolution_backward(dc, x, weight, convolution, needs)
    return dx, dweight, dbias if bias is not None else None, dbn_weight, dbn_bias, dresidual


def convolution_backward(
    dc: Tensor | None, x: Tensor, weight: Tensor, convolution: Convolution, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """PyTorch's own gradients of x, weight and bias; None where not needed."""
    mask = [needs.x, needs.weight, needs.bias]
    if dc is None or not any(mask):
        return None, None, None
    stride, padding, dilation, groups = convolution
    return torch.ops.aten.convolution_backward(
        dc, x, weight, [weight.size(0)], stride, padding, dilation, False, [0, 0], groups, mask
    )
