"""act(batch_norm(conv_transpose2d(x, weight) + bias)): the definition, in plain PyTorch.

The signatures here are the contract of every implementation of the op. Shapes: x (N, C, H, W); weight
(C, K / groups, R, S); bias, bn_weight, bn_bias and statistics (K,); y and the transposed convolution's output c
(N, K, OH, OW). x, weight, bias, y and c have one dtype; the batch norm's parameters have that dtype, or float32 beside
a half one. mean and invstd are float32, or float64 where x is.

A transposed convolution is the gradient of a convolution of K input and C output channels with respect to its input:
its own input gradient is that convolution, applied to the gradient of c.
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


class Geometry(NamedTuple):
    """That of torch.nn.functional.conv_transpose2d, in its order."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    output_padding: tuple[int, int] = (0, 0)
    groups: int = 1
    dilation: tuple[int, int] = (1, 1)

    def output_size(self, x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        """(N, K, OH, OW)."""
        height, width = (
            (size - 1) * step - 2 * pad + spread * (kernel - 1) + extra + 1
            for size, step, pad, spread, kernel, extra in zip(
                x.shape[2:],
                self.stride,
                self.padding,
                self.dilation,
                weight.shape[2:],
                self.output_padding,
                strict=True,
            )
        )
        return x.size(0), weight.size(1) * self.groups, height, width


class Request(NamedTuple):
    """What an implementation is asked to do; ``supports`` answers to it. Fields as in reference/conv_bn_act.py."""

    device: str
    dtype: torch.dtype
    param_dtype: torch.dtype
    channels_last: bool
    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    groups: int
    dilation: tuple[int, int]
    kernel: tuple[int, int]
    in_channels: int
    out_channels: int
    norm: str
    saves: bool
    activation: str


class Needs(NamedTuple):
    """Which gradients backward makes; ``norm`` is bn_weight's and bn_bias's."""

    x: bool
    weight: bool
    bias: bool
    norm: bool


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
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    geometry: Geometry,
    norm: str,
    momentum: float,
    eps: float,
    activation: Activation,
    saves: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, c, mean and invstd.

    ``norm`` is "none", "running" or "batch" (running statistics move). c, the transposed convolution's output with its
    bias, is what backward needs: None where ``saves`` is False. mean and invstd are None without a batch norm.
    """
    return compose_forward(
        batch_norm_act, x, weight, bias, bn_weight, bn_bias, running_mean, running_var,
        geometry, norm, momentum, eps, activation, saves,
    )  # fmt: skip


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    c: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    *,
    geometry: Geometry,
    norm: str,
    activation: Activation,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias, bn_weight and bn_bias (None where not needed)."""
    dc, dbn_weight, dbn_bias = before_convolution(
        batch_norm_act, grad_y, bn_weight, bn_bias, c, mean, invstd, norm, activation, needs
    )
    dx, dweight, dbias = convolution_backward(dc, x, weight, geometry, needs)
    return dx, dweight, dbias if bias is not None else None, dbn_weight, dbn_bias


# --------------------------------------------------- PyTorch's convolution and an implementation of batch_norm_act
def compose_forward(
    normalise: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    geometry: Geometry,
    norm: str,
    momentum: float,
    eps: float,
    activation: Activation,
    saves: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``forward`` of PyTorch's convolution with ``normalise``, an implementation of batch_norm_act, behind it."""
    c = F.conv_transpose2d(x, weight, bias, *geometry)
    kept = c if saves else None
    if norm == "none":
        return act.forward(c.to(accumulate_dtype(c.dtype)), activation).to(c.dtype), kept, None, None
    y, mean, invstd = normalise.forward(
        c,
        bn_weight,
        bn_bias,
        None,
        running_mean,
        running_var,
        batch_stats=norm == "batch",
        momentum=momentum,
        eps=eps,
        activation=activation,
    )
    return y, kept, mean, invstd


def before_convolution(
    normalise: ModuleType,
    grad_y: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    c: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    norm: str,
    activation: Activation,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of c, bn_weight and bn_bias, by ``normalise``, an implementation of batch_norm_act."""
    if mean is None or invstd is None:
        mean = c.new_zeros(c.size(1), dtype=accumulate_dtype(c.dtype))
        invstd = torch.ones_like(mean)
    dc, dbn_weight, dbn_bias, _ = normalise.backward(
        grad_y,
        c,
        bn_weight,
        bn_bias,
        None,
        None,
        mean,
        invstd,
        batch_stats=norm == "batch",
        activation=activation,
        needs_x=needs.x or needs.weight or needs.bias,
        needs_params=needs.norm,
        needs_residual=False,
    )
    return dc, dbn_weight, dbn_bias


def convolution_backward(
    dc: Tensor | None, x: Tensor, weight: Tensor, geometry: Geometry, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """PyTorch's own gradients of x, weight and bias; None where not needed."""
    mask = [needs.x, needs.weight, needs.bias]
    if dc is None or not any(mask):
        return None, None, None
    stride, padding, output_padding, groups, dilation = geometry
    return torch.ops.aten.convolution_backward(
        dc, x, weight, [weight.size(1) * groups], stride, padding, dilation, True, output_padding, groups, mask
    )
