"""How attention's kernels are launched: tiles, shares of the keys and of a bias's readers, precision."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..reference.attention import Extras, Options
from . import interpreted, tiles
from .attention_scores import padded

#: Queries and keys up to which one program runs backward for a whole (batch, key head).
SHORT = 256
#: Fewest blocks of keys in a share of a forward pass that is split over keys, and most shares.
_LEAST_BLOCKS, MAX_SPLITS = 4, 64
_MAX_PARTIAL = 2**24
#: The largest costs of a plain and of a rich case.
PLAIN, RICH = 0, 3
#: What a table costs: an index, and what it leads to.
TABLE = 2
#: Triton knows of a stride that it is a multiple of this, or nothing.
_ALIGNED = 16


class Launch(NamedTuple):
    """A launch configuration: queries and keys of a tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Launches(NamedTuple):
    """The configurations of each kernel, forward's from large to small.

    ``both`` is for cases to which a table alone is added, or nothing; None: backward takes several passes.
    """

    forward: tuple[Launch, ...]
    query: Launch
    key: Launch
    both: Launch | None
    bias: Launch


_SMALL = Launches((Launch(16, 16, 4, 1),), Launch(16, 16, 4, 1), Launch(16, 16, 4, 1), None, Launch(16, 16, 8, 1))
_WIDE = Launches((Launch(16, 16, 8, 1),), Launch(16, 16, 8, 1), Launch(16, 16, 8, 1), None, Launch(16, 16, 8, 1))
_DOUBLE = Launches((Launch(8, 8, 8, 1),), *(Launch(8, 8, 8, 1),) * 4)
_LEAST = Launches((Launch(2, 4, 8, 1),), Launch(4, 4, 8, 1), Launch(4, 4, 8, 1), None, Launch(8, 8, 8, 1))

#: By kind of arithmetic ("half" and "tf32" have tensor cores), by the largest padded depth that they serve, and by what
#: is added to the scores or hidden of them, which takes registers: plain, rich and crowded cases (see ``cost``).
TABLES: dict[str, dict[int, tuple[Launches, Launches, Launches]]] = {
    "half": {
        64: (
            Launches(
                (Launch(128, 64, 8, 3), Launch(64, 64, 8, 3), Launch(16, 64, 4, 2)),
                Launch(64, 64, 8, 2), Launch(32, 64, 8, 2), Launch(32, 64, 8, 1), Launch(64, 32, 8, 1),
            ),
            Launches(
                (Launch(64, 32, 8, 1), Launch(16, 32, 4, 1)),
                Launch(64, 32, 8, 1), Launch(16, 64, 8, 1), None, Launch(64, 32, 8, 1),
            ),
            _SMALL,
        ),
        128: (
            Launches(
                (Launch(64, 64, 8, 2), Launch(16, 64, 4, 2)),
                Launch(64, 64, 8, 1), Launch(32, 64, 8, 1), None, Launch(64, 32, 8, 1),
            ),
            Launches(
                (Launch(64, 16, 8, 1), Launch(16, 32, 4, 1)),
                Launch(64, 32, 8, 1), Launch(16, 64, 8, 1), None, Launch(64, 16, 8, 1),
            ),
            _SMALL,
        ),
        256: (
            Launches(
                (Launch(64, 32, 8, 2), Launch(16, 32, 4, 2)),
                *_SMALL[1:],
            ),
            _SMALL,
            _SMALL,
        ),
    },
    "tf32": {
        64: (
            Launches(
                (Launch(64, 32, 4, 1), Launch(16, 32, 4, 1)),
                Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1),
            ),
            Launches(
                (Launch(16, 32, 4, 1),),
                Launch(16, 32, 4, 1), Launch(16, 32, 4, 1), Launch(32, 32, 8, 1), Launch(16, 32, 4, 1),
            ),
            _SMALL,
        ),
        128: (
            Launches(
                (Launch(64, 32, 8, 1), Launch(16, 32, 4, 1)),
                Launch(32, 32, 8, 1), Launch(32, 32, 8, 1), None, Launch(16, 16, 8, 1),
            ),
            _SMALL,
            _SMALL,
        ),
    },
    "ieee": {
        64: (
            Launches(
                (Launch(32, 32, 8, 1), Launch(16, 32, 4, 1)),
                Launch(32, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1),
            ),
            Launches(
                (Launch(16, 16, 4, 1),),
                *_SMALL[1:],
            ),
            _SMALL,
        ),
        256: (_WIDE, _WIDE, _WIDE),
    },
    "double": {64: (_DOUBLE, _LEAST, _LEAST)},
}  # fmt: skip

#: Set by tests and tuning to run one configuration of a kernel, by its name in ``Launches``; None forces ``both`` away.
forced: dict[str, Any] = {}


def allows_tf32() -> bool:
    """Whether PyTorch's settings let a float32 matrix product run in TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


def kind(dtype: torch.dtype, depth: int) -> str:
    """The kind of arithmetic for a dtype and the larger head dimension, under the present settings."""
    if dtype == torch.float64:
        return "double"
    if dtype == torch.float32:
        return "tf32" if allows_tf32() and depth <= max(TABLES["tf32"]) else "ieee"
    return "half"


def launches(cost: int, dtype: torch.dtype, depth: int) -> Launches:
    """The configurations for a case's cost and dtype, and the larger of its two head dimensions."""
    by_depth = TABLES[kind(dtype, depth)]
    plain, rich, crowded = by_depth[min(d for d in by_depth if d >= padded(depth))]
    return plain if cost <= PLAIN else rich if cost <= RICH else crowded


def cost(extras: Extras, options: Options, *tensors: Tensor) -> int:
    """How much takes registers beside the products: whatever has an element of its own for each score.

    ``tensors`` are those whose rows are read: one that does not lie in multiples of 16 costs as much as a mask.
    """
    steps = (zip(t.stride()[:3], t.shape[:3], strict=True) for t in tensors)
    odd = any(step % _ALIGNED for each in steps for step, size in each if size > 1)
    single = (
        extras.mask is not None, extras.bias is not None, extras.slopes is not None, options.left is not None,
        options.softcap != 0, options.dropout_p > 0, odd,
    )  # fmt: skip
    return sum(single) + TABLE * (extras.table is not None)


def backward(name: str, cost: int, dtype: torch.dtype, depth: int) -> Launch:
    """The configuration of "query", "key" or "bias"."""
    return forced[name] if name in forced else getattr(launches(cost, dtype, depth), name)


def one_pass(cost: int, lone_table: bool, length: int, dtype: torch.dtype, depth: int) -> Launch | None:
    """The configuration with which one program runs backward for a whole (batch, key head); None: it does not.

    ``lone_table``: there is a table; ``length`` is the larger number of queries and keys.
    """
    if "both" in forced:
        return forced["both"]
    few = cost <= PLAIN or (lone_table and cost == TABLE)
    return launches(cost, dtype, depth).both if few and length <= SHORT else None


def forward(rows: int, owners: int, cost: int, dtype: torch.dtype, depth: int, device: torch.device) -> Launch:
    """The configuration for ``owners`` (batches times heads) of ``rows`` queries.

    The largest tile that is not half empty and still leaves every multiprocessor a program, else the smallest.
    """
    if forced.get("forward"):
        return forced["forward"]
    candidates = launches(cost, dtype, depth).forward
    slots = tiles._programs(device) // 4
    for launch in candidates:
        if 2 * rows > launch.block_m and owners * triton.cdiv(rows, launch.block_m) >= slots:
            return launch
    return next((launch for launch in reversed(candidates) if launch.block_m >= rows), candidates[0])


def splits(programs: int, keys: int, launch: Launch, device: torch.device) -> int:
    """Into how many shares a forward pass cuts its keys, where few programs would leave the device idle."""
    blocks = triton.cdiv(keys, launch.block_n)
    least = 1 if interpreted() else _LEAST_BLOCKS
    return max(1, min(tiles._programs(device) // 2 // max(programs, 1), blocks // least, MAX_SPLITS))


def shares(wanted: int, items: int, size: int) -> int:
    """Into how many shares the readers of a bias of ``size`` elements are cut, each with sums of its own."""
    return max(1, min(wanted, items, _MAX_PARTIAL // max(size, 1)))
