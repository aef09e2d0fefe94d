"""Transposed convolution + batch norm + activation on the CPU; the contract is kernels/reference/transposed.py.

In inference the batch norm is folded into oneDNN's transposed convolution, which takes the activation along; in
training it is PyTorch's convolution with the kernels of csrc/cpu/batch_norm_act.cpp behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import Activation
from ..reference import transposed as reference
from ..reference.transposed import Geometry, Needs, Request
from . import batch_norm_act, conv_bn_act


def supports(request: Request) -> str | None:
    """None for training, and for inference in float32 with what oneDNN fuses; else the reason in words."""
    return conv_bn_act.composes(request, residual=False)


def fold(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the transposed convolution that computes batch_norm(conv_transpose2d(x, weight) + bias)."""
    scale, shift = conv_bn_act.affine(bias, bn_weight, bn_bias, running_mean, running_var, eps)
    rows, columns, r, s = weight.shape  # a row's columns are the output channels of the row's group
    grouped = weight.view(groups, rows // groups, columns, r, s) * scale.view(groups, 1, columns, 1, 1)
    return grouped.view(weight.shape), shift


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: Activation) -> Tensor:
    """act(conv_transpose2d(x, weight) + bias) by oneDNN, in one pass."""
    stride, padding, output_padding, groups, dilation = geometry
    name, scalars, algorithm = conv_bn_act.POST_OPS[activation.name](activation)
    return torch.ops.mkldnn._convolution_transpose_pointwise(
        x, weight, bias, padding, output_padding, stride, dilation, groups, name, scalars, algorithm
    )


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
    """y, c, mean and invstd; None but for y in inference."""
    if norm == "batch" or saves:
        return reference.compose_forward(
            batch_norm_act, x, weight, bias, bn_weight, bn_bias, running_mean, running_var,
            geometry, norm, momentum, eps, activation, saves,
        )  # fmt: skip
    if norm == "running":
        if running_mean is None or running_var is None:
            raise ValueError("running statistics are needed where batch statistics are not used")
        weight, bias = fold(weight, bias, bn_weight, bn_bias, running_mean, running_var, eps, geometry.groups)
    return convolve(x, weight, bias, geometry, activation), None, None, None


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
    dc, dbn_weight, dbn_bias = reference.before_convolution(
        batch_norm_act, grad_y, bn_weight, bn_bias, c, mean, invstd, norm, activation, needs
    )
    dx, dweight, dbias = reference.convolution_backward(dc, x, weight, geometry, needs)
    return dx, dweight, dbias if bias is not None else None, dbn_weight, dbn_bias
