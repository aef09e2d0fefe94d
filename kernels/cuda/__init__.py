"""Launchers of the CUDA C++ kernels in csrc/cuda, and what runs them: the built extension, or cupy with NVRTC."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Protocol

import torch

from .plan import TYPES, Launch


class Runtime(Protocol):
    """What runs launches."""

    def multiprocessors(self, device: torch.device) -> int:
        """How many multiprocessors a device has."""

    def run(self, launches: Sequence[Launch], device: torch.device) -> None:
        """Start launches in order on the device's current stream; RuntimeError with the reason where one fails."""


#: Set by tests to run launches on something that is no CUDA device; None leaves the choice to :func:`runtime`.
forced: Runtime | None = None


@functools.cache
def _built_problem() -> str | None:
    """None where the extension has CUDA kernels that can run here, else the reason."""
    try:
        from dlkern import _C
    except ImportError as error:
        return f"the extension dlkern._C is not there ({error})"
    if not hasattr(_C, "cuda_kernels"):
        return "dlkern._C is older than this code"
    if not _C.cuda_kernels():
        return "dlkern._C was built without CUDA kernels"
    problem = _C.cuda_problem()
    return f"dlkern._C's CUDA kernels cannot run here: {problem}" if problem else None


@functools.cache
def _cupy_problem() -> str | None:
    """None where cupy is installed, else the reason."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy, which would compile them at run time, is not installed"
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        return f"cupy, which would compile them at run time, does not import ({error})"
    return None


def unavailable() -> str | None:
    """None where the CUDA kernels can run here, else the reason they cannot."""
    return None if forced is not None else _unavailable()


@functools.cache
def _unavailable() -> str | None:
    if torch.version.hip is not None:
        return "the CUDA kernels do not run on AMD GPUs"
    if not torch.cuda.is_available():
        return "no CUDA device (torch.cuda.is_available() is False)"
    built = _built_problem()
    if built is None:
        return None
    cupy = _cupy_problem()
    if cupy is None:
        return None
    extra = "cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda13"
    return (
        f"{built}, and {cupy}; reinstall dlkern with nvcc (CUDA 12 or later) on the path, "
        f"or pip install 'dlkern[{extra}]'"
    )


def refuses(device: str, dtypes: Sequence[torch.dtype]) -> str | None:
    """None where kernels run on a device of type ``device`` in ``dtypes``, else the reason they do not."""
    if forced is None:
        if device != "cuda":
            return f"the cuda backend takes tensors on CUDA devices, not on {device!r}"
        reason = unavailable()
        if reason is not None:
            return reason
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) < (8, 0):
            return f"the cuda backend needs compute capability 8.0 or later, this device has {major}.{minor}"
    for dtype in dtypes:
        if dtype not in TYPES:
            return f"the cuda backend has no kernels for {dtype}"
    return None


@functools.cache
def _found() -> Runtime:
    if _built_problem() is None:
        from .built import Built

        return Built()
    from .nvrtc import Nvrtc

    return Nvrtc()


def runtime() -> Runtime:
    """What runs launches here: the built extension where it can, else cupy."""
    return forced or _found()
