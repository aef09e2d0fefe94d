"""dlkern tune, cache, doctor and explain --measured, and what the doctor says of a broken backend."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import TINY

from dlkern import cli, dispatch, doctor
from dlkern.bench import cases
from dlkern.tuning import cache, policy, progress


@pytest.fixture(autouse=True)
def _alone(own_answers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "_STEP_SECONDS", 0.0)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny_model.py"
    path.write_text(TINY.replace("self.relu(self.bn(self.conv(x)))", "self.relu(self.bn(self.conv(x))).mean((2, 3))"))
    return f"{path}:tiny"


@pytest.mark.parametrize("command", [["tune"], ["explain", "--measured"]])
def test_a_model_is_measured_and_remembered(tiny: str, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--infer", "--batch", "2", "--image-size", "12", "--device", "cpu"]
    assert cli.main([command[0], tiny, *command[1:], *options]) == 0
    out = capsys.readouterr().out
    assert "measured: " in out
    assert "PyTorch" in out
    assert "To change a choice:" in out
    assert "remembered in " in out
    assert cli.main(["cache", "show"]) == 0
    assert "conv_bn_act" in capsys.readouterr().out
    assert cli.main(["cache", "clear"]) == 0
    assert "1 file removed" in capsys.readouterr().out
    assert cache.files() == []


@pytest.mark.parametrize("arguments", [["tune"], ["tune", "a:b", "--suite"], ["tune", "nothing"]])
def test_tune_asked_for_wrongly(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert "expected" in capsys.readouterr().err


def test_explain_says_how_to_change_a_choice(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", tiny]) == 0
    out = capsys.readouterr().out
    assert 'dlkern.swap(model, sample=batch, policy="measured")' in out
    assert "DLKERN_BACKEND=" in out


def test_the_doctor_finds_every_op_of_the_cpu_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--backend", "cpu"]) == 0
    out = capsys.readouterr().out
    for op in dispatch.operations():
        if "cpu" in dispatch.operation(op).modules:
            assert f"cpu {op} " in out, op
    assert "broken" not in out
    assert "every backend that is available gives right numbers" in out


def test_every_op_has_a_small_case() -> None:
    assert set(dispatch.operations()) <= {*cases.OPS, *doctor._CALLS}


@pytest.mark.parametrize("op", ["depthwise", "gru"])
def test_the_doctor_finds_a_broken_backend(
    op: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = dispatch.implementation(op, "cpu")
    original = module.forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        first = found[0] + 0.01
        return found._replace(output=first) if hasattr(found, "_replace") else (first, *found[1:])

    monkeypatch.setattr(module, "forward", wrong)
    assert cli.main(["doctor", "--backend", "cpu"]) == 1
    out = capsys.readouterr().out
    assert f"cpu {op}" in out
    assert "broken" in out
    assert "relative L2 error" in out
    assert "cpu is broken here: build the extension" in out
    assert "DLKERN_BACKEND=torch" in out


def test_the_doctor_refuses_a_backend_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--backend", "magic"]) == 2
    assert "expected one of" in capsys.readouterr().err


def test_a_backend_that_is_not_there_is_said_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "unavailable", lambda name: None if name == "torch" else "not here")
    found = list(doctor.examine(torch.device("cpu")))
    assert {f.state for f in found} == {"not run"}
    assert "right numbers" in doctor.render(found)


@pytest.mark.parametrize("rich", [True, False])
def test_progress_on_a_terminal(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if rich:
        pytest.importorskip("rich")
    else:
        for name in ("rich", "rich.console", "rich.progress"):
            monkeypatch.setitem(sys.modules, name, None)
    with progress.bar(True) as say:
        say(1, 2, "batch_norm_act [4x8]")
    assert rich or "[1/2] batch_norm_act [4x8]" in capsys.readouterr().err


def test_no_progress_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar() as say:
        say(1, 2, "batch_norm_act")
    assert capsys.readouterr().err == ""
