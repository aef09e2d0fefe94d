"""Attention: PyTorch's best form beside dlkern's, with the backend that is chosen and with dlkern's own.

On a CPU one thread's own time, so that a busy machine does not enter; on a GPU each of PyTorch's backends has a row,
too. Every row is first held to the parity rule on the very call that is timed.
"""

from __future__ import annotations

from typing import Any

import pytest

from dlkern.bench.cases.attention import AttentionCase, AttentionProblem, cases
from dlkern.kernels.cpu import unavailable

from .own_time import DEVICE_TYPE, ROWS, race

PEERS = ("sdpa-flash_attention", "sdpa-efficient_attention", "sdpa-cudnn_attention", "sdpa-math")


@pytest.mark.skipif(DEVICE_TYPE == "cpu" and unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize("row", [*ROWS, *(PEERS if DEVICE_TYPE == "cuda" else ())])
@pytest.mark.parametrize("case", cases(DEVICE_TYPE), ids=str)
def test_attention(case: AttentionCase, row: str, benchmark: Any, record: Any, request: pytest.FixtureRequest) -> None:
    if row.startswith("sdpa") and case.kind == "relative":
        pytest.skip("PyTorch's best form of this is no call of scaled_dot_product_attention")
    problem = AttentionProblem(case, DEVICE_TYPE)
    eager = problem.step("eager")
    race(problem, row, eager, benchmark, record, request)
