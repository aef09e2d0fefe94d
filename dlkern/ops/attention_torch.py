"""Attention by PyTorch alone: what the op's "torch" stands for.

``F.scaled_dot_product_attention`` itself, with what it has no argument for turned into a mask; a composed expression
where it cannot do it (softcap, LSE, no keys).
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dlkern.kernels.reference import attention as reference
from dlkern.kernels.reference.attention import Extras, Options

from . import library


def sequences(
    query: Tensor, key: Tensor, value: Tensor, extras: Extras, options: Options, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The output and LSE of sequences laid end to end, one call for each; the host reads where they end."""
    outs, lses = [], []
    ends = [t.tolist() for t in (extras.cu_queries, extras.cu_keys)]  # type: ignore[union-attr]
    for i in range(len(ends[0]) - 1):
        q = query[:, :, ends[0][i] : ends[0][i + 1]]
        k, v = (t[:, :, ends[1][i] : ends[1][i + 1]] for t in (key, value))
        slopes = extras.slopes
        own = Extras(
            table=extras.table, index=extras.index,
            slopes=slopes if slopes is None or slopes.size(0) == 1 else slopes[i : i + 1],
        )  # fmt: skip
        offset = k.size(2) - q.size(2) if options.bottom_right else options.offset
        simple = options._replace(offset=offset, bottom_right=False)
        out, lse = composed(q, k, v, own, simple) if return_lse else (run(q, k, v, own, simple), None)
        outs.append(out)
        lses.append(lse)
    if not outs:
        return value.new_zeros((*query.shape[:3], value.size(3))), query.new_zeros(query.shape[:3])
    return torch.cat(outs, 2), torch.cat(lses, 2) if return_lse else None  # type: ignore[arg-type]


def run(query: Tensor, key: Tensor, value: Tensor, extras: Extras, options: Options) -> Tensor:
    """The output (B, H, Lq, Dv)."""
    if options.softcap or query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        return composed(query, key, value, extras, options)[0]
    banded = options.left is not None or options.right != 0 or options.offset != 0
    causal = not banded and all(t is None for t in extras)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        None if causal else _mask(query, key, extras, options),
        options.dropout_p,
        causal,
        scale=options.scale,
        enable_gqa=library.plainly(query.size(1) != key.size(1)),
    )


def _mask(query: Tensor, key: Tensor, extras: Extras, options: Options) -> Tensor | None:
    """SDPA's attn_mask: None, boolean, or of query's dtype.

    A float mask of another dtype is cast: cuDNN's attention was seen to misread a float32 one beside half data.
    """
    batch, queries, keys = query.size(0), query.size(2), key.size(2)
    if extras.mask is None and extras.bias is None and extras.table is None and extras.slopes is None:
        return reference.visible(batch, queries, keys, extras, options, query.device)
    dtype = reference.accumulate_dtype(query.dtype)
    seen = reference.visible(batch, queries, keys, extras, options, query.device)
    terms = reference.added(batch, queries, keys, extras, options, dtype)
    if not terms:
        return seen
    total = functools.reduce(torch.add, terms)
    return (total if seen is None else torch.where(seen, total, -math.inf)).to(query.dtype)


def composed(query: Tensor, key: Tensor, value: Tensor, extras: Extras, options: Options) -> tuple[Tensor, Tensor]:
    """The output and LSE (B, H, Lq), by matrix products and a softmax."""
    s, _ = reference.scores(query, key, extras, options)
    p, lse = reference.softmax(s)
    if options.dropout_p:
        p = F.dropout(p, options.dropout_p)
    return p.to(value.dtype) @ reference.for_heads(value, query), lse
