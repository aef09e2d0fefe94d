"""Launchers for the CPU kernels of csrc/cpu, in the extension ``dlkern._C``."""

from __future__ import annotations

import functools


@functools.cache
def unavailable() -> str | None:
    """None where the extension is built and imports, else the reason it does not."""
    try:
        import torch  # noqa: F401  (first: its OpenMP runtime is the one to share)

        from dlkern import _C  # noqa: F401
    except ImportError as error:
        return f"the extension dlkern._C is not there ({error}); reinstall dlkern with a C++17 compiler on the path"
    return None
