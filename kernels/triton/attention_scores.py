"""What every attention kernel shares: scores of a tile, which of its elements are seen, and what dropout keeps.

A tile is queries x keys, or (where the product asks for it) keys x queries: ``m`` and ``n`` are the queries' and keys'
numbers, shaped [BLOCK, 1] or [1, BLOCK], and everything here is elementwise in both. Scores are in units of log2(e),
so that exp2 serves: FACTOR and CAP have been multiplied by it. Values that belong together travel as a tuple:

* sizes: heads, query heads to a key head, queries, keys
* extras: mask, bias, table, index, padding, slopes; each may be None
* strides: of mask and of bias, each (batches, batch, head, query, key), and slopes' of a batch
* band: left, right (each may be None), offset, and the reach of an index by distance (None: by position)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import _tanh

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def padded(depth: int) -> int:
    """A head dimension as kernels hold it."""
    return max(16, 1 << (depth - 1).bit_length())


@triton.jit
def row(base, b, h, x, strides):
    """Pointers to rows x of (batch b, head h); x need not be a scalar, nor need h."""
    return base + (b * strides[0] + h * strides[1] + x.to(tl.int64) * strides[2])


@triton.jit
def load_rows(pointers, d, exists, DEPTH: tl.constexpr):
    """The first DEPTH elements of rows, padded by zeros; ``pointers`` and ``exists`` are shaped against d."""
    return tl.load(pointers + d, mask=exists & (d < DEPTH), other=0.0)


@triton.jit
def last_key(keys, lengths, b):
    """The number of keys of a batch that may be seen."""
    end = keys
    if lengths is not None:
        end = tl.minimum(end, tl.maximum(tl.load(lengths + b).to(tl.int32), 0))
    return end


@triton.jit
def _added(pointer, b, h, m, n, first_m, first_n, inside, strides, ACC: tl.constexpr):
    """A tile of a mask or bias; offsets from its first element fit in 32 bits."""
    batches, of_batch, of_head, of_query, of_key = strides
    first = (b % batches) * of_batch + tl.cast(first_m, tl.int64) * of_query + tl.cast(first_n, tl.int64) * of_key
    offsets = (m - first_m) * of_query + (n - first_n) * of_key
    return tl.load(pointer + (first + h * of_head) + offsets, mask=inside, other=0).to(ACC)


@triton.jit
def table_rows(index, m, n, first_m, first_n, inside, sizes, band):
    """The row of the table that each element of a tile reads."""
    _, _, _, keys = sizes
    _, _, offset, reach = band
    if reach is None:
        pointers = index + (tl.cast(first_m, tl.int64) * keys + first_n) + ((m - first_m) * keys + (n - first_n))
    else:
        pointers = index + (tl.minimum(tl.maximum(n - m - offset, -reach), reach) + reach)
    return tl.load(pointers, mask=inside, other=0).to(tl.int32)


@triton.jit
def scores(
    qk, b, h, m, n, first_m, first_n, end, sizes, extras, strides, band,
    FACTOR: tl.constexpr, CAP: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Scores of a tile from its products, -inf where hidden; and the tanh of capped ones (else anything).

    Its queries begin at ``first_m``, its keys at ``first_n``. Without EDGE it lies in the band and before ``end``.
    """
    ACC: tl.constexpr = qk.dtype
    heads, _, queries, keys = sizes
    mask, bias, table, index, padding, slopes = extras
    of_mask, of_bias, of_slopes = strides
    left, right, offset, _ = band
    s = qk * FACTOR
    t = s
    if CAP != 0.0:
        t = _tanh(s)
        s = t * CAP
    inside = (m < queries) & (n < keys)
    distance = n - m - offset
    if bias is not None:
        s += _added(bias, b, h, m, n, first_m, first_n, inside, of_bias, ACC) * LOG2E
    if table is not None:
        rows = table_rows(index, m, n, first_m, first_n, inside, sizes, band)
        s += tl.load(table + (rows * heads + h), mask=inside, other=0.0).to(ACC) * LOG2E
    if slopes is not None:
        s -= tl.load(slopes + (b * of_slopes + h)).to(ACC) * LOG2E * tl.abs(distance).to(ACC)
    if mask is not None:
        if mask.dtype.element_ty.is_floating():
            s += _added(mask, b, h, m, n, first_m, first_n, inside, of_mask, ACC) * LOG2E
        else:
            keeps = _added(mask, b, h, m, n, first_m, first_n, inside, of_mask, tl.int32)
            s = tl.where(keeps != 0, s, float("-inf"))
    if padding is not None:
        hides = tl.load(padding + (b * keys + n), mask=n < keys, other=1)
        s = tl.where(hides == 0, s, float("-inf"))
    if EDGE:
        seen = n < end
        if left is not None:
            seen = seen & (distance >= left)
        if right is not None:
            seen = seen & (distance <= right)
        s = tl.where(seen, s, float("-inf"))
    return s, t


@triton.jit
def keys_in_band(first, last, end, band, BLOCK: tl.constexpr):
    """The range of keys, from a multiple of BLOCK, that queries first to last see some of."""
    left, right, offset, _ = band
    low = first * 0
    high = low + end
    if right is not None:
        high = tl.minimum(high, last + offset + right + 1)
    if left is not None:
        low = tl.maximum(first + offset + left, 0) // BLOCK * BLOCK
    return low, tl.maximum(high, low)


@triton.jit
def queries_in_band(first, last, queries, band, BLOCK: tl.constexpr):
    """The range of queries, from a multiple of BLOCK, that see some of keys first to last."""
    left, right, offset, _ = band
    low = first * 0
    high = low + queries
    if right is not None:
        low = tl.maximum(first - offset - right, 0) // BLOCK * BLOCK
    if left is not None:
        high = tl.minimum(high, last - offset - left + 1)
    return low, tl.maximum(high, low)


@triton.jit
def kept(
    seed, b, h, m, start, sizes, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Boolean, True where dropout keeps, of the tile whose keys begin at ``start``, a multiple of 4.

    DROPOUT is the threshold of a word's upper 31 bits. One Philox call draws for four keys: the layout of the counters
    is that of ``keep`` in kernels/reference/attention.py.
    """
    heads, _, _, _ = sizes
    fours = start // 4 + tl.arange(0, BLOCK_N // 4)
    shape: tl.constexpr = [BLOCK_N // 4, BLOCK_M] if KEYS_FIRST else [BLOCK_M, BLOCK_N // 4]
    zero = tl.zeros(shape, tl.uint32)
    c0 = zero + (tl.expand_dims(fours, 1) if KEYS_FIRST else tl.expand_dims(fours, 0)).to(tl.uint32)
    c1 = zero + m.to(tl.uint32)
    c2 = zero + (b * heads + h).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c2, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last two dimensions count w0, w1, w2, w3
    if KEYS_FIRST:
        words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), [BLOCK_N, BLOCK_M])
    else:
        words = tl.reshape(words, [BLOCK_M, BLOCK_N])
    return (words >> 1).to(tl.int32) >= DROPOUT
