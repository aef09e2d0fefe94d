"""What a launch of a kernel of csrc/cuda is made of; each op's own plan is in <op>_plan.py.

One plan for every way of running a kernel: built by nvcc, compiled at run time (NVRTC), or on the CPU in the tests.
Nothing here touches a device.
"""

from __future__ import annotations

import struct
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_THREADS = 256
MAX_GRID_Y = 65535
#: What a block has without asking for more, in bytes.
MAX_SHARED = 48 * 1024


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


#: What a kernel is told, by the names of its argument's fields: tensors (None for "not given"), and numbers.
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


class Arguments:
    """The structure that all kernels of an op take: pointers, then 8-byte integers, doubles and 4-byte integers.

    Each is given by the names of its fields, in the order of csrc/cuda/<op>.h.
    """

    def __init__(self, pointers: str, sizes: str, numbers: str, codes: str) -> None:
        self.pointers = tuple(pointers.split())
        tail = [
            (name, letter) for names, letter in ((sizes, "q"), (numbers, "d"), (codes, "i")) for name in names.split()
        ]
        #: Fields in order, each with struct's letter for its type.
        self.fields: tuple[tuple[str, str], ...] = (*((name, "Q") for name in self.pointers), *tail)
        self._rest = tuple(name for name, _ in tail)
        self._names = frozenset(name for name, _ in self.fields)
        self._head = struct.Struct(f"@{len(self.pointers)}Q")
        # the whole is a multiple of 8 bytes, as in C++
        self._tail = struct.Struct("@" + "".join(letter for _, letter in tail) + "0q")
        self.size = self._head.size + self._tail.size

    def _pack_pointers(self, tensors: Mapping[str, Any]) -> bytes:
        return self._head.pack(*[0 if (t := tensors.get(name)) is None else t.data_ptr() for name in self.pointers])

    def _pack_numbers(self, numbers: Mapping[str, Any]) -> bytes:
        return self._tail.pack(*[numbers.get(name, 0) for name in self._rest])

    def pack(self, fields: Mapping[str, Any]) -> bytes:
        """The kernels' argument; a field that is not named is 0, or null.

        Raises:
            KeyError: a name that is no field.
        """
        unknown = set(fields) - self._names
        if unknown:
            raise KeyError(f"the kernels' argument has no {', '.join(sorted(unknown))}")
        return self._pack_pointers(fields) + self._pack_numbers(fields)

    def step(self, kernel: str, grid: tuple[int, int], threads: int, shared_bytes: int, numbers: Numbers) -> Step:
        """A launch without its tensors."""
        return Step(kernel, grid, threads, shared_bytes, numbers, self.pack(numbers)[self._head.size :])

    def launches(self, steps: Sequence[Step], tensors: Tensors) -> list[Launch]:
        """The launches of a call: all of its steps are given all of its tensors."""
        head = self._pack_pointers(tensors)
        return [
            Launch(
                step.kernel,
                step.grid,
                step.threads,
                step.shared_bytes,
                ChainMap(tensors, step.numbers),  # type: ignore[arg-type]
                head + step.packed,
            )
            for step in steps
        ]


def aligned(tensors: Tensors) -> bool:
    """Whether each tensor begins at a multiple of 16 bytes."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors.values())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
