"""act(batch_norm(conv2d(x, weight) + bias) + residual): library ops, autograd Function, implementations.

"torch" here means PyTorch's own convolution with the op ``batch_norm_act`` right behind it, which has its own
choice of implementations: autograd keeps the convolution's output and the statistics, nothing else. The other
implementations take the convolution, too. A depthwise convolution goes to the op ``depthwise`` first, which has its
own choice as well (see depthwise_bn_act.py). Arguments have been checked by :mod:`dlkern.functional`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlkern import dispatch
from dlkern.kernels import layout
from dlkern.kernels.activation import Activation
from dlkern.kernels.reference import activation as reference_activation
from dlkern.kernels.reference import conv_bn_act as reference
from dlkern.kernels.reference.batch_norm_act import accumulate_dtype
from dlkern.kernels.reference.conv_bn_act import Convolution, Needs, Request

from . import batch_norm_act, depthwise_bn_act, library, recompute

NAME = "conv_bn_act"

#: oneDNN's fused convolution costs 30 us more a call than its plain one: outputs of fewer elements do not earn that.
_SMALL = 1 << 16


def _default_order(request: Request) -> Sequence[str]:
    if request.device != "cpu" or request.norm == "batch" or request.saves or request.pixels == 0:
        return ("torch",)
    if request.out_channels * request.pixels < _SMALL:
        return ("torch",)
    values = request.in_channels // request.groups * request.kernel[0] * request.kernel[1]
    if request.norm == "running" and batch_norm_act.FOLDED_FROM * values > request.pixels:
        return ("torch",)  # folding, at each call, would cost as much as it spares
    return ("cpu", "torch")


OP = dispatch.register(
    dispatch.Op(
        NAME,
        {
            "torch": "torch",
            "reference": "dlkern.kernels.reference.conv_bn_act",
            "cpu": "dlkern.kernels.cpu.conv_bn_act",
            "triton": "dlkern.kernels.triton.conv_bn_act",
        },
        _default_order,
        ("in_channels", "out_channels", "pixels"),
    )
)


# -------------------------------------------------------------------------------- library ops
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    norm: str,
    momentum: float,
    eps: float,
    activation: str,
    param: float,
    saves: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = dispatch.implementation(NAME, implementation).forward(
        x,
        weight,
        bias,
        bn_weight,
        bn_bias,
        residual,
        running_mean,
        running_var,
        convolution=_convolution(stride, padding, dilation, groups),
        norm=norm,
        momentum=momentum,
        eps=eps,
        activation=Activation(activation, param),
        saves=saves,
    )
    # a library op returns tensors: an empty one stands for None
    return tuple(x.new_empty(0) if t is None else t for t in outputs)  # type: ignore[return-value]


def _convolution(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Convolution:
    return Convolution(tuple(stride), tuple(padding), tuple(dilation), groups)  # type: ignore[arg-type]


def _forward_fake(x: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stride, padding, dilation, groups, norm, *_, saves, _ = options[6:]
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)  # PyTorch's own fake: shape and memory format
    stats = x.new_empty(0 if norm == "none" else weight.size(0), dtype=accumulate_dtype(x.dtype))
    return y, torch.empty_like(y) if saves else x.new_empty(0), stats, torch.empty_like(stats)


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    c: Tensor,
    mean: Tensor,
    invstd: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    norm: str,
    activation: str,
    param: float,
    needs: Sequence[bool],
    implementation: str,
) -> tuple[Tensor, ...]:
    gradients = dispatch.implementation(NAME, implementation).backward(
        grad_y,
        x,
        weight,
        bias,
        bn_weight,
        bn_bias,
        residual,
        y,
        c,
        None if norm == "none" else mean,
        None if norm == "none" else invstd,
        convolution=_convolution(stride, padding, dilation, groups),
        norm=norm,
        activation=Activation(activation, param),
        needs=Needs(*needs),
    )
    return tuple(x.new_empty(0) if g is None else g for g in gradients)


def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    c: Tensor,
    mean: Tensor,
    invstd: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    needs = Needs(*options[7])
    stats = mean.new_empty(c.size(1))
    made = (
        x if needs.x else None,
        weight if needs.weight else None,
        bias if needs.bias else None,
        (stats if bn_weight is None else bn_weight) if needs.norm else None,
        (stats if bn_bias is None else bn_bias) if needs.norm else None,
        c if needs.residual else None,
    )
    return tuple(x.new_empty(0) if like is None else torch.empty_like(like) for like in made)


_forward_op = library.define(
    "conv_bn_act(Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "str norm, float momentum, float eps, str activation, float param, bool saves, str implementation) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = library.define(
    "conv_bn_act_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor? residual, Tensor? y, Tensor c, Tensor mean, Tensor invstd, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups, str norm, str activation, float param, bool[5] needs, str implementation) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


# ---------------------------------------------------------------------------------- autograd
_NOTHING = (None,) * 13  # gradients of what is no tensor, or needs none


class ConvBNActFunction(torch.autograd.Function):
    """y = act(batch_norm(conv2d(x, weight) + bias) + residual), by one implementation of the op.

    Arguments in order: x (N, C, H, W), weight (K, C / groups, R, S), bias, bn_weight, bn_bias (K,) or None, residual
    like y or None, running_mean, running_var (K,) or None, stride, padding, dilation, groups, norm ("none",
    "running", "batch"), momentum, eps, the activation's name and parameter, True, the implementation's name.
    Differentiable in the first six; double backward works (composed of PyTorch's own ops).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, c, mean, invstd = (_forward if library.unwatched(inputs[0]) else _forward_op)(*inputs)
        x, weight, bias, bn_weight, bn_bias, residual = inputs[:6]
        stride, padding, dilation, groups, norm, _, eps, activation, param, _, implementation = inputs[8:]
        residual, kept_y = batch_norm_act.kept_of(residual, y, Activation(activation, param))
        ctx.save_for_backward(x, weight, bias, bn_weight, bn_bias, residual, kept_y, c, mean, invstd)
        ctx.options = (stride, padding, dilation, groups, norm, activation, param)
        ctx.eps, ctx.implementation = eps, implementation
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (*(None,) * 6, *_NOTHING)
        saved = ctx.saved_tensors
        x, needs_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[1:3]
        needs_norm, needs_residual = ctx.needs_input_grad[3] or ctx.needs_input_grad[4], ctx.needs_input_grad[5]
        needs = Needs(x, *needs_weights, needs_norm, needs_residual)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = _differentiable_backward(ctx, grad_y, saved, needs)
        else:
            run: Any = _backward if library.unwatched(grad_y) else _backward_op
            gradients = run(grad_y, *saved, *ctx.options, list(needs), ctx.implementation)
        wanted = zip(gradients, ctx.needs_input_grad[:6], strict=True)
        return (*(g if needed else None for g, needed in wanted), *_NOTHING)


def _differentiable_backward(
    ctx: Any, grad_y: Tensor, saved: tuple[Any, ...], needs: Needs
) -> tuple[Tensor | None, ...]:
    """create_graph=True: the gradient itself is differentiated, so it is composed of PyTorch's own ops."""
    x, weight, bias, bn_weight, bn_bias, residual, y, _, mean, invstd = saved
    stride, padding, dilation, groups, norm, activation, param = ctx.options
    convolution = _convolution(stride, padding, dilation, groups)
    c = F.conv2d(x, weight, bias, *convolution)
    if norm == "none":
        mean = invstd = None
    elif norm == "batch":
        mean, _, invstd = reference.batch_norm_act.statistics(c, ctx.eps)
    return reference.backward(
        grad_y,
        x,
        weight,
        bias,
        bn_weight,
        bn_bias,
        residual,
        y,
        c,
        mean,
        invstd,
        convolution=convolution,
        norm=norm,
        activation=Activation(activation, param),
        needs=needs,
    )


# --------------------------------------------------------------------------------- entry point
def request_of(
    x: Tensor,
    weight: Tensor,
    parameter: Tensor | None,
    convolution: Convolution,
    size: tuple[int, int, int, int],
    norm: str,
    saves: bool,
    residual: bool,
    activation: str,
) -> Request:
    """The request that a call makes; ``parameter`` is any of the batch norm's, ``size`` the output's."""
    pixels = 0
    if not torch.compiler.is_compiling():
        batch, _, height, width = size
        pixels = 1 << (batch * height * width - 1).bit_length()
    return Request(
        x.device.type,
        x.dtype,
        x.dtype if parameter is None else parameter.dtype,
        layout.is_channels_last(x),
        *convolution,
        (weight.size(2), weight.size(3)),
        x.size(1),
        weight.size(0),
        pixels,
        norm,
        saves,
        residual,
        activation,
    )


@dispatch.entry
def apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    convolution: Convolution,
    norm: str,
    momentum: float,
    eps: float,
    activation: Activation,
    memory_efficient: bool = False,
    constant_weight: bool = False,
) -> Tensor:
    """Choose an implementation and run it, with autograd where a gradient is wanted."""
    saves = library.wants_gradient(x, weight, bias, bn_weight, bn_bias, residual)
    if 1 < convolution.groups == x.size(1):
        geometry = depthwise_bn_act.geometry_of(convolution)
        depthwise = depthwise_bn_act.choose(x, weight, geometry, norm, saves, residual is not None, activation)
        if depthwise != "torch":
            return depthwise_bn_act.apply(
                x, weight, bias, bn_weight, bn_bias, residual, running_mean, running_var,
                geometry, norm, momentum, eps, activation, memory_efficient, saves, depthwise,
            )  # fmt: skip
    parameter = bn_weight if bn_weight is not None else running_mean
    size = convolution.output_size(x, weight)
    request = request_of(x, weight, parameter, convolution, size, norm, saves, residual is not None, activation.name)
    backend = dispatch.choose(NAME, request, x, weight).backend
    transformed = library.transformed()
    if transformed and backend != "torch":
        raise library.no_transforms(NAME, backend)
    if backend == "torch" or x.numel() == 0:
        plain = not saves or transformed or torch.compiler.is_compiling()
        with contextlib.nullcontext() if plain or x.grad_fn is None else recompute.forgetting(x):
            c = F.conv2d(x, weight, bias, *convolution)
        if norm == "none":
            return reference_activation.forward(c if residual is None else c + residual, activation)
        return batch_norm_act.apply(
            c, bn_weight, bn_bias, residual, running_mean, running_var, norm == "batch", momentum, eps, activation,
            recompute.MemoryEfficientFunction if memory_efficient and not plain else None, overwrite=True,
        )  # fmt: skip
    inputs = (
        x, weight, bias, bn_weight, bn_bias, residual, running_mean, running_var,
        *convolution, norm, momentum, eps, *activation, saves, backend,
    )  # fmt: skip
    if saves:
        return ConvBNActFunction.apply(*inputs)
    if constant_weight and norm == "none" and backend == "cpu" and library.unwatched(x):
        run = dispatch.implementation(NAME, backend).convolve_constant
        return run(x, weight, bias, residual, convolution, activation)
    return (_forward if library.unwatched(x) else _forward_op)(*inputs)[0]
