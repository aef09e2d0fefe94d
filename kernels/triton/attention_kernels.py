"""Attention's forward pass on the device: an online softmax over blocks of keys.

Source: Dao, "FlashAttention-2" (2023); Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_scores import LN2, kept, keys_in_band, last_key, load_rows, padded, row, scores
from .implicit_gemm import product

#: Sizes of a problem, for whose values (1, multiples of 16) there is no use: a kernel would be compiled for each.
SIZES = [
    *("heads", "group", "queries", "keys", "tiles", "splits", "rows"),
    *("mask_batches", "bias_batches", "left", "right", "offset", "reach"),
    *("out_batches", "out_heads", "tiles_q", "tiles_k", "tiles_per_program", "programs", "items", "items_per_share"),
    *("table_rows", "batch", "batches_per_program", "shares"),
]


@triton.jit
def _attend(
    acc, top, total, q, b, h, hk, m, first, start, end, k, v, of_k, of_v, seed,
    sizes, extras, strides, band,
    FACTOR: tl.constexpr, CAP: tl.constexpr, DROPOUT: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, VALUE_DEPTH: tl.constexpr,
):  # fmt: skip
    """Take a block of keys into the sum ``acc`` of weighted values, the largest score and the sum of exponentials."""
    _, _, _, keys = sizes
    n = start + tl.arange(0, BLOCK_N)
    k_t = load_rows(row(k, b, hk, n, of_k)[None, :], tl.arange(0, padded(DEPTH))[:, None], (n < keys)[None, :], DEPTH)
    qk = product(q, k_t, tl.zeros([BLOCK_M, BLOCK_N], acc.dtype), PRECISION)
    s, _ = scores(
        qk, b, h, m, n[None, :], first, start, end, sizes, extras, strides, band, FACTOR, CAP, EDGE
    )  # fmt: skip
    new = tl.maximum(top, tl.max(s, axis=1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # a row of which nothing is seen yet
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(p, axis=1)
    if DROPOUT >= 0:
        p = tl.where(kept(seed, b, h, m, start, sizes, DROPOUT, BLOCK_M, BLOCK_N, False), p, 0.0)
    values = load_rows(
        row(v, b, hk, n, of_v)[:, None], tl.arange(0, padded(VALUE_DEPTH))[None, :], (n < keys)[:, None], VALUE_DEPTH
    )
    acc = product(p.to(values.dtype), values, acc * shrink[:, None], PRECISION)
    return acc, new, total


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, out, lse, mask, bias, table, index, padding, lengths, slopes, seed,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_m,
    mask_batches, mask_b, mask_h, mask_m, mask_n, bias_batches, bias_b, bias_h, bias_m, bias_n, slopes_b,
    heads, group, queries, keys, left, right, offset, reach, tiles, rows,
    FACTOR: tl.constexpr, CAP: tl.constexpr, DROPOUT: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PACKED: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, VALUE_DEPTH: tl.constexpr,
):  # fmt: skip
    """out and LSE of a tile of queries.

    PACKED: the rows of a tile are all the queries of all the heads that share a key head, so that few queries read
    keys once. SPLIT: of the keys only the share of program_id(1); out [splits, B, H, Lq, Dv] and LSE [splits, rows].
    """
    sizes = (heads, group, queries, keys)
    extras = (mask, bias, table, index, padding, slopes)
    strides = (
        (mask_batches, mask_b, mask_h, mask_m, mask_n), (bias_batches, bias_b, bias_h, bias_m, bias_n), slopes_b,
    )  # fmt: skip
    band = (left, right, offset, reach)
    pid = tl.program_id(0)
    owner = (pid // tiles).to(tl.int64)
    r = (pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    if PACKED:
        key_heads = heads // group
        b = owner // key_heads
        hk = owner % key_heads
        exists = r < group * queries
        h = (hk * group + r // queries)[:, None]
        m = (r % queries)[:, None]
        first = pid * 0
        last = first + queries - 1
    else:
        b = owner // heads
        h = owner % heads
        hk = h // group
        exists = r < queries
        m = r[:, None]
        first = (pid % tiles) * BLOCK_M
        last = tl.minimum(first + BLOCK_M, queries) - 1
    end = last_key(keys, lengths, b)
    low, high = keys_in_band(first, last, end, band, BLOCK_N)
    # Blocks from inner_low to inner_high lie wholly in the band; those on either side are looked at element by element.
    inner_low, inner_high = low, low
    if SPLIT:
        share = ((high - low + BLOCK_N - 1) // BLOCK_N + tl.num_programs(1) - 1) // tl.num_programs(1) * BLOCK_N
        low += tl.program_id(1) * share
        high = tl.minimum(high, low + share)
        inner_low, inner_high = low, low
    else:
        if left is not None:
            inner_low = (tl.maximum(last + offset + left, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        inner_high = (low * 0 + end) // BLOCK_N * BLOCK_N
        if right is not None:
            inner_high = tl.minimum(inner_high, tl.maximum(first + offset + right + 1, 0) // BLOCK_N * BLOCK_N)
        some = inner_low < inner_high
        inner_low = tl.where(some, inner_low, low)
        inner_high = tl.where(some, inner_high, low)
    pointers = row(q, b, h, m, (q_b, q_h, q_m))
    queries_ = load_rows(pointers, tl.arange(0, padded(DEPTH))[None, :], exists[:, None], DEPTH)
    acc = tl.zeros([BLOCK_M, padded(VALUE_DEPTH)], ACC)
    top = tl.full([BLOCK_M], float("-inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    of_k, of_v = (k_b, k_h, k_n), (v_b, v_h, v_n)
    for start in range(inner_low, inner_high, BLOCK_N):
        acc, top, total = _attend(
            acc, top, total, queries_, b, h, hk, m, first, start, end, k, v, of_k, of_v, seed,
            sizes, extras, strides, band, FACTOR, CAP, DROPOUT, False, PRECISION, BLOCK_M, BLOCK_N, DEPTH, VALUE_DEPTH,
        )  # fmt: skip
    before = (inner_low - low) // BLOCK_N
    for i in range(before + (tl.maximum(high - inner_high, 0) + BLOCK_N - 1) // BLOCK_N):
        start = tl.where(i < before, low + i * BLOCK_N, inner_high + (i - before) * BLOCK_N)
        acc, top, total = _attend(
            acc, top, total, queries_, b, h, hk, m, first, start, end, k, v, of_k, of_v, seed,
            sizes, extras, strides, band, FACTOR, CAP, DROPOUT, True, PRECISION, BLOCK_M, BLOCK_N, DEPTH, VALUE_DEPTH,
        )  # fmt: skip
    safe = tl.where(total == 0.0, 1.0, total)
    acc = acc * (1.0 / safe * KEEP_SCALE)[:, None]
    lse += tl.program_id(1).to(tl.int64) * rows
    if SPLIT:
        out += tl.program_id(1).to(tl.int64) * rows * VALUE_DEPTH
    column = tl.arange(0, padded(VALUE_DEPTH))[None, :]
    tl.store(
        row(out, b, h, m, (out_b, out_h, out_m)) + column, acc.to(out.dtype.element_ty),
        mask=exists[:, None] & (column < VALUE_DEPTH),
    )  # fmt: skip
    tl.store(lse + ((b * heads + h) * queries + m), ((top + tl.log2(safe)) * LN2)[:, None], mask=exists[:, None])


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    parts, part_lse, out, lse, out_b, out_h, out_m, heads, queries, splits, rows,
    BLOCK_S: tl.constexpr, VALUE_DEPTH: tl.constexpr,
):  # fmt: skip
    """out and LSE of one row from those of each share of its keys; a share of which nothing was seen has LSE -inf."""
    r = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    each = tl.load(part_lse + s.to(tl.int64) * rows + r, mask=s < splits, other=float("-inf"))
    top = tl.max(each, axis=0)
    weight = tl.exp(each - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, axis=0)
    safe = tl.where(total == 0.0, 1.0, total)
    column = tl.arange(0, padded(VALUE_DEPTH))
    inside = (s < splits)[:, None] & (column < VALUE_DEPTH)[None, :]
    part = tl.load(
        parts + (s.to(tl.int64) * rows + r)[:, None] * VALUE_DEPTH + column[None, :], mask=inside, other=0.0
    )  # fmt: skip
    mixed = tl.sum(part * (weight / safe)[:, None], axis=0)
    owner, m = r // queries, r % queries
    target = row(out, owner // heads, owner % heads, m, (out_b, out_h, out_m))
    tl.store(target + column, mixed.to(out.dtype.element_ty), mask=column < VALUE_DEPTH)
    tl.store(lse + r, top + tl.log(safe))
