"""A whole training step and an inference, plain against swapped: time in turn, and memory kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dlkern
from dlkern.bench import models
from dlkern.bench.cases.base import DTYPES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    specs = metafunc.config.getoption("--model") or ["torchvision:resnet50"]
    metafunc.parametrize("spec", specs)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_model(
    spec: str, training: bool, layout: str, benchmark: Any, record: Any, device: torch.device,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    option = request.config.getoption
    dtype = DTYPES[option("--dtype")]
    case = models.ModelCase(spec, training, option("--batch"), option("--image-size"), dtype, layout)
    problem = models.ModelProblem(case, device)
    swapped = problem.candidate("swapped")
    results = models.run(
        problem,
        names=models.candidate_names(training, compiled=False),
        min_seconds=option("--min-seconds"),
        min_rounds=20,
    )
    for result in results:
        assert result.red is None, result.red
    first, comparison = results[0], results[0].comparison
    benchmark.group = f"{case.spec} {case}"
    benchmark.pedantic(problem.step(swapped), rounds=5, warmup_rounds=1)
    report = dlkern.report(swapped)
    facts: dict[str, Any] = {
        "ratio": first.ratio,
        "ratio_of_equals": first.equals,
        "sites": {"swapped": len(report.swapped), "skipped": len(report.skipped)},
    }
    if training:
        facts["kept_for_backward_mb"] = {name: round(size / 1e6, 1) for name, size in first.kept.items()}
    record(case.facts, comparison, facts)
    print(f"\n{comparison}")
    if training:
        assert first.kept["swapped"] <= first.kept["plain"]
