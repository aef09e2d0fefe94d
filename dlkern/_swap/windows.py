"""torchvision's shifted-window attention by the op ``attention``: its table of biases is read where it lies."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlkern import functional
from dlkern.functional import RelativePositionBias
from dlkern.ops.library import unwatched

#: What torchvision adds where a window of a shifted image holds parts that were not neighbours.
_APART = -100.0

Pair = tuple[int, int]


def _regions(size: Pair, window: Pair, shift: Pair, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(windows, 1, tokens, tokens): 0 within a region of the shifted image, _APART across."""
    number = torch.zeros(size, dtype=torch.int32, device=device)
    for axis, (w, s) in enumerate(zip(window, shift, strict=True)):
        # three bands along the axis; without a shift the slices of an axis are all of it, and nothing
        for band, cut in enumerate((slice(0, -w), slice(-w, -s), slice(-s, None))):
            number[(cut, slice(None)) if axis == 0 else (slice(None), cut)] += band * (3 if axis == 0 else 1)
    number = number.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0])).transpose(1, 2)
    number = number.flatten(2).flatten(0, 1)
    apart = number[:, None, :] != number[:, :, None]
    return torch.zeros(apart.shape, dtype=dtype, device=device).masked_fill(apart, _APART).unsqueeze(1)


@functools.lru_cache(maxsize=64)
def _kept_regions(size: Pair, window: Pair, shift: Pair, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _regions(size, window, shift, dtype, device)


def _table(module: Any, second: bool) -> Tensor:
    """(rows, heads)"""
    if not second:
        return module.relative_position_bias_table
    return 16 * torch.sigmoid(module.cpb_mlp(module.relative_coords_table).view(-1, module.num_heads))


def attend(module: Any, x: Tensor, second: bool) -> Tensor:
    """The forward of a ShiftedWindowAttention, or of a ShiftedWindowAttentionV2 (``second``), of x (B, H, W, C)."""
    batch, height, width, channels = x.shape
    heads, window, shift = module.num_heads, module.window_size, list(module.shift_size)
    pads = [-size % w for size, w in zip((height, width), window, strict=True)]
    full = (height + pads[0], width + pads[1])
    shift = [0 if w >= size else s for w, size, s in zip(window, full, shift, strict=True)]
    x = F.pad(x, (0, 0, 0, pads[1], 0, pads[0]))
    if sum(shift):
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    grid = (full[0] // window[0], full[1] // window[1])
    tokens = window[0] * window[1]
    x = x.view(batch, grid[0], window[0], grid[1], window[1], channels).transpose(2, 3)
    x = x.reshape(batch, grid[0] * grid[1], tokens, channels)

    bias = module.qkv.bias
    if second and bias is not None:  # the keys have none
        third = bias.numel() // 3
        bias = torch.cat([bias[:third], bias.new_zeros(third), bias[2 * third :]])
    qkv = F.linear(x, module.qkv.weight, bias).unflatten(-1, (3, heads, channels // heads))
    q, k, v = (t.transpose(2, 3) for t in qkv.unbind(-3))  # (batch, windows, heads, tokens, dim)
    scale = (channels // heads) ** -0.5
    if second:  # cosine attention
        factor = torch.clamp(module.logit_scale, max=math.log(100.0)).exp()
        q, k, scale = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1), 1.0
    table = _table(module, second)
    mask = None
    if sum(shift):
        make = _kept_regions if unwatched(x) else _regions
        mask = make(full, tuple(window), tuple(shift), q.dtype, q.device)
    if q.dtype != v.dtype:  # normalized under autocast
        q, k = q.to(v.dtype), k.to(v.dtype)
    out: Any = functional.attention(
        q,
        k,
        v,
        attn_mask=mask if mask is None else mask.to(v.dtype),
        bias=RelativePositionBias(table if table.dtype == torch.float32 else table.to(v.dtype), _index(module)),
        dropout_p=module.attention_dropout if module.training else 0.0,
        scale=scale,
    )
    out = out.transpose(2, 3).flatten(-2)
    out = F.dropout(F.linear(out, module.proj.weight, module.proj.bias), module.dropout, module.training)
    out = out.view(batch, grid[0], grid[1], window[0], window[1], channels).transpose(2, 3)
    out = out.reshape(batch, *full, channels)
    if sum(shift):
        out = torch.roll(out, (shift[0], shift[1]), (1, 2))
    return out[:, :height, :width, :].contiguous()


def _index(module: Any) -> Tensor:
    return module.relative_position_index
