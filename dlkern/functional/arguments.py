"""What functions of several ops do with their arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlkern.ops import library

#: An int, or one for each of height and width.
Size = int | Sequence[int]


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast all of them, other than None and float64 ones, are cast as those of PyTorch's own functions."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not library.autocasts(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)

    def cast(t: Any) -> Any:
        floating = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if floating else t

    return tuple(map(cast, tensors))


def check_tensor(name: str, value: Any) -> None:
    """TypeError for what is no Tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


def pair(name: str, value: Size, least: int) -> tuple[int, int]:
    """value as a pair.

    Raises:
        ValueError: neither an int of at least ``least`` nor one or two of them.
    """
    if type(value) is tuple and len(value) == 2:
        first, second = value
        if type(first) is int and type(second) is int and first >= least and second >= least:
            return value  # type: ignore[return-value]
    sizes = tuple(value) if isinstance(value, Iterable) else (value, value)
    if len(sizes) == 1:
        sizes = sizes * 2
    if len(sizes) != 2 or not all(isinstance(v, int) and v >= least for v in sizes):
        raise ValueError(f"{name}: expected an int of at least {least} or two of them, got {value!r}")
    return sizes  # type: ignore[return-value]
