"""The tuning cache's file: many writers, killed writers, damage, foreign files, folders that cannot be written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dlkern import info
from dlkern.tuning import cache
from dlkern.tuning.answers import Answer, Key

KEY = Key("batch_norm_act", "device=cpu dtype=float32", (2, 3, 4, 4, 1))
ANSWER = Answer("cpu", 1.43, 1.4, 1.5, 0.00125, "cpu", (("triton", "output 0: wrong"),))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def _store() -> Path:
    path = cache.store("cpu", [(KEY, ANSWER)])
    assert path is not None
    return path


def test_what_is_stored_is_loaded() -> None:
    path = _store()
    assert cache.load("cpu") == [(KEY, ANSWER)]
    assert path.suffix == ".json"
    assert f"dlkern-{info.versions()['dlkern']}" in path.name


def test_the_file_has_the_documented_form() -> None:
    document = json.loads(_store().read_text())
    assert list(document) == ["format", "schema", "device", "threads", "versions", "answers"]
    assert document["schema"] == 1
    assert document["threads"] == torch.get_num_threads()
    assert list(document["versions"]) == ["dlkern", "torch", "triton", "cuda driver"]
    (row,) = document["answers"]
    date = row.pop("date")
    assert len(date) == len("2026-01-31")
    assert row == {
        "op": "batch_norm_act",
        "request": "device=cpu dtype=float32",
        "shape": [2, 3, 4, 4, 1],
        "backend": "cpu",
        "ratio": 1.43,
        "p20": 1.4,
        "p80": 1.5,
        "pytorch_ms": 1.25,
        "rival": "cpu",
        "wrong": {"triton": "output 0: wrong"},
    }
    assert cache.problem(document) is not None  # the date is gone
    row["date"] = date
    assert cache.problem(document) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "something else"}, "not a dlkern tuning cache"),
        ({"schema": 2}, "schema is 2"),
        ({"device": "another machine"}, "another machine"),
        ({"versions": {}}, "expected"),
        ({"answers": {}}, "no list of answers"),
        ({"answers": [{}]}, r"answers\[0\]: op"),
        ({"answers": [3]}, "expected an object"),
    ],
)
def test_a_foreign_file_is_set_aside(change: dict[str, Any], words: str) -> None:
    path = _store()
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.warns(UserWarning, match=words):
        assert cache.load("cpu") == []
    assert not path.exists()
    assert path.with_name(f"{path.name}.corrupt").exists()
    assert cache.load("cpu") == []  # quietly now


@pytest.mark.parametrize(
    ("field", "value"),
    [("backend", "magic"), ("shape", [1.5]), ("shape", "2x3"), ("ratio", -1), ("ratio", "fast"), ("wrong", [])],
)
def test_a_row_of_another_form_is_not_believed(field: str, value: Any) -> None:
    document = json.loads(_store().read_text())
    document["answers"][0][field] = value
    assert field in str(cache.problem(document))


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe\x00", b'{"format": "dlkern tuning cache"'])
def test_a_damaged_file_is_set_aside_and_written_anew(damage: bytes) -> None:
    path = _store()
    path.write_bytes(damage)
    with pytest.warns(UserWarning, match="is not used"):
        assert cache.store("cpu", [(KEY, ANSWER)]) == path
    assert cache.load("cpu") == [(KEY, ANSWER)]
    assert path.with_name(f"{path.name}.corrupt").read_bytes() == damage


def test_other_versions_and_threads_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _store()
    real = info.versions()
    for name in ("dlkern", "torch", "triton", "cuda driver"):
        with monkeypatch.context() as patch:
            patch.setattr(info, "versions", lambda name=name: {**real, name: "99.9"})
            assert cache.load("cpu") == []
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert cache.load("cpu") == []
    finally:
        torch.set_num_threads(threads)
    assert cache.load("cpu") == [(KEY, ANSWER)]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")  # root may write anywhere, but not below a file
    monkeypatch.setenv(cache.VARIABLE, str(blocked / "cache"))
    with pytest.warns(UserWarning, match=r"cannot be written.*lasts as long as this process"):
        assert cache.store("cpu", [(KEY, ANSWER)]) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cache.load("cpu") == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write to a read-only folder")
def test_a_read_only_folder_is_a_warning(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o500)
    with pytest.warns(UserWarning, match="cannot be written"):
        assert cache.store("cpu", [(KEY, ANSWER)]) is None


def test_a_write_that_fails_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = _store()
    before = path.read_text()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert cache.store("cpu", [(KEY._replace(shape=(1,)), ANSWER)]) is None
    assert path.read_text() == before
    assert list(path.parent.glob(".*.tmp")) == []


_WRITER = """
import sys
from dlkern.tuning import cache
from dlkern.tuning.answers import Answer, Key
number, count = int(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for index in range(count):
    assert cache.store("cpu", [(Key("depthwise", f"writer={number}", (index, 1)), Answer("cpu", 1.5))])
"""


def _writer(number: int, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(number), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def _start(*writers: subprocess.Popen[str]) -> None:
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()


def test_eight_writers_at_once_lose_nothing() -> None:
    writers = [_writer(number, 10) for number in range(8)]
    _start(*writers)
    seen = 0
    while any(writer.poll() is None for writer in writers):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a reader never sees half a file
            count = len(cache.load("cpu"))
        assert count >= seen
        seen = count
    assert [writer.wait() for writer in writers] == [0] * 8
    found = {(key.request, key.shape[0]) for key, _ in cache.load("cpu")}
    assert found == {(f"writer={number}", index) for number in range(8) for index in range(10)}


def test_a_killed_writer_leaves_no_damage(folder: Path) -> None:
    for number in range(3):
        writer = _writer(number, 100_000)
        _start(writer)
        time.sleep(0.05 + 0.03 * number)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = len(cache.load("cpu"))
        begun = time.monotonic()
        _store()  # its lock went with it
        assert time.monotonic() - begun < 5
        assert len(cache.load("cpu")) == before + 1
    assert before >= 1
    assert list(folder.glob(".*.tmp")) == []


def test_show_and_clear(folder: Path) -> None:
    assert "nothing is remembered" in cache.show()
    path = _store()
    text = cache.show()
    assert "1 answers" in text
    assert "batch_norm_act 2x3x4x4x1: cpu (measured: 1.43x PyTorch)" in text
    assert "wrong here: triton" in text
    (folder / "other.json").write_text("{}")
    assert "other.json: not readable" in cache.show()
    assert cache.clear() == 2
    assert not path.exists()


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    if os.name != "nt":
        assert cache.folder() == Path("/somewhere/dlkern")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache.folder() == Path.home() / ".cache" / "dlkern"
