"""act(batch_norm(x)) written into channels of a wider map: the definition, in plain PyTorch.

Atrous spatial pyramid pooling concatenates what parallel convolutions make. Each branch's batch norm and activation
write their channels of the concatenation, which so is never copied together. The convolutions themselves are those of
the ops conv_bn_act and depthwise, which take every dilation.

The signatures here are the contract of every implementation of the op; shapes and dtypes are those of
kernels/reference/batch_norm_act.py, for x (N, C, H, W). ``out``, and in backward ``grad_y``, is like x in shape and
dtype: consecutive channels of a dense map of x's memory format.

Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation" (2017).
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ..activation import Activation
from . import batch_norm_act
from .batch_norm_act import Request


def supports(request: Request) -> str | None:
    """The reference runs everything."""
    del request
    return None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    out: Tensor,
    *,
    batch_stats: bool,
    momentum: float,
    eps: float,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """Fill ``out``; the mean and invstd that were used. Running statistics move with ``batch_stats``."""
    y, mean, invstd = batch_norm_act.forward(
        x,
        weight,
        bias,
        None,
        running_mean,
        running_var,
        batch_stats=batch_stats,
        momentum=momentum,
        eps=eps,
        activation=activation,
    )
    out.copy_(y)
    return mean, invstd


def backward_by(
    implementation: Any,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    *,
    batch_stats: bool,
    activation: Activation,
    needs_x: bool,
    needs_params: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias (None where not needed), by an implementation of batch_norm_act."""
    return implementation.backward(
        grad_y,
        x,
        weight,
        bias,
        None,
        None,
        mean,
        invstd,
        batch_stats=batch_stats,
        activation=activation,
        needs_x=needs_x,
        needs_params=needs_params,
        needs_residual=False,
    )[:3]


backward = functools.partial(backward_by, batch_norm_act)
