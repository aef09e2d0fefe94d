"""activation(depthwise conv2d(x, weight) + bias): the definition, in plain PyTorch.

The signatures here are the contract of every implementation of the op. Shapes: x (N, C, H, W); weight
(C * multiplier, 1, kh, kw), of any strides; bias (C * multiplier,); y (N, C * multiplier, OH, OW). Output channel o
reads input channel o // multiplier. x, weight, bias and y have one dtype; sums over taps and statistics are float32,
or float64 where x is. Padding is zeros, (top, bottom, left, right). A 1d convolution is the 2d one with H = 1.

Nothing here is empty: tensors without elements do not reach an implementation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import layout
from ..activation import Activation
from . import activation as act
from .batch_norm_act import accumulate_dtype

#: Zeros added above, below, to the left and to the right of an image.
Padding = tuple[int, int, int, int]


class Request(NamedTuple):
    """What an implementation is asked to do; ``supports`` answers to it.

    ``device`` is a torch device type; ``channels_last`` is :func:`channels_last` of x; ``kernel``, ``stride`` and
    ``dilation`` are (height, width); ``activation`` is "identity" in training. For the choice of an implementation
    alone: ``gradients`` tells whether a backward pass follows, ``plane`` is OH * OW rounded up to a power of two, or 0
    where it is not known (while torch.compile traces).
    """

    device: str
    dtype: torch.dtype
    channels_last: bool
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    multiplier: int
    activation: str
    statistics: bool
    gradients: bool = False
    plane: int = 0


def supports(request: Request) -> str | None:
    """The reference runs everything."""
    del request
    return None


def channels_last(x: Tensor) -> bool:
    """Whether kernels take x (and y is made) channels last: where x is so and not contiguous as well."""
    return layout.is_channels_last(x) and not x.is_contiguous()


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of y."""
    return torch.channels_last if channels_last(x) else torch.contiguous_format


def gradient_as(grad_y: Tensor, x: Tensor) -> Tensor:
    """The gradient of y as kernels read it: dense in x's memory format, no lazy negation."""
    if grad_y.is_neg():  # a view that PyTorch negates when it is read
        grad_y = grad_y.resolve_neg()
    return grad_y.contiguous(memory_format=memory_format(x))


def output_size(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: Padding, dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(N, C * multiplier, OH, OW)."""
    top, bottom, left, right = padding
    height = x.size(2) + top + bottom - dilation[0] * (weight.size(2) - 1) - 1
    width = x.size(3) + left + right - dilation[1] * (weight.size(3) - 1) - 1
    return x.size(0), weight.size(0), height // stride[0] + 1, width // stride[1] + 1


def _pad(x: Tensor, padding: Padding) -> Tensor:
    """x in the accumulation dtype, with its zeros."""
    top, bottom, left, right = padding
    return F.pad(x.to(accumulate_dtype(x.dtype)), (left, right, top, bottom))


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
    """y, and with ``statistics`` the mean and the biased variance of each of its channels, else None, None.

    y is channels_last where :func:`channels_last` says so of x, else contiguous. Statistics are those of y as it is
    stored, rounded to its dtype, in the accumulation dtype; they go with the activation "identity".
    """
    x = layout.dense(x)
    wide = accumulate_dtype(x.dtype)
    z = F.conv2d(
        _pad(x, padding),
        weight.to(wide),
        None if bias is None else bias.to(wide),
        stride,
        0,
        dilation,
        groups=x.size(1),
    )
    y = torch.empty(z.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    y.copy_(act.forward(z, activation))
    if not statistics:
        return y, None, None
    stored = y.to(wide)
    mean = stored.mean((0, 2, 3))
    return y, mean, (stored - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))


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
    """Gradients of x, weight and bias of the convolution without activation (None where not needed).

    ``grad_y`` may have any strides. The gradient of x has the strides of ``layout.dense(x)``; that of weight is
    contiguous; that of bias, (C * multiplier,), has weight's dtype.
    """
    x = layout.dense(x)
    padded = _pad(x, padding)
    wide = grad_y.to(padded.dtype)
    grad_x = grad_weight = grad_bias = None
    if needs_x:
        grad = torch.nn.grad.conv2d_input(
            padded.shape, weight.to(wide.dtype), wide, stride, 0, dilation, groups=x.size(1)
        )  # fmt: skip
        top, _, left, _ = padding
        inside = grad[:, :, top : top + x.size(2), left : left + x.size(3)]
        grad_x = layout.like(inside.to(x.dtype), x)
    if needs_weight:
        grad = torch.nn.grad.conv2d_weight(padded, weight.shape, wide, stride, 0, dilation, groups=x.size(1))
        grad_weight = grad.to(weight.dtype).contiguous()
    if needs_bias:
        grad_bias = wide.sum((0, 2, 3)).to(weight.dtype)
    return grad_x, grad_weight, grad_bias
