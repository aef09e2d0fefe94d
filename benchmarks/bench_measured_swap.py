"""Whole models after a measured swap, plain against swapped: a training step and an inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dlkern
from dlkern.bench import models
from dlkern.bench.cases.base import DTYPES

MODELS = (
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "torchvision:deeplabv3_resnet50",
    "torchvision:convnext_tiny",
    "torchvision:swin_t",
    "dlkern.bench.sequences:lstm",
    "dlkern.bench.sequences:gru",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("spec", metafunc.config.getoption("--model") or MODELS)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_measured_swap(
    spec: str, training: bool, benchmark: Any, record: Any, device: torch.device,
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("DLKERN_CACHE_DIR", str(tmp_path))  # nothing that was measured before counts
    option = request.config.getoption
    case = models.ModelCase(spec, training, option("--batch"), option("--image-size"), DTYPES[option("--dtype")])
    problem = models.ModelProblem(case, device)
    (result,) = models.run(problem, names=["measured"], min_seconds=option("--min-seconds"), min_rounds=20)
    assert result.red is None, result.red
    measured = problem.candidate("measured")  # again, from what the first one remembered
    benchmark.group = f"{case.spec} {case}"
    benchmark.pedantic(problem.step(measured), rounds=3, warmup_rounds=1)
    report = dlkern.report(measured)
    facts: dict[str, Any] = {
        "ratio": result.ratio,
        "ratio_of_equals": result.equals,
        "sites": {"swapped": len(report.swapped), "skipped": len(report.skipped)},
    }
    if training:
        facts["kept_for_backward_mb"] = {name: round(size / 1e6, 1) for name, size in result.kept.items()}
    record({**case.facts, "shape": list(problem.images.shape)}, result.comparison, facts)
    print(f"\n{result.comparison}\n{report}")
