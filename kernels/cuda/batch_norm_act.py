"""Launcher of csrc/cuda/batch_norm_act.cu; the contract is that of kernels/reference/batch_norm_act.py.

Training forward: statistics in shares, a merge, a pass that normalises. Inference: that pass alone. Backward: two sums
in shares, a merge, a pass for the gradients of x and residual. No atomics: results are bit for bit repeatable.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import cuda, layout
from ..activation import CODES, Activation
from ..reference.batch_norm_act import Request, accumulate_dtype
from . import batch_norm_act_plan as planning
from . import plan


def supports(request: Request) -> str | None:
    """None where this backend runs the request, else the reason in words."""
    reason = cuda.refuses(request.device, (request.dtype, request.param_dtype))
    if reason is not None:
        return reason
    if request.activation not in CODES:
        return f"the cuda backend has no activation {request.activation!r}"
    return None


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _code(tensor: Tensor | None, otherwise: Tensor) -> int:
    return plan.TYPES[otherwise.dtype if tensor is None else tensor.dtype].code


class _Call(NamedTuple):
    """What the steps of a call depend on."""

    view: layout.Layout
    dtype: torch.dtype
    param_kind: int
    activation: Activation
    aligned: bool
    multiprocessors: int

    def walk(self, reduction: bool) -> planning.Walk:
        return planning.walk(
            self.view, self.dtype, aligned=self.aligned, multiprocessors=self.multiprocessors, reduction=reduction
        )

    @property
    def numbers(self) -> plan.Numbers:
        return {
            "outer": self.view.outer,
            "channels": self.view.channels,
            "inner": self.view.inner,
            "count": self.view.outer * self.view.inner,
            "activation": CODES[self.activation.name],
            "param": self.activation.param,
            "param_kind": self.param_kind,
            "data_kind": plan.TYPES[self.dtype].code,
        }


def _call(tensors: plan.Tensors, x: Tensor, like: Tensor | None, activation: Activation, multiprocessors: int) -> _Call:
    """``like`` is any of the parameters."""
    kind = _code(like, x)
    return _Call(layout.of(x), x.dtype, kind, activation, plan.aligned(tensors), multiprocessors)


@functools.lru_cache(maxsize=4096)
def _forward_steps(call: _Call, batch_stats: bool, momentum: float, eps: float) -> tuple[tuple[plan.Step, ...], int]:
    """The steps of forward, and how many shares its reduction has (0 for none)."""
    numbers = {**call.numbers, "batch_stats": int(batch_stats), "momentum": momentum, "eps": eps}
    last = call.walk(False).step("forward", numbers)
    if not batch_stats:
        return (last,), 0
    walk = call.walk(True)
    first = walk.step("statistics", numbers, 1)
    merge = planning.merge_step("merge_statistics", call.dtype, call.view.channels, first.numbers)
    return (first, merge, last), walk.splits


@functools.lru_cache(maxsize=4096)
def _backward_steps(
    call: _Call, grad_weight_kind: int, grad_bias_kind: int, sums: bool, last: bool
) -> tuple[tuple[plan.Step, ...], int]:
    """The steps of backward, of which either part may not be wanted, and how many shares its reduction has."""
    numbers = {**call.numbers, "grad_weight_kind": grad_weight_kind, "grad_bias_kind": grad_bias_kind}
    steps: list[plan.Step] = []
    splits = 0
    if sums:
        walk = call.walk(True)
        first = walk.step("backward_sums", numbers, 0)
        steps += [first, planning.merge_step("merge_sums", call.dtype, call.view.channels, first.numbers)]
        splits = walk.splits
    if last:
        steps.append(call.walk(False).step("backward", numbers))
    return tuple(steps), splits


def _first(*tensors: Tensor | None) -> Tensor | None:
    return next((t for t in tensors if t is not None), None)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    batch_stats: bool,
    momentum: float,
    eps: float,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and invstd; see the reference's ``forward``."""
    if not batch_stats and (running_mean is None or running_var is None):
        raise ValueError("running statistics are needed where batch statistics are not used")
    x = layout.dense(x)
    y = torch.empty_like(x)
    mean = torch.empty(x.size(1), dtype=accumulate_dtype(x.dtype), device=x.device)
    invstd = torch.empty_like(mean)
    if x.numel() == 0:
        return y, mean.zero_(), invstd.zero_()
    residual = None if residual is None else layout.like(residual, x)
    weight, bias = _vector(weight), _vector(bias)
    # strided running statistics are moved in a copy, which is copied back
    moved_mean, moved_var = _vector(running_mean), _vector(running_var)
    tensors: plan.Tensors = {
        "x": x, "weight": weight, "bias": bias, "residual": residual, "y": y, "mean": mean, "invstd": invstd,
        "running_mean": moved_mean, "running_var": moved_var,
    }  # fmt: skip
    runner = cuda.runtime()
    call = _call(tensors, x, _first(weight, bias, moved_mean), activation, runner.multiprocessors(x.device))
    steps, splits = _forward_steps(call, batch_stats, momentum, eps)
    if splits:
        tensors["partial"] = mean.new_empty(2, splits, x.size(1))
    runner.run(planning.ARGS.launches(steps, tensors), x.device)
    if batch_stats:
        for statistic, moved in ((running_mean, moved_mean), (running_var, moved_var)):
            if statistic is not None and moved is not None and moved is not statistic:
                statistic.copy_(moved)
    return y, mean, invstd


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    *,
    batch_stats: bool,
    activation: Activation,
    needs_x: bool,
    needs_params: bool,
    needs_residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and residual, None where not needed; see the reference's ``backward``."""
    x = layout.dense(x)
    grad_x = torch.empty_like(x) if needs_x else None
    grad_residual = torch.empty_like(x) if needs_residual else None
    grad_weight = grad_bias = None
    if needs_params:
        grad_weight = torch.empty_like(mean, dtype=mean.dtype if weight is None else weight.dtype)
        grad_bias = torch.empty_like(mean, dtype=mean.dtype if bias is None else bias.dtype)
    results = grad_x, grad_weight, grad_bias, grad_residual
    if x.numel() == 0:
        for gradient in results:
            if gradient is not None:
                gradient.zero_()
        return results
    grad_y = layout.like(grad_y, x)
    residual = None if residual is None else layout.like(residual, x)
    y = None if y is None else layout.like(y, x)
    weight, bias = _vector(weight), _vector(bias)
    tensors: plan.Tensors = {
        "x": x, "weight": weight, "bias": bias, "residual": residual, "y": y, "grad_y": grad_y,
        "mean": mean, "invstd": invstd,
        "grad_x": grad_x, "grad_weight": grad_weight, "grad_bias": grad_bias, "grad_residual": grad_residual,
    }  # fmt: skip
    runner = cuda.runtime()
    call = _call(tensors, x, _first(weight, bias), activation, runner.multiprocessors(x.device))
    centred = needs_x and batch_stats
    steps, splits = _backward_steps(
        call, _code(grad_weight, mean), _code(grad_bias, mean), needs_params or centred, needs_x or needs_residual
    )
    if splits:
        tensors["partial"] = mean.new_empty(2, splits, x.size(1))
    if centred:
        tensors["means"] = mean.new_empty(2, x.size(1))
    runner.run(planning.ARGS.launches(steps, tensors), x.device)
    return results
