"""How a recurrent layer is run on the device: which kernels, in which tiles, in which precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

SEQUENCE, STEP, CELL = "sequence", "step", "cell"


class Launch(NamedTuple):
    """A configuration: ``kind`` of the kernels; tiles of batch elements, units and depth (a sequence's units and depth
    are all there are, a cell's rows are single); warps and stages. A step's depth is in elements of two bytes.
    """

    kind: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


#: A step's product with its gates: few batch elements, or many; float32 in full precision; float64 on sums of products.
STEPS = (Launch(STEP, 16, 32, 64, 4, 3), Launch(STEP, 64, 32, 32, 8, 3))
EXACT = (Launch(STEP, 16, 32, 64, 4, 1), Launch(STEP, 32, 32, 64, 8, 1))
DOUBLE = (Launch(STEP, 16, 16, 16, 8, 1),)
#: A whole sequence, by the power of two that holds its units; for 128 of them ptxas spills the weight.
SEQUENCES = {
    16: Launch(SEQUENCE, 16, 16, 16, 4, 2),
    32: Launch(SEQUENCE, 16, 32, 32, 4, 2),
    64: Launch(SEQUENCE, 16, 64, 64, 8, 1),
}
SEQUENCES_EXACT = {16: Launch(SEQUENCE, 16, 16, 16, 8, 1)}  # (32 spill on 10.0)
#: Sizes up to which a row of a cell, and of all its gates, fits a program; beyond them ptxas spills.
MOST_UNITS = 2048

#: Set by tests and tuning to run one configuration; None leaves the choice to the heuristic.
forced: Launch | None = None


def depth(launch: Launch, dtype: torch.dtype) -> int:
    """BLOCK_K of a step."""
    return max(16, launch.block_k * 2 // dtype.itemsize)


def row_warps(width: int) -> int:
    """Warps of a program with a row of ``width`` elements of each gate."""
    return min(max(width // 128, 4), 16)


def norm_warps(width: int) -> int:
    """Warps of a program with a row of ``width`` elements."""
    return min(max(triton.next_power_of_2(width) // 512, 4), 32)


def allows_tf32() -> bool:
    """Whether PyTorch's settings let a float32 recurrent layer run in TF32."""
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    if rnn is not None and hasattr(rnn, "fp32_precision"):
        return rnn.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def candidates(dtype: torch.dtype, hidden: int, *, norm: bool) -> tuple[Launch, ...]:
    """The configurations that can run a layer; with a layer norm a step has whole rows."""
    if norm:
        return (Launch(CELL, 1, 0, 0, row_warps(triton.next_power_of_2(hidden)), 1),)
    if dtype == torch.float64:
        return DOUBLE
    size = max(16, triton.next_power_of_2(hidden))
    exact = dtype == torch.float32 and precision(dtype) == "ieee"  # (its products take many registers)
    sequences = SEQUENCES_EXACT if exact else SEQUENCES
    cell = (Launch(CELL, 1, 0, 0, row_warps(size), 1),) if hidden <= MOST_UNITS else ()
    return (*((sequences[size],) if size in sequences else ()), *(EXACT if exact else STEPS), *cell)


def choose(dtype: torch.dtype, steps: int, batch: int, hidden: int, *, norm: bool) -> Launch:
    """The configuration for a sequence.

    Raises:
        ValueError: more units than a layer norm's row may have, or a forced configuration that cannot run this.
    """
    if norm and hidden > MOST_UNITS:
        raise ValueError(f"the triton backend normalises at most {MOST_UNITS} units of a recurrent layer, got {hidden}")
    found = candidates(dtype, hidden, norm=norm)
    if forced is not None:
        if forced not in found:
            raise ValueError(f"{forced} is none of the configurations for {dtype} and {hidden} units")
        return forced
    if found[0].kind == SEQUENCE and steps > 1:
        return found[0]
    steps_of = [launch for launch in found if launch.kind == STEP]
    if not steps_of:
        return found[0]
    return steps_of[0] if batch <= 32 or len(steps_of) == 1 else steps_of[1]


def steps_of(x: Tensor, batch_sizes: Tensor | None) -> list[tuple[int, int]]:
    """(first row, rows) of each step."""
    if batch_sizes is None:
        return [(t * x.size(1), x.size(1)) for t in range(x.size(0))]
    found, offset = [], 0
    for size in batch_sizes.tolist():
        found.append((offset, size))
        offset += size
    return found
