"""A whole model under pytest-benchmark: dlkern's candidates timed in turn with the plain model, and memory kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import dlkern
from dlkern.bench import models
from dlkern.bench.cases.base import DTYPES
from dlkern.bench.results import Result


def run(
    spec: str,
    training: bool,
    layout: str,
    names: Sequence[str],
    benchmark: Any,
    record: Any,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> Result:
    """Hold the candidates to the rule of whole models, time them, write them down; the first one's result."""
    option = request.config.getoption
    case = models.ModelCase(
        spec, training, option("--batch"), option("--image-size"), DTYPES[option("--dtype")], layout
    )
    problem = models.ModelProblem(case, device)
    ours = problem.candidate(names[0])
    results = models.run(
        problem, names=names, min_seconds=option("--min-seconds"), min_rounds=20, made={names[0]: ours}
    )
    for result in results:
        assert result.red is None, result.red
    first = results[0]
    benchmark.group = f"{case.spec} {case}"
    benchmark.pedantic(problem.step(ours), rounds=5, warmup_rounds=1)
    report = dlkern.report(ours)
    facts: dict[str, Any] = {
        "shape": list(problem.images.shape),
        "ratio": first.ratio,
        "ratio_of_equals": first.equals,
        "sites": {"swapped": len(report.swapped), "skipped": len(report.skipped)},
    }
    if training:
        facts["kept_for_backward_mb"] = {name: round(size / 1e6, 1) for name, size in first.kept.items()}
    record(case.facts, first.comparison, facts)
    print(f"\n{first.comparison}\n{report}")
    return first
