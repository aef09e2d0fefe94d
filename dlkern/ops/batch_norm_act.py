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

NAME = "batch_norm_act"


def _default_order(request: Request) -> Sequence[str]:
    # On CUDA PyTorch's own kernels run until a committed results file shows ours right and not slower.
    return ("cpu", "torch") if request.device == "cpu" else ("torch",)


OP = dispatch.register(
    dispatch.Op(
        NAME,
        {
            "torch": "torch",
            "reference": "dlkern.kernels.reference.batch_norm_act",
            "cpu": "dlkern.kernels.cpu.batch_norm_act",
            "triton": "dlkern.kernels.triton.batch_norm_act",
        },
        _default_order,
    )
)

# -------------------------------------------------------------------------------- library ops
_LIBRARY = torch.library.Library("dlkern", "FRAGMENT")
_LIBRARY.define(
    "batch_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool batch_stats, float momentum, float eps, str activation, float param, "
    "str implementation) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "batch_norm_act_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? y, "
    "Tensor mean, Tensor invstd, bool batch_stats, str activation, float param, bool needs_x, bool needs_params, "
    "bool needs_residual, str implementation) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward(
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


def _backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = dispatch.implementation(NAME, implementation).backward(
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
    dx, dweight, dbias, dresidual = (x.new_empty(0) if g is None else g for g in grads)
    return dx, dweight, dbias, dresidual  # a library op returns tensors: an empty one stands for None


def _backward_fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = x.new_empty(0)
    dense = layout.dense(x)
    return (
        torch.empty_like(dense) if needs_x else nothing,
        torch.empty_like(mean, dtype=mean.dtype if weight is None else weight.dtype) if needs_params else x.new_empty(0),
        torch.empty_like(mean, dtype=mean.dtype if bias is None else bias.dtype) if needs_params else x.new_empty(0),
        torch.empty_like(dense) if needs_residual else x.new_empty(0),
    )


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("batch_norm_act", _forward, _key)
    _LIBRARY.impl("batch_norm_act_backward", _backward, _key)
torch.library.register_fake("dlkern::batch_norm_act", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("dlkern::batch_norm_act_backward", _backward_fake, lib=_LIBRARY)
_forward_op = torch.ops.dlkern.batch_norm_act.default
_backward_op = torch.ops.dlkern.batch_norm_act_backward.default


# ---------------------------------------------------------------------------------- autograd
def _save(ctx: Any, inputs: tuple[Any, ...], y: Tensor, mean: Tensor, invstd: Tensor) -> None:
    x, weight, bias, residual, _, _, batch_stats, _, eps, activation, param, implementation = inputs
    # A residual's activation is differentiated from y, which the next layer keeps anyway, where that
    # can be done; else from the pre-activation, computed again from x and the residual.
    from_y = residual is not None and gradient_from_output(Activation(activation, param))
    keep_residual = residual is not None and not from_y
    ctx.save_for_backward(
        x, weight, bias, residual if keep_residual else None, y if from_y else None, mean, invstd
    )
    ctx.options = (batch_stats, eps, activation, param, implementation)
    ctx.mark_non_differentiable(mean, invstd)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 12
    if grad_y is None:
        return nothing
    x, weight, bias, residual, y, mean, invstd = ctx.saved_tensors
    batch_stats, eps, activation, param, implementation = ctx.options
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    act = Activation(activation, param)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # create_graph=True: the gradient itself is differentiated, so it is composed of PyTorch's own ops
        if batch_stats:
            mean, _, invstd = reference.statistics(x, eps)
        grads = reference.backward(
            grad_y,
            x,
            weight,
            bias,
            residual,
            y,
            mean,
            invstd,
            batch_stats=batch_stats,
            activation=act,
            needs_x=needs_x,
            needs_params=needs_weight or needs_bias,
            needs_residual=needs_residual,
        )
    else:
        shortcut = activation == "identity"  # the residual's gradient is grad_y itself
        grads = _backward_op(
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
            needs_weight or needs_bias,
            needs_residual and not shortcut,
            implementation,
        )
        if needs_residual and shortcut:
            grads = (*grads[:3], grad_y)
    return (
        grads[0] if needs_x else None,
        grads[1] if needs_weight else None,
        grads[2] if needs_bias else None,
        grads[3] if needs_residual else None,
        *nothing[4:],
    )


class BatchNormActFunction(torch.autograd.Function):
    """y, mean, invstd = act(batch_norm(x) + residual), differentiable in x, weight, bias and residual.

    Arguments in order: x (N, C, *), weight, bias (C,) or None, residual like x or None, running_mean,
    running_var (C,) or None, batch_stats, momentum, eps, the activation's name and parameter, the
    name of the implementation. Double backward works (composed of PyTorch's own ops).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        outputs = _forward_op(*inputs)
        _save(ctx, inputs, *outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_y)


class _TransformedFunction(BatchNormActFunction):
    """The same for torch.func transforms, which need ``setup_context`` (and its cost per call)."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        return _forward_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _save(ctx, inputs, *output)


# --------------------------------------------------------------------------------- entry point
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
) -> Tensor:
    """Choose an implementation and run it, with autograd where a gradient is wanted."""
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
    backend = dispatch.choose(NAME, request).backend
    if backend == "torch" or x.numel() == 0:  # nothing to compute on: PyTorch's own shortcut
        z = F.batch_norm(x, running_mean, running_var, weight, bias, batch_stats, momentum, eps)
        return reference_activation.forward(z if residual is None else z + residual, activation)
    inputs = (
        x, weight, bias, residual, running_mean, running_var, batch_stats, momentum, eps, *activation, backend
    )  # fmt: skip
    if torch._C._are_functorch_transforms_active():
        return _TransformedFunction.apply(*inputs)[0]
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return BatchNormActFunction.apply(*inputs)[0]
    return _forward_op(*inputs)[0]
