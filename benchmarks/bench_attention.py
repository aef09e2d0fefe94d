"""Attention: PyTorch's best form beside dlkern's, with the backend that is chosen and with the cpu backend.

One thread's own time, so that a busy machine does not enter. Every row is first held to the parity rule on the very
call that is timed.
"""

from __future__ import annotations

from typing import Any

import pytest

from dlkern.bench.cases.attention import AttentionCase, AttentionProblem, cases
from dlkern.kernels.cpu import unavailable

from .own_time import ROWS, race


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_attention(case: AttentionCase, row: str, benchmark: Any, record: Any, request: pytest.FixtureRequest) -> None:
    problem = AttentionProblem(case)
    eager = problem.step("eager")
    race(problem, row, eager, benchmark, record, request)
