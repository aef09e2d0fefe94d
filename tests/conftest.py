"""Shared set-up: where there is no GPU, Triton kernels run in its interpreter and numba's in its simulator."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing has done yet
if not HAS_CUDA:
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # read when numba is imported
os.environ["DLKERN_TABLES"] = "0"  # nothing that was measured elsewhere: tests choose for themselves

import evidence  # noqa: E402
from hypothesis import settings  # noqa: E402
from measured_cases import SHORT  # noqa: E402

from dlkern.bench import provenance  # noqa: E402
from dlkern.tuning import answers, cache, policy  # noqa: E402

#: More random cases than the tests ask for, as on a machine that is borrowed to find what others do not.
EXAMPLES_TIMES = int(os.environ.get("DLKERN_EXAMPLES_TIMES", "1"))

settings.register_profile("dlkern", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("dlkern")

#: Tensors in a parametrization, whose values stand in test ids, are the same in every process of pytest-xdist.
torch.manual_seed(0)

_NO_DEVICE = "no CUDA device"


@pytest.fixture
def own_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A tuning cache of its own, no measured answers from elsewhere, and none left behind."""
    monkeypatch.delenv("DLKERN_BACKEND", raising=False)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    answers.clear()
    yield
    answers.clear()
    assert answers.epoch == 0


@pytest.fixture
def short_races(own_answers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured swaps are done as soon as may be."""
    monkeypatch.setitem(policy.measured_swap.__kwdefaults__, "effort", SHORT)
    monkeypatch.setattr(policy, "_STEP_SECONDS", 0.0)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dlkern")
    group.addoption("--evidence", metavar="FILE", help="write what the tests have shown of each op (tests/evidence.py)")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--evidence")
    if path is None or not evidence.rows():
        return
    if exitstatus != pytest.ExitCode.OK:
        print(f"\n{path} is not written: not every test was green")
        return
    evidence.write(Path(path), provenance.gather())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # files with slow tests first: at the end of a run on several processes one of them alone would be left with them
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason=_NO_DEVICE))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # from the reports, which workers of pytest-xdist send as well
    skipped = terminalreporter.stats.get("skipped", [])
    left_out = [r.nodeid for r in skipped if r.longrepr and r.longrepr[-1] == f"Skipped: {_NO_DEVICE}"]
    if left_out:
        terminalreporter.section(f"left out: {_NO_DEVICE}")
        terminalreporter.write_line(f"{len(left_out)} tests need a GPU:")
        for name in left_out:
            terminalreporter.write_line(f"  {name}")
