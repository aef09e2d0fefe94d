"""Which kernel of csrc/cuda/batch_norm_act.cu runs, over which grid, with which argument."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import layout
from .plan import MAX_GRID_Y, MAX_THREADS, TYPES, Arguments, Numbers, Step, cdiv, power_of_two

#: What the blocks of a reduction leave for a channel is merged by one block: at most this many shares.
MAX_SPLITS = 256
#: Channels side by side in a block that merges shares.
_MERGE_CHANNELS = 8
#: Blocks for each multiprocessor of the device, and steps that a block has at least.
_BLOCKS_PER_MULTIPROCESSOR = 8
_LEAST_STEPS = 4

NAMESPACE = "dlkern::cuda::batch_norm_act::"
PASSES = ("statistics", "forward", "backward_sums", "backward")
MERGES = ("merge_statistics", "merge_sums")

#: BatchNormActArgs of csrc/cuda/batch_norm_act.h.
ARGS = Arguments(
    "x residual weight bias y grad_y mean invstd running_mean running_var partial means "
    "grad_x grad_weight grad_bias grad_residual",
    "outer channels inner share share_elements count",
    "momentum eps param",
    "param_kind grad_weight_kind grad_bias_kind activation threads_c splits batch_stats data_kind",
)


class Walk(NamedTuple):
    """How the blocks of one pass go through a tensor."""

    dtype: torch.dtype
    width: int  # elements that a thread reads at once
    rows: bool
    grid: tuple[int, int]
    threads: int
    threads_c: int  # of a block, side by side along channels
    share: int  # of one block in y: rows, or packs of a channel's planes
    share_elements: int

    @property
    def splits(self) -> int:
        return self.grid[1]

    @property
    def numbers(self) -> Numbers:
        """What the kernels' argument says of the walk."""
        return {
            "share": self.share,
            "share_elements": self.share_elements,
            "threads_c": self.threads_c,
            "splits": self.splits,
        }

    def step(self, name: str, numbers: Numbers, values: int | None = None) -> Step:
        """A pass; a reduction has ``values`` beside two a channel for each thread in shared memory."""
        shared = 0 if values is None else self._shared_bytes(values)
        return ARGS.step(self.kernel(name), self.grid, self.threads, shared, {**numbers, **self.numbers})

    def kernel(self, name: str) -> str:
        """The kernel's full name, as NVRTC and the built extension have it."""
        return f"{NAMESPACE}{name}<{TYPES[self.dtype].name}, {self.width}, {'true' if self.rows else 'false'}>"

    def _shared_bytes(self, values: int) -> int:
        channels = self.width if self.rows else 1
        return self.threads * (2 * channels + values) * TYPES[self.dtype].wide_size


def kernels(dtype: torch.dtype) -> list[str]:
    """The names of all kernels that serve a dtype."""
    kind = TYPES[dtype]
    shapes = [(width, rows) for width in (kind.width, 1) for rows in (True, False)]
    walks = [Walk(dtype, width, rows, (1, 1), 1, 1, 1, 1) for width, rows in shapes]
    return [walk.kernel(name) for walk in walks for name in PASSES] + [_merge(name, dtype) for name in MERGES]


def group(kernel: str) -> list[str]:
    """A kernel's name and those that are compiled with it at run time: the same template arguments."""
    template = kernel[kernel.index("<") :]
    return [f"{NAMESPACE}{name}{template}" for name in (PASSES if "," in template else MERGES)]


def _merge(name: str, dtype: torch.dtype) -> str:
    return f"{NAMESPACE}{name}<{TYPES[dtype].wide}>"


def walk(view: layout.Layout, dtype: torch.dtype, *, aligned: bool, multiprocessors: int, reduction: bool) -> Walk:
    """The walk of one pass over a tensor that is not empty.

    ``aligned`` tells whether every tensor of the pass begins at a multiple of 16 bytes. A reduction has at most
    MAX_SPLITS shares.
    """
    width = TYPES[dtype].width
    if not aligned or (view.channels if view.channels_last else view.inner) % width:
        width = 1
    if view.channels_last:
        packs = view.channels // width
        # the width that leaves the fewest threads idle; of equals the widest
        sizes = [n for n in (8, 16, 32) if n < 2 * packs] or [power_of_two(packs)]
        threads_c = min(sizes, key=lambda n: (cdiv(packs, n) * n, -n))
        threads = threads_c * min(MAX_THREADS // threads_c, power_of_two(view.outer))
        blocks, length = cdiv(packs, threads_c), view.outer
    else:
        threads_c, blocks, length = 1, view.channels, view.outer * (view.inner // width)
        threads = min(MAX_THREADS, max(32, power_of_two(length)))
    step = threads // threads_c
    wanted = cdiv(_BLOCKS_PER_MULTIPROCESSOR * multiprocessors, blocks)
    splits = min(wanted, cdiv(length, _LEAST_STEPS * step), MAX_SPLITS if reduction else MAX_GRID_Y)
    share = cdiv(cdiv(length, splits), step) * step
    grid = blocks, cdiv(length, share)
    return Walk(
        dtype, width, view.channels_last, grid, threads, threads_c, share, share * (1 if view.channels_last else width)
    )


def merge_step(name: str, dtype: torch.dtype, channels: int, numbers: Numbers) -> Step:
    """The merge of what a reduction left; ``numbers`` are the reduction's."""
    values = 3 if name == "merge_statistics" else 2
    shared = MAX_THREADS * values * TYPES[dtype].wide_size
    grid = cdiv(channels, _MERGE_CHANNELS), 1
    return ARGS.step(_merge(name, dtype), grid, MAX_THREADS, shared, {**numbers, "threads_c": _MERGE_CHANNELS})
