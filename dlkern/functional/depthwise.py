"""``depthwise_conv2d`` and ``depthwise_separable_conv2d``: checks of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dlkern import activations
from dlkern.kernels.activation import Activation
from dlkern.ops import depthwise as _depthwise
from dlkern.ops.depthwise import Geometry

from .arguments import Size, autocast, check_tensor, pair
from .conv_bn_act import conv_act
from .dtypes import DTYPES


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    activation: str | nn.Module | Activation = "identity",
) -> Tensor:
    """``activation(conv2d(x, weight, bias, groups=channels of x))``.

    Output channel ``o`` reads input channel ``o // multiplier``. Numbers and memory format are those of
    ``torch.nn.functional.conv2d``, and under autocast so is the dtype. The activation is part of the
    convolution's kernel where no gradient is wanted.

    Args:
        x: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16.
        weight: (C * multiplier, 1, kh, kw), x's dtype.
        bias: (C * multiplier,) or None, x's dtype.
        stride, dilation: one positive int or two (vertical, horizontal).
        padding: zeros around x: a non-negative int, two (vertical, horizontal), four (top, bottom, left, right),
            "valid" (none) or "same" (the output has x's size; stride 1 only; an odd one goes to the right and to
            the bottom).
        activation: as in :func:`dlkern.functional.batch_norm_act`.

    Returns:
        (N, C * multiplier, OH, OW), or (C * multiplier, OH, OW) for an unbatched x; x's dtype.

    Raises:
        ValueError: a wrong rank, shape, stride, dilation, padding or activation, channels that do not divide, or a
            kernel that reaches further than the padded input.
        TypeError: a non-floating x, or a weight or bias of another dtype.
        RuntimeError: tensors on several devices, or a forced backend that cannot run this.
    """
    _check_types(x, weight, bias)
    x, weight, bias = autocast(x, weight, bias)
    check(x, weight, bias)
    geometry = geometry_of(weight, stride, padding, dilation)
    unbatched = x.dim() == 3
    if unbatched:
        x = x.unsqueeze(0)
    _check_size(x, weight, geometry)
    y = _depthwise.apply(x, weight, bias, geometry, activations.resolve(activation))
    return y.squeeze(0) if unbatched else y


def depthwise_separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    depthwise_activation: str | nn.Module | Activation = "identity",
    activation: str | nn.Module | Activation = "identity",
) -> Tensor:
    """A depthwise convolution and the 1 x 1 convolution that mixes its channels.

    Args:
        x, stride, padding, dilation: as in :func:`depthwise_conv2d`.
        depthwise_weight: (C * multiplier, 1, kh, kw); depthwise_bias: (C * multiplier,) or None.
        pointwise_weight: (K, C * multiplier, 1, 1); pointwise_bias: (K,) or None.
        depthwise_activation: between the two convolutions; activation: behind them.

    Returns:
        (N, K, OH, OW), or (K, OH, OW) for an unbatched x; x's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`depthwise_conv2d`.

    Source: Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions" (2017).
    """
    for name, value in (("depthwise_weight", depthwise_weight), ("pointwise_weight", pointwise_weight)):
        check_tensor(name, value)
    if depthwise_weight.dim() != 4:
        raise ValueError(
            f"depthwise_weight: expected shape (C * multiplier, 1, kh, kw), got {tuple(depthwise_weight.shape)}"
        )
    if pointwise_weight.dim() != 4 or pointwise_weight.shape[1:] != (depthwise_weight.size(0), 1, 1):
        raise ValueError(
            f"pointwise_weight: expected shape (K, {depthwise_weight.size(0)}, 1, 1) behind a depthwise weight of "
            f"{depthwise_weight.size(0)} output channels, got {tuple(pointwise_weight.shape)}"
        )
    for name, other in (("pointwise_weight", pointwise_weight), ("pointwise_bias", pointwise_bias)):
        if other is None:
            continue
        check_tensor(name, other)
        if other.dtype != depthwise_weight.dtype:
            raise TypeError(f"{name}: expected {depthwise_weight.dtype} like depthwise_weight, got {other.dtype}")
        if other.device != depthwise_weight.device:
            raise RuntimeError(
                f"{name}: expected device {depthwise_weight.device} like depthwise_weight, got {other.device}"
            )
    if pointwise_bias is not None and tuple(pointwise_bias.shape) != (pointwise_weight.size(0),):
        raise ValueError(
            f"pointwise_bias: expected shape ({pointwise_weight.size(0)},), got {tuple(pointwise_bias.shape)}"
        )
    behind = activations.resolve(activation)
    h = depthwise_conv2d(
        x, depthwise_weight, depthwise_bias,
        stride=stride, padding=padding, dilation=dilation, activation=depthwise_activation,
    )  # fmt: skip
    return conv_act(h, pointwise_weight, pointwise_bias, activation=behind)


# -------------------------------------------------------------------------------------- checks
def _check_types(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        if value is not None or name != "bias":
            check_tensor(name, value)


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError, TypeError or RuntimeError where the tensors of a call do not fit together."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() not in (3, 4):
        raise ValueError(f"x: expected (N, C, H, W) or (C, H, W), got shape {tuple(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} like x, got {value.dtype}")
        if value.device != x.device:
            raise RuntimeError(f"{name}: expected device {x.device} like x, got {value.device}")
    channels = x.size(-3)
    if weight.dim() != 4 or weight.size(1) != 1 or min(weight.shape[2:]) < 1:
        raise ValueError(f"weight: expected shape (C * multiplier, 1, kh, kw), got {tuple(weight.shape)}")
    if channels < 1 or weight.size(0) < channels or weight.size(0) % channels:
        raise ValueError(
            f"weight: expected a multiple of x's {channels} channels as its output channels, got {weight.size(0)} "
            f"(shape {tuple(weight.shape)})"
        )
    if bias is not None and tuple(bias.shape) != (weight.size(0),):
        raise ValueError(
            f"bias: expected shape ({weight.size(0)},) for a weight of {weight.size(0)} output channels, "
            f"got {tuple(bias.shape)}"
        )


def geometry_of(weight: Tensor, stride: Size, padding: Size | str, dilation: Size) -> Geometry:
    """The geometry that PyTorch's ways to say stride, padding and dilation stand for.

    Raises:
        ValueError: a value that is none of theirs, or "same" with a stride.
    """
    steps, spread = pair("stride", stride, 1), pair("dilation", dilation, 1)
    if not isinstance(padding, str):
        return Geometry(steps, _sides(padding), spread)
    if padding not in ("same", "valid"):
        raise ValueError(f"padding: expected ints, 'same' or 'valid', got {padding!r}")
    if padding == "valid":
        return Geometry(steps, (0, 0, 0, 0), spread)
    if steps != (1, 1):
        raise ValueError(f"padding: 'same' needs stride 1, got stride {steps}")
    vertical, horizontal = (d * (k - 1) for d, k in zip(spread, weight.shape[2:], strict=True))
    before = vertical // 2, horizontal // 2
    return Geometry(steps, (before[0], vertical - before[0], before[1], horizontal - before[1]), spread)


def _sides(padding: Size) -> tuple[int, int, int, int]:
    if isinstance(padding, Sequence) and len(padding) == 4:
        if not all(isinstance(v, int) and v >= 0 for v in padding):
            raise ValueError(f"padding: expected (top, bottom, left, right) of at least 0, got {padding!r}")
        return tuple(padding)  # type: ignore[return-value]
    vertical, horizontal = pair("padding", padding, 0)
    return vertical, vertical, horizontal, horizontal


def _check_size(x: Tensor, weight: Tensor, geometry: Geometry) -> None:
    size = geometry.output_size(x, weight)
    if min(size[2:]) < 1:
        top, bottom, left, right = geometry.padding
        reach = [d * (k - 1) + 1 for d, k in zip(geometry.dilation, weight.shape[2:], strict=True)]
        raise ValueError(
            f"x: {x.size(2)} x {x.size(3)}, {x.size(2) + top + bottom} x {x.size(3) + left + right} with its padding, "
            f"is smaller than the kernel's reach, {reach[0]} x {reach[1]}"
        )
