"""``conv_bn_act`` and ``conv_act``: checks of their arguments, and PyTorch's ways to say padding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dlkern import activations
from dlkern.kernels.activation import Activation
from dlkern.kernels.reference.conv_bn_act import Convolution
from dlkern.ops import conv_bn_act as _conv_bn_act

from .arguments import Size, autocast, check_tensor, pair
from .dtypes import DTYPES, check_parameter_dtype

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | nn.Module | Activation = "relu",
    residual: Tensor | None = None,
    memory_efficient: bool = False,
) -> Tensor:
    """``activation(batch_norm(conv2d(x, weight, bias)) + residual)``.

    Numbers, running statistics and memory format are those of PyTorch's own functions in a row. In
    inference without gradients the batch norm is folded into the convolution where that is faster; in
    training the convolution's output and the statistics are all that is kept for backward.

    Args:
        x: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16.
        weight: (K, C / groups, R, S), x's dtype.
        bias: (K,) or None, x's dtype.
        running_mean, running_var: (K,), moved in place by ``momentum`` in training; or both None, and
            the batch's statistics are always used.
        bn_weight, bn_bias: (K,) or None; x's dtype, or float32 with a float16 or bfloat16 x, one dtype
            for all four.
        stride, dilation: one positive int or two.
        padding: a non-negative int or two, "valid" (none) or "same" (the output has x's size; stride 1 only).
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        training: normalise by the batch's statistics instead of the running ones.
        activation: as in :func:`dlkern.functional.batch_norm_act`.
        residual: added before the activation; shape and dtype of the convolution's output.
        memory_efficient: keep less for backward, for more time: a following ``conv_bn_act`` or
            ``conv_act`` does not keep this output, which is its input, but makes it again in its own backward
            (without a residual); a residual ReLU keeps one bit an element instead of its output. Nothing
            changes where another op keeps the output, under torch.compile and torch.func, and where
            PyTorch's own kernels are forced.

    Returns:
        (N, K, OH, OW), or (K, OH, OW) for an unbatched x; x's dtype; the memory format of conv2d's output.

    Raises:
        ValueError: a wrong rank, shape, padding or activation, groups that do not divide the channels, or one value
            per channel in training.
        TypeError: a non-floating x, or a mix of dtypes outside the list above.
        RuntimeError: tensors on several devices, or a forced backend that cannot run this.
    """
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var: expected both or neither, got one of them")
    x, weight, bias = autocast(x, weight, bias)
    _check(x, weight, bias)
    norms = (("bn_weight", bn_weight), ("bn_bias", bn_bias), ("running_mean", running_mean),
             ("running_var", running_var))  # fmt: skip
    dtype = None
    for name, value in norms:
        if value is None:
            continue
        check_vector(name, value, weight.size(0), x)
        if dtype is not None and value.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} like the other parameters, got {value.dtype}")
        dtype = value.dtype
        check_parameter_dtype(name, dtype, x.dtype)
    norm = "batch" if training or running_mean is None else "running"
    return _apply(
        x, weight, bias, bn_weight, bn_bias, residual, running_mean, running_var,
        stride, padding, dilation, groups, padding_mode, norm, momentum, eps, activation, memory_efficient,
    )  # fmt: skip


def conv_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    activation: str | nn.Module | Activation = "relu",
    residual: Tensor | None = None,
    constant_weight: bool = False,
) -> Tensor:
    """``activation(conv2d(x, weight, bias) + residual)``; arguments and errors as in :func:`conv_bn_act`.

    ``constant_weight`` promises that this weight tensor never changes its values: in inference a backend
    may then keep a copy of it in an order of its own.
    """
    x, weight, bias = autocast(x, weight, bias)
    _check(x, weight, bias)
    return _apply(
        x, weight, bias, None, None, residual, None, None,
        stride, padding, dilation, groups, padding_mode, "none", 0.0, 0.0, activation, False, constant_weight,
    )  # fmt: skip


def _apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    padding_mode: str,
    norm: str,
    momentum: float,
    eps: float,
    activation: str | nn.Module | Activation,
    memory_efficient: bool = False,
    constant_weight: bool = False,
) -> Tensor:
    act = activations.resolve(activation)
    steps, spread = pair("stride", stride, 1), pair("dilation", dilation, 1)
    _check_channels(x, weight, groups)
    unbatched = x.dim() == 3
    if residual is not None:
        check_tensor("residual", residual)
    if unbatched:
        x = x.unsqueeze(0)
        residual = None if residual is None else residual.unsqueeze(0)
    x, border = padded(x, weight, steps, padding, spread, padding_mode)
    convolution = Convolution(steps, border, spread, groups)
    size = convolution.output_size(x, weight)
    if min(size[2:]) < 1:
        raise ValueError(
            f"x: {x.size(2)} x {x.size(3)} with its padding is smaller than the kernel's reach, "
            f"{[d * (k - 1) + 1 for d, k in zip(spread, weight.shape[2:], strict=True)]}"
        )
    if norm == "batch" and size[0] * size[2] * size[3] == 1:
        raise ValueError(f"expected more than 1 value per channel in training, got an output of shape {size}")
    if residual is not None:
        if residual.shape != size:
            raise ValueError(f"residual: expected shape {size} like the output, got {tuple(residual.shape)}")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual: expected {x.dtype} like x, got {residual.dtype}")
        if residual.device != x.device:
            raise RuntimeError(f"residual: expected device {x.device} like x, got {residual.device}")
    y = _conv_bn_act.apply(
        x, weight, bias, bn_weight, bn_bias, residual, running_mean, running_var,
        convolution, norm, momentum, eps, act, memory_efficient, constant_weight,
    )  # fmt: skip
    return y.squeeze(0) if unbatched else y


# -------------------------------------------------------------------------------------- checks
def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_dtypes(x, weight, bias, "(K, C / groups, R, S)")
    if bias is not None:
        check_vector("bias", bias, weight.size(0), x)


def check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None, weight_shape: str) -> None:
    check_tensor("x", x)
    check_tensor("weight", weight)
    if bias is not None:
        check_tensor("bias", bias)
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() not in (3, 4):
        raise ValueError(f"x: expected (N, C, H, W) or (C, H, W), got shape {tuple(x.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight: expected {weight_shape}, got shape {tuple(weight.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} like x, got {value.dtype}")
        if value.device != x.device:
            raise RuntimeError(f"{name}: expected device {x.device} like x, got {value.device}")


def check_vector(name: str, value: Tensor, channels: int, x: Tensor) -> None:
    check_tensor(name, value)
    if value.device != x.device:
        raise RuntimeError(f"{name}: expected device {x.device} like x, got {value.device}")
    if tuple(value.shape) != (channels,):
        raise ValueError(
            f"{name}: expected shape ({channels},) for a weight of {channels} output channels, got {tuple(value.shape)}"
        )


def _check_channels(x: Tensor, weight: Tensor, groups: int) -> None:
    channels = x.size(-3)
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups: expected a positive int, got {groups!r}")
    if channels % groups or weight.size(0) % groups:
        raise ValueError(f"groups: {groups} does not divide {channels} input and {weight.size(0)} output channels")
    if weight.size(1) * groups != channels:
        raise ValueError(
            f"weight: expected {channels // groups} channels a group for an input of {channels} channels and "
            f"{groups} groups, got shape {tuple(weight.shape)}"
        )


def padded(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: Size | str, dilation: tuple[int, int], mode: str
) -> tuple[Tensor, tuple[int, int]]:
    """x with whatever padding a convolution with zeros on both sides cannot make, and the padding it can.

    Raises:
        ValueError: an unknown padding string or mode, or "same" with a stride.
    """
    if mode == "zeros" and not isinstance(padding, str):
        return x, pair("padding", padding, 0)
    if mode not in PADDING_MODES:
        raise ValueError(f"padding_mode: expected one of {', '.join(PADDING_MODES)}, got {mode!r}")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding: expected ints, 'same' or 'valid', got {padding!r}")
        if padding == "same" and stride != (1, 1):
            raise ValueError(f"padding: 'same' needs stride 1, got stride {stride}")
        reach = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        sides = [(total // 2, total - total // 2) for total in reach]  # the extra one goes right and bottom
    else:
        sides = [(p, p) for p in pair("padding", padding, 0)]
    if mode != "zeros":
        (top, bottom), (left, right) = sides
        return (F.pad(x, (left, right, top, bottom), mode) if any((top, bottom, left, right)) else x), (0, 0)
    extra = [after - before for before, after in sides]
    if any(extra):
        x = F.pad(x, (0, extra[1], 0, extra[0]))
    return x, (sides[0][0], sides[1][0])
