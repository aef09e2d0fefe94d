"""dlkern's attention for Hugging Face transformers, through its registries of attention functions and of masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlkern import functional
from dlkern.functional import DTYPES
from dlkern.functional.attention import MAX_HEAD_DIM
from dlkern.ops.library import unwatched

#: The name to give as ``attn_implementation``.
NAME = "dlkern"


def register() -> str:
    """Make "dlkern" an attention implementation of transformers; returns that name. Calling it again does nothing.

    ``model.set_attn_implementation("dlkern")``, or ``from_pretrained(..., attn_implementation="dlkern")``, then runs
    every attention of a model that has "sdpa" by :func:`dlkern.functional.attention`. Both registries know the name,
    since a model without a mask function would be given no mask. Beside what "sdpa" does, ``softcap`` works. A query
    that sees no key has output 0. A model that was saved or pickled with this implementation needs ``register()``
    before it is loaded.

    Raises:
        ImportError: transformers is not installed, or is older than its registry of masks (4.53).
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """A mask function of transformers: a boolean mask (B, 1, Lq, Lk), True keeps, or None.

    Where nothing but padding is hidden it is a view of the (B, Lk) that was given, expanded without a copy; every other
    mask is that of "sdpa".
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    simple = mask_function is bidirectional_mask_function and not use_vmap and q_offset == kv_offset == 0
    if simple and attention_mask is not None and tuple(attention_mask.shape) == (batch_size, kv_length):
        keeps = attention_mask.to(torch.bool)
        if allow_is_bidirectional_skip and unwatched(keeps) and bool(keeps.all()):
            return None
        return keeps[:, None, None, :].expand(-1, -1, q_length, -1)
    given = {} if mask_function is None else {"mask_function": mask_function}
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip, use_vmap=use_vmap, **given, **kwargs,
    )  # fmt: skip


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query (B, H, Lq, D), key and value (B, Hk, Lk, D); out (B, Lq, H, D).

    A mask that is the same for all queries (``attention_mask``'s for padding) goes to the kernel as the (B, Lk) that it
    is. What dlkern has no attention for (paged caches, heads of more than 256) runs as "sdpa".
    """
    softcap = kwargs.pop("softcap", None)
    if _unfit(query, key, value, attention_mask, position_bias) or kwargs.get("cache") is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if softcap is not None:
            kwargs["softcap"] = softcap
        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = query.shape[2] > 1 and attention_mask is None and bool(is_causal)
    padding = None
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
        if attention_mask.dtype == torch.bool and _same_for_all(attention_mask, query):
            padding = ~attention_mask[:, 0, 0, :]
            attention_mask = None
    out: Any = functional.attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        bias=None if position_bias is None else position_bias[..., : key.shape[2]],
        key_padding_mask=padding,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        softcap=softcap,
    )
    return out.transpose(1, 2).contiguous(), None


def _unfit(query: Tensor, key: Tensor, value: Tensor, mask: Any, bias: Any) -> bool:
    if query.dtype not in DTYPES or any(t.is_nested or t.dtype != query.dtype for t in (query, key, value)):
        return True
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        return True
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, query.dtype)):
        return True
    return bias is not None and bias.dtype not in (query.dtype, torch.float32)


def _same_for_all(mask: Tensor, query: Tensor) -> bool:
    """Whether a mask (B, 1, Lq, Lk) hides the same keys from each query, as its strides tell."""
    if mask.dim() != 4 or mask.shape[0] != query.shape[0] or mask.shape[1] != 1:
        return False
    return mask.shape[2] == 1 or mask.stride(2) == 0
