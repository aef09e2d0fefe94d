"""The matrix products behind a 2d convolution and its gradients, on the device; all tensors are channels_last.

A product's rows are positions of feature maps. Row m reads, for each filter tap (r, s), the pixel that the tap
reaches from m, and the product runs over taps and channels. The forward pass and the input gradient are one such
product: forward steps through the input by the stride, the input gradient steps through the output's gradient by
1, once for each phase (row modulo stride, column modulo stride), in which a tap either reaches whole pixels or
takes no part. The weight gradient is a product over positions.

``MODE`` tells how the sum over taps and channels is laid out:

* POINTWISE: one tap of stride 1 without padding, a plain matrix product.
* TAPS: taps unrolled statically, and for each a loop over channels. A single loop over taps and channels was seen
  to be compiled wrongly with 8 warps.
* TAP_LOOP: the same with a loop over taps, at most 4 warps: many taps, where unrolled code would be too long, and
  phases, in most of which most taps take no part.
* FLAT: few channels; one loop over pairs (tap, channel), at most 4 warps.
* PHASES: an input gradient with a stride and no dilation: TAP_LOOP over the taps alone that reach whole pixels from a
  phase, every stride-th of a row or column of them.

``SKIP`` leaves out, in TAPS and TAP_LOOP, what lies outside of the image, as much of an atrous convolution does: a tap
that no position of a tile reaches the image by (tiles are runs of whole rows and parts of rows, so with the rates of
ASPP these are the taps above and below), and in the weight gradient all positions from which its tap leaves the image.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import activation as act
from .batch_norm_act import _scale_and_shift

POINTWISE = tl.constexpr(0)
TAPS = tl.constexpr(1)
TAP_LOOP = tl.constexpr(2)
FLAT = tl.constexpr(3)
PHASES = tl.constexpr(4)

#: Sizes of a problem, for whose values (1, multiples of 16) there is no use: a kernel would be compiled for each.
_SIZES = [
    *("rows", "tiles_m", "tiles_n", "steps", "steps_per_split", "shares", "shares_per_split", "splits"),
    *("height", "width", "out_height", "out_width", "phase_height", "phase_width", "pad_h", "pad_w"),
]

NORM_NONE = tl.constexpr(0)
NORM_RUNNING = tl.constexpr(1)
NORM_BATCH = tl.constexpr(2)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b. In float64 a sum of products: not every target of ``tl.dot`` takes that type."""
    if acc.dtype == tl.float64:
        acc += tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def reach(tap, phase, stride, padding, dilation, BACKWARD: tl.constexpr):
    """How many pixels from a row's own one a tap reads, and whether it reaches a whole pixel."""
    if BACKWARD:
        numerator = phase + padding - tap * dilation
        whole = numerator % stride == 0
        offset = numerator // stride
    else:
        offset = tap * dilation - padding
        whole = offset == offset
    return offset, whole


@triton.jit
def window(offset, stride, size, out_size):
    """(first, how many) of the positions from which a tap at ``offset`` reaches one of ``size`` pixels."""
    first = (tl.maximum(-offset, 0) + stride - 1) // stride
    last = size - 1 - offset  # (of the pixels that a position would stand on at the latest; none where negative)
    end = tl.minimum(tl.where(last >= 0, tl.maximum(last, 0) // stride + 1, 0), out_size)
    return first, tl.maximum(end - first, 0)


@triton.jit
def split_position(m, height, width):
    """(image, row, column) of position m of images of height x width."""
    line = m // width
    return line // height, line % height, m % width


@triton.jit
def positions(tile, rows, INT64: tl.constexpr, BLOCK: tl.constexpr):
    """The rows (or columns) of a tile and which of them exist."""
    m = tl.arange(0, BLOCK)
    if INT64:  # (tile need not be a tensor, so it has no .to)
        m += tl.full([BLOCK], BLOCK, tl.int64) * tile
    else:
        m += tile * BLOCK
    return m, m < rows


@triton.jit
def _over_channels(
    acc, pixels, inside, filters, known, steps, depth, filter_step, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """acc + one tap: pointers to pixels [BLOCK_M] and to columns of the filter [BLOCK_N]."""
    for i in range(steps):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.load(pixels[:, None] + k[None, :], mask=inside[:, None] & (k < depth)[None, :], other=0.0)
        b = tl.load(filters[None, :] + k[:, None] * filter_step, mask=(k < depth)[:, None] & known[None, :], other=0.0)
        acc = product(a, b, acc, PRECISION)
    return acc


@triton.jit
def _add_tap(
    acc, source, filters, n, h, w, exists, known, tap, phase_h, phase_w,
    height, width, channels, depth, tap_step, filter_step, steps,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    S: tl.constexpr, BACKWARD: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offset_h, whole_h = reach(tap // S, phase_h, stride_h, pad_h, dilation_h, BACKWARD)
    offset_w, whole_w = reach(tap % S, phase_w, stride_w, pad_w, dilation_w, BACKWARD)
    hh, ww = h + offset_h, w + offset_w
    inside = exists & (hh >= 0) & (hh < height) & (ww >= 0) & (ww < width)
    if BACKWARD:
        steps = tl.where(whole_h & whole_w, steps, 0)
    if SKIP:
        steps = tl.where(tl.max(inside.to(tl.int32), axis=0) > 0, steps, 0)
    pixels = source + ((n * height + hh) * width + ww) * channels
    return _over_channels(
        acc, pixels, inside, filters + tap * tap_step, known, steps, depth, filter_step, PRECISION, BLOCK_K
    )  # fmt: skip


@triton.jit
def gather(
    source, weight, m, n, h, w, exists, column, known, group, phase_h, phase_w,
    height, width, channels, depth, columns, group_step, tap_step, filter_step, column_step,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    R: tl.constexpr, S: tl.constexpr, MODE: tl.constexpr, BACKWARD: tl.constexpr, SKIP: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: the sum over taps and channels of source's pixels times weight.

    source (images, height, width, channels), of which a group reads ``depth`` from ``group * depth`` on; weight is
    indexed by the steps of group, tap, channel of source (``filter_step``) and column of the result.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    source += group * depth
    filters = weight + group * group_step + column * column_step
    steps = (depth + BLOCK_K - 1) // BLOCK_K
    if MODE == POINTWISE:
        acc = _over_channels(
            acc, source + m * channels, exists, filters, known, steps, depth, filter_step, PRECISION, BLOCK_K
        )  # fmt: skip
    elif MODE == TAPS:
        for tap in tl.static_range(R * S):
            acc = _add_tap(
                acc, source, filters, n, h, w, exists, known, tap, phase_h, phase_w,
                height, width, channels, depth, tap_step, filter_step, steps,
                stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, S, BACKWARD, SKIP, PRECISION, BLOCK_K,
            )  # fmt: skip
    elif MODE == TAP_LOOP:
        for tap in range(R * S):
            acc = _add_tap(
                acc, source, filters, n, h, w, exists, known, tap, phase_h, phase_w,
                height, width, channels, depth, tap_step, filter_step, steps,
                stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, S, BACKWARD, SKIP, PRECISION, BLOCK_K,
            )  # fmt: skip
    elif MODE == PHASES:
        first_h, first_w = (phase_h + pad_h) % stride_h, (phase_w + pad_w) % stride_w
        across = (S + stride_w - 1) // stride_w
        for i in range(((R + stride_h - 1) // stride_h) * across):
            tap_h, tap_w = first_h + i // across * stride_h, first_w + i % across * stride_w
            acc = _add_tap(
                acc, source, filters, n, h, w, exists, known, tap_h * S + tap_w, phase_h, phase_w,
                height, width, channels, depth, tap_step, filter_step, tl.where((tap_h < R) & (tap_w < S), steps, 0),
                stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, S, BACKWARD, False, PRECISION, BLOCK_K,
            )  # fmt: skip
    else:
        for i in range((R * S * depth + BLOCK_K - 1) // BLOCK_K):
            j = i * BLOCK_K + tl.arange(0, BLOCK_K)
            tap, k = j // depth, j % depth
            offset_h, whole_h = reach(tap // S, phase_h, stride_h, pad_h, dilation_h, BACKWARD)
            offset_w, whole_w = reach(tap % S, phase_w, stride_w, pad_w, dilation_w, BACKWARD)
            hh, ww = h[:, None] + offset_h[None, :], w[:, None] + offset_w[None, :]
            used = (tap < R * S) & whole_h & whole_w
            inside = exists[:, None] & used[None, :] & (hh >= 0) & (hh < height) & (ww >= 0) & (ww < width)
            pixels = source + ((n[:, None] * height + hh) * width + ww) * channels
            a = tl.load(pixels + k[None, :], mask=inside, other=0.0)
            b = tl.load(
                filters[None, :] + (tap * tap_step + k * filter_step)[:, None],
                mask=used[:, None] & known[None, :], other=0.0,
            )  # fmt: skip
            acc = product(a, b, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    x, weight, bias, residual, bn_weight, bn_bias, mean, spread, y, c, mean_out, invstd_out, partial,
    rows, tiles_m, tiles_n, groups, height, width, channels, depth, out_height, out_width, out_channels, columns,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    EPS: tl.constexpr, CODE: tl.constexpr, PARAM: tl.constexpr, NORM: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, MODE: tl.constexpr, SKIP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, INT64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c = conv(x, weight) + bias, and what follows it.

    NORM_BATCH: partial [3, tiles_m, out_channels] takes count, mean and centred sum of squares of a tile's c.
    NORM_RUNNING: y by running statistics ``mean`` and ``spread``, and mean_out and invstd_out. NORM_NONE: y. c may
    be None. Everything is computed from c as c's dtype holds it, so backward recomputes the same numbers, and y
    does not depend on whether c is kept.
    """
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    group = (pid // tiles_n) % groups
    tile_m = pid // (tiles_n * groups)
    m, exists = positions(tile_m, rows, INT64, BLOCK_M)
    column, known = positions(tile_n, columns, INT64, BLOCK_N)
    filter_size = R * S * depth
    n, oh, ow = split_position(m, out_height, out_width)
    acc = gather(
        x, weight, m, n, oh * stride_h, ow * stride_w, exists, column, known, group, 0, 0,
        height, width, channels, depth, columns, columns * filter_size, depth, 1, filter_size,
        stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
        R, S, MODE, False, SKIP, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    index = (group * columns + column)[None, :]
    known = known[None, :]
    offsets = m[:, None] * out_channels + index
    mask = exists[:, None] & known
    if bias is not None:
        acc += tl.load(bias + index, mask=known, other=0.0).to(ACC)
    rounded = acc.to(x.dtype.element_ty)
    if c is not None:
        tl.store(c + offsets, rounded, mask=mask)
    z = rounded.to(ACC)
    if NORM == NORM_BATCH:
        z = tl.where(mask, z, 0.0)
        count = tl.sum(mask.to(ACC), axis=0, keep_dims=True)
        safe = tl.where(count > 0, count, 1.0)
        rough = tl.sum(z, axis=0, keep_dims=True) / safe
        centre = rough + tl.sum(tl.where(mask, z - rough, 0.0), axis=0, keep_dims=True) / safe
        off = tl.where(mask, z - centre, 0.0)
        out, step = partial + tile_m * out_channels + index, tiles_m * out_channels
        tl.store(out, count, mask=known)
        tl.store(out + step, centre, mask=known)
        tl.store(out + 2 * step, tl.sum(off * off, axis=0, keep_dims=True), mask=known)
    else:
        if NORM == NORM_RUNNING:
            mu = tl.load(mean + index, mask=known, other=0.0).to(ACC)
            r = tl.rsqrt(tl.load(spread + index, mask=known, other=1.0).to(ACC) + EPS)
            if tile_m == 0:
                tl.store(mean_out + index, mu, mask=known)
                tl.store(invstd_out + index, r, mask=known)
            scale, shift = _scale_and_shift(bn_weight, bn_bias, index, known, ACC)
            z = (z - mu) * r * scale + shift
        if residual is not None:
            z += tl.load(residual + offsets, mask=mask, other=0.0).to(ACC)
        tl.store(y + offsets, act.forward(z, CODE, PARAM).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def condense_statistics_kernel(
    partial, out, channels, shares, shares_per_split, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out [3, splits, channels] from partial [3, shares, channels]: Chan's formula along each lane, then over them."""
    dtype = partial.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    split = tl.program_id(1)
    first = split * shares_per_split
    end = tl.minimum(first + shares_per_split, shares)
    step = shares * channels
    count = tl.zeros([BLOCK_S, BLOCK_C], dtype)
    mean = tl.zeros([BLOCK_S, BLOCK_C], dtype)
    m2 = tl.zeros([BLOCK_S, BLOCK_C], dtype)
    for i in range((shares_per_split + BLOCK_S - 1) // BLOCK_S):
        s = first + i * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
        mask = (s < end) & (c < channels)
        source = partial + s * channels + c
        n = tl.load(source, mask=mask, other=0.0)
        delta = tl.load(source + step, mask=mask, other=0.0) - mean
        both = tl.where(count + n > 0, count + n, 1.0)
        delta = tl.where(n > 0, delta, 0.0)
        m2 += tl.load(source + 2 * step, mask=mask, other=0.0) + delta * delta * (count * n / both)
        mean += delta * (n / both)
        count += n
    total = tl.sum(count, axis=0, keep_dims=True)
    safe = tl.where(total > 0, total, 1.0)
    rough = tl.sum(count * mean, axis=0, keep_dims=True) / safe
    centre = rough + tl.sum(count * (mean - rough), axis=0, keep_dims=True) / safe
    off = mean - centre
    target, step = out + split * channels + c, tl.num_programs(1) * channels
    tl.store(target, total, mask=c < channels)
    tl.store(target + step, centre, mask=c < channels)
    tl.store(target + 2 * step, tl.sum(m2 + count * off * off, axis=0, keep_dims=True), mask=c < channels)


@triton.jit(do_not_specialize=_SIZES)
def input_gradient_kernel(
    dc, weight, dx, scale, shift, y,
    rows, tiles_n, groups, phase_height, phase_width, height, width, channels, columns,
    out_height, out_width, out_channels, depth,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, CODE: tl.constexpr, PARAM: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, MODE: tl.constexpr, SKIP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, INT64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx. Rows of a phase (p, q) are the pixels (i * stride_h + p, j * stride_w + q) of phase_height x phase_width.

    A transposed convolution is one, with an epilogue: its output, times scale and plus shift (channels,) where these
    are given, goes to dx, and act of it to y; either may be None. Without a scale y is act of what dx holds.
    """
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    group = (pid // tiles_n) % groups
    phases = stride_h * stride_w
    phase = (pid // (tiles_n * groups)) % phases
    m, exists = positions(pid // (tiles_n * groups * phases), rows, INT64, BLOCK_M)
    column, known = positions(tile_n, columns, INT64, BLOCK_N)
    filter_size = R * S * columns
    phase_h, phase_w = phase // stride_w, phase % stride_w
    n, i, j = split_position(m, phase_height, phase_width)
    h, w = i * stride_h + phase_h, j * stride_w + phase_w
    exists = exists & (h < height) & (w < width)
    acc = gather(
        dc, weight, m, n, i, j, exists, column, known, group, phase_h, phase_w,
        out_height, out_width, out_channels, depth, columns, depth * filter_size, columns, filter_size, 1,
        stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
        R, S, MODE, True, SKIP, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    target = m if MODE == POINTWISE else (n * height + h) * width + w
    index = (group * columns + column)[None, :]
    offsets = target[:, None] * channels + index
    mask = exists[:, None] & known[None, :]
    if scale is not None:
        acc *= tl.load(scale + index, mask=known[None, :], other=0.0).to(ACC)
    if shift is not None:
        acc += tl.load(shift + index, mask=known[None, :], other=0.0).to(ACC)
    rounded = acc.to(weight.dtype.element_ty)
    if dx is not None:
        tl.store(dx + offsets, rounded, mask=mask)
    if y is not None:
        z = acc
        if scale is None:
            z = rounded.to(ACC)
        tl.store(y + offsets, act.forward(z, CODE, PARAM).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def weight_gradient_kernel(
    dc, x, partial,
    rows, steps, steps_per_split, tiles_m, tiles_n, height, width, channels, depth,
    out_height, out_width, out_channels, columns,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    R: tl.constexpr, S: tl.constexpr, MODE: tl.constexpr, SKIP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, INT64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial [splits, out_channels, taps, depth]: a share of the positions' sum of dc * (the pixel a tap reads).

    Rows are output channels of a group. Columns are input channels of one tap, with FLAT pairs (tap, channel).
    """
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    tile_m = (pid // tiles_n) % tiles_m
    group = pid // (tiles_n * tiles_m)
    split = tl.program_id(1)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if MODE == FLAT:
        pair = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tap, k = pair // depth, pair % depth
        known = tap < R * S
    else:
        per_tap = (depth + BLOCK_N - 1) // BLOCK_N
        tap, k = tile_n // per_tap, (tile_n % per_tap) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        known = k < depth
    offset_h, _ = reach(tap // S, 0, stride_h, pad_h, dilation_h, False)
    offset_w, _ = reach(tap % S, 0, stride_w, pad_w, dilation_w, False)
    gradient = dc + (group * columns + row)[:, None]
    source = x + group * depth + k
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    top, left, view_height, view_width = 0, 0, out_height, out_width
    if SKIP:  # the positions from which the tap stays inside of the image
        top, view_height = window(offset_h, stride_h, height, out_height)
        left, view_width = window(offset_w, stride_w, width, out_width)
        rows = rows // (out_height * out_width) * view_height * view_width
        steps = (rows + BLOCK_K - 1) // BLOCK_K
        steps_per_split = (steps + tl.num_programs(1) - 1) // tl.num_programs(1)
        view_height, view_width = tl.maximum(view_height, 1), tl.maximum(view_width, 1)
    first = split * steps_per_split
    for i in range(first, tl.minimum(first + steps_per_split, steps)):
        m, exists = positions(i, rows, INT64, BLOCK_K)
        if SKIP:
            n, oh, ow = split_position(m, view_height, view_width)
            oh, ow = oh + top, ow + left
            m = (n * out_height + oh) * out_width + ow
        a = tl.load(gradient + m[None, :] * out_channels, mask=(row < columns)[:, None] & exists[None, :], other=0.0)
        if MODE == POINTWISE:
            b = tl.load(source + m[:, None] * channels, mask=exists[:, None] & known, other=0.0)
        else:
            if not SKIP:
                n, oh, ow = split_position(m, out_height, out_width)
            hh, ww = (oh * stride_h)[:, None] + offset_h, (ow * stride_w)[:, None] + offset_w
            inside = exists[:, None] & (hh >= 0) & (hh < height) & (ww >= 0) & (ww < width)
            pixels = source + ((n[:, None] * height + hh) * width + ww) * channels
            b = tl.load(pixels, mask=inside & known, other=0.0)
        acc = product(a, b, acc, PRECISION)
    # 32 bits hold this: a weight has fewer than 2**31 elements, and partial is larger than it only below 2**26
    offsets = (split * out_channels + group * columns + row)[:, None] * (R * S * depth) + tap * depth + k
    tl.store(partial + offsets, acc.to(partial.dtype.element_ty), mask=(row < columns)[:, None] & known)


@triton.jit(do_not_specialize=_SIZES)
def sum_splits_kernel(partial, out, size, splits, BLOCK: tl.constexpr):
    """out (size,): the sum of partial [splits, size], in the order of the splits."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], partial.dtype.element_ty)
    for split in range(splits):
        total += tl.load(partial + split * size + i, mask=i < size, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < size)
