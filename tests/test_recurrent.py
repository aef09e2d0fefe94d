"""lstm, gru and rnn against a float64 loop over steps and torch.nn: forward, and every gradient."""

from __future__ import annotations

import pytest
import torch
from recurrent_cases import Case, call, check, every_backend, judge, peer, truth
from torch import nn

F64 = torch.float64


def _cases(op: str) -> list[Case]:
    """Telling shapes of one op: each option once with others, odd and tiny sizes, long and short."""
    found = [
        Case(op, 1, 1, 1, 1),
        Case(op, 1, 3, 5, 9, hx=False),
        Case(op, 2, 1, 7, 33, only="h_n"),
        Case(op, 7, 5, 3, 17, bias=False),
        Case(op, 7, 3, 19, 24, layers=2, bidirectional=True),
        Case(op, 7, 4, 9, 13, batch_first=True, hx=False, only="y"),
        Case(op, 7, 1, 6, 11, unbatched=True, layers=2, bidirectional=True),
        Case(op, 2, 1, 6, 11, unbatched=True, batch_first=True, hx=False),
        Case(op, 7, 6, 5, 15, packed="sorted", layers=2),
        Case(op, 7, 6, 5, 15, packed="unsorted", bidirectional=True, layers=2),
        Case(op, 7, 5, 4, 10, packed="unsorted", bidirectional=True, hx=False, batch_first=True, bias=False),
        Case(op, 64, 2, 12, 40, bidirectional=True),
        Case(op, 512, 1, 3, 9),
        Case(op, 512, 3, 2, 5, packed="unsorted", bidirectional=True, only="h_n"),
        Case(op, 7, 33, 8, 31),
        Case(op, 7, 3, 5, 9, dtype=F64, layers=2, bidirectional=True),
        Case(op, 64, 5, 6, 21, dtype=F64, packed="unsorted"),
        Case(op, 7, 9, 5, 8, dtype=F64, hx=False, bias=False),
    ]
    if op == "lstm":
        found += [
            Case(op, 7, 3, 5, 17, proj=6),
            Case(op, 1, 2, 5, 9, proj=8, hx=False, bias=False),
            Case(op, 7, 12, 5, 20, proj=7, layers=2, bidirectional=True, packed="unsorted"),
            Case(op, 7, 9, 5, 12, proj=5, bidirectional=True, dtype=F64, packed="sorted"),
        ]
    if op == "rnn":
        found += [
            Case(op, 7, 5, 6, 19, nonlinearity="relu", layers=2, bidirectional=True),
            Case(op, 7, 5, 6, 19, nonlinearity="relu", packed="unsorted", dtype=F64),
        ]
    return found


CASES = [case for op in ("lstm", "gru", "rnn") for case in _cases(op)]


@every_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, backend: str) -> None:
    check(case, backend)


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == F64], ids=str)
def test_the_loop_is_torch(case: Case) -> None:
    judge(case, call(case, case.module(nn), F64))
    assert truth(case)[0].keys() == peer(case).keys()
