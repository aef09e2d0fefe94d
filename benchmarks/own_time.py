"""PyTorch beside a backend of dlkern's: on a CPU by one thread's own time, so that a busy machine does not enter."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dlkern.bench import measure
from dlkern.bench.cases.base import Unsupported

DEVICE_TYPE = "cuda" if torch.cuda.is_available() else "cpu"
#: The backend that is chosen, and the one that is dlkern's own on this kind of device.
ROWS = ("dlkern", "dlkern-triton" if DEVICE_TYPE == "cuda" else "dlkern-cpu")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for PyTorch and for dlkern."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def race(
    problem: Any,
    row: str,
    eager: Callable[[], object],
    benchmark: Any,
    record: Any,
    request: pytest.FixtureRequest,
) -> None:
    """Hold ``row`` of a problem to the parity rule on the very call that is timed; then time it, and write it down."""
    case, on_cpu = problem.case, DEVICE_TYPE == "cpu"
    with one_thread() if on_cpu else contextlib.nullcontext(), problem.candidate(row) as step:
        try:
            backend = problem.check(step, eager)
        except Unsupported as error:
            pytest.skip(str(error))
        comparison = measure.compare(
            {"eager": eager, row: step},
            device=DEVICE_TYPE,
            clock=time.thread_time if on_cpu else time.perf_counter,
            min_seconds=request.config.getoption("--min-seconds"),
        )
        benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    ratio = comparison.ratio(row).paired.median
    record({**case.facts, "row": row}, comparison, {"ratio": ratio, "target": case.target, "backend": backend})
