"""act(batch_norm(conv_transpose2d(x, weight) + bias)): library ops, autograd Function, implementations.

"torch" here means PyTorch's own transposed convolution with the op ``batch_norm_act`` right behind it, which has its
own choice of implementations. The other implementations take the convolution, too. Arguments have been checked by
:mod:`dlkern.functional`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlkern import dispatch
from dlkern.kernels import layout
from dlkern.kernels.activation import Activation
from dlkern.kernels.reference import activation as reference_activation
from dlkern.kernels.reference import transposed as reference
from dlkern.kernels.reference.batch_norm_act import accumulate_dtype
from dlkern.kernels.reference.transposed import Geometry, Needs, Request

from . import batch_norm_act, library

NAME = "transposed"


def _default_order(request: Request) -> Sequence[str]:
    """PyTorch's own convolution, with the op batch_norm_act behind it.

    On the CPU oneDNN's fused one, which inference could use, is slower than that in NCHW on the layers of DCGAN, and no
    faster in channels_last (benchmarks/bench_transposed.py). On a GPU: until a committed results file shows ours right
    and not slower.
    """
    del request
    return ("torch",)


OP = dispatch.register(
    dispatch.Op(
        NAME,
        {
            "torch": "torch",
            "reference": "dlkern.kernels.reference.transposed",
            "cpu": "dlkern.kernels.cpu.transposed",
            "triton": "dlkern.kernels.triton.transposed",
        },
        _default_order,
    )
)


# -------------------------------------------------------------------------------- library ops
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
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
        running_mean,
        running_var,
        geometry=_geometry(stride, padding, output_padding, groups, dilation),
        norm=norm,
        momentum=momentum,
        eps=eps,
        activation=Activation(activation, param),
        saves=saves,
    )
    # a library op returns tensors: an empty one stands for None
    return tuple(x.new_empty(0) if t is None else t for t in outputs)  # type: ignore[return-value]


def _geometry(
    stride: Sequence[int], padding: Sequence[int], output_padding: Sequence[int], groups: int, dilation: Sequence[int]
) -> Geometry:
    return Geometry(tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation))  # type: ignore[arg-type]


def _forward_fake(x: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *geometry, norm, _, _, _, _, saves, _ = options[5:]
    y = F.conv_transpose2d(x, weight, None, *geometry)  # PyTorch's own fake: shape and memory format
    stats = x.new_empty(0 if norm == "none" else y.size(1), dtype=accumulate_dtype(x.dtype))
    return y, torch.empty_like(y) if saves else x.new_empty(0), stats, torch.empty_like(stats)


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    c: Tensor,
    mean: Tensor,
    invstd: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
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
        c,
        None if norm == "none" else mean,
        None if norm == "none" else invstd,
        geometry=_geometry(stride, padding, output_padding, groups, dilation),
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
    c: Tensor,
    mean: Tensor,
    invstd: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    needs = Needs(*options[8])
    stats = mean.new_empty(c.size(1))
    made = (
        x if needs.x else None,
        weight if needs.weight else None,
        bias if needs.bias else None,
        (stats if bn_weight is None else bn_weight) if needs.norm else None,
        (stats if bn_bias is None else bn_bias) if needs.norm else None,
    )
    return tuple(x.new_empty(0) if like is None else torch.empty_like(like) for like in made)


_forward_op = library.define(
    "conv_transpose_bn_act(Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, int[2] stride, int[2] padding, int[2] output_padding, "
    "int groups, int[2] dilation, str norm, float momentum, float eps, str activation, float param, bool saves, "
    "str implementation) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = library.define(
    "conv_transpose_bn_act_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, Tensor? bn_weight, "
    "Tensor? bn_bias, Tensor c, Tensor mean, Tensor invstd, int[2] stride, int[2] padding, int[2] output_padding, "
    "int groups, int[2] dilation, str norm, str activation, float param, bool[4] needs, str implementation) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


# ---------------------------------------------------------------------------------- autograd
_NOTHING = (None,) * 14  # gradients of what is no tensor, or needs none


class ConvTransposeBNActFunction(torch.autograd.Function):
    """y = act(batch_norm(conv_transpose2d(x, weight) + bias)), by one implementation of the op.

    Arguments in order: x (N, C, H, W), weight (C, K / groups, R, S), bias, bn_weight, bn_bias (K,) or None,
    running_mean, running_var (K,) or None, stride, padding, output_padding, groups, dilation, norm ("none", "running",
    "batch"), momentum, eps, the activation's name and parameter, True, the implementation's name. Differentiable in
    the first five; double backward works (composed of PyTorch's own ops).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, c, mean, invstd = (_forward if library.unwatched(inputs[0]) else _forward_op)(*inputs)
        x, weight, bias, bn_weight, bn_bias = inputs[:5]
        *geometry, norm, _, eps, activation, param, _, implementation = inputs[7:]
        ctx.save_for_backward(x, weight, bias, bn_weight, bn_bias, c, mean, invstd)
        ctx.options = (*geometry, norm, activation, param)
        ctx.eps, ctx.implementation = eps, implementation
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (*(None,) * 5, *_NOTHING)
        saved = ctx.saved_tensors
        wants = ctx.needs_input_grad
        needs = Needs(*wants[:3], wants[3] or wants[4])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = _differentiable_backward(ctx, grad_y, saved, needs)
        else:
            run: Any = _backward if library.unwatched(grad_y) else _backward_op
            gradients = run(grad_y, *saved, *ctx.options, list(needs), ctx.implementation)
        return (*(g if needed else None for g, needed in zip(gradients, wants[:5], strict=True)), *_NOTHING)


def _differentiable_backward(
    ctx: Any, grad_y: Tensor, saved: tuple[Any, ...], needs: Needs
) -> tuple[Tensor | None, ...]:
    """create_graph=True: the gradient itself is differentiated, so it is composed of PyTorch's own ops."""
    x, weight, bias, bn_weight, bn_bias, _, mean, invstd = saved
    *geometry, norm, activation, param = ctx.options
    c = F.conv_transpose2d(x, weight, bias, *geometry)
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
        c,
        mean,
        invstd,
        geometry=Geometry(*geometry),
        norm=norm,
        activation=Activation(activation, param),
        needs=needs,
    )


# --------------------------------------------------------------------------------- entry point
def request_of(
    x: Tensor, weight: Tensor, parameter: Tensor | None, geometry: Geometry, norm: str, saves: bool, activation: str
) -> Request:
    """The request that a call makes; ``parameter`` is any of the batch norm's."""
    return Request(
        x.device.type,
        x.dtype,
        x.dtype if parameter is None else parameter.dtype,
        layout.is_channels_last(x),
        *geometry,
        (weight.size(2), weight.size(3)),
        x.size(1),
        weight.size(1) * geometry.groups,
        norm,
        saves,
        activation,
    )


@dispatch.entry
def apply(
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
    activation: Activation,
) -> Tensor:
    """Choose an implementation and run it, with autograd where a gradient is wanted."""
    saves = library.wants_gradient(x, weight, bias, bn_weight, bn_bias)
    parameter = bn_weight if bn_weight is not None else running_mean
    request = request_of(x, weight, parameter, geometry, norm, saves, activation.name)
    transformed = library.transformed()
    forced = dispatch.forced(NAME)
    backend = "torch" if transformed and forced is None else dispatch.choose(NAME, request, x, weight).backend
    if transformed and backend != "torch":
        raise library.no_transforms(NAME, backend)
    if backend == "torch" or x.numel() == 0:
        c = F.conv_transpose2d(x, weight, bias, *geometry)
        if norm == "none":  # nobody else holds the convolution's output, and its backward does not read it
            run = reference_activation.forward if transformed else reference_activation.forward_inplace
            return run(c, activation)
        return batch_norm_act.apply(
            c, bn_weight, bn_bias, None, running_mean, running_var, norm == "batch", momentum, eps, activation,
            overwrite=True,
        )  # fmt: skip
    inputs = (
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var,
        *geometry, norm, momentum, eps, *activation, saves, backend,
    )  # fmt: skip
    if saves:
        return ConvTransposeBNActFunction.apply(*inputs)
    return (_forward if library.unwatched(x) else _forward_op)(*inputs)[0]
