"""benchmarks/run_gpu.sh (its stages' CPU forms are run by CI) and ``python -m benchmarks.support``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import evidence
import pytest
import torch

from dlkern.bench import provenance

ROOT = Path(__file__).resolve().parents[1]


def _run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "benchmarks" / "run_gpu.sh"), *map(str, arguments)]
    variables = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_usage_and_unknown_stages(tmp_path: Path) -> None:
    without = _run()
    assert without.returncode == 2
    assert "run_gpu.sh [--dry-run] OUT [STAGE...]" in without.stderr
    unknown = _run("--dry-run", tmp_path, "install", "polish")
    assert unknown.returncode == 2
    assert "unknown stage polish; expected some of: install info" in unknown.stderr
    assert not (tmp_path / "summary.txt").exists()


def test_a_stage_is_packed_and_not_run_again(tmp_path: Path) -> None:
    first = _run("--dry-run", tmp_path, "install")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "install: ok" in (tmp_path / "summary.txt").read_text()
    with tarfile.open(tmp_path / "evidence.tar.gz") as pack:
        assert {"./install.log", "./install.done"} <= set(pack.getnames())
    again = _run("--dry-run", tmp_path, "install")
    assert again.returncode == 0
    assert "install: done before" in again.stdout


def test_a_failing_stage_is_said_and_the_next_one_runs(tmp_path: Path) -> None:
    broken = _run("--dry-run", tmp_path, "memcheck", "install", PYTEST_ADDOPTS="--no-such-option")
    assert broken.returncode == 1
    assert "memcheck: FAILED" in broken.stdout
    assert "install: ok" in broken.stdout
    assert "1 of 2 stages ok" in broken.stdout
    assert not (tmp_path / "work" / "memcheck.done").exists()


def test_a_stage_ends_at_its_limit(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    late = _run("--dry-run", tmp_path, "install", PYTHON=str(slow), STAGE_SECONDS="1")
    assert late.returncode == 1
    assert "install: FAILED" in late.stdout
    assert "the stage's limit is over" in (tmp_path / "work" / "install.log").read_text()


# ------------------------------------------------------------------------------------- support
@pytest.fixture
def support(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import support as module

    return module


def _file(path: Path, how: str, results: int, **facts: Any) -> Path:
    row = {"op": "an_op", "backend": "triton", "dtype": "float32", "how": how, "results": results}
    about = {"benchmark": "support", **provenance.gather("cpu"), "commit": "0123456789", "rows": [row], **facts}
    path.write_text(json.dumps(about))
    return path


def test_files_of_one_run_add_up(support: Any, tmp_path: Path) -> None:
    files = [_file(tmp_path / "a.json", "gpu", 3), _file(tmp_path / "b.json", "gpu", 4),
             _file(tmp_path / "c.json", "sanitized", 5, sanitizer="memcheck")]  # fmt: skip
    merged = tmp_path / "support.json"
    assert support.main([*map(str, files), "--merge", str(merged)]) == 0
    found = json.loads(merged.read_text())
    assert [(row["how"], row["results"]) for row in found["rows"]] == [("gpu", 7), ("sanitized", 5)]
    assert found["sanitizer"] == ["memcheck"]


def test_the_table_is_put_between_its_marks(support: Any, tmp_path: Path) -> None:
    source, page = _file(tmp_path / "support.json", "interpreted", 3), tmp_path / "README.md"
    page.write_text("before\n<!-- support: begin -->\nold\n<!-- support: end -->\nafter\n")
    assert support.main([str(source), "--write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- support: begin -->\n| op |")
    assert "old" not in text
    (line,) = [line for line in text.splitlines() if "an_op" in line]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:4] == ["`an_op`", "triton", "float32", "no"]
    assert cells[4].startswith("3 (")
    assert cells[5:] == ["no", "no", "no"]


@pytest.mark.parametrize(
    ("facts", "message"),
    [({"commit": None}, "no commit"), ({"benchmark": "models"}, "expected what pytest --evidence writes")],
)
def test_evidence_without_provenance_is_refused(
    support: Any, facts: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert support.main([str(_file(tmp_path / "a.json", "gpu", 1, **facts))]) == 2
    assert message in capsys.readouterr().err


def test_files_of_two_commits_are_not_merged(support: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [_file(tmp_path / "a.json", "gpu", 1), _file(tmp_path / "b.json", "gpu", 1, commit="fedcba9876")]
    assert support.main([*map(str, files), "--merge", str(tmp_path / "m.json")]) == 2
    assert "more than one commit" in capsys.readouterr().err


def test_evidence_is_recorded_by_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "_seen", type(evidence._seen)())
    monkeypatch.setenv(evidence.SANITIZER_VARIABLE, "memcheck")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    evidence.record("an_op", "triton", torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    evidence.record("an_op", "triton", torch.float32)
    evidence.record("an_op", "cpu", torch.float32)
    assert [(row["backend"], row["how"]) for row in evidence.rows()] == [
        ("cpu", "host-run"),
        ("triton", "gpu"),
        ("triton", "interpreted"),
        ("triton", "sanitized"),
    ]
    with pytest.raises(ValueError, match="unknown way 'guessed'"):
        evidence.record("an_op", "triton", torch.float32, "guessed")
