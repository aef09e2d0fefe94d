"""act(batch_norm(x) + residual) in numba.cuda; the contract is kernels/reference/batch_norm_act.py.

A tensor is seen as ``positions`` of ``channels``; a block of threads is channels x lanes, and lane l of split s of a
channel goes through positions s * lanes + l, and so on by the number of lanes in all splits. channels_last has 32
channels and 4 lanes in a block, else there is one channel and 128 lanes, so that neighbouring threads read neighbouring
elements either way. Statistics are Welford's per thread, merged by Chan's formula in a fixed order. No atomics: results
are bit for bit repeatable.

Sources: Welford, "Note on a method for calculating corrected sums of squares and products" (1962);
Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import cuda
from torch import Tensor

from .. import layout
from ..activation import Activation
from ..reference.batch_norm_act import Request, accumulate_dtype
from . import refuses
from .activation import functions
from .launch import THREADS, array, flat, on, plan, vector


# ------------------------------------------------------------------------------------------- kernels
@cuda.jit(device=True)
def _offset(position, channel, channels, inner):
    """Where an element lies; in channels_last ``inner`` is 1."""
    return ((position // inner) * channels + channel) * inner + position % inner


class Kernels(NamedTuple):
    """The op's kernels for a type of statistics and sums, and an activation."""

    statistics: Any
    merge_statistics: Any
    running_statistics: Any
    forward: Any
    sums: Any
    merge_sums: Any
    backward: Any


@functools.cache
def kernels(activation: Activation, wide: type) -> Kernels:
    """The kernels that compute in the NumPy type ``wide``; numba compiles each for the types of its arguments."""
    act, act_gradient, act_gradient_from_output = functions(activation, wide)
    zero, one = wide(0), wide(1)

    @cuda.jit
    def statistics_kernel(x, partial, positions, channels, inner):
        """partial [3, splits, channels]: count, mean and centred sum of squares of a share of x.

        The mean is that of the distance from the channel's first element: numbers far from 0 lose nothing.
        """
        counts = cuda.shared.array(THREADS, wide)
        means = cuda.shared.array(THREADS, wide)
        squares = cuda.shared.array(THREADS, wide)
        column, lane, lanes = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockDim.y
        split, splits = cuda.blockIdx.y, cuda.gridDim.y
        channel = cuda.blockIdx.x * cuda.blockDim.x + column
        count, mean, m2 = zero, zero, zero
        if channel < channels:
            start = wide(x[_offset(0, channel, channels, inner)])
            for position in range(split * lanes + lane, positions, splits * lanes):
                v = wide(x[_offset(position, channel, channels, inner)]) - start
                count += one
                delta = v - mean
                mean += delta / count
                m2 += delta * (v - mean)
        slot = lane * cuda.blockDim.x + column
        counts[slot], means[slot], squares[slot] = count, mean, m2
        cuda.syncthreads()
        half = lanes // 2
        while half > 0:
            if lane < half:
                other = slot + half * cuda.blockDim.x
                if counts[other] > zero:
                    n = counts[slot] + counts[other]
                    delta = means[other] - means[slot]
                    share = counts[other] / n
                    squares[slot] += squares[other] + delta * delta * (counts[slot] * share)
                    means[slot] += delta * share
                    counts[slot] = n
            cuda.syncthreads()
            half //= 2
        if lane == 0 and channel < channels:
            partial[0, split, channel] = counts[slot]
            partial[1, split, channel] = means[slot]
            partial[2, split, channel] = squares[slot]

    @cuda.jit
    def merge_statistics_kernel(
        x, partial, mean_out, invstd_out, running_mean, running_var, momentum, eps, positions, channels, inner
    ):
        """mean, invstd (channels,) from partial; running statistics move towards mean and unbiased variance."""
        channel = cuda.grid(1)
        if channel >= channels:
            return
        # in float64: a few operations a channel, and momentum and eps as they were given
        count, mean, m2 = np.float64(0), np.float64(0), np.float64(0)
        for split in range(partial.shape[1]):
            n = np.float64(partial[0, split, channel])
            if n > 0.0:
                delta = np.float64(partial[1, split, channel]) - mean
                share = n / (count + n)
                m2 += np.float64(partial[2, split, channel]) + delta * delta * (count * share)
                mean += delta * share
                count += n
        mean += np.float64(x[_offset(0, channel, channels, inner)])
        mean_out[channel] = mean
        invstd_out[channel] = (m2 / positions + eps) ** -0.5
        if running_mean is not None:
            unbiased = m2 / max(positions - 1, 1)
            running_mean[channel] = np.float64(running_mean[channel]) * (1.0 - momentum) + mean * momentum
            running_var[channel] = np.float64(running_var[channel]) * (1.0 - momentum) + unbiased * momentum

    @cuda.jit
    def running_statistics_kernel(running_mean, running_var, mean_out, invstd_out, eps):
        """mean and invstd (channels,) of running statistics."""
        channel = cuda.grid(1)
        if channel < mean_out.size:
            mean_out[channel] = running_mean[channel]
            invstd_out[channel] = (np.float64(running_var[channel]) + eps) ** -0.5

    @cuda.jit(device=True)
    def normalised(x, offset, mean, invstd):
        return (wide(x[offset]) - mean) * invstd

    @cuda.jit(device=True)
    def preactivation(xhat, weight, bias, residual, offset):
        """The one expression of forward and backward: both must round alike, or a mask would differ."""
        z = xhat * weight + bias
        if residual is not None:
            z += wide(residual[offset])
        return z

    @cuda.jit
    def forward_kernel(x, weight, bias, residual, mean, invstd, y, positions, channels, inner):
        """y."""
        lanes = cuda.blockDim.y
        channel = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if channel >= channels:
            return
        m, r = mean[channel], invstd[channel]
        w = one if weight is None else wide(weight[channel])
        b = zero if bias is None else wide(bias[channel])
        first = cuda.blockIdx.y * lanes + cuda.threadIdx.y
        for position in range(first, positions, cuda.gridDim.y * lanes):
            offset = _offset(position, channel, channels, inner)
            y[offset] = act(preactivation(normalised(x, offset, m, r), w, b, residual, offset))

    @cuda.jit(device=True)
    def dz_of(grad_y, xhat, weight, bias, residual, y, offset):
        """The gradient of the activation's input."""
        g = wide(grad_y[offset])
        if y is not None:
            g = act_gradient_from_output(g, wide(y[offset]))
        else:
            g = act_gradient(g, preactivation(xhat, weight, bias, residual, offset))
        return g

    @cuda.jit
    def sums_kernel(grad_y, x, weight, bias, residual, y, mean, invstd, partial, positions, channels, inner):
        """partial [2, splits, channels]: the sums of dz and of dz * xhat over a share of the tensor."""
        sums = cuda.shared.array(THREADS, wide)
        sums_xhat = cuda.shared.array(THREADS, wide)
        column, lane, lanes = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockDim.y
        split, splits = cuda.blockIdx.y, cuda.gridDim.y
        channel = cuda.blockIdx.x * cuda.blockDim.x + column
        sum_dz, sum_dz_xhat = zero, zero
        if channel < channels:
            m, r = mean[channel], invstd[channel]
            w = one if weight is None else wide(weight[channel])
            b = zero if bias is None else wide(bias[channel])
            for position in range(split * lanes + lane, positions, splits * lanes):
                offset = _offset(position, channel, channels, inner)
                xhat = normalised(x, offset, m, r)
                dz = dz_of(grad_y, xhat, w, b, residual, y, offset)
                sum_dz += dz
                sum_dz_xhat += dz * xhat
        slot = lane * cuda.blockDim.x + column
        sums[slot], sums_xhat[slot] = sum_dz, sum_dz_xhat
        cuda.syncthreads()
        half = lanes // 2
        while half > 0:
            if lane < half:
                other = slot + half * cuda.blockDim.x
                sums[slot] += sums[other]
                sums_xhat[slot] += sums_xhat[other]
            cuda.syncthreads()
            half //= 2
        if lane == 0 and channel < channels:
            partial[0, split, channel] = sums[slot]
            partial[1, split, channel] = sums_xhat[slot]

    @cuda.jit
    def merge_sums_kernel(partial, dweight, dbias, means, positions):
        """dweight, dbias (channels,), and means [2, channels] of dz and dz * xhat; each may be None."""
        channel = cuda.grid(1)
        if channel >= partial.shape[2]:
            return
        sum_dz, sum_dz_xhat = np.float64(0), np.float64(0)
        for split in range(partial.shape[1]):
            sum_dz += np.float64(partial[0, split, channel])
            sum_dz_xhat += np.float64(partial[1, split, channel])
        if dweight is not None:
            dweight[channel] = sum_dz_xhat
        if dbias is not None:
            dbias[channel] = sum_dz
        if means is not None:
            means[0, channel] = sum_dz / positions
            means[1, channel] = sum_dz_xhat / positions

    @cuda.jit
    def backward_kernel(
        grad_y, x, weight, bias, residual, y, mean, invstd, means, dx, dresidual, positions, channels, inner
    ):
        """dx and dresidual, each may be None; ``means`` is None where running statistics normalised."""
        lanes = cuda.blockDim.y
        channel = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if channel >= channels:
            return
        m, r = mean[channel], invstd[channel]
        w = one if weight is None else wide(weight[channel])
        b = zero if bias is None else wide(bias[channel])
        mean_dz = zero if means is None else means[0, channel]
        mean_dz_xhat = zero if means is None else means[1, channel]
        first = cuda.blockIdx.y * lanes + cuda.threadIdx.y
        for position in range(first, positions, cuda.gridDim.y * lanes):
            offset = _offset(position, channel, channels, inner)
            xhat = normalised(x, offset, m, r)
            dz = dz_of(grad_y, xhat, w, b, residual, y, offset)
            if dresidual is not None:
                dresidual[offset] = dz
            if dx is not None:
                if means is not None:
                    dz = dz - mean_dz - xhat * mean_dz_xhat
                dx[offset] = dz * (r * w)

    return Kernels(
        statistics_kernel,
        merge_statistics_kernel,
        running_statistics_kernel,
        forward_kernel,
        sums_kernel,
        merge_sums_kernel,
        backward_kernel,
    )


# ----------------------------------------------------------------------------------------- launching
def supports(request: Request) -> str | None:
    """None where this backend runs the request, else the reason."""
    return refuses(request.device, (request.dtype, request.param_dtype))


def _kernels(x: Tensor, activation: Activation) -> Kernels:
    return kernels(activation, np.float64 if accumulate_dtype(x.dtype) == torch.float64 else np.float32)


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
    if not batch_stats and (running_mean is None or running_var is None):
        raise ValueError("running statistics are needed where batch statistics are not used")
    y = torch.empty_like(x)
    mean = torch.empty(x.size(1), dtype=accumulate_dtype(x.dtype), device=x.device)
    invstd = torch.empty_like(mean)
    run = _kernels(x, activation)
    with on(x.device):
        launch = plan(x, reduction=False)
        if batch_stats:
            _batch_statistics(run, x, running_mean, running_var, mean, invstd, momentum, eps)
        else:
            run.running_statistics[launch.over_channels](
                vector(running_mean), vector(running_var), array(mean), array(invstd), eps
            )
        run.forward[launch.over_tensor](
            flat(x), vector(weight), vector(bias), flat(residual), array(mean), array(invstd), flat(y),
            *launch.sizes,
        )  # fmt: skip
    return y, mean, invstd


def _batch_statistics(
    run: Kernels,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    momentum: float,
    eps: float,
) -> None:
    """Fill mean and invstd by x's statistics and move the running ones."""
    launch = plan(x, reduction=True)
    partial = torch.empty(3, launch.splits, x.size(1), dtype=mean.dtype, device=x.device)
    run.statistics[launch.over_tensor](flat(x), array(partial), *launch.sizes)
    running = running_mean, running_var
    moved = [None if r is None else r.contiguous() for r in running]
    run.merge_statistics[launch.over_channels](
        flat(x), array(partial), array(mean), array(invstd), *map(array, moved), momentum, eps, *launch.sizes
    )
    for original, new in zip(running, moved, strict=True):
        if original is not None and new is not None and new is not original:
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
    dx = dweight = dbias = dresidual = means = None
    run = _kernels(x, activation)
    with on(x.device):
        arrays = (
            flat(grad_y),
            flat(x),
            vector(weight),
            vector(bias),
            flat(residual),
            flat(y),
            array(mean),
            array(invstd),
        )
        if needs_params or (needs_x and batch_stats):
            launch = plan(x, reduction=True)
            channels = x.size(1)
            partial = torch.empty(2, launch.splits, channels, dtype=mean.dtype, device=x.device)
            run.sums[launch.over_tensor](*arrays, array(partial), *launch.sizes)
            if needs_params:
                dweight, dbias = (
                    torch.empty_like(mean, dtype=mean.dtype if v is None else v.dtype) for v in (weight, bias)
                )
            if needs_x and batch_stats:
                means = torch.empty(2, channels, dtype=mean.dtype, device=x.device)
            run.merge_sums[launch.over_channels](
                array(partial), array(dweight), array(dbias), array(means), launch.sizes[0]
            )
        if needs_x or needs_residual:
            dx = torch.empty_like(x) if needs_x else None
            dresidual = torch.empty_like(x) if needs_residual else None
            launch = plan(x, reduction=False)
            run.backward[launch.over_tensor](*arrays, array(means), flat(dx), flat(dresidual), *launch.sizes)
    return dx, dweight, dbias, dresidual
