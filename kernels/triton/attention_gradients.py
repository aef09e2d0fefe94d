"""Attention's backward pass on the device: no atomics, so that results are bit for bit repeatable.

The gradients of queries are summed over keys by one program, those of keys and values over queries by another; each
computes the softmax again from LSE. Products take what was computed as it lies in registers, never transposed: a
kernel that wants dS as keys x queries computes the scores so. For short sequences one program does both, for a whole
(batch, key head), and where one tile holds all queries and keys it makes the gradient of a table, too.

The gradient of a mask, bias or table is dS summed over what they are broadcast over: a program owns a tile of the
bias and runs over all that reads it, so that dS never lies in memory.

Source: Dao et al., "FlashAttention" (2022), for the recomputation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_kernels import SIZES
from .attention_scores import (
    LOG2E,
    kept,
    keys_in_band,
    last_key,
    load_rows,
    padded,
    queries_in_band,
    row,
    scores,
    table_rows,
)
from .implicit_gemm import product


@triton.jit
def _delta(grad, o, grad_lse, b, h, m, of_lse, queries, ACC: tl.constexpr):
    d = tl.sum(grad.to(ACC) * o.to(ACC), axis=1)
    if grad_lse is not None:
        d -= tl.load(row(grad_lse, b, h, m, of_lse), mask=m < queries, other=0.0).to(ACC)
    return d


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    grad_out, out, grad_lse, delta, grad_b, grad_h, grad_m, out_b, out_h, out_m, lse_b, lse_h, lse_m,
    heads, queries, tiles, ACC: tl.constexpr, BLOCK_M: tl.constexpr, VALUE_DEPTH: tl.constexpr,
):  # fmt: skip
    """delta (B, H, Lq): the sum over a row of grad_out * out, less the gradient of LSE."""
    pid = tl.program_id(0)
    owner = (pid // tiles).to(tl.int64)
    b, h = owner // heads, owner % heads
    m = (pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = m < queries
    column = tl.arange(0, padded(VALUE_DEPTH))[None, :]
    grad = load_rows(row(grad_out, b, h, m, (grad_b, grad_h, grad_m))[:, None], column, exists[:, None], VALUE_DEPTH)
    o = load_rows(row(out, b, h, m, (out_b, out_h, out_m))[:, None], column, exists[:, None], VALUE_DEPTH)
    d = _delta(grad, o, grad_lse, b, h, m, (lse_b, lse_h, lse_m), queries, ACC)
    tl.store(delta + (owner * queries + m), d, mask=exists)


@triton.jit
def _statistics(lse, delta, b, h, m, sizes):
    """LSE in units of log2(e), inf (no weight) for rows that see nothing or do not exist; and delta."""
    heads, _, queries, _ = sizes
    offsets = (b * heads + h) * queries + m
    top = tl.load(lse + offsets, mask=m < queries, other=float("inf"))
    top = tl.where(top == float("-inf"), float("inf"), top) * LOG2E
    d = top
    if delta is not None:
        d = tl.load(delta + offsets, mask=m < queries, other=0.0)
    return top, d


@triton.jit
def _query_side(
    queries_, grad, top, d, k_tile, v_tile, seed, b, h, m, n, first, start, end, sizes, extras, strides, band,
    FACTOR: tl.constexpr, CAP: tl.constexpr, DROPOUT: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dS [BLOCK_M, BLOCK_N], and the tanh of capped scores."""
    zero = tl.zeros([BLOCK_M, BLOCK_N], d.dtype)
    qk = product(queries_, tl.trans(k_tile), zero, PRECISION)
    s, t = scores(qk, b, h, m, n, first, start, end, sizes, extras, strides, band, FACTOR, CAP, True)
    p = tl.exp2(s - top)
    dp = product(grad, tl.trans(v_tile), zero, PRECISION)
    if DROPOUT >= 0:
        keeps = kept(seed, b, h, m, start, sizes, DROPOUT, BLOCK_M, BLOCK_N, False)
        dp = tl.where(keeps, dp * KEEP_SCALE, 0.0)
    return p * (dp - d), t


@triton.jit
def _query_tile(
    ds_sum, q, k, v, grad_out, out, lse, grad_lse, delta, dq, lengths, seed, b, h, hk, first, tensors, sizes,
    extras, strides, band,
    FACTOR: tl.constexpr, CAP: tl.constexpr, DROPOUT: tl.constexpr, KEEP_SCALE: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, VALUE_DEPTH: tl.constexpr,
):  # fmt: skip
    """Store dq of the queries from ``first``; with SUM (all keys are one tile) return ds_sum + dS.

    Where ``out`` is given, delta is made here, and stored for the other side.
    """
    of_q, of_k, of_v, of_grad, of_dq, _, _, of_out, of_lse = tensors
    heads, _, queries, keys = sizes
    m = first + tl.arange(0, BLOCK_M)
    exists = (m < queries)[:, None]
    column, value_column = tl.arange(0, padded(DEPTH))[None, :], tl.arange(0, padded(VALUE_DEPTH))[None, :]
    queries_ = load_rows(row(q, b, h, m, of_q)[:, None], column, exists, DEPTH)
    grad = load_rows(row(grad_out, b, h, m, of_grad)[:, None], value_column, exists, VALUE_DEPTH)
    if out is not None:
        o = load_rows(row(out, b, h, m, of_out)[:, None], value_column, exists, VALUE_DEPTH)
        d = _delta(grad, o, grad_lse, b, h, m, of_lse, queries, lse.dtype.element_ty)
        tl.store(delta + ((b * heads + h) * queries + m), d, mask=m < queries)
        top, _ = _statistics(lse, None, b, h, m, sizes)
    else:
        top, d = _statistics(lse, delta, b, h, m, sizes)
    end = last_key(keys, lengths, b)
    low, high = keys_in_band(first, tl.minimum(first + BLOCK_M, queries) - 1, end, band, BLOCK_N)
    acc = tl.zeros([BLOCK_M, padded(DEPTH)], d.dtype)
    for start in range(low, high, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k_tile = load_rows(row(k, b, hk, n, of_k)[:, None], column, (n < keys)[:, None], DEPTH)
        v_tile = load_rows(row(v, b, hk, n, of_v)[:, None], value_column, (n < keys)[:, None], VALUE_DEPTH)
        ds, t = _query_side(
            queries_, grad, top[:, None], d[:, None], k_tile, v_tile, seed, b, h, m[:, None], n[None, :], first, start,
            end, sizes, extras, strides, band, FACTOR, CAP, DROPOUT, KEEP_SCALE, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if SUM:
            ds_sum += ds
        if CAP != 0.0:
            ds = ds * (1.0 - t * t)
        acc = product(ds.to(k_tile.dtype), k_tile, acc, PRECISION)
    target = row(dq, b, h, m, of_dq)[:, None] + column
    tl.store(target, (acc * SCALE).to(dq.dtype.element_ty), mask=exists & (column < DEPTH))
    return ds_sum


@triton.jit
def _key_tile(
    q, k, v, grad_out, lse, delta, dk, dv, lengths, seed, b, hk, first, tensors, sizes, extras, strides, band,
    FACTOR: tl.constexpr, CAP: tl.constexpr, DROPOUT: tl.constexpr, KEEP_SCALE: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, VALUE_DEPTH: tl.constexpr,
):  # fmt: skip
    """Store dk and dv of the keys from ``first``, over all query heads that read them."""
    of_q, of_k, of_v, of_grad, _, of_dk, of_dv, _, _ = tensors
    _, group, queries, keys = sizes
    n = first + tl.arange(0, BLOCK_N)
    exists = (n < keys)[:, None]
    column, value_column = tl.arange(0, padded(DEPTH))[None, :], tl.arange(0, padded(VALUE_DEPTH))[None, :]
    k_tile = load_rows(row(k, b, hk, n, of_k)[:, None], column, exists, DEPTH)
    v_tile = load_rows(row(v, b, hk, n, of_v)[:, None], value_column, exists, VALUE_DEPTH)
    end = last_key(keys, lengths, b)
    low, high = queries_in_band(first, tl.minimum(first + BLOCK_N, keys) - 1, queries, band, BLOCK_M)
    high = tl.where(first < end, high, low)
    steps = (high - low + BLOCK_M - 1) // BLOCK_M
    acc_k = tl.zeros([BLOCK_N, padded(DEPTH)], lse.dtype.element_ty)
    acc_v = tl.zeros([BLOCK_N, padded(VALUE_DEPTH)], lse.dtype.element_ty)
    for i in range(group * steps):
        h = hk * group + i // steps
        first_m = low + (i % steps) * BLOCK_M
        m = first_m + tl.arange(0, BLOCK_M)
        queries_ = load_rows(row(q, b, h, m, of_q)[:, None], column, (m < queries)[:, None], DEPTH)
        grad = load_rows(row(grad_out, b, h, m, of_grad)[:, None], value_column, (m < queries)[:, None], VALUE_DEPTH)
        top, d = _statistics(lse, delta, b, h, m, sizes)
        zero = tl.zeros([BLOCK_N, BLOCK_M], acc_k.dtype)
        qk = product(k_tile, tl.trans(queries_), zero, PRECISION)
        s, t = scores(
            qk, b, h, m[None, :], n[:, None], first_m, first, end, sizes, extras, strides, band, FACTOR, CAP, True
        )  # fmt: skip
        p = tl.exp2(s - top[None, :])
        dp = product(v_tile, tl.trans(grad), zero, PRECISION)
        given = p
        if DROPOUT >= 0:
            keeps = kept(seed, b, h, m[None, :], first, sizes, DROPOUT, BLOCK_M, BLOCK_N, True)
            dp = tl.where(keeps, dp * KEEP_SCALE, 0.0)
            given = tl.where(keeps, p * KEEP_SCALE, 0.0)
        acc_v = product(given.to(grad.dtype), grad, acc_v, PRECISION)
        ds = p * (dp - d[None, :])
        if CAP != 0.0:
            ds = ds * (1.0 - t * t)
        acc_k = product(ds.to(queries_.dtype), queries_, acc_k, PRECISION)
    target = row(dk, b, hk, n, of_dk)[:, None] + column
    tl.store(target, (acc_k * SCALE).to(dk.dtype.element_ty), mask=exists & (column < DEPTH))
    target = row(dv, b, hk, n, of_dv)[:, None] + value_column
    tl.store(target, acc_v.to(dv.dtype.element_ty), mask=exists & (value_column < VALUE_DEPTH))


@triton.jit
def _add_rows(target, ds, index, m, n, first_m, first_n, h, sizes, band, table_rows_):
    """Add to target [table_rows, heads] the sums of a tile's elements that read each row of the table, for head h."""
    heads, _, queries, keys = sizes
    inside = (m < queries) & (n < keys)
    rows = tl.where(inside, table_rows(index, m, n, first_m, first_n, inside, sizes, band), -1)
    for r in range(table_rows_):
        pointer = target + (r * heads + h)
        so_far = tl.load(pointer)
        tl.debug_barrier()  # every thread has read before one writes
        tl.store(pointer, so_far + tl.sum(tl.sum(tl.where(rows == r, ds, 0.0), axis=1), axis=0))
    tl.debug_barrier()  # and what it wrote is there for the next tile


@triton.jit(do_not_specialize=SIZES)
def tiles_kernel(
    q, k, v, grad_out, out, lse, grad_lse, delta, dq, dk, dv, partial,
    mask, bias, table, index, padding, lengths, slopes, seed,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, grad_b, grad_h, grad_m,
    dq_b, dq_h, dq_m, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, out_b, out_h, out_m, lse_b, lse_h, lse_m,
    mask_batches, mask_b, mask_h, mask_m, mask_n, bias_batches, bias_b, bias_h, bias_m, bias_n, slopes_b,
    heads, group, queries, keys, left, right, offset, reach,
    tiles, batch, batches_per_program, table_rows,
    SIDE: tl.constexpr, FACTOR: tl.constexpr, CAP: tl.constexpr, DROPOUT: tl.constexpr, KEEP_SCALE: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, VALUE_DEPTH: tl.constexpr,
):  # fmt: skip
    """dq (SIDE "query"), or dk and dv ("key"), of a tile; both, and delta, for all of a (batch, key head) ("both").

    ``out`` and ``grad_lse`` are given with "both" only.

    With "both" a program may own several batches and, where ``partial`` is given (one tile is all, and each key head
    has one query head), sums their dS over what reads each row of the table: [shares, table_rows, heads] of zeros.
    ``out`` and ``grad_lse`` are given with "both" only.

    With "both" a program may own several batches and, where ``partial`` is given (one tile is all, and each key head
    has one query head), sums their dS: partial [shares, heads, queries, keys], or [shares, table_rows, heads] of
    zeros where there is a table.
    """
    sizes = (heads, group, queries, keys)
    extras = (mask, bias, table, index, padding, slopes)
    strides = (
        (mask_batches, mask_b, mask_h, mask_m, mask_n), (bias_batches, bias_b, bias_h, bias_m, bias_n), slopes_b,
    )  # fmt: skip
    band = (left, right, offset, reach)
    tensors = (
        (q_b, q_h, q_m), (k_b, k_h, k_n), (v_b, v_h, v_n), (grad_b, grad_h, grad_m),
        (dq_b, dq_h, dq_m), (dk_b, dk_h, dk_n), (dv_b, dv_h, dv_n), (out_b, out_h, out_m), (lse_b, lse_h, lse_m),
    )  # fmt: skip
    ACC: tl.constexpr = lse.dtype.element_ty
    pid = tl.program_id(0)
    none = tl.zeros([1, 1], ACC)
    if SIDE == "query":
        owner = (pid // tiles).to(tl.int64)
        h = owner % heads
        _query_tile(
            none, q, k, v, grad_out, out, lse, grad_lse, delta, dq, lengths, seed, owner // heads, h, h // group,
            (pid % tiles) * BLOCK_M, tensors, sizes, extras, strides, band,
            FACTOR, CAP, DROPOUT, KEEP_SCALE, SCALE, PRECISION, False, BLOCK_M, BLOCK_N, DEPTH, VALUE_DEPTH,
        )  # fmt: skip
    if SIDE == "key":
        owner = (pid // tiles).to(tl.int64)
        _key_tile(
            q, k, v, grad_out, lse, delta, dk, dv, lengths, seed, owner // (heads // group), owner % (heads // group),
            (pid % tiles) * BLOCK_N, tensors, sizes, extras, strides, band,
            FACTOR, CAP, DROPOUT, KEEP_SCALE, SCALE, PRECISION, BLOCK_M, BLOCK_N, DEPTH, VALUE_DEPTH,
        )  # fmt: skip
    if SIDE == "both":
        key_heads = heads // group
        hk = (pid % key_heads).to(tl.int64)
        share = (pid // key_heads).to(tl.int64)
        SUM: tl.constexpr = partial is not None
        # fewer queries at once on the keys' side, which has two sums to hold
        STEP: tl.constexpr = BLOCK_M // 2 if BLOCK_M >= 32 else BLOCK_M
        ds_sum = tl.zeros([BLOCK_M, BLOCK_N], ACC) if SUM else none
        for i in range(batches_per_program):
            b = share * batches_per_program + i
            steps = tl.where(b < batch, (queries + BLOCK_M - 1) // BLOCK_M * group, 0)
            for step in range(steps):
                h = hk * group + step % group
                ds_sum = _query_tile(
                    ds_sum, q, k, v, grad_out, out, lse, grad_lse, delta, dq, lengths, seed, b, h, hk,
                    step // group * BLOCK_M, tensors, sizes, extras, strides, band,
                    FACTOR, CAP, DROPOUT, KEEP_SCALE, SCALE, PRECISION, SUM, BLOCK_M, BLOCK_N, DEPTH, VALUE_DEPTH,
                )  # fmt: skip
            tl.debug_barrier()  # delta, which one side stored, is there for the other
            steps = tl.where(b < batch, (keys + BLOCK_N - 1) // BLOCK_N, 0)
            for step in range(steps):
                _key_tile(
                    q, k, v, grad_out, lse, delta, dk, dv, lengths, seed, b, hk, step * BLOCK_N,
                    tensors, sizes, extras, strides, band,
                    FACTOR, CAP, DROPOUT, KEEP_SCALE, SCALE, PRECISION, STEP, BLOCK_N, DEPTH, VALUE_DEPTH,
                )  # fmt: skip
        if SUM:
            m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
            target = partial + share * table_rows * heads
            _add_rows(target, ds_sum, index, m, n, pid * 0, pid * 0, hk, sizes, band, table_rows)


@triton.jit(do_not_specialize=SIZES)
def bias_kernel(
    q, k, v, grad_out, lse, delta, partial,
    mask, bias, table, index, padding, lengths, slopes, seed,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, grad_b, grad_h, grad_m,
    mask_batches, mask_b, mask_h, mask_m, mask_n, bias_batches, bias_b, bias_h, bias_m, bias_n, slopes_b,
    heads, group, queries, keys, left, right, offset, reach,
    out_batches, out_heads, tiles_q, tiles_k, tiles_per_program, programs, items, items_per_share, table_rows,
    OVER_QUERIES: tl.constexpr, OVER_KEYS: tl.constexpr, TABLE: tl.constexpr,
    FACTOR: tl.constexpr, CAP: tl.constexpr, DROPOUT: tl.constexpr, KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, VALUE_DEPTH: tl.constexpr,
):  # fmt: skip
    """dS of tiles of an added term of (out_batches, out_heads, queries, keys), summed over what it is broadcast over.

    Program (i, s) owns tiles_per_program tiles of one (batch, head) of the term, and of the ``items`` that read a
    tile (batches, heads, blocks of queries where OVER_QUERIES, of keys where OVER_KEYS) the s-th share. partial
    [shares, *term]; with TABLE [shares * programs, table_rows, heads] of zeros.
    """
    sizes = (heads, group, queries, keys)
    extras = (mask, bias, table, index, padding, slopes)
    strides = (
        (mask_batches, mask_b, mask_h, mask_m, mask_n), (bias_batches, bias_b, bias_h, bias_m, bias_n), slopes_b,
    )  # fmt: skip
    band = (left, right, offset, reach)
    ACC: tl.constexpr = lse.dtype.element_ty
    pid, share = tl.program_id(0), tl.program_id(1).to(tl.int64)
    owner = (pid // programs).to(tl.int64)
    out_b, out_h = owner // out_heads, owner % out_heads
    column, value_column = tl.arange(0, padded(DEPTH))[None, :], tl.arange(0, padded(VALUE_DEPTH))[None, :]
    steps_q = (queries + BLOCK_M - 1) // BLOCK_M if OVER_QUERIES else 1
    steps_k = (keys + BLOCK_N - 1) // BLOCK_N if OVER_KEYS else 1
    over_heads = heads // out_heads
    first_tile = (pid % programs) * tiles_per_program
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, tiles_q * tiles_k)):
        total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        first_item = tl.program_id(1) * items_per_share
        for item in range(first_item, tl.minimum(first_item + items_per_share, items)):
            first_m = (tile // tiles_k + item // steps_k % steps_q) * BLOCK_M
            first_n = (tile % tiles_k + item % steps_k) * BLOCK_N
            which = item // (steps_k * steps_q)
            h = out_h + which % over_heads
            b = out_b + (which // over_heads).to(tl.int64) * out_batches
            m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
            end = last_key(keys, lengths, b)
            low, high = keys_in_band(first_m, tl.minimum(first_m + BLOCK_M, queries) - 1, end, band, BLOCK_N)
            if (first_n < high) & (first_n + BLOCK_N > low):
                hk = h // group
                q_tile = load_rows(
                    row(q, b, h, m, (q_b, q_h, q_m))[:, None], column, (m < queries)[:, None], DEPTH
                )  # fmt: skip
                grad = load_rows(
                    row(grad_out, b, h, m, (grad_b, grad_h, grad_m))[:, None], value_column, (m < queries)[:, None],
                    VALUE_DEPTH,
                )  # fmt: skip
                k_tile = load_rows(row(k, b, hk, n, (k_b, k_h, k_n))[:, None], column, (n < keys)[:, None], DEPTH)
                v_tile = load_rows(
                    row(v, b, hk, n, (v_b, v_h, v_n))[:, None], value_column, (n < keys)[:, None], VALUE_DEPTH
                )  # fmt: skip
                top, d = _statistics(lse, delta, b, h, m, sizes)
                ds, _ = _query_side(
                    q_tile, grad, top[:, None], d[:, None], k_tile, v_tile, seed, b, h, m[:, None], n[None, :],
                    first_m, first_n, end, sizes, extras, strides, band,
                    FACTOR, CAP, DROPOUT, KEEP_SCALE, PRECISION, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                total += ds
        first_m, first_n = tile // tiles_k * BLOCK_M, tile % tiles_k * BLOCK_N
        m, n = (first_m + tl.arange(0, BLOCK_M))[:, None], (first_n + tl.arange(0, BLOCK_N))[None, :]
        if TABLE:
            target = partial + (share * programs + pid % programs) * table_rows * heads
            _add_rows(target, total, index, m, n, first_m, first_n, out_h, sizes, band, table_rows)
        else:
            if OVER_QUERIES:
                total = tl.sum(total, axis=0, keep_dims=True)
                m = tl.zeros([1, 1], tl.int32)
            if OVER_KEYS:
                total = tl.sum(total, axis=1, keep_dims=True)
                n = tl.zeros([1, 1], tl.int32)
            rows, columns = 1 if OVER_QUERIES else queries, 1 if OVER_KEYS else keys
            target = ((share * out_batches + out_b) * out_heads + out_h) * rows + m
            tl.store(
                partial + (target * columns + n), total.to(partial.dtype.element_ty), mask=(m < rows) & (n < columns)
            )
