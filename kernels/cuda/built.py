"""Launches of the kernels that nvcc has built into ``dlkern._C``."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from dlkern import _C

from .plan import Launch


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a CUDA device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


class Built:
    """Runs launches through the extension (see ``dlkern.kernels.cuda.Runtime``)."""

    def __init__(self) -> None:
        self._numbers = {name: number for number, name in enumerate(_C.cuda_kernels())}

    def multiprocessors(self, device: torch.device) -> int:
        return multiprocessors(device)

    def run(self, launches: Sequence[Launch], device: torch.device) -> None:
        with torch.cuda.device(device):
            index, stream = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
            for launch in launches:
                number = self._numbers[launch.kernel]
                _C.cuda_launch(number, *launch.grid, launch.threads, launch.shared_bytes, index, stream, launch.args)
