"""activation(depthwise conv2d(x, weight) + bias) in numba.cuda; the contract is kernels/reference/depthwise.py.

One thread for each element of a result, in the order in which elements lie in memory, so that neighbouring threads read
neighbouring elements in either memory format. What is summed over positions (statistics, the weight's gradient) is
summed in shares, which a second kernel merges in their order. No atomics: results are bit for bit repeatable.

Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
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
from ..reference import depthwise as reference
from ..reference.batch_norm_act import accumulate_dtype
from ..reference.depthwise import Padding, Request
from . import refuses, simulated
from .activation import functions
from .launch import THREADS, _programs, _stream, array, flat, on, vector

_MAX_SPLITS, _MAX_BLOCKS = 64, 65535


# ------------------------------------------------------------------------------------------- kernels
@cuda.jit(device=True)
def _split(i, channels, height, width, last):
    """(image, channel, row, column) of the element that lies at i; ``last``: its channels are innermost."""
    if last:
        c, i = i % channels, i // channels
        return i // (height * width), c, i // width % height, i % width
    plane = i // (height * width)
    return plane // channels, plane % channels, i // width % height, i % width


@cuda.jit(device=True)
def _offset(n, c, h, w, channels, height, width, last):
    """Where an element lies."""
    if last:
        return ((n * height + h) * width + w) * channels + c
    return ((n * channels + c) * height + h) * width + w


class Kernels(NamedTuple):
    """The op's kernels for a type of sums, and an activation."""

    forward: Any
    statistics: Any
    merge_statistics: Any
    input_gradient: Any
    weight_gradient: Any
    merge_weight_gradient: Any


@functools.cache
def kernels(activation: Activation, wide: type) -> Kernels:
    """The kernels that compute in the NumPy type ``wide``; numba compiles each for the types of its arguments.

    ``in_size`` and ``out_size`` are (channels, height, width) of x and y; ``kernel``, ``stride`` and ``dilation``
    (height, width); ``padding`` (top, left).
    """
    act = functions(activation, wide).value
    zero, one = wide(0), wide(1)

    @cuda.jit
    def forward_kernel(x, weight, bias, y, in_size, out_size, kernel, stride, dilation, padding, last):
        channels, height, width = in_size
        out_channels, out_height, out_width = out_size
        for i in range(cuda.grid(1), y.size, cuda.gridsize(1)):
            n, o, oh, ow = _split(i, out_channels, out_height, out_width, last)
            total = zero
            for kh in range(kernel[0]):
                h = oh * stride[0] + kh * dilation[0] - padding[0]
                if h >= 0 and h < height:
                    for kw in range(kernel[1]):
                        w = ow * stride[1] + kw * dilation[1] - padding[1]
                        if w >= 0 and w < width:
                            at = _offset(n, o // (out_channels // channels), h, w, channels, height, width, last)
                            total += wide(x[at]) * wide(weight[(o * kernel[0] + kh) * kernel[1] + kw])
            if bias is not None:
                total += wide(bias[o])
            y[i] = act(total)

    @cuda.jit
    def statistics_kernel(y, partial, batch, out_size, last):
        """partial [3, splits, channels]: count, mean and centred sum of squares of y's distance from its first."""
        channels, height, width = out_size
        positions = batch * height * width
        splits = partial.shape[1]
        for i in range(cuda.grid(1), splits * channels, cuda.gridsize(1)):
            split, c = i // channels, i % channels
            start = wide(y[_offset(0, c, 0, 0, channels, height, width, last)])
            count, mean, m2 = zero, zero, zero
            for p in range(split, positions, splits):
                n, h, w = p // (height * width), p // width % height, p % width
                v = wide(y[_offset(n, c, h, w, channels, height, width, last)]) - start
                count += one
                delta = v - mean
                mean += delta / count
                m2 += delta * (v - mean)
            partial[0, split, c], partial[1, split, c], partial[2, split, c] = count, mean, m2

    @cuda.jit
    def merge_statistics_kernel(y, partial, mean_out, variance, out_size, last):
        channels, height, width = out_size
        for c in range(cuda.grid(1), channels, cuda.gridsize(1)):
            count, mean, m2 = np.float64(0), np.float64(0), np.float64(0)  # a few operations a channel
            for split in range(partial.shape[1]):
                n = np.float64(partial[0, split, c])
                if n > 0.0:
                    delta = np.float64(partial[1, split, c]) - mean
                    share = n / (count + n)
                    m2 += np.float64(partial[2, split, c]) + delta * delta * (count * share)
                    mean += delta * share
                    count += n
            mean_out[c] = mean + np.float64(y[_offset(0, c, 0, 0, channels, height, width, last)])
            variance[c] = m2 / count

    @cuda.jit
    def input_gradient_kernel(grad_y, weight, dx, in_size, out_size, kernel, stride, dilation, padding, last):
        channels, height, width = in_size
        out_channels, out_height, out_width = out_size
        multiplier = out_channels // channels
        for i in range(cuda.grid(1), dx.size, cuda.gridsize(1)):
            n, c, h, w = _split(i, channels, height, width, last)
            total = zero
            for kh in range(kernel[0]):
                oh = h + padding[0] - kh * dilation[0]
                if oh >= 0 and oh % stride[0] == 0 and oh // stride[0] < out_height:
                    for kw in range(kernel[1]):
                        ow = w + padding[1] - kw * dilation[1]
                        if ow >= 0 and ow % stride[1] == 0 and ow // stride[1] < out_width:
                            for o in range(c * multiplier, (c + 1) * multiplier):
                                at = _offset(
                                    n, o, oh // stride[0], ow // stride[1], out_channels, out_height, out_width, last
                                )  # fmt: skip
                                total += wide(grad_y[at]) * wide(weight[(o * kernel[0] + kh) * kernel[1] + kw])
            dx[i] = total

    @cuda.jit
    def weight_gradient_kernel(grad_y, x, partial, batch, in_size, out_size, kernel, stride, dilation, padding, last):
        """partial [splits, out channels * taps]: a share's sums of grad_y * (the pixel that a tap reads)."""
        channels, height, width = in_size
        out_channels, out_height, out_width = out_size
        splits, size = partial.shape
        taps = kernel[0] * kernel[1]
        for i in range(cuda.grid(1), splits * size, cuda.gridsize(1)):
            split, element = i // size, i % size
            o, kh, kw = element // taps, element // kernel[1] % kernel[0], element % kernel[1]
            total = zero
            for line in range(split, batch * out_height, splits):
                n, oh = line // out_height, line % out_height
                h = oh * stride[0] + kh * dilation[0] - padding[0]
                if h >= 0 and h < height:
                    for ow in range(out_width):
                        w = ow * stride[1] + kw * dilation[1] - padding[1]
                        if w >= 0 and w < width:
                            g = grad_y[_offset(n, o, oh, ow, out_channels, out_height, out_width, last)]
                            at = _offset(n, o // (out_channels // channels), h, w, channels, height, width, last)
                            total += wide(g) * wide(x[at])
            partial[split, element] = total

    @cuda.jit
    def merge_weight_gradient_kernel(partial, dweight):
        for i in range(cuda.grid(1), dweight.size, cuda.gridsize(1)):
            total = zero
            for split in range(partial.shape[0]):
                total += partial[split, i]
            dweight[i] = total

    return Kernels(
        forward_kernel,
        statistics_kernel,
        merge_statistics_kernel,
        input_gradient_kernel,
        weight_gradient_kernel,
        merge_weight_gradient_kernel,
    )


# ----------------------------------------------------------------------------------------- launchers
def supports(request: Request) -> str | None:
    """None where this backend runs the request, else the reason."""
    reason = refuses(request.device, (request.dtype,))
    if reason is not None:
        return reason
    if request.statistics and request.activation != "identity":
        return f"statistics are those of a convolution without activation, not with {request.activation!r}"
    return None


def _kernels(x: Tensor, activation: Activation) -> Kernels:
    return kernels(activation, np.float64 if x.dtype == torch.float64 else np.float32)


def _grid(threads: int, device: torch.device) -> tuple[Any, ...]:
    """The launch configuration of a kernel with a thread for each of ``threads`` results, or for several."""
    most = _programs(device) if simulated() else _MAX_BLOCKS
    return max(1, min(-(-threads // THREADS), most)), THREADS, _stream(device)


def _splits(results: int, positions: int, device: torch.device) -> int:
    """Into how many shares positions are cut to fill the device."""
    return max(1, min(_programs(device) * THREADS // results, positions, _MAX_SPLITS))


def _size(t: Tensor) -> tuple[int, int, int]:
    return t.size(1), t.size(2), t.size(3)


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
    shape = reference.output_size(x, weight, stride, padding, dilation)
    if min(*x.shape, *shape) < 1:
        raise ValueError(f"the numba backend has nothing to convolve from {tuple(x.shape)} to {shape}")
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=reference.memory_format(x))
    last, out_size = reference.channels_last(x), shape[1:]
    run, kernel = _kernels(x, activation), (weight.size(2), weight.size(3))
    mean = variance = None
    with on(x.device):
        run.forward[_grid(y.numel(), x.device)](
            flat(x), flat(weight), vector(bias), flat(y), _size(x), out_size, kernel, stride, dilation,
            (padding[0], padding[2]), last,
        )  # fmt: skip
        if statistics:
            mean = torch.empty(shape[1], dtype=accumulate_dtype(x.dtype), device=x.device)
            variance = torch.empty_like(mean)
            splits = _splits(shape[1], y.numel() // shape[1], x.device)
            partial = torch.empty(3, splits, shape[1], dtype=mean.dtype, device=x.device)
            run.statistics[_grid(splits * shape[1], x.device)](flat(y), array(partial), shape[0], out_size, last)
            run.merge_statistics[_grid(shape[1], x.device)](
                flat(y), array(partial), vector(mean), vector(variance), out_size, last
            )  # fmt: skip
    return y, mean, variance


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
    run, kernel, last = (
        _kernels(x, Activation("identity")),
        (weight.size(2), weight.size(3)),
        reference.channels_last(x),
    )
    geometry = (_size(x), _size(grad_y), kernel, stride, dilation, (padding[0], padding[2]), last)
    dx = dweight = dbias = None
    with on(x.device):
        if needs_x:
            dx = torch.empty_like(x)
            run.input_gradient[_grid(dx.numel(), x.device)](flat(grad_y), flat(weight), flat(dx), *geometry)
        if needs_weight:
            dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
            splits = _splits(weight.numel(), x.size(0) * grad_y.size(2), x.device)
            partial = torch.empty(splits, weight.numel(), dtype=accumulate_dtype(x.dtype), device=x.device)
            run.weight_gradient[_grid(partial.numel(), x.device)](
                flat(grad_y), flat(x), array(partial), x.size(0), *geometry
            )
            run.merge_weight_gradient[_grid(weight.numel(), x.device)](array(partial), flat(dweight))
        if needs_bias:
            dbias = grad_y.sum((0, 2, 3), dtype=accumulate_dtype(x.dtype)).to(weight.dtype)
    return dx, dweight, dbias
