"""BatchNorm2d + ReLU (+ residual): eager PyTorch, torch.compile and each dlkern backend that can run here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .op_rows import parametrized, run


@parametrized("batch_norm_act", "eager", "compile")
def test_batch_norm_act(
    case: Any, row: str, benchmark: Any, record: Any, device: torch.device, request: pytest.FixtureRequest
) -> None:
    run(case, row, benchmark, record, device, request)
