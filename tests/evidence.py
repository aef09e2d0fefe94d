"""What the tests have shown: which op ran on which backend in which dtype, and how.

``record`` is called where a result has passed the parity rule. ``pytest --evidence FILE`` (tests/conftest.py) writes
what was recorded, and only where every test was green; ``python -m benchmarks.support`` makes the README's table of it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

#: Compiled ahead of time; run in an interpreter or simulator, on the host, on a GPU, on a GPU under a sanitizer.
HOW = ("compiled", "interpreted", "host-run", "gpu", "sanitized")

#: Names the tool of compute-sanitizer under which the tests run (benchmarks/run_gpu.sh sets it).
SANITIZER_VARIABLE = "DLKERN_SANITIZER"

_seen: Counter[tuple[str, str, str, str]] = Counter()


def record(op: str, backend: str, dtype: torch.dtype, how: str | None = None) -> None:
    """Count one result of ``op`` that passed. ``how`` defaults to where the backend's kernels run here.

    Raises:
        ValueError: an unknown ``how``.
    """
    if backend in ("torch", "reference"):
        return  # PyTorch's own kernels
    if how is None:
        from dlkern.kernels import cuda as kernels

        cuda = torch.cuda.is_available()
        # CUDA C++ runs under the host shim (tests/host_shim) where that is put in the device's place
        on_host = backend == "cpu" or (backend == "cuda" and kernels.forced is not None)
        how = "host-run" if on_host else "gpu" if cuda else "interpreted"
        if how == "gpu" and os.environ.get(SANITIZER_VARIABLE):
            record(op, backend, dtype, "sanitized")
    if how not in HOW:
        raise ValueError(f"unknown way {how!r}; expected one of {', '.join(HOW)}")
    _seen[op, backend, str(dtype).removeprefix("torch."), how] += 1


def rows() -> list[dict[str, Any]]:
    """What was recorded, as plain values."""
    names = ("op", "backend", "dtype", "how")
    return [{**dict(zip(names, key, strict=True)), "results": count} for key, count in sorted(_seen.items())]


def write(path: Path, facts: dict[str, Any]) -> None:
    """Write what was recorded with its provenance. A worker of pytest-xdist writes a file of its own beside it."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        path = path.with_name(f"{path.stem}.{worker}{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    sanitizer = os.environ.get(SANITIZER_VARIABLE)
    about = {"benchmark": "support", **facts, **({"sanitizer": sanitizer} if sanitizer else {})}
    path.write_text(json.dumps({**about, "rows": rows()}, indent=1) + "\n")
