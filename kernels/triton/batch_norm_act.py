"""act(batch_norm(x) + residual) in Triton; the contract is kernels/reference/batch_norm_act.py.

Training forward: a statistics kernel leaves count, mean and centred sum of squares of each share of each channel
(Welford's recurrence per lane, merged by Chan's formula), a merge kernel makes mean, invstd and running
statistics of them, a third normalises. Inference is the third alone. Backward: the sums of dz and dz * xhat in
shares, a merge, and a kernel for dx and dresidual. No atomics: results are bit for bit repeatable.

Sources: Welford, "Note on a method for calculating corrected sums of squares and products" (1962);
Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import layout
from ..activation import CODES, Activation
from ..reference.batch_norm_act import Request, accumulate_dtype
from . import activation as act
from . import tiles
from .target import device_of, runs_on, stored_dtype

_MERGE_SPLITS = tl.constexpr(tiles.MAX_SPLITS)
_MERGE_CHANNELS = tl.constexpr(8)


# ------------------------------------------------------------------------------------------ kernels
@triton.jit
def _statistics_kernel(
    x, partial, outer, channels, inner, n_tiles, tiles_k, tiles_per_split,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial [3, splits, channels]: count, mean and centred sum of squares of a share of x."""
    dtype = partial.dtype.element_ty
    index, exists = tiles.channel_index(tl.program_id(0), channels, CHANNELS_LAST, BLOCK_K)
    split = tl.program_id(1)
    count = tl.zeros([BLOCK_R, BLOCK_K], dtype)
    mean = tl.zeros([BLOCK_R, BLOCK_K], dtype)
    m2 = tl.zeros([BLOCK_R, BLOCK_K], dtype)
    first = split * tiles_per_split
    for t in range(first, tl.minimum(first + tiles_per_split, n_tiles)):
        offsets, mask = tiles.tile(
            t, index, outer, channels, inner, tiles_k, CHANNELS_LAST, INT64, BLOCK_R, BLOCK_K
        )  # fmt: skip
        v = tl.load(x + offsets, mask=mask, other=0.0).to(dtype)
        delta = tl.where(mask, v - mean, 0.0)
        count += tl.where(mask, 1.0, 0.0).to(dtype)
        mean += delta / tl.maximum(count, 1.0)
        m2 += delta * tl.where(mask, v - mean, 0.0)
    n = tiles.total(count, CHANNELS_LAST)
    safe = tl.maximum(n, 1.0)
    rough = tiles.total(count * mean, CHANNELS_LAST) / safe
    centre = rough + tiles.total(count * (mean - rough), CHANNELS_LAST) / safe
    off = mean - centre
    spread = tiles.total(m2 + count * off * off, CHANNELS_LAST)
    out = partial + split * channels + index
    step = tl.num_programs(1) * channels
    tl.store(out, n, mask=exists)
    tl.store(out + step, centre, mask=exists)
    tl.store(out + 2 * step, spread, mask=exists)


@triton.jit
def _merge_statistics_kernel(
    partial, mean_out, invstd_out, running_mean, running_var, momentum, momentum_rest, count, channels, splits,
    EPS: tl.constexpr,
):  # fmt: skip
    """mean, invstd (channels,) from partial; running statistics move towards mean and unbiased variance."""
    dtype = partial.dtype.element_ty
    c = tl.program_id(0) * _MERGE_CHANNELS + tl.arange(0, _MERGE_CHANNELS)[None, :]
    s = tl.arange(0, _MERGE_SPLITS)[:, None]
    mask, exists = (s < splits) & (c < channels), c < channels
    source, step = partial + s * channels + c, splits * channels
    n = tl.load(source, mask=mask, other=0.0)
    means = tl.load(source + step, mask=mask, other=0.0)
    m2 = tl.load(source + 2 * step, mask=mask, other=0.0)
    safe = tl.maximum(tl.sum(n, axis=0, keep_dims=True), 1.0)
    rough = tl.sum(n * means, axis=0, keep_dims=True) / safe
    mean = rough + tl.sum(n * (means - rough), axis=0, keep_dims=True) / safe
    # A share without elements (or without a split) has n = 0 and mean 0: it adds nothing.
    off = means - mean
    m2 = tl.sum(m2 + n * off * off, axis=0, keep_dims=True)
    size = tl.zeros([1, 1], dtype) + count  # (an argument of 1 is a constant, and has no .to)
    tl.store(mean_out + c, mean, mask=exists)
    tl.store(invstd_out + c, tl.rsqrt(m2 / size + EPS), mask=exists)
    if running_mean is not None:
        # a Python float arrives as float32: what that cuts off follows in momentum_rest
        m = tl.zeros([1, 1], dtype) + momentum + momentum_rest
        old_mean = tl.load(running_mean + c, mask=exists, other=0.0).to(dtype)
        old_var = tl.load(running_var + c, mask=exists, other=0.0).to(dtype)
        unbiased = m2 / tl.maximum(size - 1.0, 1.0)
        tl.store(running_mean + c, (old_mean * (1.0 - m) + mean * m).to(running_mean.dtype.element_ty), mask=exists)
        tl.store(running_var + c, (old_var * (1.0 - m) + unbiased * m).to(running_var.dtype.element_ty), mask=exists)


@triton.jit
def _scale_and_shift(weight, bias, index, exists, dtype: tl.constexpr):
    """weight and bias of a program's channels: 1 and 0 where there are none."""
    if weight is not None:  # noqa: SIM108
        w = tl.load(weight + index, mask=exists, other=0.0).to(dtype)
    else:
        w = tl.full([1, 1], 1.0, dtype)
    if bias is not None:  # noqa: SIM108
        b = tl.load(bias + index, mask=exists, other=0.0).to(dtype)
    else:
        b = tl.full([1, 1], 0.0, dtype)
    return w, b


@triton.jit
def _forward_kernel(
    x, weight, bias, residual, mean, spread, y, mean_out, invstd_out,
    outer, channels, inner, n_tiles, tiles_k, tiles_per_split,
    EPS: tl.constexpr, CODE: tl.constexpr, PARAM: tl.constexpr, RUNNING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y; ``spread`` is invstd, or with RUNNING the running variance, and mean and invstd are written out."""
    dtype = mean_out.dtype.element_ty
    index, exists = tiles.channel_index(tl.program_id(0), channels, CHANNELS_LAST, BLOCK_K)
    m = tl.load(mean + index, mask=exists, other=0.0).to(dtype)
    r = tl.load(spread + index, mask=exists, other=1.0).to(dtype)
    if RUNNING:
        r = tl.rsqrt(r + EPS)
        if tl.program_id(1) == 0:
            tl.store(mean_out + index, m, mask=exists)
            tl.store(invstd_out + index, r, mask=exists)
    w, b = _scale_and_shift(weight, bias, index, exists, dtype)
    first = tl.program_id(1) * tiles_per_split
    for t in range(first, tl.minimum(first + tiles_per_split, n_tiles)):
        offsets, mask = tiles.tile(
            t, index, outer, channels, inner, tiles_k, CHANNELS_LAST, INT64, BLOCK_R, BLOCK_K
        )  # fmt: skip
        z = (tl.load(x + offsets, mask=mask, other=0.0).to(dtype) - m) * r * w + b
        if residual is not None:
            z += tl.load(residual + offsets, mask=mask, other=0.0).to(dtype)
        tl.store(y + offsets, act.forward(z, CODE, PARAM).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _dz_and_xhat(
    grad_y, x, residual, y, offsets, mask, m, r, w, b, dtype: tl.constexpr, CODE: tl.constexpr, PARAM: tl.constexpr
):
    """The gradient of the activation's input and the normalised input, of a tile; both 0 outside of the tensor."""
    g = tl.load(grad_y + offsets, mask=mask, other=0.0).to(dtype)
    xhat = tl.where(mask, (tl.load(x + offsets, mask=mask, other=0.0).to(dtype) - m) * r, 0.0)
    if y is not None:
        g = act.gradient_from_output(g, tl.load(y + offsets, mask=mask, other=0.0).to(dtype), CODE, PARAM)
    else:
        z = xhat * w + b
        if residual is not None:
            z += tl.load(residual + offsets, mask=mask, other=0.0).to(dtype)
        g = act.gradient(g, z, CODE, PARAM)
    return g, xhat  # (g is 0 outside because grad_y is)


@triton.jit
def _backward_sums_kernel(
    grad_y, x, weight, bias, residual, y, mean, invstd, partial,
    outer, channels, inner, n_tiles, tiles_k, tiles_per_split,
    CODE: tl.constexpr, PARAM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial [2, splits, channels]: the sums of dz and of dz * xhat over a share of the tensor."""
    dtype = partial.dtype.element_ty
    index, exists = tiles.channel_index(tl.program_id(0), channels, CHANNELS_LAST, BLOCK_K)
    split = tl.program_id(1)
    m = tl.load(mean + index, mask=exists, other=0.0)
    r = tl.load(invstd + index, mask=exists, other=0.0)
    w, b = _scale_and_shift(weight, bias, index, exists, dtype)
    sum_dz = tl.zeros([BLOCK_R, BLOCK_K], dtype)
    sum_dz_xhat = tl.zeros([BLOCK_R, BLOCK_K], dtype)
    first = split * tiles_per_split
    for t in range(first, tl.minimum(first + tiles_per_split, n_tiles)):
        offsets, mask = tiles.tile(
            t, index, outer, channels, inner, tiles_k, CHANNELS_LAST, INT64, BLOCK_R, BLOCK_K
        )  # fmt: skip
        dz, xhat = _dz_and_xhat(grad_y, x, residual, y, offsets, mask, m, r, w, b, dtype, CODE, PARAM)
        sum_dz += dz
        sum_dz_xhat += dz * xhat
    out = partial + split * channels + index
    tl.store(out, tiles.total(sum_dz, CHANNELS_LAST), mask=exists)
    tl.store(out + tl.num_programs(1) * channels, tiles.total(sum_dz_xhat, CHANNELS_LAST), mask=exists)


@triton.jit
def _merge_sums_kernel(partial, dweight, dbias, means, count, channels, splits):
    """dweight, dbias (channels,), and means [2, channels] of dz and dz * xhat; each may be None."""
    c = tl.program_id(0) * _MERGE_CHANNELS + tl.arange(0, _MERGE_CHANNELS)
    s = tl.arange(0, _MERGE_SPLITS)[:, None]
    mask, exists = (s < splits) & (c[None, :] < channels), c < channels
    source = partial + s * channels + c[None, :]
    sum_dz = tl.sum(tl.load(source, mask=mask, other=0.0), axis=0)
    sum_dz_xhat = tl.sum(tl.load(source + splits * channels, mask=mask, other=0.0), axis=0)
    if dweight is not None:
        tl.store(dweight + c, sum_dz_xhat.to(dweight.dtype.element_ty), mask=exists)
    if dbias is not None:
        tl.store(dbias + c, sum_dz.to(dbias.dtype.element_ty), mask=exists)
    if means is not None:
        size = tl.zeros([1], partial.dtype.element_ty) + count
        tl.store(means + c, sum_dz / size, mask=exists)
        tl.store(means + channels + c, sum_dz_xhat / size, mask=exists)


@triton.jit
def _backward_kernel(
    grad_y, x, weight, bias, residual, y, mean, invstd, means, dx, dresidual,
    outer, channels, inner, n_tiles, tiles_k, tiles_per_split,
    CODE: tl.constexpr, PARAM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx and dresidual, each may be None; ``means`` is None where running statistics normalised."""
    dtype = mean.dtype.element_ty
    index, exists = tiles.channel_index(tl.program_id(0), channels, CHANNELS_LAST, BLOCK_K)
    m = tl.load(mean + index, mask=exists, other=0.0)
    r = tl.load(invstd + index, mask=exists, other=0.0)
    w, b = _scale_and_shift(weight, bias, index, exists, dtype)
    if means is not None:
        mean_dz = tl.load(means + index, mask=exists, other=0.0)
        mean_dz_xhat = tl.load(means + channels + index, mask=exists, other=0.0)
    first = tl.program_id(1) * tiles_per_split
    for t in range(first, tl.minimum(first + tiles_per_split, n_tiles)):
        offsets, mask = tiles.tile(
            t, index, outer, channels, inner, tiles_k, CHANNELS_LAST, INT64, BLOCK_R, BLOCK_K
        )  # fmt: skip
        dz, xhat = _dz_and_xhat(grad_y, x, residual, y, offsets, mask, m, r, w, b, dtype, CODE, PARAM)
        if dresidual is not None:
            tl.store(dresidual + offsets, dz.to(dresidual.dtype.element_ty), mask=mask)
        if dx is not None:
            if means is not None:
                dz = dz - mean_dz - xhat * mean_dz_xhat
            tl.store(dx + offsets, (dz * (r * w)).to(dx.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------- launchers
def supports(request: Request) -> str | None:
    """None where this backend runs the request, else the reason."""
    return runs_on(request.device)


def _merge_grid(channels: int) -> tuple[int]:
    return (triton.cdiv(channels, _MERGE_CHANNELS.value),)


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
    x = layout.dense(x)
    residual = None if residual is None else layout.like(residual, x)
    channels = x.size(1)
    y = torch.empty_like(x, dtype=stored_dtype(x.dtype))
    mean = torch.empty(channels, dtype=accumulate_dtype(x.dtype), device=x.device)
    invstd = torch.empty_like(mean)
    with device_of(x):
        if batch_stats:
            _batch_statistics(x, running_mean, running_var, mean, invstd, momentum, eps)
            source = mean, invstd
        elif running_mean is None or running_var is None:
            raise ValueError("running statistics are needed where batch statistics are not used")
        else:
            source = running_mean.contiguous(), running_var.contiguous()
        plan = tiles.plan(x, reduction=False)
        _forward_kernel[plan.grid](
            x, _dense1(weight), _dense1(bias), residual, *source, y, mean, invstd, *plan.sizes,
            EPS=eps, CODE=CODES[activation.name], PARAM=activation.param, RUNNING=not batch_stats, **plan.meta,
            **tiles.registers(x.dtype, activation.name),
        )  # fmt: skip
    return y.to(x.dtype), mean, invstd


def _dense1(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def _batch_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    momentum: float,
    eps: float,
) -> None:
    """Fill mean and invstd by x's statistics and move the running ones."""
    plan = tiles.plan(x, reduction=True)
    channels, count = x.size(1), x.numel() // x.size(1)
    partial = torch.empty(3, plan.splits, channels, dtype=mean.dtype, device=x.device)
    _statistics_kernel[plan.grid](x, partial, *plan.sizes, **plan.meta, **tiles.registers(x.dtype))
    running = [running_mean, running_var]
    moved = [r if r is None else r.contiguous().to(stored_dtype(r.dtype)) for r in running]
    near = struct.unpack("f", struct.pack("f", momentum))[0]
    _merge_statistics_kernel[_merge_grid(channels)](
        partial, mean, invstd, *moved, near, momentum - near, count, channels, plan.splits, EPS=eps, num_warps=4
    )
    for original, new in zip(running, moved, strict=True):
        if original is not None and new is not original:
            original.copy_(new)


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
    grad_y = layout.like(grad_y, x)
    residual = None if residual is None else layout.like(residual, x)
    y = None if y is None else layout.like(y, x)
    channels = x.size(1)
    tensors = grad_y, x, _dense1(weight), _dense1(bias), residual, y, mean, invstd
    options = {
        "CODE": CODES[activation.name],
        "PARAM": activation.param,
        **tiles.registers(x.dtype, activation.name),
    }
    dx = dweight = dbias = dresidual = means = None
    with device_of(x):
        if needs_params or (needs_x and batch_stats):
            plan = tiles.plan(x, reduction=True)
            partial = torch.empty(2, plan.splits, channels, dtype=mean.dtype, device=x.device)
            _backward_sums_kernel[plan.grid](*tensors, partial, *plan.sizes, **options, **plan.meta)
            if needs_params:
                kinds = [mean.dtype if v is None else v.dtype for v in (weight, bias)]
                dweight, dbias = (torch.empty_like(mean, dtype=stored_dtype(kind)) for kind in kinds)
            if needs_x and batch_stats:
                means = torch.empty(2, channels, dtype=mean.dtype, device=x.device)
            count = x.numel() // channels
            _merge_sums_kernel[_merge_grid(channels)](
                partial, dweight, dbias, means, count, channels, plan.splits, num_warps=4
            )
            if dweight is not None and dbias is not None:
                dweight, dbias = dweight.to(kinds[0]), dbias.to(kinds[1])
        if needs_x or needs_residual:
            dx = torch.empty_like(x, dtype=stored_dtype(x.dtype)) if needs_x else None
            dresidual = torch.empty_like(x, dtype=stored_dtype(x.dtype)) if needs_residual else None
            plan = tiles.plan(x, reduction=False)
            _backward_kernel[plan.grid](*tensors, means, dx, dresidual, *plan.sizes, **options, **plan.meta)
    return (
        None if dx is None else dx.to(x.dtype),
        dweight,
        dbias,
        None if dresidual is None else dresidual.to(x.dtype),
    )
