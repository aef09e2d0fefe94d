"""What one call costs beyond PyTorch's own call for the same layer, on tensors too small to compute on.

One thread, and its own CPU time, so that a busy machine does not enter. What it still adds (caches taken by
others) only makes calls slower: the budget is held by the 20th percentiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkern
from dlkern.bench import measure

BUDGET = 15e-6  # seconds over PyTorch's own
SHAPE = (2, 8, 2, 2)


def _steps(mode: str, residual: bool, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """PyTorch's call and dlkern's; mode is "inference", "forward" (recorded by autograd) or "training"."""
    training = mode != "inference"
    torch.manual_seed(0)
    x = torch.randn(SHAPE, device=device, requires_grad=training)
    add = torch.randn(SHAPE, device=device, requires_grad=training) if residual else None
    grad = torch.randn(SHAPE, device=device)
    plain = nn.BatchNorm2d(SHAPE[1], device=device).train(training)
    fused = dlkern.nn.BatchNormAct2d(SHAPE[1], device=device).train(training)

    def eager(x: Tensor, add: Tensor | None) -> Tensor:
        return F.relu(plain(x) if add is None else plain(x) + add)

    def step(layer: Callable[..., Tensor], norm: nn.BatchNorm2d) -> Callable[[], Any]:
        inputs = [t for t in (x, norm.weight, norm.bias, add) if t is not None]

        def run() -> Any:
            with torch.set_grad_enabled(training):
                y = layer(x, add)
            return torch.autograd.grad(y, inputs, grad) if mode == "training" else y

        return run

    return step(eager, plain), step(fused, fused)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("residual", [False, True], ids=["bn-act", "bn-add-act"])
@pytest.mark.parametrize("mode", ["inference", "forward", "training"])
def test_call_overhead(
    mode: str, residual: bool, benchmark: Any, record: Any, device: torch.device, request: pytest.FixtureRequest
) -> None:
    plain, fused = _steps(mode, residual, device)
    torch.testing.assert_close(fused(), plain())
    comparison = measure.compare(
        {"torch": plain, "dlkern": fused},
        device="cpu",  # what Python and the launch cost, on a GPU as well
        clock=time.thread_time,
        min_seconds=request.config.getoption("--min-seconds"),
        sample_seconds=2e-3,
    )
    benchmark.pedantic(fused, rounds=50, iterations=20, warmup_rounds=5)
    extra = comparison.time("dlkern").p20 - comparison.time("torch").p20
    record({"mode": mode, "residual": residual}, comparison, {"microseconds_over": extra * 1e6, "budget": BUDGET * 1e6})
