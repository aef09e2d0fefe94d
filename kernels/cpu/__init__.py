"""Launchers for the CPU kernels of csrc/cpu, in the extension ``dlkern._C``."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch  # first: its OpenMP runtime is the one to share
from torch import Tensor

_reason: str | None = None
try:
    from dlkern import _C
except ImportError as error:
    _C: ModuleType | None = None  # type: ignore[no-redef]
    _reason = f"the extension dlkern._C is not there ({error}); reinstall dlkern with a C++17 compiler on the path"

#: The dtypes that kernels take, and their codes in csrc.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def unavailable() -> str | None:
    """None where the extension is built and imports, else the reason it does not."""
    return _reason


def refuses(device: str, dtypes: Sequence[torch.dtype]) -> str | None:
    """None where kernels run on a device of type ``device`` in ``dtypes``, else the reason they do not."""
    if device != "cpu":
        return f"the cpu backend takes tensors on the CPU, not on {device!r}"
    if _reason is not None:
        return _reason
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"the cpu backend has no kernels for {dtype}"
    return None


def address(tensor: Tensor | None) -> int:
    """The address that a kernel takes: 0 where there is no tensor."""
    return 0 if tensor is None else tensor.data_ptr()
