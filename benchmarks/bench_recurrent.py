"""LSTM, GRU, RNN and cells: torch.nn's beside dlkern's, with the backend that is chosen and with dlkern's own.

On a CPU one thread's own time, so that a busy machine does not enter; on a GPU torch.nn's layers are cuDNN's. Every
row is first held to the parity rule on the very call that is timed.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from dlkern.bench.cases.recurrent import RecurrentCase, RecurrentProblem, cases
from dlkern.kernels.cpu import unavailable

from .own_time import DEVICE_TYPE, ROWS, race


@pytest.mark.skipif(DEVICE_TYPE == "cpu" and unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize(
    ("case", "row"),
    # a variant is dlkern's own whatever is asked for
    [(case, row) for case in cases(DEVICE_TYPE) for row in ROWS if row == "dlkern" or not case.variant],
    ids=str,
)
def test_recurrent(case: RecurrentCase, row: str, benchmark: Any, record: Any, request: pytest.FixtureRequest) -> None:
    problem = RecurrentProblem(case, DEVICE_TYPE)
    eager = problem.step(problem.module(nn))
    race(problem, row, eager, benchmark, record, request)
