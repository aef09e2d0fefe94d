"""Tiles over a batch of feature maps: how per-channel kernels of either memory format walk through a tensor.

A tile is [BLOCK_R, BLOCK_K]. In channels_last it is rows x channels, and a program owns BLOCK_K channels; else it
is images x contiguous positions of the one channel that a program owns. Program (i, s) of a grid runs over the
s-th share of the tiles of channel block i, so that few channels do not leave a GPU idle.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import layout
from . import interpreted
from .target import ALL_REGISTERS

#: What one program of a reduction leaves is merged by one program: at most this many shares.
MAX_SPLITS = 128
_MAX_GRID_Y = 65535
_INT32_END = 2**31


class Launch(NamedTuple):
    """A launch configuration."""

    block_r: int
    block_k: int
    num_warps: int


#: Configurations by memory format. A thread holds 16 elements of a tile, in float64 (see ``warps``) 8.
ROWS = (Launch(128, 16, 4), Launch(64, 32, 4), Launch(32, 64, 4), Launch(16, 128, 4))
PLANES = (Launch(128, 16, 4), Launch(32, 64, 4), Launch(8, 256, 4), Launch(1, 2048, 4))

#: Set by tests and tuning to run one configuration; None leaves the choice to the heuristic.
forced: Launch | None = None


def warps(launch: Launch, itemsize: int) -> int:
    """Warps for a tile of elements of ``itemsize`` bytes: float64 takes twice the registers, and would spill."""
    return launch.num_warps * (2 if itemsize == 8 else 1)


def registers(dtype: torch.dtype, activation: str = "identity") -> dict[str, int]:
    """The launch option ``maxnreg`` where it is needed.

    Left alone, ptxas spills a few registers in float64 and beside an exp or erf, for one more program on a
    multiprocessor. Told that it may have them all it takes more where nothing was spilled, too, and so the cheap
    activations, in which nothing is, are left alone.
    """
    straight = activation in ("identity", "relu", "relu6", "leaky_relu")
    return {} if straight and dtype != torch.float64 else ALL_REGISTERS


class Plan(NamedTuple):
    """A grid over a tensor: its configuration, and the integers that every kernel takes."""

    launch: Launch
    num_warps: int
    channels_last: bool
    channel_blocks: int
    splits: int
    sizes: tuple[int, int, int, int, int, int]  # outer, channels, inner, tiles, tiles_k, tiles_per_split
    int64: bool

    @property
    def grid(self) -> tuple[int, int]:
        return self.channel_blocks, self.splits

    @property
    def meta(self) -> dict[str, int | bool]:
        """The keyword arguments of every kernel launch."""
        return {
            "CHANNELS_LAST": self.channels_last,
            "INT64": self.int64,
            "BLOCK_R": self.launch.block_r,
            "BLOCK_K": self.launch.block_k,
            "num_warps": self.num_warps,
            # A product and a sum round alike in every kernel, so that backward recomputes forward's mask exactly.
            "enable_fp_fusion": False,
        }


@functools.cache
def _programs(device: torch.device) -> int:
    """How many programs fill the device."""
    if interpreted():
        return 4  # enough that reductions are split
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def _padded(size: int, block: int) -> int:
    return triton.cdiv(size, block) * block


def _heuristic(view: layout.Layout) -> Launch:
    """The configuration whose tiles cover the tensor with the least waste; of equals the one of longest rows."""
    if view.channels_last:
        return min(ROWS, key=lambda c: (_padded(view.channels, c.block_k), -c.block_k))
    return min(PLANES, key=lambda c: (_padded(view.outer, c.block_r) * _padded(view.inner, c.block_k), -c.block_k))


def plan(x: Tensor, *, reduction: bool) -> Plan:
    """The grid for a dense tensor (N, C, *); a reduction has at most MAX_SPLITS shares."""
    view = layout.of(x)
    launch = forced or _heuristic(view)
    if view.channels_last:
        tiles_k, channel_blocks = 1, triton.cdiv(view.channels, launch.block_k)
    else:
        tiles_k, channel_blocks = triton.cdiv(view.inner, launch.block_k), view.channels
    tiles = triton.cdiv(view.outer, launch.block_r) * tiles_k
    most = MAX_SPLITS if reduction else _MAX_GRID_Y
    programs = _programs(x.device) * (1 if reduction or interpreted() else 4)
    wanted = min(tiles, most, max(1, triton.cdiv(programs, channel_blocks)))
    per_split = triton.cdiv(tiles, wanted)
    sizes = (view.outer, view.channels, view.inner, tiles, tiles_k, per_split)
    int64 = _padded(view.outer, launch.block_r) * view.channels * view.inner + launch.block_k > _INT32_END
    splits = triton.cdiv(tiles, per_split)
    return Plan(launch, warps(launch, x.itemsize), view.channels_last, channel_blocks, splits, sizes, int64)


# ------------------------------------------------------------------------------------- on the device
@triton.jit
def channel_index(block, channels, CHANNELS_LAST: tl.constexpr, BLOCK_K: tl.constexpr):
    """The channels of a program, to broadcast against its tiles, and which of them exist."""
    if CHANNELS_LAST:  # noqa: SIM108
        index = (block * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    else:
        index = block
    return index, index < channels


@triton.jit
def tile(
    t, index, outer, channels, inner, tiles_k,
    CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of tile t."""
    if CHANNELS_LAST:
        rows = (t * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
        mask = (rows < outer) & (index < channels)
        if INT64:
            rows = rows.to(tl.int64)
        offsets = rows * channels + index
    else:
        rows = ((t // tiles_k) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
        positions = ((t % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        mask = (rows < outer) & (positions < inner)
        if INT64:
            rows = rows.to(tl.int64)
        offsets = (rows * channels + index) * inner + positions
    return offsets, mask


@triton.jit
def total(v, CHANNELS_LAST: tl.constexpr):
    """The sum of a tile over all but its channels: [1, BLOCK_K] in channels_last, else one number."""
    if CHANNELS_LAST:  # noqa: SIM108
        v = tl.sum(v, axis=0, keep_dims=True)
    else:
        v = tl.sum(tl.sum(v, axis=1), axis=0)
    return v
