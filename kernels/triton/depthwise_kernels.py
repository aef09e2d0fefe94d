"""A depthwise 2d convolution and its gradients, on the device, in either memory format.

A tile is [BLOCK_P, BLOCK_C]: positions (image, strip of rows, column) by channels. In channels_last a program owns
BLOCK_C channels, else one, and runs over a share of the tiles.

``WINDOW``: a position stands for a strip of rows of its column, down which the program walks. The taps' weights (in
the weight's gradient their sums) stay in registers, and so do the rows that the window has begun and not finished: each
pixel is loaded once for each column of taps, and a row ahead of its use. Else (large kernels, dilated rows) a position
is one element and taps run in a loop. Rows that lie outside of the image for the whole tile are left out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import activation as act
from . import tiles

#: Sizes of a problem, for whose values (1, multiples of 16) there is no use: a kernel would be compiled for each.
_SIZES = [
    *("size", "n_tiles", "tiles_per_split", "strips", "rows", "columns", "batch", "splits"),
    *("height", "width", "out_height", "out_width", "first_row", "first_column", "pad_top", "pad_left"),
]

_FAR = tl.constexpr(2**30)


# ----------------------------------------------------------------------------------------- addresses
@triton.jit
def _positions(t, size, strips, width, INT64: tl.constexpr, BLOCK_P: tl.constexpr):
    """(image, strip of rows, column, whether it exists) of the positions of tile t, each [BLOCK_P, 1]."""
    p = tl.arange(0, BLOCK_P)[:, None]
    if INT64:
        p += tl.full([BLOCK_P, 1], BLOCK_P, tl.int64) * t
    else:
        p += t * BLOCK_P
    line = p // width
    return line // strips, line % strips, p % width, p < size


@triton.jit
def _offset(n, c, h, w, channels, height, width, CHANNELS_LAST: tl.constexpr):
    """Where element (n, c, h, w) lies in a tensor of images of channels x height x width."""
    if CHANNELS_LAST:
        offset = ((n * height + h) * width + w) * channels + c
    else:
        offset = ((n * channels + c) * height + h) * width + w
    return offset


@triton.jit
def _steps(channels, width, CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr):
    """How far the next row and the next column lie, each [1, 1]."""
    column = tl.full([1, 1], 1, tl.int64 if INT64 else tl.int32)
    if CHANNELS_LAST:
        column *= channels
    return column * width, column


@triton.jit
def _taps(weight, c, known, TAPS: tl.constexpr, ACC: tl.constexpr):
    """The weights of a program's channels: a tuple over taps."""
    w = ()
    for tap in tl.static_range(TAPS):
        w = w + (tl.load(weight + c * TAPS + tap, mask=known, other=0.0).to(ACC),)
    return w


@triton.jit
def _added(sums, i: tl.constexpr, v):
    """The tuple with v added to its element i."""
    return sums[:i] + (sums[i] + v,) + sums[i + 1 :]


@triton.jit
def _extent(v, exists):
    """The least and the largest v [BLOCK_P, 1] of those that exist."""
    least = tl.min(tl.min(tl.where(exists, v, _FAR), axis=1), axis=0)
    largest = tl.max(tl.max(tl.where(exists, v, -_FAR), axis=1), axis=0)
    return least, largest


@triton.jit
def _row(pointers, inside, column, width, column_step, dilation_w, KW: tl.constexpr):
    """What KW taps read of a row: a tuple. ``pointers`` and ``column`` are the first tap's."""
    values = ()
    for kw in tl.static_range(KW):
        at = column + kw * dilation_w
        mask = inside & (at >= 0) & (at < width)
        values = values + (tl.load(pointers + column_step * (kw * dilation_w), mask=mask, other=0.0),)
    return values


@triton.jit
def _rows(
    pointers, mask, row, column, height, width, row_step, column_step, dilation_w, ROWS: tl.constexpr, KW: tl.constexpr
):
    """What KW taps read of each of ROWS rows: a tuple."""
    values = ()
    for a in tl.static_range(ROWS):
        inside = mask & (row + a >= 0) & (row + a < height)
        values = values + _row(pointers + row_step * a, inside, column, width, column_step, dilation_w, KW)
    return values


# ------------------------------------------------------------------------------------------- forward
@triton.jit
def _loop(
    x, weight, n, c, exists, known, row, column, height, width, channels, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, MULTIPLIER: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sum over taps of one element."""
    total = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    source = c // MULTIPLIER if MULTIPLIER > 1 else c
    least, largest = _extent(row, exists)
    first = (tl.maximum(-largest, 0) + dilation_h - 1) // dilation_h
    end = tl.minimum((tl.maximum(height - least, 0) + dilation_h - 1) // dilation_h, KH)
    for kh in range(first, end):
        h = row + kh * dilation_h
        inside = exists & (h >= 0) & (h < height) & known
        for kw in range(KW):
            at = column + kw * dilation_w
            pixels = x + _offset(n, source, h, at, channels, height, width, CHANNELS_LAST)
            v = tl.load(pixels, mask=inside & (at >= 0) & (at < width), other=0.0).to(ACC)
            w = tl.load(weight + c * (KH * KW) + (kh * KW + kw), mask=known, other=0.0).to(ACC)
            total += v * w
    return total


@triton.jit
def _merged(count, shift, mean, m2, z, there, ACC: tl.constexpr):
    """Count, shift, mean and centred sum of squares of each lane, with z where ``there`` (Welford).

    A lane's first value is its shift, and ``mean`` that of the differences from it: where the values' own mean is far
    larger than their spread, a running mean of the values would be rounded by a part of the spread at every step.
    """
    number = there.to(ACC)
    shift = tl.where(there & (count == 0), z, shift)
    both = count + number
    share = number / tl.maximum(both, 1.0)
    delta = tl.where(there, (z - shift) - mean, 0.0)
    return both, shift, mean + delta * share, m2 + delta * delta * (count * share)


@triton.jit
def _store_statistics(
    partial, c, known, split, channels, count, shift, mean, m2,
    CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The lanes' statistics, merged by Chan's formula, to partial [3, splits, channels]."""
    elements = tiles.total(count, CHANNELS_LAST)
    safe = tl.maximum(elements, 1.0)
    rough = tiles.total(count * (shift + mean), CHANNELS_LAST) / safe
    mean += shift - rough
    rest = tiles.total(count * mean, CHANNELS_LAST) / safe
    off = mean - rest
    out, step = partial + split * channels + c, tl.num_programs(1) * channels
    if CHANNELS_LAST:
        elements += tl.zeros([1, BLOCK_C], ACC)
    tl.store(out, elements, mask=known)
    tl.store(out + step, rough + rest, mask=known)
    tl.store(out + 2 * step, tiles.total(m2 + count * off * off, CHANNELS_LAST), mask=known)


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    x, weight, bias, y, partial,
    size, n_tiles, tiles_per_split, strips, rows, height, width, channels, out_height, out_width,
    stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left,
    CODE: tl.constexpr, PARAM: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, WINDOW: tl.constexpr, MULTIPLIER: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y; partial [3, splits, out channels] (or None): count, mean and centred sum of squares of a share of y.

    Positions are y's, in strips of ``rows`` rows. With ``WINDOW`` dilation_h is 1 and STRIDE_H is stride_h; else a
    strip is one row and STRIDE_H 1.
    """
    out_channels = channels * MULTIPLIER
    c, known = tiles.channel_index(tl.program_id(0), out_channels, CHANNELS_LAST, BLOCK_C)
    split = tl.program_id(1)
    source = c // MULTIPLIER if MULTIPLIER > 1 else c
    row_step, column_step = _steps(channels, width, CHANNELS_LAST, INT64)
    out_step, _ = _steps(out_channels, out_width, CHANNELS_LAST, INT64)
    BEGUN: tl.constexpr = (KH + STRIDE_H - 1) // STRIDE_H if WINDOW else 1
    nothing = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    if WINDOW:
        w = _taps(weight, c, known, KH * KW, ACC)
    if bias is not None:
        b = tl.load(bias + c, mask=known, other=0.0).to(ACC)
    count, shift, mean, m2 = tl.zeros([BLOCK_P, 1], ACC), nothing, nothing, nothing
    first = split * tiles_per_split
    for t in range(first, tl.minimum(first + tiles_per_split, n_tiles)):
        n, strip, column, exists = _positions(t, size, strips, out_width, INT64, BLOCK_P)
        mask = exists & known
        out_row, left = strip * rows, column * stride_w - pad_left
        target = y + _offset(n, c, out_row - (BEGUN - 1), column, out_channels, out_height, out_width, CHANNELS_LAST)
        if WINDOW:
            row = out_row * STRIDE_H - pad_top
            least, largest = _extent(row, exists)
            pixels = x + _offset(n, source, row, left, channels, height, width, CHANNELS_LAST)
            ahead = _rows(
                pixels, mask, row, left, height, width, row_step, column_step, dilation_w, STRIDE_H, KW
            )  # fmt: skip
            sums = (nothing,) * BEGUN
        for i in range(rows + BEGUN - 1):
            if WINDOW:
                # sums[j] is that of row i - j of the strip, which this row's taps a + j * STRIDE_H reach
                values = ahead
                row += STRIDE_H
                pixels += row_step * STRIDE_H
                ahead = _rows(
                    pixels, mask, row, left, height, width, row_step, column_step, dilation_w, STRIDE_H, KW
                )  # fmt: skip
                if (largest + (i + 1) * STRIDE_H > 0) & (least + i * STRIDE_H < height):
                    for a in tl.static_range(STRIDE_H):
                        for kw in tl.static_range(KW):
                            v = values[a * KW + kw].to(ACC)
                            for j in tl.static_range(BEGUN):
                                if a + j * STRIDE_H < KH:
                                    sums = _added(sums, j, v * w[(a + j * STRIDE_H) * KW + kw])
                z = sums[BEGUN - 1]
                sums = (nothing,) + sums[: BEGUN - 1]
            else:
                z = _loop(
                    x, weight, n, c, exists, known, out_row * stride_h - pad_top, left, height, width, channels,
                    dilation_h, dilation_w, KH, KW, MULTIPLIER, CHANNELS_LAST, ACC, BLOCK_P, BLOCK_C,
                )  # fmt: skip
            if bias is not None:
                z += b
            z = act.forward(z, CODE, PARAM).to(y.dtype.element_ty)
            there = exists & (i >= BEGUN - 1) & (out_row + (i - (BEGUN - 1)) < out_height)
            tl.store(target, z, mask=there & known)
            target += out_step
            if partial is not None:
                count, shift, mean, m2 = _merged(count, shift, mean, m2, z.to(ACC), there, ACC)
    if partial is not None:
        _store_statistics(
            partial, c, known, split, out_channels, count, shift, mean, m2, CHANNELS_LAST, ACC, BLOCK_C
        )  # fmt: skip


# ------------------------------------------------------------------------------------ input gradient
@triton.jit
def _gradient_loop(
    grad_y, weight, n, c, exists, known, row, column, channels, out_height, out_width,
    stride_h, stride_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, MULTIPLIER: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx at one pixel; row and column are counted from the first of the padding."""
    total = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    least, largest = _extent(row, exists)
    last = (out_height - 1) * stride_h
    first = (tl.maximum(least - last, 0) + dilation_h - 1) // dilation_h
    end = tl.minimum(tl.maximum(largest, 0) // dilation_h + 1, KH)
    for kh in range(first, end):
        h = row - kh * dilation_h
        inside = exists & (h >= 0) & (h <= last) & (h % stride_h == 0) & known
        for kw in range(KW):
            at = column - kw * dilation_w
            mask = inside & (at >= 0) & (at <= (out_width - 1) * stride_w) & (at % stride_w == 0)
            for m in range(MULTIPLIER):
                out = c * MULTIPLIER + m
                elements = grad_y + _offset(
                    n, out, h // stride_h, at // stride_w, channels * MULTIPLIER, out_height, out_width, CHANNELS_LAST
                )  # fmt: skip
                g = tl.load(elements, mask=mask, other=0.0).to(ACC)
                w = tl.load(weight + out * (KH * KW) + (kh * KW + kw), mask=known, other=0.0).to(ACC)
                total += g * w
    return total


@triton.jit(do_not_specialize=_SIZES)
def input_gradient_kernel(
    grad_y, weight, dx,
    size, n_tiles, tiles_per_split, strips, rows, columns, first_row, first_column,
    height, width, channels, out_height, out_width,
    stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    WINDOW: tl.constexpr, MULTIPLIER: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx. Positions are ``columns`` columns of strips of ``rows`` rows.

    With ``WINDOW`` the dilation and MULTIPLIER are 1, STRIDE_H and STRIDE_W are the strides, and a row (column) is
    one of grad_y: STRIDE_H (STRIDE_W) of dx, counted from the first of the padding, so that it is known when the
    kernel is compiled which tap takes which element of grad_y to which of dx. The rows (columns) before first_row
    (first_column) are padding alone. Else a row (column) is one of dx.
    """
    c, known = tiles.channel_index(tl.program_id(0), channels, CHANNELS_LAST, BLOCK_C)
    row_step, column_step = _steps(channels, out_width, CHANNELS_LAST, INT64)
    dx_row, dx_column = _steps(channels, width, CHANNELS_LAST, INT64)
    ABOVE: tl.constexpr = (KH - 1) // STRIDE_H
    LEFT: tl.constexpr = (KW - 1) // STRIDE_W
    nothing = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    if WINDOW:
        w = _taps(weight, c, known, KH * KW, ACC)
    first = tl.program_id(1) * tiles_per_split
    for t in range(first, tl.minimum(first + tiles_per_split, n_tiles)):
        n, strip, column, exists = _positions(t, size, strips, columns, INT64, BLOCK_P)
        if WINDOW:
            mask = exists & known
            row, at = strip * rows + (first_row - ABOVE), column + (first_column - LEFT)
            least, largest = _extent(row, exists)
            elements = grad_y + _offset(n, c, row, at, channels, out_height, out_width, CHANNELS_LAST)
            dx_h, dx_w = row * STRIDE_H - pad_top, (column + first_column) * STRIDE_W - pad_left
            target = dx + _offset(n, c, dx_h, dx_w, channels, height, width, CHANNELS_LAST)
            ahead = _rows(elements, mask, row, at, out_height, out_width, row_step, column_step, 1, 1, LEFT + 1)
            sums = (nothing,) * ((ABOVE + 1) * STRIDE_H * STRIDE_W)
            for i in range(rows + ABOVE):
                # sums[k * STRIDE_W + q] is that of row k and column q, counted from this row's and column's first
                values = ahead
                row += 1
                elements += row_step
                ahead = _rows(elements, mask, row, at, out_height, out_width, row_step, column_step, 1, 1, LEFT + 1)
                if (largest + i >= 0) & (least + i < out_height):
                    for j in tl.static_range(LEFT + 1):
                        g = values[j].to(ACC)
                        for kh in tl.static_range(KH):
                            for q in tl.static_range(STRIDE_W):
                                if q + (LEFT - j) * STRIDE_W < KW:
                                    product = g * w[kh * KW + q + (LEFT - j) * STRIDE_W]
                                    sums = _added(sums, kh * STRIDE_W + q, product)
                for a in tl.static_range(STRIDE_H):
                    h = dx_h + (i * STRIDE_H + a)
                    inside = mask & (i >= ABOVE) & (h >= 0) & (h < height)
                    for q in tl.static_range(STRIDE_W):
                        tl.store(
                            target + (dx_row * a + dx_column * q),
                            sums[a * STRIDE_W + q].to(dx.dtype.element_ty),
                            mask=inside & (dx_w + q >= 0) & (dx_w + q < width),
                        )
                target += dx_row * STRIDE_H
                sums = sums[STRIDE_H * STRIDE_W :] + (nothing,) * (STRIDE_H * STRIDE_W)
        else:
            total = _gradient_loop(
                grad_y, weight, n, c, exists, known, strip + pad_top, column + pad_left, channels,
                out_height, out_width, stride_h, stride_w, dilation_h, dilation_w,
                KH, KW, MULTIPLIER, CHANNELS_LAST, ACC, BLOCK_P, BLOCK_C,
            )  # fmt: skip
            target = dx + _offset(n, c, strip, column, channels, height, width, CHANNELS_LAST)
            tl.store(target, total.to(dx.dtype.element_ty), mask=exists & known)
