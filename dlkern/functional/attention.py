"""``attention``: checks of its arguments, and PyTorch's ways to say what is hidden from whom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlkern.kernels.reference.attention import Extras, Options
from dlkern.ops import attention as _attention
from dlkern.ops.library import unwatched

from .arguments import autocast, check_tensor
from .attention_bias import RelativePositionBias, T5Bias, check_device, check_values
from .dtypes import DTYPES

#: The largest head dimension.
MAX_HEAD_DIM = 256
ALIGNMENTS = ("top_left", "bottom_right")
Window = int | Sequence[int | None]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    bias: Tensor | RelativePositionBias | T5Bias | None = None,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
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
    """``softmax(scale * query @ key.mT + what is added) @ value``, with everything hidden left out of the softmax.

    Arguments mean what they mean to ``torch.nn.functional.scaled_dot_product_attention``, and those it lacks may be
    combined at will. Tensors are (..., heads, length, dim); "broadcast" is meant against (..., heads, Lq, Lk).

    Args:
        query: (..., H, Lq, D); float32, float64, float16 or bfloat16. Under autocast query, key and value are cast as
            scaled_dot_product_attention casts them.
        key: (..., Hk, Lk, D). Hk is H, or with ``enable_gqa`` divides H; head h reads key head h // (H / Hk).
        value: (..., Hk, Lk, Dv). D and Dv are at most 256.
        attn_mask: boolean (True keeps) or float (added), broadcast. It may come with ``is_causal``.
        bias: float, broadcast, added; or RelativePositionBias or T5Bias, whose table of values is read in place.
        key_padding_mask: (..., Lk) boolean, True hides a key of a batch, as in ``torch.nn.MultiheadAttention``.
        key_lengths: (...,) int32 or int64: keys from that position on are hidden. 0 to Lk: checked on the CPU, not on
            CUDA devices (the host would have to wait), where less means 0 and more means Lk.
        dropout_p: the probability to drop an element of the softmax, from 0 up to but not including 1. There is no
            training flag: pass 0.0 in evaluation. Which elements are dropped follows from ``torch.manual_seed``, and
            is another choice for each backend.
        is_causal: hide the keys behind a query's position.
        causal_alignment: query i stands at key position i ("top_left"), or i + Lk - Lq ("bottom_right": the last query
            at the last key, as in decoding). This holds for is_causal, window, alibi_slopes and T5Bias alike.
        scale: of the scores; 1 / sqrt(D) where None.
        window: how far a query sees: a distance to either side, or a pair (left, right), where None is any distance.
        alibi_slopes: (H,) or (..., H): slope * distance is subtracted. Has no gradient.
        softcap: scores become softcap * tanh(scores / softcap) before anything is added.
        return_lse: return (output, LSE): LSE (..., H, Lq), the logarithm of the sum of a query's exponentials before
            dropout, in float32 (float64 for float64), differentiable.

    Returns the output (..., H, Lq, Dv) in query's dtype, or with ``return_lse`` a pair. A query that sees no key has
    output 0, LSE -inf and gradient 0. attn_mask, a bias and tables may be float32 beside half data; their gradients
    are summed over what they were broadcast over.

    Raises:
        ValueError: shapes that do not fit, heads that do not divide, a number out of its range.
        TypeError: no tensor, or a mix of dtypes other than above.
        RuntimeError: tensors on several devices, or a forced backend that cannot run this.
    """
    query, key, value = autocast(query, key, value)
    _check_tensors(query, key, value, enable_gqa)
    _check_options(dropout_p, causal_alignment, scale, softcap)
    lead, (heads, queries, _), keys = query.shape[:-3], query.shape[-3:], key.shape[-2]
    batch = math.prod(lead)
    full = (*lead, heads, queries, keys)
    mask = None if attn_mask is None else _added("attn_mask", attn_mask, query, full)
    dense = table = index = None
    if isinstance(bias, (RelativePositionBias, T5Bias)):
        table, index = bias.check(query, heads, queries, keys)
    elif bias is not None:
        dense = _added("bias", bias, query, full)
    extras = Extras(
        mask,
        dense,
        table,
        index,
        None if key_padding_mask is None else _padding(key_padding_mask, query, (*lead, keys)).reshape(batch, keys),
        None if key_lengths is None else _lengths(key_lengths, query, lead, keys).reshape(batch),
        None if alibi_slopes is None else _slopes(alibi_slopes, query, lead, heads),
    )
    offset = keys - queries if causal_alignment == "bottom_right" else 0
    left, right = _band(is_causal, window, queries, keys, offset)
    if left is None and right is None and alibi_slopes is None and not isinstance(bias, T5Bias):
        offset = 0  # nothing asks for positions: one request for all
    options = Options(
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        left,
        right,
        offset,
        0.0 if softcap is None else float(softcap),
        float(dropout_p),
    )
    if query.dim() != 4:
        query, key, value = (t[None] if t.dim() == 3 else t.flatten(0, -4) for t in (query, key, value))
    out, lse = _attention.apply(query, key, value, extras, options, return_lse)
    if len(lead) != 1:
        out = out.unflatten(0, lead) if lead else out[0]
        lse = lse if lse is None else lse.reshape(*lead, *lse.shape[1:])
    return (out, lse) if lse is not None and return_lse else out


# -------------------------------------------------------------------------------------- checks
def _check_tensors(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    for name, t in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, t)
        if t.dim() < 3:
            raise ValueError(f"{name}: expected (..., heads, length, dim), got shape {tuple(t.shape)}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {t.dtype}")
        if t.dtype != query.dtype:
            raise TypeError(f"{name}: expected {query.dtype} like query, got {t.dtype}")
        if t.device != query.device:
            raise RuntimeError(f"{name}: expected device {query.device} like query, got {t.device}")
        if t.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name}: expected leading dimensions {tuple(query.shape[:-3])} like query {tuple(query.shape)}, "
                f"got shape {tuple(t.shape)}"
            )
        if not 1 <= t.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: expected a head dimension from 1 to {MAX_HEAD_DIM}, got {t.shape[-1]}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key: expected head dimension {query.shape[-1]} like query, got {key.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value: expected length {key.shape[-2]} like key, got {value.shape[-2]}")
    if value.shape[-3] != key.shape[-3]:
        raise ValueError(f"value: expected {key.shape[-3]} heads like key, got {value.shape[-3]}")
    heads, key_heads = query.shape[-3], key.shape[-3]
    if heads != key_heads:
        if not enable_gqa:
            raise ValueError(f"key: expected {heads} heads like query (enable_gqa is False), got {key_heads}")
        if key_heads == 0 or heads % key_heads:
            raise ValueError(f"enable_gqa: {key_heads} heads of key do not divide {heads} heads of query")


def _check_number(name: str, value: Any) -> None:
    if type(value) is float or type(value) is int:
        return
    try:
        float(value)
        wrong = isinstance(value, str)
    except (TypeError, ValueError, RuntimeError):
        wrong = True
    if wrong:
        raise TypeError(f"{name}: expected a number, got {value!r}")


def _check_options(dropout_p: float, causal_alignment: str, scale: float | None, softcap: float | None) -> None:
    _check_number("dropout_p", dropout_p)
    if scale is not None:
        _check_number("scale", scale)
    if softcap is not None:
        _check_number("softcap", softcap)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability from 0 up to, not including, 1, got {dropout_p}")
    if causal_alignment not in ALIGNMENTS:
        raise ValueError(f"causal_alignment: expected one of {', '.join(ALIGNMENTS)}, got {causal_alignment!r}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number or None, got {scale}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")


def _added(name: str, t: Tensor, query: Tensor, full: tuple[int, ...]) -> Tensor:
    """A mask or bias as (Bm, 1 or H, 1 or Lq, 1 or Lk), where batch b reads b % Bm."""
    if not isinstance(t, Tensor) or t.dtype != torch.bool or name == "bias":
        check_values(name, t, query)
    else:
        check_device(name, t, query)
    shape = (1,) * (len(full) - t.dim()) + tuple(t.shape)
    if len(shape) != len(full) or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(f"{name}: shape {tuple(t.shape)} does not broadcast to {full} (..., heads, Lq, Lk)")
    t = t.reshape(shape)
    lead, expected = shape[:-3], full[:-3]
    ones = next((i for i, n in enumerate(lead) if n != 1), len(lead))
    if lead[ones:] != expected[ones:]:  # neither the same for all, nor repeated: one for each batch
        t = t.expand(*expected, *shape[-3:])
    return t.reshape(math.prod(t.shape[:-3]), *shape[-3:])


def _padding(t: Tensor, query: Tensor, shape: tuple[int, ...]) -> Tensor:
    check_device("key_padding_mask", t, query)
    if t.dtype != torch.bool:
        raise TypeError(f"key_padding_mask: expected torch.bool, got {t.dtype}")
    if tuple(t.shape) != shape:
        raise ValueError(f"key_padding_mask: expected shape {shape} (..., Lk), got {tuple(t.shape)}")
    return t


def _lengths(t: Tensor, query: Tensor, shape: Sequence[int], keys: int) -> Tensor:
    check_device("key_lengths", t, query)
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"key_lengths: expected torch.int32 or torch.int64, got {t.dtype}")
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"key_lengths: expected shape {tuple(shape)}, one length a batch, got {tuple(t.shape)}")
    if t.device.type == "cpu" and unwatched(t) and t.numel():
        least, most = (int(v) for v in t.aminmax())
        if least < 0 or most > keys:
            raise ValueError(f"key_lengths: expected 0 to {keys}, got {least} to {most}")
    return t


def _slopes(t: Tensor, query: Tensor, lead: Sequence[int], heads: int) -> Tensor:
    check_values("alibi_slopes", t, query)
    if t.requires_grad:
        raise ValueError("alibi_slopes: expected a tensor without gradient, got one that requires it")
    if tuple(t.shape) not in ((heads,), (*lead, heads)):
        raise ValueError(f"alibi_slopes: expected shape ({heads},) or {(*lead, heads)}, got {tuple(t.shape)}")
    return t.reshape(-1, heads)


def _band(
    is_causal: bool, window: Window | None, queries: int, keys: int, offset: int
) -> tuple[int | None, int | None]:
    """Options' left and right; None where a limit would hide nothing."""
    pair: Any = window
    if window is None or isinstance(window, int):
        pair = (window, window)
    wrong = not isinstance(pair, (tuple, list)) or len(pair) != 2 or isinstance(window, bool)
    if wrong or any(w is not None and (not isinstance(w, int) or isinstance(w, bool) or w < 0) for w in pair):
        raise ValueError(f"window: expected an int of at least 0, or a pair of those or None, got {window!r}")
    left = None if pair[0] is None else -pair[0]
    right = 0 if is_causal else pair[1]
    if left is not None and left <= 1 - queries - offset:
        left = None
    if right is not None and right >= keys - 1 - offset:
        right = None
    return left, right
