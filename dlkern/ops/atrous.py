"""Atrous spatial pyramid pooling: batch norms and activations of parallel branches, written side by side into one map.

The branches' convolutions are the ops ``conv_bn_act`` (dense, of any dilation: its Function is that of an atrous
convolution) and ``depthwise``; what is left of a concatenation of them is here. Arguments have been checked by
:mod:`dlkern.functional`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlkern import dispatch
from dlkern.kernels import layout
from dlkern.kernels.activation import Activation
from dlkern.kernels.reference import batch_norm_act as reference
from dlkern.kernels.reference.batch_norm_act import Request, accumulate_dtype

from . import batch_norm_act, library
from .conv_bn_act import ConvBNActFunction

__all__ = ["NAME", "ConcatBNActFunction", "ConvBNActFunction", "Options", "PooledMean", "apply"]

NAME = "atrous"

OP = dispatch.register(
    dispatch.Op(
        NAME,
        {
            "torch": "torch",
            "reference": "dlkern.kernels.reference.atrous",
            "cpu": "dlkern.kernels.cpu.atrous",
            "triton": "dlkern.kernels.triton.atrous",
        },
        batch_norm_act._default_order,  # the same kernels, and what they save more is the same
    )
)


class Options(NamedTuple):
    """What a branch's batch norm and activation are told besides their tensors."""

    batch_stats: bool
    momentum: float
    eps: float
    activation: Activation


# -------------------------------------------------------------------------------- library op
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    out: Tensor,
    batch_stats: bool,
    momentum: float,
    eps: float,
    activation: str,
    param: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    return dispatch.implementation(NAME, implementation).forward(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        out,
        batch_stats=batch_stats,
        momentum=momentum,
        eps=eps,
        activation=Activation(activation, param),
    )


def _forward_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.size(1), dtype=accumulate_dtype(x.dtype))
    return mean, torch.empty_like(mean)


def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    batch_stats: bool,
    activation: str,
    param: float,
    needs_x: bool,
    needs_params: bool,
    implementation: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return dispatch.implementation(NAME, implementation).backward(
        grad_y,
        x,
        weight,
        bias,
        mean,
        invstd,
        batch_stats=batch_stats,
        activation=Activation(activation, param),
        needs_x=needs_x,
        needs_params=needs_params,
    )


def _backward_tensors(grad_y: Tensor, x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """A library op returns tensors: an empty one stands for None."""
    return tuple(x.new_empty(0) if g is None else g for g in _backward(grad_y, x, *inputs))


def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs_x, needs_params, _ = options
    return (
        torch.empty_like(layout.dense(x)) if needs_x else x.new_empty(0),
        torch.empty_like(mean if weight is None else weight) if needs_params else x.new_empty(0),
        torch.empty_like(mean if bias is None else bias) if needs_params else x.new_empty(0),
    )


forward_op = library.define(
    "atrous_branch(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!) out, bool batch_stats, float momentum, float eps, str activation, float param, str implementation) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward_op = library.define(
    "atrous_branch_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, "
    "bool batch_stats, str activation, float param, bool needs_x, bool needs_params, str implementation) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_tensors,
    _backward_fake,
)


# ---------------------------------------------------------------------------------- autograd
def _parts(channels: Sequence[int], whole: Tensor) -> Iterator[Tensor]:
    """The branches' channels of a map."""
    first = 0
    for count in channels:
        yield whole.narrow(1, first, count)
        first += count


def _run(
    implementation: str, options: Sequence[Options], maps: Sequence[Tensor], parameters: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor]]:
    """The concatenation, and each branch's mean and invstd; ``parameters`` are four of each branch."""
    first = maps[0]
    n, _, height, width = first.shape
    last = layout.is_channels_last(first) and not first.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    channels = [x.size(1) for x in maps]
    size = (n, sum(channels), height, width)
    whole = torch.empty(size, dtype=first.dtype, device=first.device, memory_format=memory_format)
    run: Any = _forward if library.unwatched(first) else forward_op
    kept: list[Tensor] = []
    for i, (x, option, part) in enumerate(zip(maps, options, _parts(channels, whole), strict=True)):
        batch_stats, momentum, eps, activation = option
        x = x.contiguous(memory_format=memory_format)
        tensors = parameters[4 * i : 4 * i + 4]
        kept += run(x, *tensors, part, batch_stats, momentum, eps, *activation, implementation)
    return whole, kept


class ConcatBNActFunction(torch.autograd.Function):
    """cat([act_i(batch_norm_i(x_i))], 1), written in place.

    Arguments in order: the implementation's name, a tuple of :class:`Options`, one a branch, the maps x_i (N, C_i, H,
    W), and each branch's weight, bias, running_mean and running_var (C_i,) or None. Differentiable in the maps, weights
    and biases; double backward works (composed of PyTorch's own ops).
    """

    @staticmethod
    def forward(ctx: Any, implementation: str, options: tuple[Options, ...], *tensors: Tensor | None) -> Tensor:
        branches = len(options)
        maps: Any = tensors[:branches]
        parameters = tensors[branches:]
        whole, kept = _run(implementation, options, maps, parameters)
        weights = [p for i, p in enumerate(parameters) if i % 4 < 2]
        ctx.save_for_backward(*maps, *weights, *kept)
        ctx.options, ctx.implementation = options, implementation
        ctx.set_materialize_grads(False)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        branches = len(ctx.options)
        if grad is None:
            return (None,) * (2 + 5 * branches)
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        maps, parameters, kept = saved[:branches], saved[branches : 3 * branches], saved[3 * branches :]
        dmaps: list[Tensor | None] = []
        dparameters: list[Tensor | None] = []
        for i, part in enumerate(_parts([x.size(1) for x in maps], grad)):
            needs_weight, needs_bias = needs[branches + 4 * i : branches + 4 * i + 2]
            tensors = (*parameters[2 * i : 2 * i + 2], *kept[2 * i : 2 * i + 2])
            dx, dweight, dbias = _branch_gradients(ctx, i, part, maps[i], tensors, needs[i], needs_weight or needs_bias)
            dmaps.append(dx if needs[i] else None)
            dparameters += [dweight if needs_weight else None, dbias if needs_bias else None, None, None]
        return (None, None, *dmaps, *dparameters)


def _branch_gradients(
    ctx: Any,
    branch: int,
    grad: Tensor,
    x: Tensor,
    tensors: tuple[Any, ...],
    needs_x: bool,
    needs_params: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A branch's gradients of its map, weight and bias; ``tensors`` are weight, bias, mean and invstd."""
    weight, bias, mean, invstd = tensors
    batch_stats, _, eps, activation = ctx.options[branch]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # create_graph=True: the gradient itself is differentiated, so it is composed of PyTorch's own ops
        if batch_stats:
            mean, _, invstd = reference.statistics(x, eps)
        return reference.backward(
            grad,
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
    run: Any = _backward if library.unwatched(grad) else backward_op
    return run(grad, x, weight, bias, mean, invstd, batch_stats, *activation, needs_x, needs_params, ctx.implementation)


class PooledMean(torch.autograd.Function):
    """The mean of each channel of x (N, C, H, W): (N, C, 1, 1).

    PyTorch's own writes the gradient, one value a channel, out for every pixel before it is added to that of the other
    branches; this one hands it over as a view.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return (grad / (ctx.shape[2] * ctx.shape[3])).expand(ctx.shape)


# --------------------------------------------------------------------------------- entry point
@dispatch.entry
def apply(
    maps: Sequence[Tensor], parameters: Sequence[tuple[Tensor | None, ...]], options: Sequence[Options]
) -> Tensor:
    """cat([act_i(batch_norm_i(x_i))], 1): choose an implementation and run it, with autograd where it is wanted.

    ``parameters`` are each branch's weight, bias, running_mean and running_var.
    """
    first = maps[0]
    backend = choose(maps, parameters, options)
    if backend == "torch" or first.numel() == 0:
        made = []
        for x, (weight, bias, *statistics), option in zip(maps, parameters, options, strict=True):
            mean, var = statistics
            made.append(batch_norm_act.apply(x, weight, bias, None, mean, var, *option))
        return torch.cat(made, 1)
    flat = [p for tensors in parameters for p in tensors]
    if library.wants_gradient(*maps, *(p for tensors in parameters for p in tensors[:2])):
        return ConcatBNActFunction.apply(backend, tuple(options), *maps, *flat)
    return _run(backend, options, maps, flat)[0]


def choose(maps: Sequence[Tensor], parameters: Sequence[tuple[Tensor | None, ...]], options: Sequence[Options]) -> str:
    """The backend that runs a call: "torch" where it is that of any branch.

    Raises:
        RuntimeError: a backend was forced that cannot run this.
    """
    channels_last = layout.is_channels_last(maps[0])
    for x, (weight, _, running_mean, _), option in zip(maps, parameters, options, strict=True):
        like = weight if weight is not None else running_mean
        request = Request(
            x.device.type,
            x.dtype,
            x.dtype if like is None else like.dtype,
            channels_last,
            option.batch_stats,
            False,
            option.activation.name,
        )
        backend = dispatch.choose(NAME, request, x).backend
        if backend == "torch":
            return backend
    if library.transformed():
        if dispatch.forced(NAME) is None:
            return "torch"
        raise library.no_transforms(NAME, backend)
    return backend
