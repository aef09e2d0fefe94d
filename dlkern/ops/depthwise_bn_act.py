"""act(batch_norm(depthwise convolution) + residual): the chain that op conv_bn_act hands over where groups = channels.

In inference batch norm and activation are part of the op ``depthwise``: one kernel. In training its kernel takes the
statistics of what it writes, where it can, and the op ``batch_norm_act`` normalises by them: one pass less. Else the
two ops run in a row.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from dlkern import dispatch
from dlkern.kernels.activation import Activation
from dlkern.kernels.cpu.conv_bn_act import fold
from dlkern.kernels.reference import activation as reference_activation
from dlkern.kernels.reference import batch_norm_act as reference
from dlkern.kernels.reference.batch_norm_act import accumulate_dtype
from dlkern.kernels.reference.conv_bn_act import Convolution

from . import batch_norm_act, depthwise, library, recompute
from .depthwise import IDENTITY, Geometry


def choose(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    norm: str,
    saves: bool,
    residual: bool,
    activation: Activation,
    dtype: torch.dtype | None = None,
) -> str:
    """The implementation of ``depthwise`` that runs a depthwise convolution's block; "torch" where none does.

    "torch" where a backend is forced for conv_bn_act: it then runs as that backend has it. ``dtype`` is the one that
    autocast will give to x.

    Raises:
        RuntimeError: a backend was forced that cannot run this.
    """
    if dispatch.forced("conv_bn_act") is not None:
        return "torch"
    fused = IDENTITY if saves or residual or norm == "batch" else activation
    return depthwise.choose(x, weight, geometry, fused.name, saves, dtype)


def geometry_of(convolution: Convolution) -> Geometry:
    """Where the taps of a convolution lie."""
    vertical, horizontal = convolution.padding
    return Geometry(convolution.stride, (vertical, vertical, horizontal, horizontal), convolution.dilation)


def apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    geometry: Geometry,
    norm: str,
    momentum: float,
    eps: float,
    activation: Activation,
    memory_efficient: bool,
    saves: bool,
    backend: str,
) -> Tensor:
    """The chain by an implementation of ``depthwise`` other than "torch"; arguments as conv_bn_act.apply has them."""
    saves = saves or library.transformed()
    if not saves and residual is None:
        if norm == "none":
            return depthwise.run(x, weight, bias, geometry, activation, backend)
        if norm == "running" and running_mean is not None and running_var is not None and _folds(x, weight, geometry):
            weight, bias = _folded(weight, bias, bn_weight, bn_bias, running_mean, running_var, eps)
            return depthwise.run(x, weight, bias, geometry, activation, backend)
    plain = not saves or library.transformed() or torch.compiler.is_compiling()
    keep_less = memory_efficient and not plain
    with contextlib.nullcontext() if plain or x.grad_fn is None else recompute.forgetting(x):
        if norm == "batch" and not keep_less and not library.transformed():
            parameters = (bn_weight, bn_bias, running_mean, running_var)
            passes = _normaliser(x, weight, geometry, parameters, residual is not None, activation, backend)
            if passes is not None:
                inputs = (
                    x, weight, bias, bn_weight, bn_bias, residual, running_mean, running_var,
                    *geometry, momentum, eps, *activation, backend, passes,
                )  # fmt: skip
                return DepthwiseBNActFunction.apply(*inputs) if saves else _forward(*inputs)[0]
        c = depthwise.run(x, weight, bias, geometry, IDENTITY, backend)
    if norm == "none":
        return reference_activation.forward(c if residual is None else c + residual, activation)
    return batch_norm_act.apply(
        c, bn_weight, bn_bias, residual, running_mean, running_var, norm == "batch", momentum, eps, activation,
        recompute.MemoryEfficientFunction if keep_less else None, overwrite=True,
    )  # fmt: skip


# -------------------------------------------------------------------------------------- inference
def _folds(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether folding the batch norm, at each call, costs less than a pass over the output."""
    if torch.compiler.is_compiling():
        return True
    batch, _, height, width = geometry.output_size(x, weight)
    return batch_norm_act.FOLDED_FROM * weight.size(2) * weight.size(3) <= batch * height * width


def _folded(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias with the batch norm in them, in the weight's dtype."""
    dtype = weight.dtype
    wide = accumulate_dtype(dtype)
    if dtype != wide or running_var.dtype != wide:
        weight, running_mean, running_var = weight.to(wide), running_mean.to(wide), running_var.to(wide)
        bias, bn_weight, bn_bias = (None if t is None else t.to(wide) for t in (bias, bn_weight, bn_bias))
    weight, bias = fold(weight, bias, bn_weight, bn_bias, running_mean, running_var, eps)
    return weight.to(dtype), bias.to(dtype)


# --------------------------------------------------------------------------------------- training
def _normaliser(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    parameters: tuple[Tensor | None, ...],
    residual: bool,
    activation: Activation,
    backend: str,
) -> str | None:
    """The implementation of batch_norm_act that normalises by the statistics of the convolution's own kernel.

    None where the kernel has none in this layout, or where PyTorch is to normalise: the two ops run in a row then.
    """
    wide = accumulate_dtype(x.dtype)
    if any(p is not None and p.dtype != wide for p in parameters):
        return None  # statistics come in the accumulation dtype, and parameters have one dtype
    request = depthwise.request_of(x, weight, geometry, statistics=True)
    if not request.channels_last or not _supported(backend, *request):
        return None  # in NCHW a channel is in the cache when its statistics are wanted: nothing to gain
    normalised = batch_norm_act.Request(
        request.device, request.dtype, wide, request.channels_last, False, residual, activation.name
    )
    passes = dispatch.choose(batch_norm_act.NAME, normalised, x, weight).backend
    return None if passes == "torch" else passes


@dispatch._constant
def _supported(backend: str, *fields: Any) -> bool:
    return dispatch.implementation(depthwise.NAME, backend).supports(depthwise.Request(*fields)) is None


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    momentum: float,
    eps: float,
    activation: str,
    param: float,
    backend: str,
    passes: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the convolution's output, and its mean and 1 / sqrt(variance + eps); running statistics move."""
    direct = library.unwatched(x)
    convolve: Any = depthwise.run_forward if direct else depthwise.forward_op
    c, mean, variance = convolve(x, weight, bias, stride, padding, dilation, *IDENTITY, True, backend)
    if running_mean is not None and running_var is not None:
        count = c.numel() // c.size(1)
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(variance, alpha=momentum * (count / max(count - 1, 1)))
    y, mean, invstd = (batch_norm_act.run_forward if direct else batch_norm_act.forward_op)(
        c, bn_weight, bn_bias, residual, mean, variance, False, 0.0, eps, activation, param, passes
    )
    return y, c, mean, invstd


class DepthwiseBNActFunction(torch.autograd.Function):
    """y = act(batch_norm(conv2d(x, weight) + bias) + residual) by the batch's statistics, groups = channels.

    Arguments in order: x (N, C, H, W), weight (C * multiplier, 1, kh, kw), bias, bn_weight, bn_bias (C * multiplier,)
    or None, residual like y or None, running_mean, running_var (C * multiplier,) or None, stride, padding (top, bottom,
    left, right), dilation, momentum, eps, the activation's name and parameter, and the names of the implementations
    of depthwise and of batch_norm_act. Differentiable in the first six; double backward works (composed of PyTorch's
    own ops).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, c, mean, invstd = _forward(*inputs)
        x, weight, bias, bn_weight, bn_bias, residual, _, _, *geometry, _, eps, activation, param, backend, passes = (
            inputs
        )
        residual, kept_y = batch_norm_act.kept_of(residual, y, Activation(activation, param))
        ctx.save_for_backward(x, weight, bias, bn_weight, bn_bias, residual, kept_y, c, mean, invstd)
        ctx.geometry, ctx.eps, ctx.activation = Geometry(*geometry), eps, Activation(activation, param)
        ctx.backend, ctx.passes = backend, passes
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 17
        x, weight, bias, bn_weight, bn_bias, residual, y, c, mean, invstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        needs_c, needs_norm, needs_residual = any(needs[:3]), needs[3] or needs[4], needs[5]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph=True: the gradient itself is differentiated, so it is composed of PyTorch's own ops
            c = depthwise.by_torch(x, weight, bias, ctx.geometry, IDENTITY)
            mean, _, invstd = reference.statistics(c, ctx.eps)
            gradients = reference.backward(
                grad_y, c, bn_weight, bn_bias, residual, y, mean, invstd, batch_stats=True,
                activation=ctx.activation, needs_x=needs_c, needs_params=needs_norm, needs_residual=needs_residual,
            )  # fmt: skip
        else:
            shared = needs_residual and ctx.activation.name == "identity"  # the residual's gradient is grad_y itself
            run: Any = batch_norm_act.run_backward if library.unwatched(grad_y) else batch_norm_act.backward_op
            gradients = run(
                grad_y, c, bn_weight, bn_bias, residual, y, mean, invstd, True, *ctx.activation,
                needs_c, needs_norm, needs_residual and not shared, ctx.passes,
            )  # fmt: skip
            if shared:
                gradients = (*gradients[:3], grad_y)
        dc, dbn_weight, dbn_bias, dresidual = gradients
        own: tuple[Tensor | None, ...] = (None, None, None)
        if needs_c and dc is not None:
            own = depthwise.gradients(dc, x, weight, ctx.geometry, needs[:3], ctx.backend)
        wanted = zip((*own, dbn_weight, dbn_bias, dresidual), needs[:6], strict=True)
        return (*(g if needed else None for g, needed in wanted), *(None,) * 11)
