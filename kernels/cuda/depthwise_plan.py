"""Which kernel of csrc/cuda/depthwise.cu runs, over which grid, with which tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .plan import MAX_GRID_Y, MAX_SHARED, MAX_THREADS, TYPES, Arguments, Numbers, Step, cdiv, power_of_two

NAMESPACE = "dlkern::cuda::depthwise::"
#: Kernels of so many rows and as many columns are unrolled where they have no dilation, and strides of 1 or of 2.
UNROLLED = (3, 5, 7)
MAX_KERNEL = 31
MERGES = ("merge_statistics", "merge_weight_gradient")

#: Taps that a thread of the weight's gradient sums, where they are not unrolled.
_TAPS = 4
#: Shares of a reduction, and the elements of their sums.
_MAX_SPLITS, _MAX_PARTIAL = 1024, 2**24
_MERGE_COLUMNS = 8
#: Threads for each multiprocessor: what it holds, whatever the kernel's registers, and no second wave to speak of.
_THREADS_PER_MULTIPROCESSOR = 2048
#: What a step of a block costs beside its multiplications, in units of one of them: a load of a pack, the barriers.
_LOAD, _BARRIERS = 64, 64
#: Of a multiprocessor: bytes of shared memory for resident blocks, and threads that hide latency.
_RESIDENT_SHARED, _RESIDENT_THREADS = 160 * 1024, 512

#: DepthwiseArgs of csrc/cuda/depthwise.h.
ARGS = Arguments(
    "x weight bias y grad_y partial mean var grad_weight grad_bias",
    "x_image x_channel x_row x_col y_image y_channel y_row y_col items share",
    "param",
    "batch channels multiplier height width out_height out_width "
    "kernel_h kernel_w stride_h stride_w dilation_h dilation_w pad_top pad_left lattice_height lattice_width "
    "row_phases row_gap row_step row_next segments strip_rows tile_rows ring "
    "col_phases col_gap col_step col_next col_tap tiles columns cols first_row first_col "
    "threads_c groups channels_last flip activation splits data_kind",
)


class Axis(NamedTuple):
    """Rows, or columns, as a block walks over them: those of a tile are ``gap`` apart.

    Of what is read it has every ``step``-th in shared memory, of which number i and tap t read i * next + t * tap.
    """

    extent: int
    gap: int
    step: int
    next: int
    tap: int
    taps: int

    @property
    def phases(self) -> int:
        return min(self.gap, self.extent)

    @property
    def length(self) -> int:
        """Of the longest phase."""
        return cdiv(self.extent, self.gap)

    def span(self, count: int) -> int:
        """What ``count`` of them read."""
        return (count - 1) * self.next + (self.taps - 1) * self.tap + 1


def _lattice(extent: int, taps: int, stride: int, dilation: int) -> Axis:
    """The axis on which the taps of neighbours meet, whatever the dilation."""
    common = math.gcd(stride, dilation)
    return Axis(extent, dilation // common, dilation, stride // common, 1, taps)


class Problem(NamedTuple):
    """A convolution as a kernel sees it: what it reads (height x width) and what it covers (out_height x out_width).

    ``channels`` are those of y, channel c reads channel c // multiplier; padding is (top, left), and may be negative.
    """

    dtype: torch.dtype
    width_c: int  # channels that a thread reads at once
    channels_last: bool
    batch: int
    channels: int
    multiplier: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def pack(self) -> int:
        """Bytes of what a thread reads at once."""
        return self.width_c * TYPES[self.dtype].size

    @property
    def unrolled(self) -> tuple[int, int]:
        """(rows of the kernel, stride) of the kernels made for them, else (0, 0)."""
        (kh, kw), (sh, sw) = self.kernel, self.stride
        made = kh == kw and kh in UNROLLED and sh == sw and sh in (1, 2) and self.dilation == (1, 1)
        return (kh, sh) if made and self.width_c > 1 and self.dtype != torch.float64 else (0, 0)

    @property
    def rows(self) -> Axis:
        return _lattice(self.out_height, self.kernel[0], self.stride[0], self.dilation[0])

    @property
    def columns(self) -> list[Axis]:
        """What columns may be walked as: as rows are, or side by side, which reads memory in order."""
        taps, stride, dilation = self.kernel[1], self.stride[1], self.dilation[1]
        lattice = _lattice(self.out_width, taps, stride, dilation)
        return [lattice, *([Axis(self.out_width, 1, 1, stride, dilation, taps)] if lattice.gap > 1 else [])]

    def name(self, kernel: str, *parameters: int | str) -> str:
        """The kernel's full name, as NVRTC and the built extension have it."""
        return _name(kernel, self.dtype, self.width_c, *parameters)

    def flipped(self) -> Problem:
        """The convolution that is this one's gradient of its input; at stride 1 and without a multiplier alone."""
        (kh, kw), (dh, dw), (top, left) = self.kernel, self.dilation, self.padding
        return self._replace(
            height=self.out_height, width=self.out_width, out_height=self.height, out_width=self.width,
            padding=(dh * (kh - 1) - top, dw * (kw - 1) - left),
        )  # fmt: skip

    @property
    def numbers(self) -> Numbers:
        """What every kernel is told."""
        given: Numbers = {
            "batch": self.batch, "channels": self.channels, "multiplier": self.multiplier,
            "height": self.height, "width": self.width, "out_height": self.out_height, "out_width": self.out_width,
            "kernel_h": self.kernel[0], "kernel_w": self.kernel[1],
            "stride_h": self.stride[0], "stride_w": self.stride[1],
            "dilation_h": self.dilation[0], "dilation_w": self.dilation[1],
            "pad_top": self.padding[0], "pad_left": self.padding[1],
            "channels_last": int(self.channels_last), "data_kind": TYPES[self.dtype].code,
            "lattice_height": self.out_height, "lattice_width": self.out_width,
        }  # fmt: skip
        sizes = (
            ("x", self.channels // self.multiplier, self.height, self.width),
            ("y", self.channels, self.out_height, self.out_width),
        )
        for name, channels, height, width in sizes:
            given |= _strides(name, channels, height, width, self.channels_last)
        return given


def _strides(name: str, channels: int, height: int, width: int, channels_last: bool) -> Numbers:
    image = channels * height * width
    strides = (image, 1, width * channels, channels) if channels_last else (image, height * width, width, 1)
    return {f"{name}_{part}": n for part, n in zip(("image", "channel", "row", "col"), strides, strict=True)}


def _name(kernel: str, dtype: torch.dtype, *parameters: int | str) -> str:
    return f"{NAMESPACE}{kernel}<{', '.join(map(str, (TYPES[dtype].name, *parameters)))}>"


def kernels(dtype: torch.dtype) -> list[str]:
    """The names of all kernels that serve a dtype."""
    kind, found = TYPES[dtype], []
    for width in (kind.width, 1):
        sizes = [(size, stride) for size in UNROLLED for stride in (1, 2)]
        unrolled = width > 1 and dtype != torch.float64
        for size, stride in [*(sizes if unrolled else []), (0, 0)]:
            found += [_name("forward", dtype, width, size, stride, flag) for flag in ("false", "true")]
            found.append(_name("weight_gradient", dtype, width, size or _TAPS, stride))
        found.append(_name("input_gradient", dtype, width))
        found += [_name("input_gradient_unrolled", dtype, width, size) for size in UNROLLED if unrolled]
    return [*found, *(_merge(name, dtype) for name in MERGES)]


def _merge(name: str, dtype: torch.dtype) -> str:
    return f"{NAMESPACE}{name}<{TYPES[dtype].wide}>"


def group(kernel: str) -> list[str]:
    """A kernel's name and those that are compiled with it at run time: the merges go together."""
    template = kernel[kernel.index("<") :]
    return [f"{NAMESPACE}{name}{template}" for name in MERGES] if "merge_" in kernel else [kernel]


# ------------------------------------------------------------------------------------------------ tiles
class Tile(NamedTuple):
    """What a block works on at a time: ``rows`` x ``columns`` of the output of ``threads_c`` packs of channels."""

    threads_c: int
    lanes: int  # threads of the same channels
    rows: int
    columns: int
    column_axis: Axis
    ring: int  # rows in shared memory, each of ``cols`` packs
    cols: int
    groups: int
    shared_bytes: int

    @property
    def threads(self) -> int:
        return self.threads_c * self.lanes


def _powers(most: int, limit: int) -> list[int]:
    """Powers of two up to the first that is at least ``most``, and to ``limit``."""
    return [1 << i for i in range(min(power_of_two(most), limit).bit_length())]


def _forward_tiles(p: Problem, rows: Axis, columns: list[Axis], per_thread: int, reduces: bool) -> Iterator[Tile]:
    kind = TYPES[p.dtype]
    fewer = () if p.unrolled[0] else (2, 1)  # rows than a thread has, where no more fit
    for axis in columns:
        for threads_c in _powers(cdiv(p.channels, p.width_c), 32):
            for across in _powers(axis.length, 64):
                for down in _powers(cdiv(rows.length, per_thread), 16):
                    threads = threads_c * across * down
                    if threads > MAX_THREADS:
                        break
                    for tile_rows in (down * per_thread, *(fewer if down == 1 else ())):
                        ring, cols = rows.span(tile_rows), axis.span(across)
                        shared = (p.taps + 1 + ring * cols) * threads_c * p.pack
                        if reduces:
                            shared = max(shared, threads * (2 * p.width_c + 1) * kind.wide_size)
                        if shared <= MAX_SHARED:
                            yield Tile(threads_c, across * down, tile_rows, across, axis, ring, cols, 0, shared)
                            break


def _weight_tiles(p: Problem, taps: int, per_thread: int) -> Iterator[Tile]:
    kind, rows = TYPES[p.dtype], p.rows
    columns_of_taps = p.kernel[1] * cdiv(p.kernel[0], taps)
    for axis in p.columns:
        for threads_c in _powers(cdiv(p.channels, p.width_c), 32):
            for across in _powers(axis.length, 64):
                for tile_rows in (per_thread, *(() if p.unrolled[0] else (2, 1))):
                    ring, cols = rows.span(tile_rows), axis.span(across)
                    shared = (tile_rows * across + ring * cols) * threads_c * p.pack
                    if shared > MAX_SHARED:
                        continue
                    for groups in _powers(across, across):
                        lanes = groups * columns_of_taps
                        sums = threads_c * lanes * p.width_c * kind.wide_size
                        if threads_c * lanes <= MAX_THREADS and sums <= MAX_SHARED:
                            yield Tile(threads_c, lanes, tile_rows, across, axis, ring, cols, groups, max(shared, sums))
                    break


def _cost(p: Problem, rows: Axis, tile: Tile, multiplications: int) -> float:
    """About what a tile costs over the whole output; ``multiplications`` are those of a thread in a step."""
    axis = tile.column_axis
    blocks = cdiv(p.channels, tile.threads_c * p.width_c)
    steps = rows.phases * cdiv(rows.length, tile.rows) * axis.phases * cdiv(axis.length, tile.columns)
    # bytes that lie side by side: less than a sector is a sector
    side = tile.threads_c * p.pack if p.channels_last else min(tile.cols, p.width) * p.pack
    loads = min(tile.rows * rows.next, tile.ring) * tile.cols / tile.lanes * max(1.0, 64 / side)
    if not p.channels_last and axis.step > 1:
        loads *= min(axis.step, 8)
    threads = cdiv(tile.threads, 32) * 32
    resident = min(32, _RESIDENT_SHARED // (tile.shared_bytes + 1024)) * threads
    idle = max(1.0, _RESIDENT_THREADS / resident)
    return blocks * steps * threads * idle * (multiplications * p.width_c + _LOAD * loads + _BARRIERS)


def _grid(
    p: Problem, rows: Axis, tile: Tile, multiprocessors: int, most: int = MAX_GRID_Y
) -> tuple[tuple[int, int], Numbers]:
    """The grid, of at most ``most`` shares, and what kernels are told of the walk.

    A strip is as long as is possible with the device filled: a window has to be begun for each.
    """
    axis, blocks = tile.column_axis, cdiv(p.channels, tile.threads_c * p.width_c)
    tiles = cdiv(axis.length, tile.columns)
    items = p.batch * rows.phases * axis.phases * tiles
    wanted = cdiv(_THREADS_PER_MULTIPROCESSOR * multiprocessors, tile.threads * blocks)
    segments = max(1, min(cdiv(wanted, items), rows.length // (4 * tile.rows)))
    strip_rows = cdiv(cdiv(rows.length, segments), tile.rows) * tile.rows
    segments = cdiv(rows.length, strip_rows)
    items *= segments
    share = cdiv(items, max(1, min(items, wanted, most)))
    grid = blocks, cdiv(items, share)
    return grid, {
        "items": items, "share": share, "splits": grid[1],
        "row_phases": rows.phases, "row_gap": rows.gap, "row_step": rows.step, "row_next": rows.next,
        "segments": segments, "strip_rows": strip_rows, "tile_rows": tile.rows, "ring": tile.ring,
        "col_phases": axis.phases, "col_gap": axis.gap, "col_step": axis.step, "col_next": axis.next,
        "col_tap": axis.tap, "tiles": tiles, "columns": tile.columns, "cols": tile.cols,
        "threads_c": tile.threads_c, "groups": tile.groups,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ steps
def forward(p: Problem, multiprocessors: int, numbers: Numbers, *, statistics: bool) -> tuple[list[Step], int]:
    """The steps that write y, and how many shares their statistics have (0 for none)."""
    size, stride = p.unrolled
    per_thread = 2 if stride == 2 else 4
    rows = p.rows
    tile = min(
        _forward_tiles(p, rows, p.columns, per_thread, statistics),
        key=lambda t: _cost(p, rows, t, per_thread * p.taps),
    )
    most = min(_MAX_SPLITS, max(1, _MAX_PARTIAL // (3 * p.channels))) if statistics else MAX_GRID_Y
    grid, walk = _grid(p, rows, tile, multiprocessors, most)
    told = {**p.numbers, **walk, **numbers}
    name = p.name("forward", size, stride, "true" if statistics else "false")
    steps = [ARGS.step(name, grid, tile.threads, tile.shared_bytes, told)]
    if statistics:
        steps.append(_merge_step("merge_statistics", p, p.channels, 3, told))
    return steps, grid[1] if statistics else 0


def input_gradient(p: Problem, multiprocessors: int) -> list[Step]:
    """The steps that write y, the gradient of the input, from x, that of the output; p is the forward convolution."""
    size, stride = p.unrolled
    back = p._replace(height=p.out_height, width=p.out_width, out_height=p.height, out_width=p.width)
    if p.stride == (1, 1) and p.multiplier == 1:
        return forward(p.flipped(), multiprocessors, {"flip": 1}, statistics=False)[0]
    if stride == 2:
        return [_input_gradient_unrolled(back, size, multiprocessors)]
    told = back.numbers
    inputs = p.channels // p.multiplier
    told |= _strides("x", p.channels, back.height, back.width, p.channels_last)
    told |= _strides("y", inputs, back.out_height, back.out_width, p.channels_last)
    told["items"] = p.batch * back.out_height * back.out_width * (inputs // p.width_c)
    blocks = min(cdiv(int(told["items"]), MAX_THREADS), 32 * multiprocessors)
    return [ARGS.step(p.name("input_gradient"), (blocks, 1), MAX_THREADS, 0, told)]


def _input_gradient_unrolled(back: Problem, size: int, multiprocessors: int) -> Step:
    """At stride 2: number i of either axis stands for the two rows (columns) that tap 0 and 1 lead to from it."""
    taps = (size + 1) // 2
    axes, first = [], []
    for extent, pad in zip((back.out_height, back.out_width), back.padding, strict=True):
        first.append(pad // 2)
        axes.append(Axis((pad + extent - 1) // 2 - pad // 2 + 1, 1, 1, 1, 1, taps))
    rows, columns = axes
    tile = min(
        _forward_tiles(back, rows, [columns], 2, False), key=lambda t: _cost(back, rows, t, 2 * back.taps)
    )  # fmt: skip
    grid, walk = _grid(back, rows, tile, multiprocessors)
    told = {
        **back.numbers, **walk, "stride_h": 1, "stride_w": 1,
        "pad_top": taps - 1 - first[0], "pad_left": taps - 1 - first[1],
        "lattice_height": rows.extent, "lattice_width": columns.extent,
        "first_row": 2 * first[0] - back.padding[0], "first_col": 2 * first[1] - back.padding[1],
    }  # fmt: skip
    return ARGS.step(back.name("input_gradient_unrolled", size), grid, tile.threads, tile.shared_bytes, told)


def weight_gradient(p: Problem, multiprocessors: int) -> tuple[list[Step], int]:
    """The steps that write the gradients of weight and bias, and how many shares they have."""
    size, stride = p.unrolled
    taps, per_thread, rows = size or _TAPS, 2 if stride == 2 else 4, p.rows

    def cost(t: Tile) -> float:
        return _cost(p, rows, t, cdiv(t.columns, t.groups) * per_thread * taps)

    tile = min(_weight_tiles(p, taps, per_thread), key=cost)
    most = min(_MAX_SPLITS, max(1, _MAX_PARTIAL // ((p.taps + 1) * p.channels)))
    grid, walk = _grid(p, rows, tile, multiprocessors, most)
    told = {**p.numbers, **walk}
    name = p.name("weight_gradient", taps, stride)
    steps = [ARGS.step(name, grid, tile.threads, tile.shared_bytes, told)]
    steps.append(_merge_step("merge_weight_gradient", p, (p.taps + 1) * p.channels, 1, told))
    return steps, grid[1]


def _merge_step(name: str, p: Problem, entries: int, values: int, numbers: Numbers) -> Step:
    """The merge of what a reduction left; ``values`` are a thread's in shared memory."""
    shared = MAX_THREADS * values * TYPES[p.dtype].wide_size
    grid = cdiv(entries, _MERGE_COLUMNS), 1
    return ARGS.step(_merge(name, p.dtype), grid, MAX_THREADS, shared, {**numbers, "threads_c": _MERGE_COLUMNS})
