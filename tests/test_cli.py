"""The ``dlkern`` command as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dlkern
from dlkern import cli, info, models

TINY = """
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))

def tiny():
    return Tiny()

instance = nn.Linear(1, 1)
text = "no model"

def wrong():
    return 3

def raises():
    raise KeyError("planned")
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny_model.py"
    path.write_text(TINY)
    return path


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dlkern", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("command", [[], ["info"], ["explain"], ["demo"]], ids=lambda c: c[0] if c else "dlkern")
def test_help_has_an_example(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {' '.join(['dlkern', *command])}")
    assert "example: dlkern " in done.stdout
    for name in ("info", "explain", "demo") if not command else ():
        assert f"    {name} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["demo", "--epochs", "0"], "expected a whole number of at least 1, got 0"),
        (["demo", "--epochs", "x"], "expected a whole number of at least 1, got x"),
        (["bench", "--min-seconds", "soon"], "expected seconds, 0 or more, got soon"),
        (["demo", "--samples", "many"], "expected a whole number of at least 1, got many"),
        (["explain"], "required: MODEL"),
    ],
)
def test_wrong_use_is_2(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_version() -> None:
    assert run("--version").stdout == f"dlkern {dlkern.__version__}\n"


def test_info_json_tells_what_is_here() -> None:
    done = run("info", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["versions"]["dlkern"] == dlkern.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["cores"] >= 1
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert set(facts["backends"]) == {"torch", "reference", "cpu", "triton", "cuda", "numba"}
    assert facts["backends"]["torch"] is None
    built = facts["extension"]
    if facts["backends"]["cpu"] is None:
        assert {"compiler", "cpu_isa_compiled", "cpu_isa_active", "cuda_architectures", "file"} <= set(built)
    else:
        assert built["missing"]
        assert "C++17 compiler" in built["remedy"]


def test_info_prints_each_backend_and_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out.splitlines()
    titles = ["versions", "devices", "backends", "extension"]
    assert [line for line in printed if line in titles] == titles
    section = printed[printed.index("backends") + 1 : printed.index("extension")]
    expected = dlkern.available_backends()
    assert [line.split()[0] for line in section] == list(expected)
    for line, reason in zip(section, expected.values(), strict=True):
        assert line.endswith(" available" if reason is None else f" no: {reason}")


def test_info_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dlkern._C", None)  # what import sees where the file is missing
    monkeypatch.delattr(dlkern, "_C", raising=False)
    facts = info.gather()
    assert facts["extension"]["missing"]
    assert "pip install" in info.render(facts)


def test_explain_a_model_of_a_file(tiny: Path) -> None:
    done = run("explain", f"{tiny}:tiny")
    assert done.returncode == 0, done.stderr
    assert "bn" in done.stdout


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet50", "expected torchvision:NAME"),
        ("torchvision:resnet51", "torchvision has no model 'resnet51'; did you mean"),
        ("timm:repvgg_a99", "timm has no model 'repvgg_a99'; did you mean"),
        ("no_such_package.models:build", "no_such_package.models does not import"),
        ("missing.py:build", "there is no file"),
        ("{tiny}:absent", "has no 'absent'"),
        ("{tiny}:text", "expected a function or an nn.Module, got str"),
        ("{tiny}:wrong", "wrong() returned int, expected an nn.Module"),
        ("{tiny}:raises", "raises() raised KeyError: 'planned'"),
    ],
)
def test_explain_a_model_that_is_none(spec: str, message: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if spec.startswith("torchvision"):
        pytest.importorskip("torchvision")
    if spec.startswith("timm"):
        pytest.importorskip("timm")
    assert cli.main(["explain", spec.format(tiny=tiny)]) == 2
    assert message in capsys.readouterr().err


def test_explain_of_an_unknown_model_exits_2() -> None:
    done = run("explain", "nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("dlkern: MODEL 'nonsense': expected torchvision:NAME")
    assert "Traceback" not in done.stderr


def test_models_come_as_functions_classes_and_instances(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(models.build(f"{tiny}:tiny")).__name__ == "Tiny"
    assert type(models.build(f"{tiny}:Tiny")).__name__ == "Tiny"
    assert isinstance(models.build(f"{tiny}:instance"), torch.nn.Linear)
    monkeypatch.chdir(tiny.parent)
    path = list(sys.path)
    assert type(models.build("tiny_model:tiny")).__name__ == "Tiny"
    assert sys.path == path


def test_models_of_torchvision_and_timm_download_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    assert sum(p.numel() for p in models.build("torchvision:resnet18").parameters()) == 11_689_512
    assert models.build("torchvision:deeplabv3_resnet50") is not None
    assert models.build("timm:repvgg_a0") is not None


def test_python_m_dlkern_in_the_clones_root() -> None:
    root = Path(__file__).resolve().parents[1]
    done = run("info", "--json", cwd=root)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["package"] == str(root / "dlkern")
