"""Set-up of the benchmarks: what counts as one, their options, and the results file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dlkern import info
from dlkern.bench import measure, provenance

HERE = Path(__file__).resolve().parent

_rows: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dlkern benchmarks")
    group.addoption("--results", action="store_true", help="write benchmarks/results/<device>/<benchmark>.json")
    group.addoption("--results-dir", metavar="DIR", help="write DIR/<device>/<benchmark>.json instead")
    group.addoption("--min-seconds", type=float, default=1.0, help="least time of one comparison (default 1)")
    group.addoption("--results-suffix", default="", metavar="TEXT", help="end of the file's name, before .json")
    group.addoption("--model", action="append", help="a model of bench_models.py (default torchvision:resnet50)")
    group.addoption("--dtype", default="float32", help="of bench_models.py; half types by autocast (default float32)")
    group.addoption("--batch", type=int, default=8, help="batch of bench_models.py (default 8)")
    group.addoption("--image-size", type=int, default=128, help="image size of bench_models.py (default 128)")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect bench_*.py here, so that ``pytest benchmarks`` runs them and ``pytest`` alone does not."""
    wanted = file_path.suffix == ".py" and file_path.name.startswith("bench_")
    if not wanted or parent.session.isinitpath(file_path):  # named on the command line: pytest has it already
        return None
    return pytest.Module.from_parent(parent, path=file_path)


def pytest_report_header() -> list[str]:
    lines = [f"device: {provenance.device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"]
    built = info.extension()
    if "missing" in built:
        where = Path(info.__file__).parent
        lines.append(f"WARNING: dlkern in {where} has no extension, and no CPU kernel of its own: {built['missing']}")
    missing = measure.missing_stability()
    if missing and not torch.cuda.is_available():
        wanted = " ".join(f"{name}={measure.stable_environment()[name]}" for name in missing)
        lines.append(f"WARNING: CPU timings will scatter; start again with: {wanted} pytest benchmarks")
    return lines


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def record(
    request: pytest.FixtureRequest, benchmark: Any, device: torch.device
) -> Callable[[dict[str, Any], measure.Comparison | None, dict[str, Any]], None]:
    """record(case, comparison, facts): into pytest-benchmark's extra_info and the results file."""

    def add(case: dict[str, Any], comparison: measure.Comparison | None, facts: dict[str, Any]) -> None:
        row = {**case, **facts, **({} if comparison is None else {"measured": comparison.as_dict()})}
        _rows.append({"benchmark": request.path.stem.removeprefix("bench_"), **row})
        machine = {"device": provenance.device_name(), "threads": torch.get_num_threads(), "versions": info.versions()}
        benchmark.extra_info.update({**row, **machine})

    return add


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With --results: one file per benchmark that ran, and only where every row was green."""
    into = session.config.getoption("--results-dir")
    if not (into or session.config.getoption("--results")) or not _rows:
        return
    if exitstatus != pytest.ExitCode.OK:
        print("\nno results file is written: not every row was green")
        return
    about = provenance.gather()
    folder = Path(into or HERE / "results").resolve() / provenance.folder_name(about["device"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(row["benchmark"] for row in _rows):
        rows = [{k: v for k, v in row.items() if k != "benchmark"} for row in _rows if row["benchmark"] == name]
        path = folder / f"{name}{session.config.getoption('--results-suffix')}.json"
        path.write_text(json.dumps({"benchmark": name, **about, "rows": rows}, indent=1) + "\n")
        print(f"\nresults: {path.relative_to(HERE.parent) if path.is_relative_to(HERE.parent) else path}")
