"""Triton kernels and their launchers."""

from __future__ import annotations

import functools
import os

import torch


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter (TRITON_INTERPRET=1 before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


@functools.cache
def unavailable() -> str | None:
    """None where Triton kernels can run here, else the reason they cannot."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton does not import ({error}); pip install triton"
    if interpreted() or torch.cuda.is_available():
        return None
    return "no CUDA device; TRITON_INTERPRET=1 (set before Python starts) runs the kernels in Triton's interpreter"
