"""Attention: PyTorch's best form beside dlkern's, with the backend that is chosen and with the cpu backend.

One thread's own time, so that a busy machine does not enter. Every row is first held to the parity rule on the very
call that is timed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dlkern.bench import measure
from dlkern.bench.cases.attention import AttentionCase, AttentionProblem, cases
from dlkern.kernels.cpu import unavailable

ROWS = ("dlkern", "dlkern-cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_attention(case: AttentionCase, row: str, benchmark: Any, record: Any, request: pytest.FixtureRequest) -> None:
    problem = AttentionProblem(case)
    eager = problem.step("eager")
    with problem.candidate(row) as step:
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
