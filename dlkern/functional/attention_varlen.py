"""``attention_varlen``: sequences of different lengths laid end to end, without padding."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dlkern.kernels.reference.attention import Extras, Options
from dlkern.ops import attention as _attention
from dlkern.ops.library import unwatched

from .arguments import autocast, check_tensor
from .attention import Window, _band, _check_options, _check_tensors
from .attention_bias import T5Bias, check_values

#: More than any length: a limit of the band that might hide something in one of the sequences stays.
_FAR = 2**40


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    bias: T5Bias | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` of each of several sequences, which lie end to end and see nothing of each other.

    Positions count from a sequence's own beginning; ``causal_alignment="bottom_right"`` puts the last query of each at
    the last key of each. Arguments not named here mean what they mean to :func:`attention`.

    Args:
        query: (total of queries, H, D).
        key: (total of keys, Hk, D).
        value: (total of keys, Hk, Dv).
        cu_seqlens_q: (sequences + 1,), int32 or int64: sequence s is the rows cu_seqlens_q[s] up to, not including,
            cu_seqlens_q[s + 1] of query. It begins with 0, never falls, and ends with the total: checked on the CPU, on
            CUDA devices not (the host would have to wait).
        cu_seqlens_k: the same of key and value.
        bias: T5Bias alone, as there is no position that all sequences share.
        alibi_slopes: (H,) or (sequences, H).

    Returns the output (total of queries, H, Dv), or with ``return_lse`` a pair with LSE (H, total of queries). A query
    of a sequence without keys has output 0, LSE -inf and gradient 0.

    Raises:
        ValueError: shapes that do not fit, ends that are out of order, a number out of its range.
        TypeError: no tensor, a bias of another kind, or a mix of dtypes.
        RuntimeError: tensors on several devices, or a forced backend that cannot run this.
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, t)
        if t.dim() != 3:
            raise ValueError(f"{name}: expected (total length, heads, dim), got shape {tuple(t.shape)}")
    query, key, value = (t.transpose(0, 1) for t in autocast(query, key, value))
    _check_tensors(query, key, value, enable_gqa)
    _check_options(dropout_p, causal_alignment, scale, softcap)
    heads, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    ends = [
        _ends(name, t, query, length)
        for name, t, length in (("cu_seqlens_q", cu_seqlens_q, queries), ("cu_seqlens_k", cu_seqlens_k, keys))
    ]
    sequences = ends[0].numel() - 1
    if ends[1].numel() - 1 != sequences:
        raise ValueError(f"cu_seqlens_k: expected {sequences + 1} elements like cu_seqlens_q, got {ends[1].numel()}")
    table = index = None
    if isinstance(bias, T5Bias):
        table, index = bias.check(query, heads, queries, keys)
    elif bias is not None:
        raise TypeError(f"bias: expected a T5Bias or None, got {type(bias).__name__}")
    if alibi_slopes is not None:
        check_values("alibi_slopes", alibi_slopes, query)
        if alibi_slopes.requires_grad:
            raise ValueError("alibi_slopes: expected a tensor without gradient, got one that requires it")
        if tuple(alibi_slopes.shape) not in ((heads,), (sequences, heads)):
            expected = f"({heads},) or {(sequences, heads)}"
            raise ValueError(f"alibi_slopes: expected shape {expected}, got {tuple(alibi_slopes.shape)}")
        alibi_slopes = alibi_slopes.reshape(-1, heads)
    left, right = _band(is_causal, window, _FAR, _FAR, 0)
    options = Options(
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        left,
        right,
        0,
        0.0 if softcap is None else float(softcap),
        float(dropout_p),
        causal_alignment == "bottom_right",
    )
    extras = Extras(table=table, index=index, slopes=alibi_slopes, cu_queries=ends[0], cu_keys=ends[1])
    out, lse = _attention.apply(query[None], key[None], value[None], extras, options, return_lse)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if lse is not None and return_lse else out


def _ends(name: str, t: Tensor, query: Tensor, length: int) -> Tensor:
    if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected an int32 or int64 Tensor, got {t.dtype if isinstance(t, Tensor) else t!r}")
    if t.device != query.device:
        raise RuntimeError(f"{name}: expected device {query.device} like query, got {t.device}")
    if t.dim() != 1 or t.numel() < 1:
        raise ValueError(f"{name}: expected shape (sequences + 1,), got {tuple(t.shape)}")
    if t.device.type == "cpu" and unwatched(t):
        seen = t.tolist()
        if seen[0] != 0 or seen[-1] != length:
            raise ValueError(f"{name}: expected to begin with 0 and end with {length}, got {seen[0]} and {seen[-1]}")
        for i, (a, b) in enumerate(itertools.pairwise(seen)):
            if b < a:
                raise ValueError(f"{name}: expected ends that never fall, got {a} and then {b} at {i + 1}")
    return t
