"""``batch_norm_act``: checks of its arguments."""

from __future__ import annotations

from torch import Tensor, nn

from dlkern import activations
from dlkern.kernels.activation import Activation
from dlkern.ops import batch_norm_act as _batch_norm_act

from .arguments import check_tensor
from .dtypes import DTYPES, check_parameter_dtype


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | nn.Module | Activation = "relu",
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(batch_norm(x) + residual)`` in one fused op.

    Numbers, running statistics and memory format are those of ``torch.nn.functional.batch_norm``
    followed by the addition and the activation. The activation's input is computed again in
    backward and never stored.

    Args:
        x: (N, C, *) with any number of trailing dimensions; float32, float64, float16 or bfloat16.
        running_mean, running_var: (C,), moved in place by ``momentum`` in training; or both None,
            and batch statistics are always used.
        weight, bias: (C,) or None; of x's dtype, or float32 with a float16 or bfloat16 x. All of
            weight, bias and running statistics have one dtype.
        training: normalise by the batch's statistics (biased variance; the unbiased one enters
            running_var) instead of the running ones.
        activation: a name (relu, relu6, leaky_relu, silu, gelu, gelu_tanh, hardswish, hardsigmoid,
            sigmoid, tanh, elu, identity), a torch.nn module of one of them, or an Activation.
        residual: added before the activation; shape, dtype and device of x.

    Returns:
        A tensor of x's shape and dtype, in x's memory format.

    Raises:
        ValueError: a wrong rank, shape or activation, or one value per channel in training.
        TypeError: a non-floating x, or a mix of dtypes outside the list above.
        RuntimeError: tensors on several devices, or a forced backend that cannot run this.
    """
    return run(
        x, running_mean, running_var, weight, bias, residual, training, momentum, eps, activations.resolve(activation)
    )


def run(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: Activation,
    overwrite: bool = False,
) -> Tensor:
    """``batch_norm_act``; with ``overwrite`` nobody else holds x, and in inference the result may take its memory."""
    check(x, running_mean, running_var, weight, bias, residual)
    batch_stats = training or running_mean is None
    if batch_stats and x.numel() == x.shape[1]:
        raise ValueError(f"expected more than 1 value per channel in training, got an input of shape {tuple(x.shape)}")
    return _batch_norm_act.apply(
        x,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        batch_stats,
        momentum,
        eps,
        activation,
        overwrite=overwrite,
    )


def check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Raise ValueError, TypeError or RuntimeError where the tensors of a call do not fit together."""
    check_tensor("x", x)
    dtype, device, shape = x.dtype, x.device, x.shape
    if dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float64, float16 or bfloat16, got {dtype}")
    if len(shape) < 2:
        raise ValueError(f"x: expected at least 2 dimensions (N, C, *), got shape {tuple(shape)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var: expected both or neither, got one of them")
    expected, param_dtype = shape[1:2], None
    for i, value in enumerate((weight, bias, running_mean, running_var)):
        if value is None:
            continue
        check_tensor(_PARAMETERS[i], value)
        if value.shape != expected or value.device != device:
            raise _wrong_parameter(_PARAMETERS[i], value, x)
        if value.dtype is not param_dtype:
            if param_dtype is not None:
                other = f"{param_dtype} like the other parameters"
                raise TypeError(f"{_PARAMETERS[i]}: expected {other}, got {value.dtype}")
            param_dtype = value.dtype
            if param_dtype is not dtype:
                check_parameter_dtype(_PARAMETERS[i], param_dtype, dtype)
    if residual is not None:
        check_tensor("residual", residual)
        if residual.shape != shape:
            raise ValueError(f"residual: expected shape {tuple(shape)} like x, got {tuple(residual.shape)}")
        if residual.dtype != dtype:
            raise TypeError(f"residual: expected {dtype} like x, got {residual.dtype}")
        if residual.device != device:
            raise RuntimeError(f"residual: expected device {device} like x, got {residual.device}")


_PARAMETERS = ("weight", "bias", "running_mean", "running_var")


def _wrong_parameter(name: str, value: Tensor, x: Tensor) -> Exception:
    channels = x.shape[1]
    if value.device != x.device and tuple(value.shape) == (channels,):
        return RuntimeError(f"{name}: expected device {x.device} like x, got {value.device}")
    return ValueError(
        f"{name}: expected shape ({channels},) for an input of {channels} channels, got {tuple(value.shape)}"
    )
