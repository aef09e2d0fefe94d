"""How the kernels of depthwise_kernels.py are launched: tiles, rows of a window, and shares of the work."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreted, tiles
from .target import ALL_REGISTERS

_INT32_END = 2**31
#: Taps of at most this many rows and columns stay in registers.
MAX_WINDOW = 7
#: Values of the taps (weights, or sums of the weight's gradient) that a thread may hold.
_TAP_VALUES = 100
#: Strips of fewer rows are not made to fill a device.
_LEAST_STRIP = 8
#: Taps of one row that a program of the weight gradient's loop sums.
_LOOP_COLUMNS = 8
#: Shares of a weight gradient, and the elements of their sums (64 MiB).
_MAX_SPLITS, _MAX_PARTIAL = 1024, 2**24


class Launch(NamedTuple):
    """A launch configuration: a tile of positions by channels."""

    block_p: int
    block_c: int
    num_warps: int


#: Configurations by the elements of a tile that a thread holds (see ``elements``): channels_last, and one channel.
#: Loops over taps were seen compiled wrongly with 8 warps: none has more than 4.
ROWS = {
    8: (Launch(64, 16, 4), Launch(32, 32, 4), Launch(16, 64, 4)),
    4: (Launch(32, 16, 4), Launch(16, 32, 4), Launch(8, 64, 4)),
    2: (Launch(16, 16, 4), Launch(8, 32, 4), Launch(4, 64, 4)),
    1: (Launch(8, 16, 4), Launch(4, 32, 4), Launch(2, 64, 4)),
}
PLANES = {4: (Launch(512, 1, 4),), 2: (Launch(256, 1, 4),), 1: (Launch(128, 1, 4),)}

#: Set by tests and tuning to run one configuration; None leaves the choice to the heuristic.
forced: Launch | None = None


class Geometry(NamedTuple):
    """A depthwise convolution; pairs are (height, width), padding is (top, bottom, left, right)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    multiplier: int

    @property
    def window(self) -> bool:
        """Whether the taps of forward and of the weight's gradient stay in registers."""
        return max(self.kernel) <= MAX_WINDOW and self.dilation[0] == 1 and self.stride[0] <= 2

    @property
    def gradient_window(self) -> bool:
        """The same of the input's gradient, in which each phase of the strides has its own taps."""
        return self.window and self.dilation[1] == 1 and self.stride[1] <= 2 and self.multiplier == 1


class Plan(NamedTuple):
    """A grid over positions, each a strip of ``rows`` rows of a column."""

    launch: Launch
    channel_blocks: int
    splits: int
    size: int
    n_tiles: int
    tiles_per_split: int
    strips: int
    rows: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.channel_blocks, self.splits

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """The integers that every kernel takes first."""
        return self.size, self.n_tiles, self.tiles_per_split, self.strips, self.rows


def elements(taps: int, itemsize: int, channels_last: bool) -> int:
    """Elements of a tile a thread holds: 16 bytes in channels_last, fewer where many taps stay in registers."""
    most = 16 // itemsize if channels_last else min(4, 16 // itemsize)
    while most > 1 and taps * most * (2 if itemsize == 8 else 1) > _TAP_VALUES:
        most //= 2
    return most


def choose(channels: int, taps: int, itemsize: int, channels_last: bool) -> Launch:
    """The configuration with the fewest channels that are none; of equals that of the longest rows."""
    candidates = (ROWS if channels_last else PLANES)[elements(taps, itemsize, channels_last)]
    if forced is not None:
        if forced not in candidates:
            raise ValueError(f"{forced} is none of the configurations {candidates} for {taps} taps in registers")
        return forced
    return min(candidates, key=lambda c: (triton.cdiv(channels, c.block_c) * c.block_c, -c.block_c))


def plan(
    launch: Launch, batch: int, rows: int, columns: int, channels: int, device: torch.device,
    *, window: bool, reduction: int = 0,
) -> Plan:  # fmt: skip
    """The grid over batch x rows x columns positions; ``reduction``: elements that each share leaves.

    With ``window`` rows lie in strips, as long as is possible with the device filled: a window needs to be begun for
    each.
    """
    channel_blocks = triton.cdiv(channels, launch.block_c)
    strips = 1 if window else rows
    least = min(rows, _LEAST_STRIP)
    while window and triton.cdiv(rows, 2 * strips) >= least:
        if triton.cdiv(batch * strips * columns, launch.block_p) * channel_blocks >= tiles._programs(device):
            break
        strips *= 2
    length = triton.cdiv(rows, strips)
    strips = triton.cdiv(rows, length)
    size = batch * strips * columns
    n_tiles = triton.cdiv(size, launch.block_p)
    wanted = shares(n_tiles, channel_blocks, device, reduction)
    per_split = triton.cdiv(n_tiles, wanted)
    return Plan(launch, channel_blocks, triton.cdiv(n_tiles, per_split), size, n_tiles, per_split, strips, length)


def shares(n_tiles: int, programs: int, device: torch.device, reduction: int) -> int:
    """Into how many shares the tiles of each of ``programs`` are cut."""
    most = 65535 if not reduction else max(1, min(_MAX_SPLITS, _MAX_PARTIAL // reduction))
    device_programs = tiles._programs(device) * (1 if interpreted() else 4)  # (so that the last wave is a small part)
    return max(1, min(n_tiles, most, triton.cdiv(device_programs, programs)))


def loop_columns(kernel: tuple[int, int]) -> int:
    """Taps of one row that a program of the weight gradient's loop sums."""
    return min(kernel[1], _LOOP_COLUMNS)


def needs_int64(geometry: Geometry, launch: Launch, *tensors: Tensor) -> bool:
    """Whether an offset into a tensor, its padding, or positions of a last tile over it, may pass 32 bits."""
    (kh, kw), _, (top, bottom, left, right), (dh, dw), _ = geometry
    margin_h, margin_w = dh * kh + top + bottom + 16, dw * kw + left + right + 16
    return any(
        t.numel() + margin_h * (t.size(3) + margin_w) * t.size(1) + launch.block_p > _INT32_END for t in tensors
    )  # fmt: skip


def meta(geometry: Geometry, launch: Launch, dtype: torch.dtype, channels_last: bool, int64: bool) -> dict[str, object]:
    """The keyword arguments that all kernels share."""
    return {
        "KH": geometry.kernel[0],
        "KW": geometry.kernel[1],
        "MULTIPLIER": geometry.multiplier,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "CHANNELS_LAST": channels_last,
        "INT64": int64,
        "BLOCK_P": launch.block_p,
        "BLOCK_C": launch.block_c,
        "num_warps": launch.num_warps,
        **ALL_REGISTERS,
    }
