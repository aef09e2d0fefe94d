"""Conv2d + BatchNorm2d + ReLU (+ residual): eager PyTorch, torch.compile, cuDNN's fused inference and dlkern.

The row "dlkern" is what dispatch chooses, the others are backends that are forced; a backend that does not take a
case (training, say) is skipped with its reason.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .op_rows import parametrized, run


@parametrized("conv_bn_act", "eager", "compile", "cudnn", "dlkern")
def test_conv_bn_act(
    case: Any, row: str, benchmark: Any, record: Any, device: torch.device, request: pytest.FixtureRequest
) -> None:
    run(case, row, benchmark, record, device, request)
