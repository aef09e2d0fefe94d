"""The weight gradient of a depthwise 2d convolution, on the device; tiles are those of depthwise_kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles
from .depthwise_kernels import _SIZES, _added, _extent, _offset, _positions, _rows, _steps


@triton.jit(do_not_specialize=_SIZES)
def weight_gradient_kernel(
    grad_y, x, partial,
    size, n_tiles, tiles_per_split, strips, rows, height, width, channels, out_height, out_width,
    stride_w, dilation_w, pad_top, pad_left,
    BIAS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr,
    MULTIPLIER: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial [splits, taps (with BIAS one more), out channels]: a share's sums of grad_y * (the pixel a tap reads).

    As forward with ``WINDOW``; the rows of grad_y that the window has begun stay in registers. With BIAS the last of
    partial is the sum of grad_y.
    """
    TAPS: tl.constexpr = KH * KW
    BEGUN: tl.constexpr = (KH + STRIDE_H - 1) // STRIDE_H
    out_channels = channels * MULTIPLIER
    c, known = tiles.channel_index(tl.program_id(0), out_channels, CHANNELS_LAST, BLOCK_C)
    source = c // MULTIPLIER if MULTIPLIER > 1 else c
    row_step, column_step = _steps(channels, width, CHANNELS_LAST, INT64)
    out_step, _ = _steps(out_channels, out_width, CHANNELS_LAST, INT64)
    sums = (tl.zeros([BLOCK_P, BLOCK_C], ACC),) * (TAPS + (1 if BIAS else 0))
    first = tl.program_id(1) * tiles_per_split
    for t in range(first, tl.minimum(first + tiles_per_split, n_tiles)):
        n, strip, column, exists = _positions(t, size, strips, out_width, INT64, BLOCK_P)
        mask = exists & known
        out_row, left = strip * rows, column * stride_w - pad_left
        row = out_row * STRIDE_H - pad_top
        least, largest = _extent(row, exists)
        gradients = grad_y + _offset(n, c, out_row, column, out_channels, out_height, out_width, CHANNELS_LAST)
        pixels = x + _offset(n, source, row, left, channels, height, width, CHANNELS_LAST)
        ahead = _rows(pixels, mask, row, left, height, width, row_step, column_step, dilation_w, STRIDE_H, KW)
        g_ahead = tl.load(gradients, mask=mask, other=0.0)
        begun = (tl.zeros([BLOCK_P, BLOCK_C], grad_y.dtype.element_ty),) * BEGUN
        for i in range(rows + BEGUN - 1):
            values = ahead
            begun = (g_ahead,) + begun[: BEGUN - 1]
            row += STRIDE_H
            pixels += row_step * STRIDE_H
            gradients += out_step
            ahead = _rows(pixels, mask, row, left, height, width, row_step, column_step, dilation_w, STRIDE_H, KW)
            g_ahead = tl.load(gradients, mask=mask & (i + 1 < rows) & (out_row + i + 1 < out_height), other=0.0)
            if BIAS:
                sums = _added(sums, TAPS, begun[0].to(ACC))
            if (largest + (i + 1) * STRIDE_H > 0) & (least + i * STRIDE_H < height):
                for a in tl.static_range(STRIDE_H):
                    for kw in tl.static_range(KW):
                        v = values[a * KW + kw].to(ACC)
                        for j in tl.static_range(BEGUN):
                            if a + j * STRIDE_H < KH:
                                sums = _added(sums, (a + j * STRIDE_H) * KW + kw, begun[j].to(ACC) * v)
    out = partial + tl.program_id(1) * ((TAPS + (1 if BIAS else 0)) * out_channels) + c
    for tap in tl.static_range(TAPS + (1 if BIAS else 0)):
        tl.store(out + tap * out_channels, tiles.total(sums[tap], CHANNELS_LAST), mask=known)


@triton.jit(do_not_specialize=_SIZES)
def weight_gradient_loop_kernel(
    grad_y, x, partial,
    batch, height, width, channels, out_height, out_width,
    stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left,
    KH: tl.constexpr, KW: tl.constexpr, COLUMNS: tl.constexpr, MULTIPLIER: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial [splits, taps, out channels]; a program has COLUMNS taps of one row, and the rows where it is inside."""
    out_channels = channels * MULTIPLIER
    c, known = tiles.channel_index(tl.program_id(0), out_channels, CHANNELS_LAST, BLOCK_C)
    split = tl.program_id(1)
    blocks: tl.constexpr = (KW + COLUMNS - 1) // COLUMNS
    kh, kw = tl.program_id(2) // blocks, (tl.program_id(2) % blocks) * COLUMNS
    source = c // MULTIPLIER if MULTIPLIER > 1 else c
    top = kh * dilation_h - pad_top
    least = (tl.maximum(-top, 0) + stride_h - 1) // stride_h
    end = tl.minimum((tl.maximum(height - top, 0) + stride_h - 1) // stride_h, out_height)
    rows = tl.maximum(end - least, 0)
    if INT64:
        rows = rows.to(tl.int64)
    size = rows * batch * out_width
    per_split = (tl.cdiv(size, BLOCK_P) + tl.num_programs(1) - 1) // tl.num_programs(1)
    sums = (tl.zeros([BLOCK_P, BLOCK_C], ACC),) * COLUMNS
    for i in range(per_split):
        n, line, column, exists = _positions(
            split * per_split + i, size, tl.maximum(rows, 1), out_width, INT64, BLOCK_P
        )  # fmt: skip
        oh = line + least
        mask = exists & known
        gradients = grad_y + _offset(n, c, oh, column, out_channels, out_height, out_width, CHANNELS_LAST)
        g = tl.load(gradients, mask=mask, other=0.0).to(ACC)
        for k in tl.static_range(COLUMNS):
            at = column * stride_w + (kw + k) * dilation_w - pad_left
            pixels = x + _offset(n, source, oh * stride_h + top, at, channels, height, width, CHANNELS_LAST)
            v = tl.load(pixels, mask=mask & (at >= 0) & (at < width), other=0.0).to(ACC)
            sums = _added(sums, k, g * v)
    out = partial + (split * (KH * KW) + kh * KW + kw) * out_channels + c
    for k in tl.static_range(COLUMNS):
        tl.store(out + k * out_channels, tiles.total(sums[k], CHANNELS_LAST), mask=known & (kw + k < KW))


@triton.jit(do_not_specialize=_SIZES)
def merge_weight_gradient_kernel(
    partial, dweight, dbias, channels, splits, TAPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dweight [channels, TAPS] and dbias (channels,), or None, from partial [splits, TAPS (and 1), channels]."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tl.program_id(1)
    step = tl.num_programs(1) * channels
    total = tl.zeros([BLOCK_S, BLOCK_C], partial.dtype.element_ty)
    for i in range((splits + BLOCK_S - 1) // BLOCK_S):
        s = i * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
        source = partial + s * step + (tap * channels + c)[None, :]
        total += tl.load(source, mask=(s < splits) & (c < channels)[None, :], other=0.0)
    value = tl.sum(total, axis=0)
    if tap < TAPS:
        tl.store(dweight + c * TAPS + tap, value.to(dweight.dtype.element_ty), mask=c < channels)
    elif dbias is not None:
        tl.store(dbias + c, value.to(dbias.dtype.element_ty), mask=c < channels)
