"""act(conv2d(x, weight) + bias) with one input channel per output channel: library ops, autograd Function, choice.

Arguments have been checked by :mod:`dlkern.functional` before anything here runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from dlkern import dispatch
from dlkern.kernels import layout
from dlkern.kernels.activation import Activation
from dlkern.kernels.reference import activation as reference_activation
from dlkern.kernels.reference import depthwise as reference
from dlkern.kernels.reference.batch_norm_act import accumulate_dtype
from dlkern.kernels.reference.depthwise import Request

from . import library

NAME = "depthwise"
IDENTITY = Activation("identity")


def _default_order(request: Request) -> Sequence[str]:
    """On the CPU ours where benchmarks (float32, one thread) show it faster than oneDNN."""
    if request.device != "cpu":
        return ("torch",)  # until a committed results file shows ours right and not slower
    ours, theirs = ("cpu", "torch"), ("torch",)
    if max(request.dilation) > 1:
        return ours  # PyTorch's gradients take a slow path, and its forward at large distances
    size, reduction = max(request.kernel), request.stride[0] * request.stride[1]
    if request.gradients and size > 3:
        return ours  # PyTorch's gradient of the weight is fast for 3 x 3 alone
    if request.channels_last:
        small = 0 < request.plane <= 256  # 14 x 14
        return theirs if small and reduction > 1 else ours
    if request.gradients:
        return ours if request.plane >= 1024 * reduction else theirs
    return ours if size <= 3 and (reduction == 1 or request.plane >= 256) else theirs


OP = dispatch.register(
    dispatch.Op(
        NAME,
        {
            "torch": "torch",
            "reference": "dlkern.kernels.reference.depthwise",
            "cpu": "dlkern.kernels.cpu.depthwise",
            "triton": "dlkern.kernels.triton.depthwise",
            "cuda": "dlkern.kernels.cuda.depthwise",
            "numba": "dlkern.kernels.numba.depthwise",
        },
        _default_order,
    )
)


class Geometry(NamedTuple):
    """Where the taps lie. padding is zeros: (top, bottom, left, right)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def output_size(self, x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        """(N, C * multiplier, OH, OW)."""
        return reference.output_size(x, weight, *self)


# -------------------------------------------------------------------------------- library ops
def run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    param: float,
    statistics: bool,
    implementation: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, and the mean and biased variance of its channels where ``statistics`` asks for them."""
    return dispatch.implementation(NAME, implementation).forward(
        x,
        weight,
        bias,
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        activation=Activation(activation, param),
        statistics=statistics,
    )


def _forward_tensors(x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A library op returns tensors: an empty one stands for None."""
    y, mean, variance = run_forward(x, *inputs)
    nothing = x.new_empty(0, dtype=accumulate_dtype(x.dtype))
    return y, nothing if mean is None else mean, torch.empty_like(nothing) if variance is None else variance


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    param: float,
    statistics: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    size = Geometry(tuple(stride), tuple(padding), tuple(dilation)).output_size(x, weight)  # type: ignore[arg-type]
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=reference.memory_format(x))
    mean = x.new_empty(weight.size(0) if statistics else 0, dtype=accumulate_dtype(x.dtype))
    return y, mean, torch.empty_like(mean)


def run_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    implementation: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias; None where not needed."""
    return dispatch.implementation(NAME, implementation).backward(
        grad_y,
        x,
        weight,
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        needs_x=needs_x,
        needs_weight=needs_weight,
        needs_bias=needs_bias,
    )


def _backward_tensors(grad_y: Tensor, x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if g is None else g for g in run_backward(grad_y, x, *inputs))


def _backward_fake(grad_y: Tensor, x: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs_x, needs_weight, needs_bias, _ = options
    return (
        torch.empty_like(layout.dense(x)) if needs_x else x.new_empty(0),
        weight.new_empty(weight.shape) if needs_weight else x.new_empty(0),
        weight.new_empty(weight.size(0)) if needs_bias else x.new_empty(0),
    )


forward_op = library.define(
    "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, int[2] dilation, "
    "str activation, float param, bool statistics, str implementation) -> (Tensor, Tensor, Tensor)",
    _forward_tensors,
    _forward_fake,
)
backward_op = library.define(
    "depthwise_conv2d_backward(Tensor grad_y, Tensor x, Tensor weight, int[2] stride, int[4] padding, "
    "int[2] dilation, bool needs_x, bool needs_weight, bool needs_bias, str implementation) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_tensors,
    _backward_fake,
)


# ---------------------------------------------------------------------------------- autograd
_NOTHING = (None,) * 7  # gradients of what is no tensor


class DepthwiseConv2dFunction(torch.autograd.Function):
    """y = conv2d(x, weight) + bias, output channel o reading input channel o // multiplier.

    Arguments in order: x (N, C, H, W), weight (C * multiplier, 1, kh, kw), bias (C * multiplier,) or None, stride,
    padding (top, bottom, left, right), dilation, "identity", 0.0, False, the name of the implementation.
    Differentiable in the first three; double backward works (composed of PyTorch's own ops).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        save(ctx, inputs)
        return (run_forward if library.unwatched(inputs[0]) else forward_op)(*inputs)[0]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None, None, None, *_NOTHING)
        x, weight = ctx.saved_tensors
        dx, dweight, dbias = gradients(grad_y, x, weight, ctx.geometry, ctx.needs_input_grad[:3], ctx.implementation)
        return (dx, dweight, dbias, *_NOTHING)


class _TransformedFunction(DepthwiseConv2dFunction):
    """The same for torch.func transforms, which need ``setup_context`` (and its cost per call)."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:  # type: ignore[override]
        return forward_op(*inputs)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, inputs)


def save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    x, weight, _, *geometry, _, _, _, implementation = inputs
    ctx.save_for_backward(x, weight)
    ctx.geometry, ctx.implementation = Geometry(*geometry), implementation
    ctx.set_materialize_grads(False)


def gradients(
    grad_y: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: Sequence[bool], implementation: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias; None where ``needs`` does not ask for them."""
    needs_x, needs_weight, needs_bias = needs
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return differentiable_gradients(grad_y, x, weight, geometry, needs)
    run: Any = run_backward if library.unwatched(grad_y) else backward_op
    dx, dweight, dbias = run(grad_y, x, weight, *geometry, needs_x, needs_weight, needs_bias, implementation)
    return dx if needs_x else None, dweight if needs_weight else None, dbias if needs_bias else None


def differentiable_gradients(
    grad_y: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``gradients`` for create_graph=True: they are differentiated themselves, so PyTorch's own ops make them."""
    x, padding = _padded(x, geometry.padding)
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        grad_y, x, weight, [weight.size(0)], geometry.stride, padding, geometry.dilation, False, [0, 0], x.size(1),
        list(needs),
    )  # fmt: skip
    if needs[0] and padding == (0, 0):
        top, bottom, left, right = geometry.padding
        dx = F.pad(dx, (-left, -right, -top, -bottom))
    return dx, dweight, dbias


# --------------------------------------------------------------------------------- entry point
def _padded(x: Tensor, padding: tuple[int, int, int, int]) -> tuple[Tensor, tuple[int, int]]:
    """x with whatever zeros a convolution with the same on both sides cannot add, and the padding that it can."""
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def request_of(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    activation: str = "identity",
    statistics: bool = False,
    dtype: torch.dtype | None = None,
    gradients: bool = False,
) -> Request:
    """The request that a call makes; ``dtype`` is the one that autocast will give to x."""
    plane = 0
    if not torch.compiler.is_compiling():
        *_, height, width = geometry.output_size(x, weight)
        plane = 1 << max(height * width - 1, 0).bit_length()
    return Request(
        x.device.type,
        x.dtype if dtype is None else dtype,
        reference.channels_last(x),
        (weight.size(2), weight.size(3)),
        geometry.stride,
        geometry.dilation,
        weight.size(0) // x.size(1),
        activation,
        statistics,
        gradients,
        plane,
    )


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: Activation) -> Tensor:
    """The op by PyTorch's own convolution."""
    x, padding = _padded(x, geometry.padding)
    c = F.conv2d(x, weight, bias, geometry.stride, padding, geometry.dilation, x.size(1))
    if torch._C._are_functorch_transforms_active():
        return reference_activation.forward(c, activation)
    return reference_activation.forward_inplace(c, activation)


@dispatch.entry
def apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: Activation = IDENTITY
) -> Tensor:
    """Choose an implementation and run it, with autograd where a gradient is wanted."""
    saves = library.transformed() or library.wants_gradient(x, weight, bias)
    # backward wants the convolution's output and not the activation's
    backend = choose(x, weight, geometry, "identity" if saves else activation.name, saves)
    if backend == "torch":
        return by_torch(x, weight, bias, geometry, activation)
    return run(x, weight, bias, geometry, activation, backend)


def _takes_gradients_only() -> bool:
    """Whether of all transforms only torch.func.grad, or vjp, is active."""
    if forward_ad._current_level >= 0:
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return all(level.key() == torch._C._functorch.TransformType.Grad for level in levels)


def choose(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    activation: str,
    gradients: bool,
    dtype: torch.dtype | None = None,
) -> str:
    """The backend that runs a call; ``gradients`` tells whether a backward pass follows (``dtype`` as above).

    PyTorch's own where there is nothing to compute, and under vmap and forward mode, which it alone has.

    Raises:
        RuntimeError: a backend was forced that cannot run this.
    """
    if x.numel() == 0 or weight.numel() == 0:
        return "torch"
    if library.transformed() and not _takes_gradients_only():
        forced = dispatch.forced(NAME)
        if forced is None or forced == "torch":
            return "torch"
        raise RuntimeError(
            f"{NAME}: the {forced} backend has no vmap and no forward-mode gradients (jvp); "
            "use dlkern.backend(depthwise='torch')"
        )
    request = request_of(x, weight, geometry, activation, False, dtype, gradients)
    return dispatch.choose(NAME, request, x, weight).backend


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: Activation, backend: str
) -> Tensor:
    """The op by an implementation other than "torch"."""
    watched = library.transformed()
    if not watched and not library.wants_gradient(x, weight, bias):
        inputs = (x, weight, bias, *geometry, *activation, False, backend)
        return (run_forward if library.unwatched(x) else forward_op)(*inputs)[0]
    function = _TransformedFunction if watched else DepthwiseConv2dFunction
    y = function.apply(x, weight, bias, *geometry, *IDENTITY, False, backend)
    return reference_activation.forward(y, activation)
