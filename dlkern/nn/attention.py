"""Attention and MultiheadAttention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlkern import functional
from dlkern.functional import DTYPES, RelativePositionBias, T5Bias
from dlkern.functional.attention import MAX_HEAD_DIM, Window, _band, _check_options


class Attention(nn.Module):
    """:func:`dlkern.functional.attention` with its plain options kept; it has no Parameters.

    Args:
        dropout: the probability to drop an element of the softmax, in training mode.
        is_causal, causal_alignment, scale, enable_gqa, window, softcap: as in functional.attention.

    ``forward(query, key, value, **tensors)`` takes (..., heads, length, dim) and, by name, attn_mask, bias,
    key_padding_mask, key_lengths, alibi_slopes and return_lse.
    """

    def __init__(
        self,
        *,
        dropout: float = 0.0,
        is_causal: bool = False,
        causal_alignment: str = "top_left",
        scale: float | None = None,
        enable_gqa: bool = False,
        window: Window | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability from 0 up to, not including, 1, got {dropout}")
        _check_options(dropout, causal_alignment, scale, softcap)
        _band(is_causal, window, 1, 1, 0)  # for its errors: the lengths come with the call
        self.dropout = dropout
        self.is_causal = is_causal
        self.causal_alignment = causal_alignment
        self.scale = scale
        self.enable_gqa = enable_gqa
        self.window = window
        self.softcap = softcap

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None = None,
        bias: Tensor | RelativePositionBias | T5Bias | None = None,
        key_padding_mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The output (..., H, Lq, Dv), with ``return_lse`` a pair with LSE (..., H, Lq)."""
        return functional.attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            bias=bias,
            key_padding_mask=key_padding_mask,
            key_lengths=key_lengths,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.is_causal,
            causal_alignment=self.causal_alignment,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
            window=self.window,
            alibi_slopes=alibi_slopes,
            softcap=self.softcap,
            return_lse=return_lse,
        )

    def extra_repr(self) -> str:
        """The options."""
        names = ("dropout", "is_causal", "causal_alignment", "scale", "enable_gqa", "window", "softcap")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: the same arguments, Parameters, state_dict and numbers.

    With ``need_weights=False`` the projections are taken apart without a copy, and padding and masks are read where
    they are; a query that sees no key has output 0 before the output projection. With ``need_weights=True`` (PyTorch's
    default: the weights themselves are asked for), for nested tensors, and for calls that PyTorch refuses, PyTorch's
    own forward runs.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, shaped like query, and the weights with ``need_weights``."""
        reason = why_not(self, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        if reason is not None:
            return nn.MultiheadAttention.forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        return attend(self, query, key, value, key_padding_mask, attn_mask, is_causal), None


def why_not(
    module: nn.MultiheadAttention,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any,
    need_weights: bool,
    attn_mask: Any,
    is_causal: bool,
) -> str | None:
    """Why a call is PyTorch's to run, or to refuse in its own words; None where ``attend`` runs it."""
    if need_weights:
        return "need_weights=True asks for the weights themselves"
    for t in (query, key, value):
        if not isinstance(t, Tensor) or t.is_nested or t.dtype not in DTYPES or t.dtype != query.dtype:
            return "query, key and value are not dense tensors of one float dtype"
    rank = query.dim()
    if rank not in (2, 3) or key.dim() != rank or value.dim() != rank or key.shape[:-1] != value.shape[:-1]:
        return f"query, key and value are of {rank}, {key.dim()} and {value.dim()} dimensions, or their lengths differ"
    sizes = (query.shape[-1], key.shape[-1], value.shape[-1])
    if sizes != (module.embed_dim, module.kdim, module.vdim) or module.head_dim > MAX_HEAD_DIM:
        return f"sizes {sizes} of query, key and value, or a head of more than {MAX_HEAD_DIM}"
    axis = 0 if rank == 2 or not module.batch_first else 1
    batch = 1 if rank == 2 else query.shape[1 - axis]
    if rank == 3 and key.shape[1 - axis] != batch:
        return f"a batch of {batch} in query and of {key.shape[1 - axis]} in key"
    queries, keys = query.shape[axis], key.shape[axis]
    if key_padding_mask is not None:
        shape = (keys,) if rank == 2 else (batch, keys)
        if not _is_mask(key_padding_mask, query) or tuple(key_padding_mask.shape) != shape:
            return f"its key_padding_mask is no boolean or {query.dtype} tensor of shape {shape}"
    if attn_mask is not None:
        shapes = ((queries, keys), (batch * module.num_heads, queries, keys))
        if not _is_mask(attn_mask, query) or tuple(attn_mask.shape) not in shapes:
            return f"its attn_mask is no boolean or {query.dtype} tensor of shape {shapes[0]} or {shapes[1]}"
    elif is_causal:
        return "is_causal without an attn_mask"
    return None


def _is_mask(mask: Any, query: Tensor) -> bool:
    return isinstance(mask, Tensor) and mask.dtype in (torch.bool, query.dtype) and mask.device == query.device


def _project(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value behind their projections, each (*, *, heads, head_dim), as views where one product did."""
    embed, bias, split = module.embed_dim, module.in_proj_bias, (module.num_heads, module.head_dim)
    if not module._qkv_same_embed_dim:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        made = (F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))
        q, k, v = (t.unflatten(-1, split) for t in made)
        return q, k, v
    weight = module.in_proj_weight
    if query is key and key is value:
        q, k, v = F.linear(query, weight, bias).unflatten(-1, (3, *split)).unbind(-3)
        return q, k, v
    q = F.linear(query, weight[:embed], None if bias is None else bias[:embed]).unflatten(-1, split)
    if key is value:
        pair = F.linear(key, weight[embed:], None if bias is None else bias[embed:])
        k, v = pair.unflatten(-1, (2, *split)).unbind(-3)
        return q, k, v
    k, v = (
        F.linear(t, weight[i * embed : (i + 1) * embed], None if bias is None else bias[i * embed : (i + 1) * embed])
        for i, t in ((1, key), (2, value))
    )
    return q, k.unflatten(-1, split), v.unflatten(-1, split)


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """What MultiheadAttention's forward returns without weights, of arguments for which ``why_not`` has nothing."""
    batched = query.dim() == 3
    q, k, v = _project(module, query, key, value)
    # (*, *, heads, head_dim) -> (batch, heads, length, head_dim)
    if not batched:
        q, k, v = (t.unsqueeze(0) for t in (q, k, v))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    order = (0, 2, 1, 3) if module.batch_first or not batched else (1, 2, 0, 3)
    q, k, v = (t.permute(order) for t in (q, k, v))
    batch, heads, _, dim = q.shape
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (batch, heads))
    # the hint stands for the mask where there is nothing to merge the mask with, as in PyTorch
    causal = is_causal and key_padding_mask is None
    if causal:
        attn_mask = None
    more: list[tuple[Tensor, Tensor]] = []
    if module.bias_k is not None and module.bias_v is not None:
        more.append(tuple(t.view(1, heads, 1, dim).expand(batch, -1, -1, -1) for t in (module.bias_k, module.bias_v)))  # type: ignore[arg-type]
    if module.add_zero_attn:
        zeros = k.new_zeros((batch, heads, 1, dim))
        more.append((zeros, zeros))
    for extra_k, extra_v in more:  # keys that everybody sees
        k, v = torch.cat([k, extra_k.to(k.dtype)], 2), torch.cat([v, extra_v.to(v.dtype)], 2)
        attn_mask = None if attn_mask is None else F.pad(attn_mask, (0, 1))
        key_padding_mask = None if key_padding_mask is None else F.pad(key_padding_mask, (0, 1))
    keeps = bias = None
    if attn_mask is not None:
        keeps = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        bias, key_padding_mask = key_padding_mask[:, None, None, :].to(q.dtype), None
    out: Any = functional.attention(
        q,
        k,
        v,
        attn_mask=keeps,
        bias=bias,
        key_padding_mask=key_padding_mask,
        dropout_p=module.dropout if module.training else 0.0,
        is_causal=causal,
    )
    out = out.permute((0, 2, 1, 3) if module.batch_first or not batched else (2, 0, 1, 3)).flatten(-2)
    out = F.linear(out, module.out_proj.weight, module.out_proj.bias)
    return out if batched else out[0]
