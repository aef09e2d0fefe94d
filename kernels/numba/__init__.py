"""numba.cuda kernels and their launchers, for a GPU without Triton."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch


def simulated() -> bool:
    """Whether kernels run in numba's simulator on the CPU (NUMBA_ENABLE_CUDASIM=1 before numba is imported)."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


def refuses(device: str, dtypes: Sequence[torch.dtype]) -> str | None:
    """None where kernels run on a device of type ``device`` in ``dtypes``, else the reason they do not."""
    if simulated():
        if device != "cpu":
            return f"numba's simulator (NUMBA_ENABLE_CUDASIM=1) runs on the CPU, not on {device!r}"
    elif device != "cuda":
        return f"the numba backend runs on CUDA devices, not on {device!r}"
    for dtype in dtypes:
        if dtype == torch.bfloat16:
            return "the numba backend has no bfloat16: NumPy, whose types describe its arrays, has none"
        if dtype not in (torch.float32, torch.float64, torch.float16):
            return f"the numba backend runs float32, float64 and float16, not {dtype}"
    return None


@functools.cache
def unavailable() -> str | None:
    """None where numba's kernels can run here, else the reason they cannot."""
    try:
        from numba import cuda
    except ImportError as error:
        return f"numba.cuda does not import ({error}); pip install numba-cuda"
    if simulated() or cuda.is_available():
        return None
    return "no CUDA device; NUMBA_ENABLE_CUDASIM=1 (set before Python starts) runs the kernels in numba's simulator"
