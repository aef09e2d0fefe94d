"""Launcher of csrc/cuda/depthwise.cu; the contract is that of kernels/reference/depthwise.py.

Each memory format is computed in place. Forward: one kernel, and with statistics a merge of what its blocks found.
Backward: at stride 1 the input's gradient is a convolution by the turned kernel; the gradients of weight and bias are
summed in shares, and these in their order. No atomics: results are bit for bit repeatable.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import cuda, layout
from ..activation import CODES, Activation
from ..reference import depthwise as reference
from ..reference.batch_norm_act import accumulate_dtype
from ..reference.depthwise import Padding, Request
from . import depthwise_plan as planning
from . import plan
from .depthwise_plan import MAX_KERNEL, Problem


def supports(request: Request) -> str | None:
    """None where this backend runs the request, else the reason in words."""
    reason = cuda.refuses(request.device, (request.dtype,))
    if reason is not None:
        return reason
    if request.activation not in CODES:
        return f"the cuda backend has no activation {request.activation!r}"
    if request.statistics and request.activation != "identity":
        return f"statistics are those of a convolution without activation, not with {request.activation!r}"
    if max(request.kernel) > MAX_KERNEL:
        return f"the cuda backend has kernels of at most {MAX_KERNEL} x {MAX_KERNEL}, not of {request.kernel}"
    return None


def _problem(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: Padding, dilation: tuple[int, int], aligned: bool
) -> Problem:
    """``aligned``: every tensor that is read or written in packs begins at a multiple of 16 bytes."""
    shape = reference.output_size(x, weight, stride, padding, dilation)
    if min(*x.shape, *shape) < 1:
        raise ValueError(f"the cuda backend has nothing to convolve from {tuple(x.shape)} to {shape}")
    channels_last, multiplier, width = reference.channels_last(x), shape[1] // x.size(1), plan.TYPES[x.dtype].width
    wide = channels_last and aligned and multiplier == 1 and shape[1] % width == 0
    return Problem(
        x.dtype, width if wide else 1, channels_last, shape[0], shape[1], multiplier, x.size(2), x.size(3), *shape[2:],
        (weight.size(2), weight.size(3)), stride, dilation, (padding[0], padding[2]),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _forward_steps(
    problem: Problem, activation: Activation, statistics: bool, multiprocessors: int
) -> tuple[list[plan.Step], int]:
    numbers: plan.Numbers = {"activation": CODES[activation.name], "param": activation.param}
    return planning.forward(problem, multiprocessors, numbers, statistics=statistics)


_input_steps = functools.lru_cache(maxsize=4096)(planning.input_gradient)
_weight_steps = functools.lru_cache(maxsize=4096)(planning.weight_gradient)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
    activation: Activation,
    statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, and mean and variance or None, None; see the reference's ``forward``."""
    if statistics and activation.name != "identity":
        raise ValueError(f"statistics go with the activation 'identity', not {activation.name!r}")
    x, weight = layout.dense(x), weight.contiguous()
    problem = _problem(x, weight, stride, padding, dilation, plan.aligned({"x": x}))
    y = torch.empty(
        (problem.batch, problem.channels, problem.out_height, problem.out_width),
        dtype=x.dtype, device=x.device, memory_format=reference.memory_format(x),
    )  # fmt: skip
    runner = cuda.runtime()
    steps, splits = _forward_steps(problem, activation, statistics, runner.multiprocessors(x.device))
    tensors: plan.Tensors = {"x": x, "weight": weight, "bias": None if bias is None else bias.contiguous(), "y": y}
    mean = var = None
    if statistics:
        wide = accumulate_dtype(x.dtype)
        tensors["partial"] = torch.empty(3, splits, problem.channels, dtype=wide, device=x.device)
        tensors["mean"] = mean = torch.empty(problem.channels, dtype=wide, device=x.device)
        tensors["var"] = var = torch.empty_like(mean)
    runner.run(planning.ARGS.launches(steps, tensors), x.device)
    return y, mean, var


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    stride: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, None where not needed; see the reference's ``backward``."""
    x, weight = layout.dense(x), weight.contiguous()
    grad_y = reference.gradient_as(grad_y, x)
    problem = _problem(x, weight, stride, padding, dilation, plan.aligned({"x": x, "grad_y": grad_y}))
    runner = cuda.runtime()
    multiprocessors = runner.multiprocessors(x.device)
    launches: list[plan.Launch] = []
    dx = dweight = dbias = None
    if needs_x:
        dx = torch.empty_like(x)
        steps = _input_steps(problem, multiprocessors)
        launches += planning.ARGS.launches(steps, {"x": grad_y, "weight": weight, "y": dx})
    if needs_weight or needs_bias:
        dweight = torch.empty_like(weight) if needs_weight else None
        dbias = weight.new_empty(problem.channels) if needs_bias else None
        steps, splits = _weight_steps(problem, multiprocessors)
        shape = splits, problem.taps + 1, problem.channels
        partial = torch.empty(shape, dtype=accumulate_dtype(x.dtype), device=x.device)
        launches += planning.ARGS.launches(
            steps, {"x": x, "grad_y": grad_y, "partial": partial, "grad_weight": dweight, "grad_bias": dbias}
        )
    runner.run(launches, x.device)
    return dx, dweight, dbias
