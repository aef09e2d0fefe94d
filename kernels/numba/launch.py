"""How numba's kernels are launched over a batch of feature maps: arrays, blocks and grids, device and stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from numba import cuda
from torch import Tensor

from .. import layout
from . import simulated

#: Threads of a block (the simulator has a Python thread for each), and channels of a block in channels_last.
THREADS, _ROW_CHANNELS = (4, 2) if simulated() else (128, 32)
#: Shares of a channel: one thread merges those of a reduction; else as many as a grid has blocks in y.
_MAX_SPLITS, _MAX_GRID_Y = 64, 65535


def array(t: Tensor | None) -> Any:
    """The memory of a contiguous tensor as an array of its shape that kernels take, without a copy; None for None."""
    if t is None:
        return None
    # sync=False: kernels are launched on the stream on which torch works
    return t.detach().numpy() if simulated() else cuda.as_cuda_array(t.detach(), sync=False)


def flat(t: Tensor | None) -> Any:
    """The memory of a dense tensor (contiguous or channels_last) as an array of one dimension; None for None."""
    return None if t is None else array(t.detach().as_strided((t.numel(),), (1,)))


def vector(v: Tensor | None) -> Any:
    """A tensor (C,) of any stride as an array; None for None."""
    return None if v is None else array(v.contiguous())


class Plan(NamedTuple):
    """How kernels run over a tensor: a block of channels x lanes, and a grid of channel blocks x splits."""

    block: tuple[int, int]
    grid: tuple[int, int]
    sizes: tuple[int, int, int]  # positions, channels, inner
    stream: Any

    @property
    def splits(self) -> int:
        return self.grid[1]

    @property
    def over_tensor(self) -> tuple[Any, ...]:
        """The launch configuration of a kernel over all of the tensor."""
        return self.grid, self.block, self.stream

    @property
    def over_channels(self) -> tuple[Any, ...]:
        """The launch configuration of a kernel with a thread for each channel."""
        return -(-self.sizes[1] // THREADS), THREADS, self.stream


def _programs(device: torch.device) -> int:
    """How many blocks fill the device."""
    if simulated():
        return 4  # enough that reductions are split
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count


def _stream(device: torch.device) -> Any:
    """The stream on which torch works."""
    if simulated():
        return 0
    pointer = torch.cuda.current_stream(device).cuda_stream
    return cuda.external_stream(pointer) if pointer else cuda.default_stream()


def plan(x: Tensor, *, reduction: bool) -> Plan:
    """Blocks and grid for a dense tensor (N, C, *)."""
    view = layout.of(x)
    positions = view.outer * view.inner
    columns = _ROW_CHANNELS if view.channels_last else 1
    lanes = THREADS // columns
    channel_blocks = -(-view.channels // columns)
    wanted = -(-_programs(x.device) // channel_blocks)
    splits = max(1, min(-(-positions // lanes), wanted, _MAX_SPLITS if reduction else _MAX_GRID_Y))
    sizes = (positions, view.channels, view.inner)
    return Plan((columns, lanes), (channel_blocks, splits), sizes, _stream(x.device))


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """numba launches on its current device, which need not be a tensor's."""
    if simulated():
        yield
    else:
        with torch.cuda.device(device), cuda.gpus[device.index]:
            yield
