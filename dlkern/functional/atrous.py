"""``atrous_conv2d`` and ``aspp``: checks of their arguments, and what the block is composed of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dlkern import activations
from dlkern.kernels import layout
from dlkern.kernels.activation import Activation
from dlkern.ops import atrous as _atrous
from dlkern.ops import library
from dlkern.ops.atrous import Options, PooledMean

from .arguments import Size, check_tensor, pair
from .batch_norm_act import batch_norm_act
from .conv_bn_act import check_vector, conv_act, conv_bn_act
from .depthwise import depthwise_conv2d
from .dtypes import DTYPES, check_parameter_dtype


def atrous_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: Size,
    stride: Size = 1,
    padding: Size | str = 0,
    groups: int = 1,
    activation: str | nn.Module | Activation = "identity",
) -> Tensor:
    """``activation(conv2d(x, weight, bias))`` with a dilation, the rate of an atrous convolution.

    It is :func:`dlkern.functional.conv_act` under the name by which papers know it, for every dilation, also beyond
    the size of x (``padding=dilation`` keeps the size of x with kernels of 3). The arguments, results and errors are
    those of ``conv_act``.
    """
    return conv_act(
        x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups, activation=activation
    )


class ConvNorm(NamedTuple):
    """A convolution without a stride, its batch norm and its activation: what ASPP is made of.

    ``weight`` is (K, C, R, S) with odd R and S, ``bias`` (K,) or None; padding keeps the size of the image. The batch
    norm's tensors (K,) and numbers are as in :func:`dlkern.functional.conv_bn_act`. ``depthwise_weight``, if any, is
    that of a depthwise convolution (C, 1, R, S) in front, without a bias: the dilation is then its, and ``weight``
    is (K, C, 1, 1).
    """

    weight: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    bias: Tensor | None = None
    dilation: Size = 1
    depthwise_weight: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    activation: str | nn.Module | Activation = "relu"

    @property
    def batch_stats(self) -> bool:
        """Whether the batch's statistics normalise, and not the running ones."""
        return self.training or self.running_mean is None


def aspp(x: Tensor, branches: Sequence[ConvNorm], pooled: ConvNorm | None, projection: ConvNorm) -> Tensor:
    """Atrous spatial pyramid pooling: parallel convolutions of x, side by side, and a 1 x 1 convolution over them.

    The branches' batch norms and activations write their channels of the one map that the projection reads. The pooled
    branch, of the mean over each image, is the same for every pixel: it enters the projection as a bias of each
    image and is never written out. Its channels are the last of the projection's weight. Numbers and running
    statistics are those of PyTorch's own functions in a row; dropout is left to the caller.

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16.
        branches: one or more; each keeps H and W.
        pooled: a 1 x 1 convolution of the mean, or None.
        projection: a 1 x 1 convolution of all branches' channels, in their order.

    Returns:
        (N, K, H, W) for a projection of K output channels; x's dtype (autocast's under autocast).

    Raises:
        ValueError: no branch, a wrong shape, dilation or activation, channels that do not match, or one value per
            channel in training.
        TypeError: a non-floating x, or a mix of dtypes outside those of ``conv_bn_act``.
        RuntimeError: tensors on several devices, or a forced backend that cannot run this.
    """
    options = _checked(x, branches, pooled, projection)
    pool = None if pooled is None else _pooled(x, pooled)
    maps = [_convolved(x, branch) for branch in branches]
    parameters = [(b.bn_weight, b.bn_bias, b.running_mean, b.running_var) for b in branches]
    return project(_atrous.apply(maps, parameters, options), pool, projection)


def project(whole: Tensor, pool: Tensor | None, projection: ConvNorm) -> Tensor:
    """The projection of the branches' map, and of the pooled branch (N, C, 1, 1)."""
    return batch_norm_act(
        combined(whole, pool, projection.weight, projection.bias),
        projection.running_mean,
        projection.running_var,
        projection.bn_weight,
        projection.bn_bias,
        training=projection.training,
        momentum=projection.momentum,
        eps=projection.eps,
        activation=projection.activation,
    )


def combined(whole: Tensor, pool: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 1 x 1 convolution of a map and of what is the same in all of an image's pixels (N, C, 1, 1)."""
    if pool is None:
        return conv_act(whole, weight, bias, activation="identity")
    channels = whole.size(1)
    c = conv_act(whole, weight[:, :channels], bias, activation="identity")
    if not layout.strides_channels_last(weight):  # the memory format of PyTorch's own, which has a contiguous map here
        c = c.contiguous()
    per_image = conv_act(pool, weight[:, channels:], activation="identity")
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return c + per_image
    # neither PyTorch's convolution nor a copy is kept by what made it, nor is it anybody else's: a pass is saved
    untouched = not c.requires_grad or type(c.grad_fn).__name__ in ("ConvolutionBackward0", "CloneBackward0")
    return c.add_(per_image) if untouched else c + per_image


def _pooled(x: Tensor, pooled: ConvNorm) -> Tensor:
    """The pooled branch: (N, K, 1, 1)."""
    plain = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    mean = x.mean((2, 3), keepdim=True) if plain else PooledMean.apply(x)
    return conv_bn_act(
        mean,
        pooled.weight,
        pooled.bias,
        pooled.running_mean,
        pooled.running_var,
        pooled.bn_weight,
        pooled.bn_bias,
        training=pooled.training,
        momentum=pooled.momentum,
        eps=pooled.eps,
        activation=pooled.activation,
    )


def _convolved(x: Tensor, branch: ConvNorm) -> Tensor:
    """A branch's convolutions alone."""
    weight, dilation = branch.weight, branch.dilation
    if branch.depthwise_weight is not None:
        padding = _padding(branch.depthwise_weight, dilation)
        x = depthwise_conv2d(x, branch.depthwise_weight, padding=padding, dilation=dilation)
        dilation = 1
    padding = _padding(weight, dilation)
    return conv_act(x, weight, branch.bias, padding=padding, dilation=dilation, activation="identity")


def _padding(weight: Tensor, dilation: Size) -> tuple[int, int]:
    vertical, horizontal = pair("dilation", dilation, 1)
    return vertical * (weight.size(2) // 2), horizontal * (weight.size(3) // 2)


# -------------------------------------------------------------------------------------- checks
def _checked(x: Tensor, branches: Sequence[ConvNorm], pooled: ConvNorm | None, projection: ConvNorm) -> list[Options]:
    """The branches' options; raises before anything runs."""
    check_tensor("x", x)
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"x: expected (N, C, H, W), got shape {tuple(x.shape)}")
    if not branches:
        raise ValueError("branches: expected at least one, got none")
    options = [_check_part(f"branches[{i}]", part, x, x.size(1)) for i, part in enumerate(branches)]
    channels = sum(part.weight.size(0) for part in branches)
    if pooled is not None:
        _check_part("pooled", pooled, x, x.size(1), pointwise=True)
        channels += pooled.weight.size(0)
        if pooled.batch_stats and x.size(0) == 1:
            raise ValueError("pooled: expected more than 1 value per channel in training, got one image")
    _check_part("projection", projection, x, channels, pointwise=True)
    if x.size(0) * x.size(2) * x.size(3) == 1 and any(part.batch_stats for part in (*branches, projection)):
        raise ValueError(f"expected more than 1 value per channel in training, got an input of shape {tuple(x.shape)}")
    return options


def _check_part(name: str, part: ConvNorm, x: Tensor, channels: int, *, pointwise: bool = False) -> Options:
    """A part's options; ``pointwise``: it is a 1 x 1 convolution of ``channels``."""
    if not isinstance(part, ConvNorm):
        raise TypeError(f"{name}: expected a ConvNorm, got {type(part).__name__}")
    for what, value in (("weight", part.weight), ("depthwise_weight", part.depthwise_weight), ("bias", part.bias)):
        if value is not None or what == "weight":
            check_tensor(f"{name}: {what}", value)
    autocast = library.autocasts(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    weight, kernel = part.weight, part.weight.shape[2:]
    if weight.dim() != 4:
        raise ValueError(f"{name}: expected a weight of shape (K, C, R, S), got {tuple(weight.shape)}")
    if part.depthwise_weight is not None:
        kernel = part.depthwise_weight.shape[2:]
        if part.depthwise_weight.dim() != 4 or tuple(part.depthwise_weight.shape[:2]) != (channels, 1):
            raise ValueError(
                f"{name}: expected a depthwise_weight of shape ({channels}, 1, R, S) for {channels} channels, got "
                f"{tuple(part.depthwise_weight.shape)}"
            )
        pointwise = True
    if weight.size(1) != channels:
        raise ValueError(
            f"{name}: expected a weight of {channels} input channels for {channels} channels, got shape "
            f"{tuple(weight.shape)}"
        )
    if pointwise and tuple(weight.shape[2:]) != (1, 1):
        raise ValueError(f"{name}: expected a weight of shape (K, C, 1, 1), got {tuple(weight.shape)}")
    if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        raise ValueError(f"{name}: expected a kernel of odd size, which keeps that of x, got {tuple(kernel)}")
    for what, value in (("weight", weight), ("depthwise_weight", part.depthwise_weight), ("bias", part.bias)):
        if value is None:
            continue
        if value.device != x.device:
            raise RuntimeError(f"{name}: expected a {what} on {x.device} like x, got {value.device}")
        if value.dtype != x.dtype and (not autocast or value.dtype not in DTYPES or value.dtype == torch.float64):
            raise TypeError(f"{name}: expected a {what} of {x.dtype} like x, got {value.dtype}")
    pair(f"{name}: dilation", part.dilation, 1)
    if (part.running_mean is None) != (part.running_var is None):
        raise ValueError(f"{name}: expected both of running_mean and running_var or neither, got one of them")
    parameter_dtype = None
    for what in ("bias", "running_mean", "running_var", "bn_weight", "bn_bias"):
        value = getattr(part, what)
        if value is None:
            continue
        check_vector(f"{name}: {what}", value, weight.size(0), x)
        if what == "bias":
            continue
        if parameter_dtype not in (None, value.dtype):
            raise TypeError(f"{name}: expected a {what} of {parameter_dtype} like its others, got {value.dtype}")
        parameter_dtype = value.dtype
        check_parameter_dtype(f"{name}: {what}", value.dtype, dtype)
    return Options(part.batch_stats, part.momentum, part.eps, activations.resolve(part.activation))
