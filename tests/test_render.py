"""Provenance of results files, and ``python -m benchmarks.render``, which refuses figures without it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from dlkern import cli
from dlkern.bench import measure, provenance
from dlkern.bench.cases import conv_bn_act

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def test_commit_of_a_clone_and_of_no_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", *identity, "-C", str(tmp_path), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    monkeypatch.delenv(provenance.COMMIT_VARIABLE, raising=False)
    inside = tmp_path / "installed"
    inside.mkdir()
    (tmp_path / "file").write_text("a")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert provenance.commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert provenance.commit(tmp_path) == git("rev-parse", "HEAD") + " with uncommitted changes"
    assert provenance.commit(inside) is None  # in somebody's repository, but not a clone itself
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "abc123")
    assert provenance.commit(inside) == "abc123"


def complete() -> dict[str, Any]:
    """A results file with one row."""
    comparison = measure.compare({"plain": int, "swapped": int, "plain again": int}, max_rounds=2, min_seconds=0.0)
    row = {
        "model": "torchvision:resnet18",
        "batch": 2,
        "image_size": 32,
        "format": "nchw",
        "ratio": 1.5,
        "kept_for_backward_mb": {"plain": 3.0, "swapped": 2.0},
        "sites": {"swapped": 17, "skipped": 0},
        "measured": comparison.as_dict(),
    }
    return {"benchmark": "models", **provenance.gather("cpu"), "commit": "0123456789abcdef", "rows": [row]}


@pytest.fixture
def render(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import render as module

    return module


def test_render_makes_tables_and_pictures(render: Any, tmp_path: Path) -> None:
    source, page = tmp_path / "models.json", tmp_path / "README.md"
    source.write_text(json.dumps(complete()))
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert render.main([str(source), "--write", str(page), "--plot", str(tmp_path / "pictures")]) == 0
    text = page.read_text()
    assert "old" not in text
    assert text.startswith(f"before\n{BEGIN}\n**models** on ")
    assert "commit 0123456789" in text
    assert "| torchvision:resnet18, training step | 2x3x32x32 | nchw |" in text
    assert "plain / plain again" in text
    assert text.endswith(f"{END}\nafter\n")
    (picture,) = (tmp_path / "pictures").iterdir()
    assert f"](pictures/{picture.name})" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_render_takes_what_bench_writes(
    render: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(provenance, "commit", lambda root: "0123456789abcdef")
    monkeypatch.setattr(conv_bn_act, "SHAPES", (conv_bn_act.Shape(4, 5, 6, 3, stride=2),))
    path = tmp_path / "suite.json"
    arguments = ["--op", "conv_bn_act", "--device", "cpu", "--min-seconds", "0", "--batch", "2", "--json", str(path)]
    assert cli.main(["bench", *arguments]) == 0
    capsys.readouterr()
    assert render.main([str(path)]) == 0
    assert "| conv_bn_act | 2x4x5x5-to-6-k3s2-nchw-training-float32 | dlkern |" in capsys.readouterr().out


def test_render_of_the_results_in_the_repository(render: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert render.main([]) == 0
    files = [
        path for path in ROOT.glob("benchmarks/results/*/*") if path.name != "support.json"
    ]  # see benchmarks.support
    assert capsys.readouterr().out.count("File: `benchmarks/results/") == len(files)


@pytest.mark.parametrize(
    ("path", "value", "lacks"),
    [
        (("commit",), None, "commit"),
        (("commit",), "unknown with uncommitted changes", "commit"),
        (("date",), "", "date"),
        (("device",), None, "device"),
        (("versions",), None, "versions.dlkern, versions.torch"),
        (("versions", "torch"), None, "versions.torch"),
        (("rows",), None, "rows"),
        (("rows", 0, "measured"), None, "rows[0].measured"),
        (("rows", 0, "measured", "rounds"), None, "rows[0].measured.rounds"),
        (("rows", 0, "measured", "device"), None, "rows[0].measured.device"),
    ],
)
def test_render_refuses_figures_without_provenance(
    path: tuple[Any, ...],
    value: Any,
    lacks: str,
    render: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    facts = complete()
    assert provenance.missing(facts) == []
    inner: Any = facts
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    source, page = tmp_path / "models.json", tmp_path / "README.md"
    source.write_text(json.dumps(facts))
    before = f"{BEGIN}\nold\n{END}\n"
    page.write_text(before)
    assert render.main([str(source), "--write", str(page)]) == 2
    printed = capsys.readouterr().err
    assert f"{source}: refused" in printed
    assert lacks in printed
    assert page.read_text() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [("no json", "Expecting value"), ("[]", "expected a JSON object, got list"), (None, "No such file")],
)
def test_render_refuses_what_is_no_results_file(
    content: str | None, message: str, render: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "x.json"
    if content is not None:
        source.write_text(content)
    assert render.main([str(source)]) == 2
    assert message in capsys.readouterr().err
    source.write_text(json.dumps({**complete(), "benchmark": "nonsense"}))
    assert render.main([str(source)]) == 2
    assert "unknown benchmark 'nonsense'; expected one of" in capsys.readouterr().err
