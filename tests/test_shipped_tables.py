"""Tables of measured answers that come with dlkern: for which devices they hold, and what they yield to."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dlkern
from dlkern import dispatch
from dlkern.tuning import answers, cache, command, race
from dlkern.tuning.answers import Answer, Key

KEY = Key("batch_norm_act", "device=cpu", (2, 3))
ANSWER = Answer("cpu", 1.43, 1.4, 1.5, 0.00125, "cpu")
COMMITTED = sorted(cache.TABLES.glob("*.json"))

pytestmark = pytest.mark.usefixtures("short_races")


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(cache, "TABLES", folder)
    monkeypatch.delenv(cache.TABLES_VARIABLE)
    return folder


def _table(folder: Path, **changes: Any) -> Path:
    """A table with what this device's cache holds, which is emptied."""
    (own,) = cache.files()
    document = json.loads(own.read_text())
    document["versions"] |= changes.pop("versions", {})
    path = folder / f"{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(document | changes))
    return path


def test_an_answer_says_where_it_comes_from(tables: Path) -> None:
    cache.store("cpu", [(KEY, ANSWER)])
    _table(tables)
    cache.clear()
    assert cache.load("cpu") == []
    assert cache.shipped("cpu") == [(KEY, ANSWER._replace(shipped=True))]
    assert cache.shipped("cpu")[0][1].in_words() == "measured on a like device: 1.43x PyTorch"
    text = cache.show()
    assert "nothing is remembered" in text
    assert "came with dlkern, for what was not measured here" in text


@pytest.mark.parametrize(
    ("versions", "changes", "holds"),
    [
        ({"dlkern": "0.0.1", "cuda driver": "1.2"}, {}, True),
        ({"torch": f"{'.'.join(torch.__version__.split('.')[:2])}.99+cu999"}, {}, True),
        ({"torch": "1.13.0"}, {}, False),
        ({"triton": "1.0.0"}, {}, False),
        ({}, {"device": "another"}, False),
        ({}, {"threads": 99}, False),
    ],
    ids=str,
)
def test_for_which_processes_a_table_holds(
    versions: dict[str, str], changes: dict[str, Any], holds: bool, tables: Path
) -> None:
    cache.store("cpu", [(KEY, ANSWER)])
    _table(tables, versions=versions, **changes)
    assert [key for key, _ in cache.shipped("cpu")] == [KEY] * holds


def test_tables_can_be_left_out(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store("cpu", [(KEY, ANSWER)])
    _table(tables)
    with cache.measuring():
        assert cache.shipped("cpu") == []
    assert cache.shipped("cpu")
    monkeypatch.setenv(cache.TABLES_VARIABLE, "0")
    assert cache.shipped("cpu") == []


@pytest.mark.parametrize(
    ("damage", "why"),
    [({"schema": 99}, "its schema is 99"), ({"device": None}, "it does not say of which device and versions it is")],
    ids=str,
)
def test_a_damaged_table_is_left_out(damage: dict[str, Any], why: str, tables: Path) -> None:
    cache.store("cpu", [(KEY, ANSWER)])
    _table(tables)
    damaged = _table(tables, **damage)
    with pytest.warns(UserWarning, match=f"the table {damaged} is not used, since {why}"):
        assert [key for key, _ in cache.shipped("cpu")] == [KEY]
    assert damaged.exists()


def _model() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()), torch.randn(2, 3, 9, 9)


def _raced(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    seen: list[bool] = []
    real = race.race

    def spy(*args: Any, **kwargs: Any) -> race.Outcome:
        outcome = real(*args, **kwargs)
        seen.append(outcome.raced)
        return outcome

    monkeypatch.setattr(race, "race", spy)
    return seen


def test_a_measured_swap_takes_what_was_shipped_and_its_own_first(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _model()
    dlkern.swap(model, sample=x, policy="measured")
    own = cache.load("cpu")
    assert own
    _table(tables)
    raced = _raced(monkeypatch)

    answers.clear()
    cache.clear()
    model, x = _model()
    dlkern.swap(model, sample=x, policy="measured")
    assert raced
    assert not any(raced)
    assert cache.load("cpu") == []  # nothing was measured
    assert all(answer.shipped for _, answer in answers.everything())

    answers.clear()
    key, answer = own[0]
    cache.store("cpu", [(key, answer)])
    model, x = _model()
    dlkern.swap(model, sample=x, policy="measured")
    found = answers.exact(key)
    assert found is not None
    assert not found.shipped


def test_tune_measures_in_spite_of_a_table(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"batch": 1, "image_size": 16, "dtype": "float32", "any_format": False}
    raced = _raced(monkeypatch)
    for _ in range(2):
        raced.clear()
        command.model("tests_shipped:model", training=False, device=torch.device("cpu"), **options)
        assert any(raced)
        _table(tables)
        cache.clear()
        answers.clear()


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tests_shipped.py").write_text(
        "from torch import nn\n"
        "def model():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_there_is_a_table() -> None:
    assert COMMITTED


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_committed_tables_are_of_todays_requests(path: Path) -> None:
    """A table that no request can match any more would be dead weight: measure it again."""
    document = json.loads(path.read_text())
    assert cache.problem(document) is None
    ops = dispatch._all_ops()
    for row in document["answers"]:
        op = ops[row["op"]]
        assert row["backend"] in op.modules
        request = importlib.import_module(op.modules["reference"]).Request
        names = [pair.partition("=")[0] for pair in row["request"].split(" ")]
        assert names == [name for name in request._fields if name not in op.sizes], row
        assert not row["wrong"], row
