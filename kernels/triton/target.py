"""What every launcher of Triton kernels needs: where they run, on which device, with which registers."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import interpreted

#: The launch options that let a kernel have every register of its threads. Left alone, ptxas spills a few registers
#: for one more program on a multiprocessor.
ALL_REGISTERS: dict[str, int] = {"maxnreg": 255} if torch.version.hip is None else {}


def runs_on(device: str) -> str | None:
    """None where kernels run on a device of type ``device``, else the reason they do not."""
    if device == "cpu":
        if interpreted():
            return None
        return "the triton backend runs on CUDA devices; on the CPU only in its interpreter (TRITON_INTERPRET=1)"
    if device != "cuda":
        return f"the triton backend runs on CUDA devices, not on {device!r}"
    if torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"the triton backend needs compute capability 8.0 or later, this device has {major}.{minor}"
    return None


def device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel stores for ``dtype``: the interpreter truncates to bfloat16 instead of rounding."""
    return torch.float32 if dtype == torch.bfloat16 and interpreted() else dtype
