"""Which kernel of csrc/cuda/batch_norm_act.cu runs, over which grid, with which argument.

One plan for every way of running them: built by nvcc, compiled at run time (NVRTC), or on the CPU in the tests.
Nothing here touches a device.
"""

from __future__ import annotations

import struct
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import layout

MAX_THREADS = 256
#: What the blocks of a reduction leave for a channel is merged by one block: at most this many shares.
MAX_SPLITS = 256
_MAX_GRID_Y = 65535
#: Channels side by side in a block that merges shares.
_MERGE_CHANNELS = 8
#: Blocks for each multiprocessor of the device, and steps that a block has at least.
_BLOCKS_PER_MULTIPROCESSOR = 8
_LEAST_STEPS = 4

NAMESPACE = "dlkern::cuda::batch_norm_act::"
PASSES = ("statistics", "forward", "backward_sums", "backward")
MERGES = ("merge_statistics", "merge_sums")


class Type(NamedTuple):
    """A dtype as the kernels know it."""

    name: str
    size: int
    wide: str  # what it is accumulated in
    code: int  # DType of csrc/include/dlkern/batch_norm_act.h

    @property
    def wide_size(self) -> int:
        return 8 if self.wide == "double" else 4

    @property
    def width(self) -> int:
        """Elements in 16 bytes."""
        return 16 // self.size


TYPES: dict[torch.dtype, Type] = {
    torch.float32: Type("float", 4, "float", 0),
    torch.float64: Type("double", 8, "double", 1),
    torch.bfloat16: Type("__nv_bfloat16", 2, "float", 2),
    torch.float16: Type("__half", 2, "float", 3),
}


#: What a kernel is told, by the names of BatchNormActArgs' fields: tensors (None for "not given"), and numbers.
Tensors = dict[str, "Tensor | None"]
Numbers = dict[str, "int | float"]


class Launch(NamedTuple):
    """One kernel launch: what a stream is given."""

    kernel: str
    grid: tuple[int, int]
    threads: int
    shared_bytes: int
    fields: Mapping[str, Any]  # the argument, by name
    args: bytes  # the argument, packed


class Step(NamedTuple):
    """A launch without its tensors: what calls with the same sizes and options have in common, and is kept."""

    kernel: str
    grid: tuple[int, int]
    threads: int
    shared_bytes: int
    numbers: Numbers
    packed: bytes


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
        return _step(self.kernel(name), self.grid, self.threads, shared, {**numbers, **self.numbers})

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


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


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
        sizes = [n for n in (8, 16, 32) if n < 2 * packs] or [_power_of_two(packs)]
        threads_c = min(sizes, key=lambda n: (_cdiv(packs, n) * n, -n))
        threads = threads_c * min(MAX_THREADS // threads_c, _power_of_two(view.outer))
        blocks, length = _cdiv(packs, threads_c), view.outer
    else:
        threads_c, blocks, length = 1, view.channels, view.outer * (view.inner // width)
        threads = min(MAX_THREADS, max(32, _power_of_two(length)))
    step = threads // threads_c
    wanted = _cdiv(_BLOCKS_PER_MULTIPROCESSOR * multiprocessors, blocks)
    splits = min(wanted, _cdiv(length, _LEAST_STEPS * step), MAX_SPLITS if reduction else _MAX_GRID_Y)
    share = _cdiv(_cdiv(length, splits), step) * step
    grid = blocks, _cdiv(length, share)
    return Walk(
        dtype, width, view.channels_last, grid, threads, threads_c, share, share * (1 if view.channels_last else width)
    )


def merge_step(name: str, dtype: torch.dtype, channels: int, numbers: Numbers) -> Step:
    """The merge of what a reduction left; ``numbers`` are the reduction's."""
    values = 3 if name == "merge_statistics" else 2
    shared = MAX_THREADS * values * TYPES[dtype].wide_size
    grid = _cdiv(channels, _MERGE_CHANNELS), 1
    return _step(_merge(name, dtype), grid, MAX_THREADS, shared, {**numbers, "threads_c": _MERGE_CHANNELS})


_POINTERS = (
    "x", "residual", "weight", "bias", "y", "grad_y", "mean", "invstd", "running_mean", "running_var",
    "partial", "means", "grad_x", "grad_weight", "grad_bias", "grad_residual",
)  # fmt: skip
_SIZES = ("outer", "channels", "inner", "share", "share_elements", "count")
_NUMBERS = ("momentum", "eps", "param")
_CODES = (
    "param_kind", "grad_weight_kind", "grad_bias_kind", "activation", "threads_c", "splits", "batch_stats", "data_kind"
)  # fmt: skip
#: BatchNormActArgs of csrc/cuda/batch_norm_act.h: its fields in order, each with struct's letter for its type.
ARGS: tuple[tuple[str, str], ...] = (
    *((name, "Q") for name in _POINTERS),
    *((name, "q") for name in _SIZES),
    *((name, "d") for name in _NUMBERS),
    *((name, "i") for name in _CODES),
)
ARGS_SIZE = struct.calcsize("@" + "".join(letter for _, letter in ARGS))
_HEAD = struct.Struct(f"@{len(_POINTERS)}Q")
_TAIL = struct.Struct("@" + "".join(letter for _, letter in ARGS[len(_POINTERS) :]))


def _pack_pointers(tensors: Mapping[str, Any]) -> bytes:
    return _HEAD.pack(*[0 if (t := tensors.get(name)) is None else t.data_ptr() for name in _POINTERS])


def _pack_numbers(numbers: Mapping[str, Any]) -> bytes:
    return _TAIL.pack(*[numbers.get(name, 0) for name, _ in ARGS[len(_POINTERS) :]])


def pack(fields: Mapping[str, Any]) -> bytes:
    """The kernels' argument; a field that is not named is 0, or null."""
    unknown = set(fields) - {name for name, _ in ARGS}
    if unknown:
        raise KeyError(f"the kernels' argument has no {', '.join(sorted(unknown))}")
    return _pack_pointers(fields) + _pack_numbers(fields)


def _step(kernel: str, grid: tuple[int, int], threads: int, shared_bytes: int, numbers: Numbers) -> Step:
    return Step(kernel, grid, threads, shared_bytes, numbers, pack(numbers)[_HEAD.size :])


def aligned(tensors: Tensors) -> bool:
    """Whether each tensor begins at a multiple of 16 bytes."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors.values())


def launches(steps: Sequence[Step], tensors: Tensors) -> list[Launch]:
    """The launches of a call: all of its steps are given all of its tensors."""
    head = _pack_pointers(tensors)
    return [
        Launch(
            step.kernel, step.grid, step.threads, step.shared_bytes, ChainMap(tensors, step.numbers), head + step.packed
        )
        for step in steps
    ]
