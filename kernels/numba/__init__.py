"""numba.cuda kernels and their launchers, for a GPU without Triton."""

from __future__ import annotations

import functools
import os


def simulated() -> bool:
    """Whether kernels run in numba's simulator on the CPU (NUMBA_ENABLE_CUDASIM=1 before numba is imported)."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


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
