"""LSTM, GRU, RNN and cells: torch.nn's beside dlkern's, with the backend that is chosen and with the cpu backend.

One thread's own time, so that a busy machine does not enter. Every row is first held to the parity rule on the very
call that is timed.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from dlkern.bench.cases.recurrent import RecurrentCase, RecurrentProblem, cases
from dlkern.kernels.cpu import unavailable

from .own_time import ROWS, race


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize(
    ("case", "row"),
    [(case, row) for case in cases() for row in ROWS if row == "dlkern" or not case.variant],  # a variant is cpu's
    ids=str,
)
def test_recurrent(case: RecurrentCase, row: str, benchmark: Any, record: Any, request: pytest.FixtureRequest) -> None:
    problem = RecurrentProblem(case)
    eager = problem.step(problem.module(nn))
    race(problem, row, eager, benchmark, record, request)
