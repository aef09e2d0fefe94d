"""softmax(scores + biases) @ value: the definition, in plain PyTorch.

The signatures here are the contract of every implementation of the op. Shapes: query (B, H, Lq, D), key
(B, Hk, Lk, D), value (B, Hk, Lk, Dv) with H a multiple of Hk; head h reads key head h // (H / Hk). Beside them:

* ``mask`` (boolean, True keeps; or float, added) and ``bias`` (float, added): (Bm, 1 or H, 1 or Lq, 1 or Lk), where Bm
  divides B and batch b reads b % Bm;
* ``table`` (rows, H), added as table[row, h]; ``index`` holds the row: (Lq, Lk) by position, or (2 R + 1,) by
  distance, where the distance of key j from query i is d = j - (i + offset), held to [-R, R], and read at d + R;
* ``padding`` (B, Lk), True hides a key; ``lengths`` (B,), keys from that one on are hidden;
* ``slopes`` (1 or B, H), ALiBi's: slope * |d| is subtracted;
* ``seed`` (1,) int64, of the dropout;
* ``cu_queries`` and ``cu_keys`` (sequences + 1,): sequences laid end to end in a batch of one. Sequence s is the
  queries cu_queries[s] to cu_queries[s + 1] and the keys of cu_keys likewise, and sees nothing of the others; positions
  count from its own beginning, and it is the batch of the slopes and of the dropout. Mask, bias, padding, lengths and
  an index by position do not come with them.

A row (query) that sees no key has output 0, LSE -inf and gradient 0. LSE (B, H, Lq) is the natural logarithm of the
sum of a row's exponentials, in the dtype of accumulation: float32, or float64 where query is.

Sources: Vaswani et al., "Attention Is All You Need" (2017); Press et al., "Train Short, Test Long" (2022), for ALiBi;
Raffel et al., "Exploring the Limits of Transfer Learning" (2020), for distances in buckets; Salmon et al., "Parallel
Random Numbers: As Easy as 1, 2, 3" (2011), for Philox.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .batch_norm_act import accumulate_dtype

#: Below so many queries or keys a call is mostly overhead.
SHORT = 48


class Request(NamedTuple):
    """What an implementation is asked to do; ``supports`` answers to it.

    ``device`` is a torch device type; ``mask`` is "none", "bool" or "float", ``bias`` "none" or "dense", ``table``
    "none", "positions" or "distances"; ``group`` is the number of query heads to a key head; ``causal`` is a band that
    hides just what follows a query, from the top left on; ``sequences`` are those of cu_queries and cu_keys; ``short``
    says that there are fewer than SHORT queries or keys.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    group: int
    mask: str
    bias: str
    table: str
    padding: bool
    lengths: bool
    slopes: bool
    dropout: bool
    banded: bool
    softcap: bool
    causal: bool = False
    sequences: bool = False
    short: bool = False


class Options(NamedTuple):
    """The plain values. Key j is in the band of query i where left <= d <= right; None is no limit on that side.

    Causal attention is ``right`` 0. ``softcap`` 0 is none; else scores s become softcap * tanh(s / softcap) before
    anything is added. Dropout drops an element of the softmax with ``dropout_p`` and divides the others by
    1 - dropout_p; LSE is from before dropout. With ``bottom_right`` (of sequences only) the offset is each sequence's
    own number of keys minus queries.
    """

    scale: float
    left: int | None = None
    right: int | None = None
    offset: int = 0
    softcap: float = 0.0
    dropout_p: float = 0.0
    bottom_right: bool = False


class Needs(NamedTuple):
    """Which gradients are wanted: of query, of key and value, of a float mask, of bias, of table."""

    query: bool
    key_value: bool
    mask: bool
    bias: bool
    table: bool


class Extras(NamedTuple):
    """The tensors beside query, key and value."""

    mask: Tensor | None = None
    bias: Tensor | None = None
    table: Tensor | None = None
    index: Tensor | None = None
    padding: Tensor | None = None
    lengths: Tensor | None = None
    slopes: Tensor | None = None
    seed: Tensor | None = None
    cu_queries: Tensor | None = None
    cu_keys: Tensor | None = None


def supports(request: Request) -> str | None:
    """The reference runs everything."""
    del request
    return None


def empty_output(query: Tensor, dim: int) -> Tensor:
    """An empty (B, H, L, dim): in memory (B, L, H, dim) where query's is, so that heads are put together for free."""
    batch, heads, length, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return query.new_empty((batch, heads, length, dim))


# -------------------------------------------------------------------------------------------- dropout
_ROUNDS = 10
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_32_BITS = 0xFFFFFFFF


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * m, of 32 bits each, in int64."""
    low = (a & 0xFFFF) * m
    high = (a >> 16) * m + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10: four words of 32 bits (in int64) for a key of 64 bits and four counters."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _32_BITS, (seed >> 32) & _32_BITS
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _M0)
        high1, low1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _32_BITS, (k1 + _W1) & _32_BITS
    return c0, c1, c2, c3


def threshold(dropout_p: float) -> int:
    """An element is kept where the upper 31 bits of its word are at least this."""
    return min(math.floor(dropout_p * 2**31), 2**31 - 1)


def keep(seed: Tensor, batch: int, heads: int, queries: int, keys: int, dropout_p: float) -> Tensor:
    """(batch, heads, queries, keys), True where dropout keeps.

    Key j of query i in (batch b, head h) has word j % 4 of the counters (j // 4, i, b * heads + h, 0).
    """
    device = seed.device
    zero = torch.zeros((), dtype=torch.int64, device=device)
    owner = torch.arange(batch * heads, device=device).view(-1, 1, 1)
    query = torch.arange(queries, device=device).view(-1, 1)
    words = philox(seed, torch.broadcast_tensors(torch.arange((keys + 3) // 4, device=device), query, owner, zero))
    flat = torch.stack(words, dim=-1).flatten(-2)[..., :keys]
    return ((flat >> 1) >= threshold(dropout_p)).view(batch, heads, queries, keys)


def _keep_sequences(seed: Tensor, heads: int, sides: tuple[Side, Side], dropout_p: float) -> Tensor:
    """The same (1, heads, queries, keys) for sequences: each is a batch, and counts from its own beginning."""
    of_query, of_key = sides
    query, key = of_query.position[:, None], of_key.position
    owner = of_query.sequence[:, None] * heads + torch.arange(heads, device=seed.device).view(-1, 1, 1)
    counter = torch.broadcast_tensors(key // 4, query, owner, torch.zeros_like(owner))
    words = torch.stack(philox(seed, counter), dim=-1)  # type: ignore[arg-type]
    word = words.gather(-1, (key % 4).expand(words.shape[:-1])[..., None])[..., 0]
    return ((word >> 1) >= threshold(dropout_p))[None]


# ------------------------------------------------------------------------------------------ sequences
class Side(NamedTuple):
    """Of each row of queries or of keys: the sequence that it is of, and its position there."""

    sequence: Tensor
    position: Tensor


def side(ends: Tensor, length: int) -> Side:
    """The rows of sequences whose ends are ``ends`` (sequences + 1,)."""
    row = torch.arange(length, device=ends.device)
    sequence = torch.searchsorted(ends.long(), row, right=True) - 1
    return Side(sequence, row - ends.long()[sequence])


def sides(extras: Extras, queries: int, keys: int) -> tuple[Side, Side] | None:
    """Of queries and of keys; None where they are not laid end to end."""
    if extras.cu_queries is None or extras.cu_keys is None:
        return None
    return side(extras.cu_queries, queries), side(extras.cu_keys, keys)


def _distances(queries: int, keys: int, extras: Extras, options: Options, device: torch.device) -> Tensor:
    """(queries, keys): how far key j lies behind the position of query i, within its sequence."""
    both = sides(extras, queries, keys)
    if both is None:
        return distances(queries, keys, options.offset, device)
    of_query, of_key = both
    origin = of_query.position + options.offset
    if options.bottom_right:
        more = extras.cu_keys.diff() - extras.cu_queries.diff()  # type: ignore[union-attr]
        origin = of_query.position + more[of_query.sequence]
    return of_key.position - origin[:, None]


# --------------------------------------------------------------------------------------------- scores
def for_batches(t: Tensor, batch: int) -> Tensor:
    """A mask or bias of Bm batches, for all of them."""
    return t if t.size(0) in (1, batch) else t.repeat(batch // t.size(0), 1, 1, 1)


def distances(queries: int, keys: int, offset: int, device: torch.device) -> Tensor:
    """(queries, keys): how far key j lies behind the position of query i."""
    return torch.arange(keys, device=device) - (torch.arange(queries, device=device) + offset)[:, None]


def rows_of(index: Tensor, distance: Tensor) -> Tensor:
    """(Lq, Lk): the row of the table that each pair of positions reads."""
    if index.dim() == 2:
        return index.long()
    reach = index.size(0) // 2
    return index.long()[distance.clamp(-reach, reach) + reach]


def visible(
    batch: int, queries: int, keys: int, extras: Extras, options: Options, device: torch.device
) -> Tensor | None:
    """Boolean, broadcastable to (B, H, Lq, Lk): what band, padding, lengths and a boolean mask leave to see."""
    seen = []
    if options.left is not None or options.right is not None:
        distance = _distances(queries, keys, extras, options, device)
        if options.left is not None:
            seen.append(distance >= options.left)
        if options.right is not None:
            seen.append(distance <= options.right)
    if extras.padding is not None:
        seen.append(~extras.padding.view(batch, 1, 1, keys))
    if extras.lengths is not None:
        seen.append(torch.arange(keys, device=device) < extras.lengths.view(batch, 1, 1, 1))
    if extras.mask is not None and extras.mask.dtype == torch.bool:
        seen.append(for_batches(extras.mask, batch))
    both = sides(extras, queries, keys)
    if both is not None:
        seen.append(both[0].sequence[:, None] == both[1].sequence)
    return functools.reduce(torch.logical_and, seen) if seen else None


def added(batch: int, queries: int, keys: int, extras: Extras, options: Options, dtype: torch.dtype) -> list[Tensor]:
    """What is added to the scores: tensors of ``dtype`` that broadcast to (B, H, Lq, Lk)."""
    mask, bias, table, index, slopes = extras.mask, extras.bias, extras.table, extras.index, extras.slopes
    terms = []
    if mask is not None and mask.dtype != torch.bool:
        terms.append(for_batches(mask, batch).to(dtype))
    if bias is not None:
        terms.append(for_batches(bias, batch).to(dtype))
    if table is not None and index is not None:
        rows = rows_of(index, _distances(queries, keys, extras, options, index.device))
        terms.append(table.to(dtype)[rows].permute(2, 0, 1)[None])
    if slopes is not None:
        distance = _distances(queries, keys, extras, options, slopes.device)
        slope = slopes.to(dtype)[:, :, None, None]
        both = sides(extras, queries, keys)
        if both is not None and slopes.size(0) > 1:  # a sequence's own
            slope = slope[both[0].sequence, :, :, 0].movedim(0, 1)[None]
        terms.append(-slope * distance.abs())
    return terms


def scores(query: Tensor, key: Tensor, extras: Extras, options: Options) -> tuple[Tensor, Tensor | None]:
    """(B, H, Lq, Lk) in the dtype of accumulation, -inf where hidden; and tanh's value where scores are capped."""
    (batch, _, queries, _), keys, dtype = query.shape, key.size(2), accumulate_dtype(query.dtype)
    s = query.to(dtype) @ for_heads(key, query).to(dtype).mT * options.scale
    t = None
    if options.softcap:
        t = torch.tanh(s / options.softcap)
        s = t * options.softcap
    for term in added(batch, queries, keys, extras, options, dtype):
        s = s + term
    seen = visible(batch, queries, keys, extras, options, query.device)
    return s if seen is None else s.masked_fill(~seen, -math.inf), t


def for_heads(t: Tensor, query: Tensor) -> Tensor:
    """Key or value repeated for the query's heads."""
    group = query.size(1) // t.size(1)
    return t if group == 1 else t.repeat_interleave(group, dim=1)


def softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and LSE over the last dimension; 0 and -inf, and no NaN in a gradient, where all of it is -inf."""
    dead = (s == -math.inf).all(-1, keepdim=True)
    s = s.masked_fill(dead, 0.0)
    return s.softmax(-1).masked_fill(dead, 0.0), s.logsumexp(-1).masked_fill(dead.squeeze(-1), -math.inf)


def _kept(query: Tensor, keys: int, extras: Extras, options: Options) -> Tensor | None:
    """What elements of the softmax are multiplied by: 0 or 1 / (1 - p)."""
    if not options.dropout_p or extras.seed is None:
        return None
    batch, heads, queries, _ = query.shape
    both = sides(extras, queries, keys)
    if both is None:
        kept = keep(extras.seed, batch, heads, queries, keys, options.dropout_p)
    else:
        kept = _keep_sequences(extras.seed, heads, both, options.dropout_p)
    return kept.to(accumulate_dtype(query.dtype)) / (1.0 - options.dropout_p)


# ------------------------------------------------------------------------------------------- the pair
def forward(query: Tensor, key: Tensor, value: Tensor, extras: Extras, *, options: Options) -> tuple[Tensor, Tensor]:
    """Output (B, H, Lq, Dv) in query's dtype, with ``empty_output``'s strides, and LSE (B, H, Lq), contiguous."""
    s, _ = scores(query, key, extras, options)
    p, lse = softmax(s)
    kept = _kept(query, key.size(2), extras, options)
    if kept is not None:
        p = p * kept
    out = empty_output(query, value.size(3))
    out.copy_(p @ for_heads(value, query).to(p.dtype))
    return out, lse.contiguous()


def _sum_to(t: Tensor, like: Tensor) -> Tensor:
    """t (B, H, Lq, Lk) summed over what ``like`` (Bm, 1 or H, 1 or Lq, 1 or Lk) is broadcast over."""
    batches = like.size(0)
    t = t.unflatten(0, (-1, batches)).sum(0)
    dims = [i for i in (1, 2, 3) if like.size(i) == 1]
    return (t.sum(dims, keepdim=True) if dims else t).to(like.dtype)


def _sum_heads(t: Tensor, like: Tensor) -> Tensor:
    """A gradient (B, H, L, D) summed over the query heads of each key head, in the strides of ``empty_output``."""
    t = t.unflatten(1, (like.size(1), -1)).sum(2).to(like.dtype)
    return t.transpose(1, 2).contiguous().transpose(1, 2) if like.stride(1) < like.stride(2) else t.contiguous()


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: Extras,
    out: Tensor,
    lse: Tensor,
    *,
    options: Options,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, mask, bias and table, None where not needed.

    Either of ``grad_out`` and ``grad_lse`` may be None (zero), and have any strides. Gradients of query, key and value
    have the strides of ``empty_output`` of each; the others are contiguous. ``out`` and ``lse`` are forward's; here
    they are computed again, so that this is differentiable itself.
    """
    del out, lse
    queries, keys, dtype = query.size(2), key.size(2), accumulate_dtype(query.dtype)
    s, t = scores(query, key, extras, options)
    p, _ = softmax(s)
    kept = _kept(query, keys, extras, options)
    dp = torch.zeros_like(p)
    dvalue = None
    if grad_out is not None:
        grad = grad_out.to(dtype)
        dp = grad @ for_heads(value, query).to(dtype).mT
        if kept is not None:
            dp = dp * kept
        if needs.key_value:
            dvalue = _sum_heads((p if kept is None else p * kept).mT @ grad, value)
    elif needs.key_value:
        dvalue = torch.zeros_like(_sum_heads(for_heads(value, query), value))
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    if grad_lse is not None:
        ds = ds + p * grad_lse.to(dtype)[..., None]
    mask, bias, table, index, *_ = extras
    dmask = _sum_to(ds, mask) if needs.mask and mask is not None else None
    dbias = _sum_to(ds, bias) if needs.bias and bias is not None else None
    dtable = None
    if needs.table and table is not None and index is not None:
        rows = rows_of(index, _distances(queries, keys, extras, options, query.device)).flatten()
        per_pair = ds.sum(0).flatten(1).T
        dtable = torch.zeros_like(table, dtype=dtype).index_add(0, rows, per_pair).to(table.dtype)
    if t is not None:
        ds = ds * (1.0 - t * t)
    dquery = dkey = None
    if needs.query:
        dquery = ds @ for_heads(key, query).to(dtype) * options.scale
        dquery = _sum_heads(dquery, query)
    if needs.key_value:
        dkey = _sum_heads(ds.mT @ query.to(dtype) * options.scale, key)
    return dquery, dkey, dvalue, dmask, dbias, dtable
