"""How a batch of feature maps lies in memory, as kernels see it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """A tensor (N, C, *) seen by a per-channel kernel.

    ``channels_last`` False: ``outer`` images of ``channels`` planes of ``inner`` contiguous elements.
    ``channels_last`` True: ``outer`` rows of ``channels`` contiguous elements, and ``inner`` is 1.
    """

    channels_last: bool
    outer: int
    channels: int
    inner: int


def _channels_last_format(ndim: int) -> torch.memory_format | None:
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(ndim)


def is_channels_last(x: Tensor) -> bool:
    """Whether x, of 4 or 5 dimensions, is dense with its channels innermost."""
    memory_format = _channels_last_format(x.dim())
    return memory_format is not None and x.is_contiguous(memory_format=memory_format)


def strides_channels_last(t: Tensor) -> bool:
    """Whether PyTorch takes t (N, C, H, W) for channels_last: by its strides, contiguous where both would do."""
    least = 0
    if t.stride(1) == 0:
        return False
    for d in (1, 3, 2, 0):
        if t.size(d) == 0 or t.stride(d) < least or (d == 0 and least == t.stride(1)):
            return False
        least = t.stride(d) * max(t.size(d), 1)
    return True


def dense(x: Tensor) -> Tensor:
    """x itself where a kernel can read it in place (contiguous or channels_last), else a contiguous copy."""
    if x.is_neg():  # a view that PyTorch negates when it is read
        x = x.resolve_neg()
    if x.is_contiguous() or is_channels_last(x):
        return x
    return x.contiguous()


def like(x: Tensor, reference: Tensor) -> Tensor:
    """x itself where it has the strides of ``reference``, else a copy that has them.

    ``reference`` is dense. Gradients arrive with arbitrary strides (expanded, transposed, sliced).
    """
    if x.is_neg():
        x = x.resolve_neg()
    if x.stride() == reference.stride() or all(
        size == 1 or ours == theirs for size, ours, theirs in zip(x.shape, x.stride(), reference.stride(), strict=True)
    ):
        return x
    return torch.empty_like(reference, dtype=x.dtype).copy_(x)


def of(x: Tensor) -> Layout:
    """The layout of a dense tensor (N, C, *)."""
    channels = x.size(1)
    if x.is_contiguous():
        outer = x.size(0)
        inner = x.numel() // (outer * channels) if outer and channels else 0
        if inner == 1:  # rows of channels: the same memory, and far better access
            return Layout(True, outer, channels, 1)
        return Layout(False, outer, channels, inner)
    return Layout(True, x.numel() // channels if channels else 0, channels, 1)


def step(part: Tensor, view: Layout) -> int:
    """Elements from one of a layout's ``outer`` to the next in ``part``, channels of a map that may have more."""
    if not view.channels_last:
        return part.stride(0)
    return next((part.stride(d) for d in (3, 2) if part.size(d) > 1), part.stride(0))


def is_part(t: Tensor, view: Layout) -> bool:
    """Whether t (N, C, H, W) is consecutive channels of a dense map, of this layout, that may have more."""
    if t.dim() != 4 or t.is_neg():
        return False
    h, w = t.shape[2:]
    s = step(t, view)
    strides = (h * w * s, 1, w * s, s) if view.channels_last else (s, h * w, w, 1)
    same = all(size == 1 or ours == theirs for size, ours, theirs in zip(t.shape, t.stride(), strides, strict=True))
    return same and (view.outer == 1 or s >= view.channels * view.inner)
