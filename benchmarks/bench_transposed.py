"""ConvTranspose2d + BatchNorm2d + ReLU: eager PyTorch, torch.compile and dlkern, by choice and by backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .op_rows import parametrized, run


@parametrized("transposed", "eager", "compile", "dlkern")
def test_transposed(
    case: Any, row: str, benchmark: Any, record: Any, device: torch.device, request: pytest.FixtureRequest
) -> None:
    run(case, row, benchmark, record, device, request)
