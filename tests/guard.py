"""Guard zones and poison: memory that shows when it is written out of bounds, or read before it is written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

#: Bytes on each side of a guarded tensor; a multiple of every vector width, so alignment stays.
ZONE = 256
_SENTINEL = 0xA5


class Guards:
    """Hands out tensors that lie between two sentinel zones, and looks at the zones afterwards."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int, int, str]] = []

    def empty(
        self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: Any = None, *, offset: int = 0
    ) -> Tensor:
        """A tensor filled with NaN (integers: 0xA5 bytes), ``offset`` elements off its alignment."""
        last = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        start = ZONE + offset * dtype.itemsize
        stop = start + last * dtype.itemsize
        buffer = torch.full((stop + ZONE,), _SENTINEL, dtype=torch.uint8, device=device)
        self._buffers.append((buffer, start, stop, f"a tensor of shape {tuple(size)}, {dtype}"))
        flat = buffer[start:stop].view(dtype)
        if dtype.is_floating_point:
            flat.fill_(float("nan"))
        return flat.as_strided(tuple(size), tuple(stride), flat.storage_offset())

    def place(self, values: Tensor, stride: Sequence[int] | None = None, *, offset: int = 0) -> Tensor:
        """A copy of ``values`` between guard zones, with its own strides or those given."""
        stride = values.stride() if stride is None else stride
        out = self.empty(values.shape, stride, values.dtype, values.device, offset=offset)
        return out.copy_(values)

    def check(self) -> None:
        """Raise AssertionError where a sentinel was overwritten."""
        for buffer, start, stop, what in self._buffers:
            for side, zone in (("before", buffer[:start]), ("after", buffer[stop:])):
                broken = (zone != _SENTINEL).nonzero()
                if broken.numel():
                    raise AssertionError(f"out of bounds: {broken.numel()} bytes {side} {what} were overwritten")


@contextlib.contextmanager
def guarded() -> Iterator[Guards]:
    """Inside the block ``torch.empty`` and its kin allocate poisoned tensors between guard zones.

    The zones are looked at when the block ends without an error.
    """
    guards = Guards()
    empty, empty_like = torch.empty, torch.empty_like

    def fake_empty(*size: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        shape = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size
        like = empty(tuple(shape), dtype=dtype, device="meta", **kwargs)
        if str(device) == "meta":
            return like
        return guards.empty(like.shape, like.stride(), like.dtype, device)

    def fake_empty_like(x: Tensor, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        like = empty_like(x, dtype=dtype, device="meta", **kwargs)
        return guards.empty(like.shape, like.stride(), like.dtype, device or x.device)

    def fake_new_empty(x: Tensor, *size: Any, dtype: Any = None, device: Any = None) -> Tensor:
        return fake_empty(*size, dtype=dtype or x.dtype, device=device or x.device)

    def fake_empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        return guards.empty(size, stride, dtype or torch.get_default_dtype(), device)

    with (
        mock.patch.object(torch, "empty", fake_empty),
        mock.patch.object(torch, "empty_like", fake_empty_like),
        mock.patch.object(torch, "empty_strided", fake_empty_strided),
        mock.patch.object(torch.Tensor, "new_empty", fake_new_empty),
    ):
        yield guards
    guards.check()
