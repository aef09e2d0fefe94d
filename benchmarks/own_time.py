"""Rows timed by one thread's own time, so that a busy machine does not enter: PyTorch beside a backend of dlkern's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dlkern.bench import measure

#: The backend that is chosen, and the cpu backend.
ROWS = ("dlkern", "dlkern-cpu")


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
    case = problem.case
    with one_thread(), problem.candidate(row) as step:
        backend = problem.check(step, eager)
        comparison = measure.compare(
            {"eager": eager, row: step},
            device="cpu",
            clock=time.thread_time,
            min_seconds=request.config.getoption("--min-seconds"),
        )
        benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    ratio = comparison.ratio(row).paired.median
    record({**case.facts, "row": row}, comparison, {"ratio": ratio, "target": case.target, "backend": backend})
