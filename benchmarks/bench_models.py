"""A whole training step, plain against swapped: time in turn, and memory kept for backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkern
from dlkern import models
from dlkern.bench import measure


def _train_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(model(images)), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def _logits(output: Any) -> Tensor:
    """The classification output of models that return several (inception_v3, googlenet)."""
    return output if isinstance(output, Tensor) else output[0]


def _kept(model: nn.Module, images: Tensor) -> int:
    held: list[Any] = []
    return measure.saved_bytes(lambda: held.append(model(images)), model.parameters())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_training_step(
    layout: torch.memory_format, benchmark: Any, record: Any, device: torch.device, request: pytest.FixtureRequest
) -> None:
    option = request.config.getoption
    name, batch, size = option("--model"), option("--batch"), option("--image-size")
    torch.manual_seed(0)
    plain = models.build(name).to(device, memory_format=layout)
    swapped = dlkern.swap(copy.deepcopy(plain))
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
    labels = torch.randint(10, (batch,), device=device)

    verified = dlkern.verify(plain, swapped, images)
    assert verified.ok, str(verified)
    kept = {"plain": _kept(plain, images), "swapped": _kept(swapped, images)}
    # a second copy of the plain model shows how far from 1 a ratio of equals is on this machine
    steps = {
        "plain": _train_step(plain, images, labels),
        "plain again": _train_step(copy.deepcopy(plain), images, labels),
        "swapped": _train_step(swapped, images, labels),
    }
    comparison = measure.compare(
        steps, device=device, calls=1, min_rounds=20, min_seconds=option("--min-seconds"), max_rounds=200
    )
    benchmark.group = f"{name} {batch}x3x{size}x{size}"
    benchmark.pedantic(steps["swapped"], rounds=5, warmup_rounds=1)
    report = dlkern.report(swapped)
    record(
        {"model": name, "batch": batch, "image_size": size, "format": request.node.callspec.id},
        comparison,
        {
            "ratio": comparison.ratio("swapped").paired.median,
            "ratio_of_equals": comparison.ratio("plain again").paired.median,
            "kept_for_backward_mb": {k: round(v / 1e6, 1) for k, v in kept.items()},
            "sites": {"swapped": len(report.swapped), "skipped": len(report.skipped)},
        },
    )
    print(
        f"\n{comparison}\nkept for backward: {kept['plain'] / 1e6:.1f} MB plain, {kept['swapped'] / 1e6:.1f} MB swapped"
    )
    assert kept["swapped"] <= kept["plain"]
