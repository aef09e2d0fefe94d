"""The cases of an op (dlkern/bench/cases) under pytest-benchmark.

Every row is first held to the parity rule on the very call that is timed; a red row shows no time.
Its ratio against eager is measured in turn with eager, in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlkern.bench import cases, ops
from dlkern.bench.cases.base import Unsupported
from dlkern.bench.results import Result

DEVICE_TYPE = "cuda" if torch.cuda.is_available() else "cpu"


def parametrized(op: str, *rows: str) -> Callable[[Any], Any]:
    """Parametrizes a test by every case of an op and by row: ``rows``, and each backend of dlkern's forced."""
    found = cases.of(op, DEVICE_TYPE)
    every = [*rows, *(f"dlkern-{name}" for name in ops.backends(op, DEVICE_TYPE))]

    def decorate(test: Any) -> Any:
        return pytest.mark.parametrize("row", every)(pytest.mark.parametrize("case", found, ids=str)(test))

    return decorate


def run(
    case: cases.Case, row: str, benchmark: Any, record: Any, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """One row: parity, the ratio in turn with eager, and pytest-benchmark's own rounds."""
    benchmark.group = f"{case.op} {case}"

    def rounds(step: Callable[[], Any]) -> None:
        def synchronised() -> None:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(synchronised, rounds=15, warmup_rounds=3)

    ours = row.startswith("dlkern")
    result = Result("op", case.op, str(case), row, case.facts, "eager", target=case.target if ours else None)
    try:
        ops.measured(cases.Problem(case, device), row, request.config.getoption("--min-seconds"), result, rounds)
    except Unsupported as error:
        pytest.skip(str(error))
    facts: dict[str, Any] = {"target": result.target, **({"backend": result.backend} if row == "dlkern" else {})}
    if result.comparison is not None:
        facts = {"ratio": result.ratio, **facts}
    for name, sizes in (("kept_for_backward_mb", result.kept), ("peak_mb", result.peak)):
        if sizes:
            facts[name] = {row: round(size / 1e6, 2) for row, size in sizes.items()}
    record({**case.facts, "row": row}, result.comparison, facts)
