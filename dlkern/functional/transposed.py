"""``conv_transpose_bn_act`` and ``conv_transpose_act``: checks of their arguments."""

from __future__ import annotations

from torch import Tensor, nn

from dlkern import activations
from dlkern.kernels.activation import Activation
from dlkern.kernels.reference.transposed import Geometry
from dlkern.ops import transposed as _transposed

from .arguments import Size, autocast, pair
from .conv_bn_act import check_dtypes, check_vector
from .dtypes import check_parameter_dtype


def conv_transpose_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | nn.Module | Activation = "relu",
) -> Tensor:
    """``activation(batch_norm(conv_transpose2d(x, weight, bias)))``.

    Numbers, running statistics and memory format are those of PyTorch's own functions in a row. In training the
    convolution's output and the statistics are all that is kept for backward.

    Args:
        x: (N, C, H, W) or (C, H, W); float32, float64, float16 or bfloat16.
        weight: (C, K / groups, R, S), x's dtype.
        bias: (K,) or None, x's dtype.
        running_mean, running_var: (K,), moved in place by ``momentum`` in training; or both None, and the batch's
            statistics are always used.
        bn_weight, bn_bias: (K,) or None; x's dtype, or float32 with a float16 or bfloat16 x, one dtype for all four.
        stride, dilation: one positive int or two; padding, output_padding: one non-negative int or two. The size of
            the output is (H - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1.
        training: normalise by the batch's statistics instead of the running ones.
        activation: as in :func:`dlkern.functional.batch_norm_act`.

    Returns:
        (N, K, OH, OW), or (K, OH, OW) for an unbatched x; x's dtype; the memory format of conv_transpose2d's output.

    Raises:
        ValueError: a wrong rank, shape or activation, groups that do not divide the channels, an output_padding that
            is not smaller than stride or dilation, an output without a pixel, or one value per channel in training.
        TypeError: a non-floating x, or a mix of dtypes outside the list above.
        RuntimeError: tensors on several devices, or a forced backend that cannot run this.
    """
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var: expected both or neither, got one of them")
    x, weight, bias = autocast(x, weight, bias)
    geometry = check(x, weight, bias, stride, padding, output_padding, groups, dilation)
    channels = weight.size(1) * groups
    norms = (("bn_weight", bn_weight), ("bn_bias", bn_bias), ("running_mean", running_mean),
             ("running_var", running_var))  # fmt: skip
    dtype = None
    for name, value in norms:
        if value is None:
            continue
        check_vector(name, value, channels, x)
        if dtype is not None and value.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype} like the other parameters, got {value.dtype}")
        dtype = value.dtype
        check_parameter_dtype(name, dtype, x.dtype)
    norm = "batch" if training or running_mean is None else "running"
    return _apply(
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var, geometry, norm, momentum, eps, activation
    )


def conv_transpose_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    activation: str | nn.Module | Activation = "relu",
) -> Tensor:
    """``activation(conv_transpose2d(x, weight, bias))``; arguments, errors as in :func:`conv_transpose_bn_act`."""
    x, weight, bias = autocast(x, weight, bias)
    geometry = check(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _apply(x, weight, bias, None, None, None, None, geometry, "none", 0.0, 0.0, activation)


def _apply(
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
    activation: str | nn.Module | Activation,
) -> Tensor:
    act = activations.resolve(activation)
    unbatched = x.dim() == 3
    if unbatched:
        x = x.unsqueeze(0)
    size = geometry.output_size(x, weight)
    if min(size[2:]) < 1:
        raise ValueError(f"padding: {geometry.padding} leaves an output of {size[2]} x {size[3]}")
    if norm == "batch" and size[0] * size[2] * size[3] == 1:
        raise ValueError(f"expected more than 1 value per channel in training, got an output of shape {size}")
    y = _transposed.apply(
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var, geometry, norm, momentum, eps, act
    )
    return y.squeeze(0) if unbatched else y


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
) -> Geometry:
    """The geometry; ValueError, TypeError or RuntimeError where the arguments of a call do not fit together."""
    check_dtypes(x, weight, bias, "(C, K / groups, R, S)")
    geometry = Geometry(
        pair("stride", stride, 1),
        pair("padding", padding, 0),
        pair("output_padding", output_padding, 0),
        groups,
        pair("dilation", dilation, 1),
    )
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups: expected a positive int, got {groups!r}")
    channels = x.size(-3)
    if weight.size(0) != channels:
        raise ValueError(
            f"weight: expected {channels} input channels for an input of {channels} channels, got shape "
            f"{tuple(weight.shape)}"
        )
    if channels % groups:
        raise ValueError(f"groups: {groups} does not divide {channels} input channels")
    if bias is not None:
        check_vector("bias", bias, weight.size(1) * groups, x)
    for extra, step, spread in zip(geometry.output_padding, geometry.stride, geometry.dilation, strict=True):
        if extra >= max(step, spread):
            raise ValueError(
                f"output_padding: expected less than stride {geometry.stride} or dilation {geometry.dilation}, got "
                f"{geometry.output_padding}"
            )
    return geometry
