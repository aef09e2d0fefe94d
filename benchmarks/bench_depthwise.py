"""Depthwise convolution: eager PyTorch, torch.compile, what dispatch chooses and each backend that can run here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .op_rows import parametrized, run


@parametrized("depthwise", "eager", "compile", "dlkern")
def test_depthwise(
    case: Any, row: str, benchmark: Any, record: Any, device: torch.device, request: pytest.FixtureRequest
) -> None:
    run(case, row, benchmark, record, device, request)
