"""act(batch_norm(x) + residual): library ops, autograd Functions, implementations.

Arguments have been checked by :mod:`dlkern.functional` before anything here runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlkern import dispatch
from dlkern.kernels import layout
from dlkern.kernels.activation import Activation, gradient_from_output
from dlkern.kernels.reference import activation as reference_activation
from dlkern.kernels.reference import batch_norm_act as reference
from dlkern.kernels.reference.batch_norm_act import Request, accumulate_dtype

from . import library

NAME = "batch_norm_act"

#: How many times larger than the weight a convolution's output is, from which on folding the batch norm into the
#: weight at each call costs less than a pass over the output.
FOLDED_FROM = 4


def _default_order(request: Request) -> Sequence[str]:
    if request.device != "cpu":
        return ("torch",)  # until a committed results file shows ours right and not slower
    if request.channels_last and request.batch_stats and request.activation in _NOT_FASTER:
        return ("torch",)
    return ("cpu", "torch")


#: Activations with which training in channels_last is no faster than PyTorch's own two passes on the CPU.
_NOT_FASTER = ("silu", "sigmoid", "gelu", "gelu_tanh")


OP = dispatch.register(
    dispatch.Op(
        NAME,
        {
            "torch": "torch",
            "reference": "dlkern.kernels.reference.batch_norm_act",
            "cpu": "dlkern.kernels.cpu.batch_norm_act",
            "triton": "dlkern.kernels.triton.batch_norm_act",
            "cuda": "dlkern.kernels.cuda.batch_norm_act",
            "numba": "dlkern.kernels.numba.batch_norm_act",
        },
        _default_order,
    )
)


# -------------------------------------------------------------------------------- library ops
def run_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batch_stats: bool,
    momentum: float,
    eps: float,
    activation: str,
    param: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return dispatch.implementation(NAME, implementation).forward(
        x,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        batch_stats=batch_stats,
        momentum=momentum,
        eps=eps,
        activation=Activation(activation, param),
    )


def _forward_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulate_dtype(x.dtype)
    stats = x.new_empty(x.size(1), dtype=wide)
    return torch.empty_like(layout.dense(x)), stats, torch.empty_like(stats)


def run_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    batch_stats: bool,
    activation: str,
    param: float,
    needs_x: bool,
    needs_params: bool,
    needs_residual: bool,
    implementation: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    return dispatch.implementation(NAME, implementation).backward(
        grad_y,
        x,
        weight,
        bias,
        residual,
        y,
        mean,
        invstd,
        batch_stats=batch_stats,
        activation=Activation(activation, param),
        needs_x=needs_x,
        needs_params=needs_params,
        needs_residual=needs_residual,
    )


def _backward_tensors(grad_y: Tensor, x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """A library op returns tensors: an empty one stands for None."""
    return tuple(x.new_empty(0) if g is None else g for g in run_backward(grad_y, x, *inputs))


def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, needs_x, needs_params, needs_residual, _ = options
    dense = layout.dense(x)
    return (
        torch.empty_like(dense) if needs_x else x.new_empty(0),
        torch.empty_like(mean if weight is None else weight) if needs_params else x.new_empty(0),
        torch.empty_like(mean if bias is None else bias) if needs_params else x.new_empty(0),
        torch.empty_like(dense) if needs_residual else x.new_empty(0),
    )


forward_op = library.define(
    "batch_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool batch_stats, float momentum, float eps, str activation, float param, "
    "str implementation) -> (Tensor, Tensor, Tensor)",
    run_forward,
    _forward_fake,
)
backward_op = library.define(
    "batch_norm_act_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? y, "
    "Tensor mean, Tensor invstd, bool batch_stats, str activation, float param, bool needs_x, bool needs_params, "
    "bool needs_residual, str implementation) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_tensors,
    _backward_fake,
)


# ---------------------------------------------------------------------------------- autograd
_NOTHING = (None,) * 8  # gradients of what is no tensor, or needs none


class BatchNormActFunction(torch.autograd.Function):
    """y = act(batch_norm(x) + residual), differentiable in x, weight, bias and residual.

    Arguments in order: x (N, C, *), weight, bias (C,) or None, residual like x or None, running_mean,
    running_var (C,) or None, batch_stats, momentum, eps, the activation's name and parameter, the
    name of the implementation. Double backward works (composed of PyTorch's own ops).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        outputs = (run_forward if library.unwatched(inputs[0]) else forward_op)(*inputs)
        save(ctx, inputs, *outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return gradients(ctx, grad_y, ctx.saved_tensors)


def gradients(ctx: Any, grad_y: Tensor | None, saved: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """What backward returns, from what ``save`` kept."""
    if grad_y is None:
        return (None, None, None, None, *_NOTHING)
    x, weight, bias, residual, y, mean, invstd = saved
    batch_stats, eps, activation, param, implementation = ctx.options
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    needs_params = needs_weight or needs_bias
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # create_graph=True: the gradient itself is differentiated, so it is composed of PyTorch's own ops
        if batch_stats:
            mean, _, invstd = reference.statistics(x, eps)
        dx, dweight, dbias, dresidual = reference.backward(
            grad_y,
            x,
            weight,
            bias,
            residual,
            y,
            mean,
            invstd,
            batch_stats=batch_stats,
            activation=Activation(activation, param),
            needs_x=needs_x,
            needs_params=needs_params,
            needs_residual=needs_residual,
        )
    else:
        shared = needs_residual and activation == "identity"  # the residual's gradient is grad_y itself
        dx, dweight, dbias, dresidual = (run_backward if library.unwatched(grad_y) else backward_op)(
            grad_y,
            x,
            weight,
            bias,
            residual,
            y,
            mean,
            invstd,
            batch_stats,
            activation,
            param,
            needs_x,
            needs_params,
            needs_residual and not shared,
            implementation,
        )
        if shared:
            dresidual = grad_y
    return (
        dx if needs_x else None,
        dweight if needs_weight else None,
        dbias if needs_bias else None,
        dresidual if needs_residual else None,
        *_NOTHING,
    )


class _TransformedFunction(BatchNormActFunction):
    """The same for torch.func transforms, which need ``setup_context`` (and its cost per call)."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        return forward_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        save(ctx, inputs, *output)
        ctx.mark_non_differentiable(*output[1:])


def kept_of(residual: Tensor | None, y: Tensor, activation: Activation) -> tuple[Tensor | None, Tensor | None]:
    """Residual and output as backward is to have them.

    A residual's activation is differentiated from y, which the next layer keeps anyway, where that can be
    done; else from the pre-activation, computed again from x and the residual.
    """
    return (None, y) if residual is not None and gradient_from_output(activation) else (residual, None)


def save(ctx: Any, inputs: tuple[Any, ...], y: Tensor, mean: Tensor, invstd: Tensor) -> None:
    x, weight, bias, residual, _, _, batch_stats, _, eps, activation, param, implementation = inputs
    residual, kept_y = kept_of(residual, y, Activation(activation, param))
    ctx.save_for_backward(x, weight, bias, residual, kept_y, mean, invstd)
    ctx.options = (batch_stats, eps, activation, param, implementation)
    ctx.set_materialize_grads(False)


# --------------------------------------------------------------------------------- entry point
@dispatch.entry
def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batch_stats: bool,
    momentum: float,
    eps: float,
    activation: Activation,
    function: type[BatchNormActFunction] | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Choose an implementation and run it, with autograd where a gradient is wanted.

    ``overwrite``: nobody else holds x, so that in inference y may take its memory, which spares a third of the traffic.
    ``function`` stands in for BatchNormActFunction; PyTorch's own path, which has none, is then taken only
    where it is forced.
    """
    like = weight if weight is not None else running_mean
    request = Request(
        x.device.type,
        x.dtype,
        x.dtype if like is None else like.dtype,
        layout.is_channels_last(x),
        batch_stats,
        residual is not None,
        activation.name,
    )
    backend = dispatch.choose(NAME, request, x, weight, residual).backend
    if function is not None and backend == "torch" and dispatch.forced(NAME) is None:
        backend = dispatch.first_supporting(NAME, ("cpu", "triton", "reference"), request)
    if backend == "torch" or x.numel() == 0:  # nothing to compute on: PyTorch's own shortcut
        z = F.batch_norm(x, running_mean, running_var, weight, bias, batch_stats, momentum, eps)
        if torch._C._are_functorch_transforms_active():  # vmap may map over the residual and not over z
            return reference_activation.forward(z if residual is None else z + residual, activation)
        return reference_activation.forward_inplace(z if residual is None else z.add_(residual), activation)
    inputs = (
        x, weight, bias, residual, running_mean, running_var, batch_stats, momentum, eps, *activation, backend
    )  # fmt: skip
    # forward mode: a Function without a jvp raises, where an op without one would drop the tangent
    if library.transformed():
        return _TransformedFunction.apply(*inputs)[0]
    if library.wants_gradient(x, weight, bias, residual):
        return (function or BatchNormActFunction).apply(*inputs)
    alone = library.unwatched(x) and torch._C._len_torch_function_stack() == 0
    if overwrite and not batch_stats and backend == "cpu" and alone:
        return dispatch.implementation(NAME, backend).forward(
            x, weight, bias, residual, running_mean, running_var, batch_stats=batch_stats, momentum=momentum, eps=eps,
            activation=activation, out=x,
        )[0]  # fmt: skip
    return (run_forward if library.unwatched(x) else forward_op)(*inputs)[0]
