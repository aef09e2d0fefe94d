"""Partial statistics of channels merged on the device, in a fixed order."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import tiles
from .implicit_gemm import condense_statistics_kernel

BLOCK_SHARES, BLOCK_CHANNELS = 64, 8


def condense_statistics(partial: Tensor) -> Tensor:
    """partial [3, shares, channels] with at most tiles.MAX_SPLITS shares of the same whole."""
    shares = partial.size(1)
    if shares <= tiles.MAX_SPLITS:
        return partial
    return _condensed(partial, triton.cdiv(shares, tiles.MAX_SPLITS))


def merge_statistics(partial: Tensor) -> Tensor:
    """count, mean and centred sum of squares, each (channels,), from partial [3, shares, channels]."""
    partial = condense_statistics(partial)
    return partial[:, 0] if partial.size(1) == 1 else _condensed(partial, partial.size(1))[:, 0]


def _condensed(partial: Tensor, per_split: int) -> Tensor:
    _, shares, channels = partial.shape
    splits = triton.cdiv(shares, per_split)
    out = torch.empty(3, splits, channels, dtype=partial.dtype, device=partial.device)
    condense_statistics_kernel[(triton.cdiv(channels, BLOCK_CHANNELS), splits)](
        partial, out, channels, shares, per_split, BLOCK_S=BLOCK_SHARES, BLOCK_C=BLOCK_CHANNELS
    )
    return out
