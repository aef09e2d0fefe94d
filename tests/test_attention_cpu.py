"""attention in the extension: parity for a pairwise cover of the options, determinism, memory, semantics."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, check, pairwise
from conftest import HAS_CUDA

pytestmark = pytest.mark.skipif(HAS_CUDA, reason="the values are made on the CUDA device")
TARGET = ("cpu", "cpu")


@pytest.mark.parametrize("case", pairwise(), ids=str)
def test_pairwise(case: Case) -> None:
    check(case, TARGET)


@pytest.mark.parametrize("case", [case._replace(dtype=torch.bfloat16) for case in pairwise()[:12]], ids=str)
def test_bfloat16(case: Case) -> None:
    check(case, TARGET)
