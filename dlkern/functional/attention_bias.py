"""Biases of attention that are read from a table: no tensor of queries x keys is made."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dlkern.ops.library import unwatched

from .arguments import check_tensor
from .dtypes import HALF_DTYPES


@dataclass(frozen=True, eq=False)
class RelativePositionBias:
    """bias[h, i, j] = table[index[i, j], h], as in Swin Transformer.

    table (rows, H), float; index (Lq, Lk) or (Lq * Lk,), int32 or int64, from 0 to rows - 1: checked on the CPU, on
    CUDA devices not (the host would have to wait), where a value outside of that reads other memory.
    """

    table: Tensor
    index: Tensor

    def check(self, query: Tensor, heads: int, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        """The table, and the index as (Lq, Lk). Raises ValueError, TypeError or RuntimeError."""
        _check_table(self.table, query, heads)
        index = self.index
        if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
            seen = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"bias.index: expected an int32 or int64 Tensor, got {seen}")
        if index.device != query.device:
            raise RuntimeError(f"bias.index: expected device {query.device} like query, got {index.device}")
        if tuple(index.shape) not in ((queries, keys), (queries * keys,)):
            raise ValueError(f"bias.index: expected shape {(queries, keys)} (Lq, Lk), got {tuple(index.shape)}")
        rows = self.table.shape[0]
        if index.device.type == "cpu" and unwatched(index) and index.numel():
            least, most = (int(v) for v in index.aminmax())
            if least < 0 or most >= rows:
                raise ValueError(f"bias.index: expected 0 to {rows - 1} for {rows} rows, got {least} to {most}")
        return self.table, index.reshape(queries, keys)


@dataclass(frozen=True, eq=False)
class T5Bias:
    """bias[h, i, j] = table[bucket(j - i), h], T5's buckets of distances.

    table (num_buckets, H), float. Near distances have buckets of their own, farther ones share them logarithmically up
    to ``max_distance``; with ``bidirectional`` half of the buckets are for keys behind the query, else those count as
    distance 0. Positions are those of attention's ``causal_alignment``.
    """

    table: Tensor
    bidirectional: bool = True
    num_buckets: int = 32
    max_distance: int = 128

    def check(self, query: Tensor, heads: int, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        """The table, and the row of each distance. Raises ValueError, TypeError or RuntimeError."""
        del queries, keys
        _check_table(self.table, query, heads)
        for name, value in (("num_buckets", self.num_buckets), ("max_distance", self.max_distance)):
            if type(value) is not int:  # the number of rows of distances follows from it
                raise TypeError(f"bias.{name}: expected an int, got {value!r}")
        least = 4 if self.bidirectional else 2
        if self.num_buckets < least or (self.bidirectional and self.num_buckets % 2):
            kind = "an even number of" if self.bidirectional else "buckets,"
            raise ValueError(f"bias.num_buckets: expected {kind} at least {least}, got {self.num_buckets}")
        if self.table.shape[0] != self.num_buckets:
            raise ValueError(f"bias.table: expected {self.num_buckets} rows, one a bucket, got {self.table.shape[0]}")
        exact = self.num_buckets // (4 if self.bidirectional else 2)
        if self.max_distance <= exact:
            raise ValueError(f"bias.max_distance: expected more than {exact}, got {self.max_distance}")
        make = _kept_rows if unwatched(query) else _rows
        return self.table, make(self.bidirectional, self.num_buckets, self.max_distance, query.device)


def _rows(bidirectional: bool, num_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """(2 max_distance + 1,): the bucket of each distance from -max_distance on; farther ones have the same."""
    distance = torch.arange(-max_distance, max_distance + 1, device="cpu")
    first = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return (first + torch.where(distance < exact, distance, far)).to(device)


@functools.lru_cache(maxsize=64)
def _kept_rows(bidirectional: bool, num_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a later call may want a gradient
        return _rows(bidirectional, num_buckets, max_distance, device)


def check_device(name: str, t: Tensor, query: Tensor) -> None:
    """Raise where t is no tensor, or not on query's device."""
    check_tensor(name, t)
    if t.device != query.device:
        raise RuntimeError(f"{name}: expected device {query.device} like query, got {t.device}")


def check_values(name: str, t: Tensor, query: Tensor) -> None:
    """Raise where t is not on query's device, or neither of its dtype nor float32 beside half data."""
    check_device(name, t, query)
    if t.dtype != query.dtype and not (t.dtype == torch.float32 and query.dtype in HALF_DTYPES):
        allowed = f"{query.dtype} or torch.float32" if query.dtype in HALF_DTYPES else f"{query.dtype}"
        raise TypeError(f"{name}: expected {allowed} with a query of {query.dtype}, got {t.dtype}")


def _check_table(table: Tensor, query: Tensor, heads: int) -> None:
    check_values("bias.table", table, query)
    if table.dim() != 2 or table.shape[1] != heads:
        raise ValueError(f"bias.table: expected (rows, {heads}), one column a head, got shape {tuple(table.shape)}")
