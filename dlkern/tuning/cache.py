"""The tuning cache: measured answers in a readable JSON file, one per device and set of versions.

Right with many writers on one host: a writer locks, reads what the others wrote, merges, and replaces the file in one
step, so that a reader sees the old file or the new one, and a writer that is killed leaves the old one.

Files of this format that came with dlkern (``TABLES``) hold for devices of the same name.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from dlkern import dispatch, info

from .answers import Answer, Key

try:
    import fcntl
except ImportError:  # Windows: the replacement is still one step, but of two writers at once the later one wins
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1
_FORMAT = "dlkern tuning cache"
#: Names a folder for the cache instead of the default one.
VARIABLE = "DLKERN_CACHE_DIR"
#: "0" leaves out the tables that came with dlkern.
TABLES_VARIABLE = "DLKERN_TABLES"
#: Answers measured by ``dlkern tune --suite``, a file each for a device and versions.
TABLES = Path(__file__).with_name("shipped")
_VERSIONS = ("dlkern", "torch", "triton", "cuda driver")


def folder() -> Path:
    """DLKERN_CACHE_DIR, else dlkern in XDG_CACHE_HOME (Windows: LOCALAPPDATA), else ~/.cache/dlkern."""
    own = os.environ.get(VARIABLE)
    if own:
        return Path(own).expanduser()
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return Path(base or "~/.cache").expanduser() / "dlkern"


def identity(device_type: str) -> dict[str, Any]:
    """What an answer holds for: device, threads on a CPU, versions."""
    found = info.versions()
    name = torch.cuda.get_device_name() if device_type == "cuda" else info.cpu()["model"]
    return {
        "device": name,
        "threads": torch.get_num_threads() if device_type == "cpu" else None,
        "versions": {n: found.get(n) for n in _VERSIONS},
    }


def path(about: dict[str, Any]) -> Path:
    """The file of an identity."""
    versions = about["versions"]
    words = [about["device"], f"{about['threads']} threads" if about["threads"] else ""]
    words += [f"{name} {versions[name]}" for name in _VERSIONS if versions[name]]
    text = "".join(c if c.isalnum() or c in ".+_" else "-" for c in "-".join(filter(None, words)).lower())
    while "--" in text:
        text = text.replace("--", "-")
    return folder() / f"{text[:200]}.json"


# ------------------------------------------------------------------------------------- reading
def load(device_type: str) -> list[tuple[Key, Answer]]:
    """The answers remembered for this device and these versions; none where there is no file.

    A file that is damaged or not this cache's is renamed to .corrupt, with a warning.
    """
    about = identity(device_type)
    return _read(path(about), about)


def _read(file: Path, about: dict[str, Any] | None) -> list[tuple[Key, Answer]]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, UnicodeDecodeError):
            return _set_aside(file, "it is not text")
        warnings.warn(f"dlkern: the tuning cache {file} cannot be read ({error}); measuring anew", stacklevel=3)
        return []
    try:
        document = json.loads(text)
    except ValueError as error:
        return _set_aside(file, f"it is not JSON ({error})")
    why = problem(document, about)
    if why is not None:
        return _set_aside(file, why)
    return [_entry(row) for row in document["answers"]]


def problem(document: Any, about: dict[str, Any] | None = None) -> str | None:
    """None for a document of this cache (and of this identity), else what is wrong with it, in words."""
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        return "it is not a dlkern tuning cache"
    if document.get("schema") != SCHEMA:
        return f"its schema is {document.get('schema')!r}, expected {SCHEMA}"
    own = {name: document.get(name) for name in ("device", "threads", "versions")}
    if about is not None and own != about:
        return f"it is of {own}, expected {about}"
    if not isinstance(own["device"], str) or not isinstance(own["versions"], dict):
        return "it does not say of which device and versions it is"
    rows = document.get("answers")
    if not isinstance(rows, list):
        return "it has no list of answers"
    for index, row in enumerate(rows):
        if (why := _row_problem(row)) is not None:
            return f"answers[{index}]: {why}"
    return None


def _looked_at(file: Path) -> tuple[dict[str, Any], str | None]:
    """A file's document, and what is wrong with it, in words; the file stays as it is."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, str(error)
    return document, problem(document)


def _row_problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"expected an object, got {type(row).__name__}"
    for name in ("op", "request", "backend", "date"):
        if not isinstance(row.get(name), str):
            return f"{name}: expected a string, got {row.get(name)!r}"
    if row["backend"] not in dispatch.BACKENDS:
        return f"backend: expected one of {', '.join(dispatch.BACKENDS)}, got {row['backend']!r}"
    shape = row.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int for n in shape):
        return f"shape: expected a list of whole numbers, got {shape!r}"
    for name in ("ratio", "p20", "p80", "pytorch_ms"):
        value = row.get(name)
        if value is not None and (type(value) not in (int, float) or not 0 < value < float("inf")):
            return f"{name}: expected a positive number or null, got {value!r}"
    if row.get("rival") is not None and not isinstance(row["rival"], str):
        return f"rival: expected a string or null, got {row['rival']!r}"
    wrong = row.get("wrong", {})
    if not isinstance(wrong, dict) or not all(isinstance(text, str) for text in wrong.values()):
        return f"wrong: expected an object of strings, got {wrong!r}"
    return None


def _entry(row: dict[str, Any]) -> tuple[Key, Answer]:
    milliseconds = row.get("pytorch_ms")
    seconds = None if milliseconds is None else milliseconds / 1e3
    figures = (row.get("ratio"), row.get("p20"), row.get("p80"), seconds)
    wrong = tuple(row.get("wrong", {}).items())
    return Key(row["op"], row["request"], tuple(row["shape"])), Answer(
        row["backend"], *figures, row.get("rival"), wrong
    )


def _row(key: Key, answer: Answer) -> dict[str, Any]:
    return {
        "op": key.op,
        "request": key.request,
        "shape": list(key.shape),
        "backend": answer.backend,
        "ratio": answer.ratio,
        "p20": answer.low,
        "p80": answer.high,
        "pytorch_ms": None if answer.seconds is None else float(f"{answer.seconds * 1e3:.6g}"),
        "rival": answer.rival,
        "wrong": dict(answer.wrong),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _set_aside(file: Path, why: str) -> list[tuple[Key, Answer]]:
    aside = file.with_name(f"{file.name}.corrupt")
    try:
        os.replace(file, aside)
        what = f"renamed to {aside.name}"
    except FileNotFoundError:
        return []  # another process did it
    except OSError as error:
        what = f"left where it is ({error})"
    warnings.warn(f"dlkern: the tuning cache {file} is not used, since {why}; {what}", stacklevel=4)
    return []


# ------------------------------------------------------------------------------------- shipped
_measuring = False


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """No table that came with dlkern counts inside: everything is measured here."""
    global _measuring
    before, _measuring = _measuring, True
    try:
        yield
    finally:
        _measuring = before


def shipped(device_type: str) -> list[tuple[Key, Answer]]:
    """The answers that came with dlkern for a device of this name, marked as such.

    They hold for the same number of threads and the same minor releases of torch and triton. None inside
    :func:`measuring`, or where DLKERN_TABLES is 0. A damaged table is left out, with a warning.
    """
    if _measuring or os.environ.get(TABLES_VARIABLE) == "0":
        return []
    own = _kind(identity(device_type))
    found: list[tuple[Key, Answer]] = []
    for file in sorted(TABLES.glob("*.json")):
        document, why = _looked_at(file)
        if why is not None:
            warnings.warn(f"dlkern: the table {file} is not used, since {why}", stacklevel=3)
        elif _kind(document) == own:
            found += [(key, answer._replace(shipped=True)) for key, answer in map(_entry, document["answers"])]
    return found


def _kind(about: dict[str, Any]) -> tuple[Any, ...]:
    """What a table that came with dlkern must have in common with this process."""
    versions = about["versions"]
    minor = (".".join((versions.get(name) or "").split("+")[0].split(".")[:2]) for name in ("torch", "triton"))
    return about["device"], about["threads"], *minor


# ------------------------------------------------------------------------------------- writing
def store(device_type: str, found: Iterable[tuple[Key, Answer]]) -> Path | None:
    """Add answers to the file of this device; returns its path.

    None, with a warning, where the folder cannot be written: the answers then last as long as the process.
    """
    about, rows = identity(device_type), list(found)
    file = path(about)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file):
            merged = {(r["op"], r["request"], tuple(r["shape"])): r for r in _rows(file, about)}
            for key, answer in rows:
                row = _row(key, answer)
                merged[row["op"], row["request"], tuple(row["shape"])] = row
            ordered = [merged[place] for place in sorted(merged)]
            _replace(file, {"format": _FORMAT, "schema": SCHEMA, **about, "answers": ordered})
    except OSError as error:
        warnings.warn(
            f"dlkern: the tuning cache {file} cannot be written ({error}); what was measured lasts as long as this "
            f"process. {VARIABLE} names another folder",
            stacklevel=2,
        )
        return None
    return file


def _rows(file: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file as they stand, after the checks of reading it."""
    _read(file, about)
    try:
        return json.loads(file.read_text(encoding="utf-8"))["answers"]
    except FileNotFoundError:
        return []


def _replace(file: Path, document: dict[str, Any]) -> None:
    for stale in file.parent.glob(f".{file.name}.*.tmp"):  # the lock is held: their writers are dead
        with contextlib.suppress(OSError):
            stale.unlink()
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(document, out, indent=1)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One writer at a time; the system lets go of the lock when its holder ends, however it ends."""
    if fcntl is None:
        yield
        return
    with open(file.with_name(f"{file.name}.lock"), "a+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ------------------------------------------------------------------------------ show and clear
def files() -> list[Path]:
    """Every cache file in the folder."""
    return sorted(folder().glob("*.json")) if folder().is_dir() else []


def show() -> str:
    """The folder, each file's device and answers, and the devices of the tables that came with dlkern, for people."""
    lines = [f"folder: {folder()}"]
    if not files():
        lines.append("nothing is remembered: dlkern tune MODEL measures")
    for file in [*files(), *sorted(TABLES.glob("*.json"))]:
        document, why = _looked_at(file)
        if why is not None:
            lines.append(f"\n{file.name}: not readable: {why}")
            continue
        about = [document["device"], f"{document['threads']} threads" if document["threads"] else ""]
        about += [f"{name} {version}" for name, version in document["versions"].items() if version]
        if file.parent == TABLES:
            about.insert(0, "came with dlkern, for what was not measured here")
        lines.append(f"\n{', '.join(filter(None, about))}: {len(document['answers'])} answers")
        if file.parent == TABLES:
            continue
        for row in document["answers"]:
            key, answer = _entry(row)
            lines.append(f"  {key.op} {'x'.join(map(str, key.shape))}: {answer.backend} ({answer.in_words()})")
            lines += [f"    wrong here: {name}: {text}" for name, text in answer.wrong]
            lines.append(f"    {key.request}")
    return "\n".join(lines)


def clear() -> int:
    """Remove every cache file, also those set aside; returns how many there were."""
    count = 0
    for file in [*files(), *folder().glob("*.json.corrupt")]:  # lock files stay: somebody may hold one
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
            count += 1
    return count
