"""act(batch_norm(x)) into channels of a wider map in Triton; the contract is kernels/reference/atrous.py.

Statistics are batch_norm_act's kernels; the kernel that normalises writes the wider map in place. Backward is
batch_norm_act's: the gradient's channels are copied out of the wider map, once.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import layout
from ..activation import CODES, Activation
from ..reference import atrous as reference
from ..reference.batch_norm_act import Request, accumulate_dtype
from . import activation as act
from . import batch_norm_act, interpreted, tiles
from .target import device_of

_INT32_END = 2**31


@triton.jit
def _forward_into_kernel(
    x, weight, bias, mean, spread, y, mean_out, invstd_out,
    outer, channels, inner, n_tiles, tiles_k, tiles_per_split, further,
    EPS: tl.constexpr, CODE: tl.constexpr, PARAM: tl.constexpr, RUNNING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As batch_norm_act's, for y in a map with ``further`` elements more an image, or in channels_last a row."""
    dtype = mean_out.dtype.element_ty
    index, exists = tiles.channel_index(tl.program_id(0), channels, CHANNELS_LAST, BLOCK_K)
    m = tl.load(mean + index, mask=exists, other=0.0).to(dtype)
    r = tl.load(spread + index, mask=exists, other=1.0).to(dtype)
    if RUNNING:
        r = tl.rsqrt(r + EPS)
        if tl.program_id(1) == 0:
            tl.store(mean_out + index, m, mask=exists)
            tl.store(invstd_out + index, r, mask=exists)
    w, b = batch_norm_act._scale_and_shift(weight, bias, index, exists, dtype)
    first = tl.program_id(1) * tiles_per_split
    for t in range(first, tl.minimum(first + tiles_per_split, n_tiles)):
        offsets, mask = tiles.tile(
            t, index, outer, channels, inner, tiles_k, CHANNELS_LAST, INT64, BLOCK_R, BLOCK_K
        )  # fmt: skip
        rows = ((t if CHANNELS_LAST else t // tiles_k) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
        if INT64:
            rows = rows.to(tl.int64)
        z = (tl.load(x + offsets, mask=mask, other=0.0).to(dtype) - m) * r * w + b
        tl.store(y + (offsets + rows * further), act.forward(z, CODE, PARAM).to(y.dtype.element_ty), mask=mask)


def supports(request: Request) -> str | None:
    """None where this backend runs the request, else the reason."""
    if interpreted() and torch.bfloat16 in (request.dtype, request.param_dtype):
        return "Triton's interpreter truncates to bfloat16 instead of rounding"
    return batch_norm_act.supports(request)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    out: Tensor,
    *,
    batch_stats: bool,
    momentum: float,
    eps: float,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """Fill ``out``; the mean and invstd that were used."""
    x = layout.dense(x)
    mean = torch.empty(x.size(1), dtype=accumulate_dtype(x.dtype), device=x.device)
    invstd = torch.empty_like(mean)
    weight, bias = batch_norm_act._dense1(weight), batch_norm_act._dense1(bias)
    view = layout.of(x)
    y = out if layout.is_part(out, view) else torch.empty_like(x)
    step = layout.step(y, view)
    with device_of(x):
        if batch_stats:
            batch_norm_act._batch_statistics(x, running_mean, running_var, mean, invstd, momentum, eps)
            source = mean, invstd
        elif running_mean is None or running_var is None:
            raise ValueError("running statistics are needed where batch statistics are not used")
        else:
            source = running_mean.contiguous(), running_var.contiguous()
        plan = tiles.plan(x, reduction=False)
        meta = plan.meta | {"INT64": plan.int64 or (view.outer + plan.launch.block_r) * step > _INT32_END}
        _forward_into_kernel[plan.grid](
            x, weight, bias, *source, y, mean, invstd, *plan.sizes, step - view.channels * view.inner,
            EPS=eps, CODE=CODES[activation.name], PARAM=activation.param, RUNNING=not batch_stats, **meta,
            **tiles.registers(x.dtype, activation.name),
        )  # fmt: skip
    if y is not out:
        out.copy_(y)
    return mean, invstd


backward = functools.partial(reference.backward_by, batch_norm_act)
