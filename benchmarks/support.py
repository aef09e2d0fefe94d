"""The README's support table from evidence files: ``python -m benchmarks.support [FILE...] [--write README.md]``.

An evidence file is what ``pytest --evidence FILE`` writes (tests/evidence.py): results that passed the parity rule, by
op, backend, dtype and how they were made. ``--merge FILE`` puts several of them, such as those of the workers
of one run, together in one file of benchmarks/results/<device>.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlkern.bench import provenance

from .page import PageError, replace
from .tables import table

HERE = Path(__file__).resolve().parent
MARK = "support"

#: How a result was made, as tests/evidence.py names it, and the column's head.
COLUMNS = {
    "compiled": "compiled ahead of time",
    "interpreted": "interpreted or simulated",
    "host-run": "run on the host",
    "gpu": "run on a GPU",
    "sanitized": "sanitized on a GPU",
}
_DTYPES = ("float32", "float16", "bfloat16", "float64")


class Refused(Exception):
    """An evidence file that cannot be used; the message names it and says why."""


def load(path: Path) -> dict[str, Any]:
    """An evidence file.

    Raises:
        Refused: one that cannot be read, is no evidence file, or does not say where it comes from.
    """
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: {error}") from error
    if not isinstance(facts, dict) or facts.get("benchmark") != MARK:
        raise Refused(f"{path}: expected what pytest --evidence writes")
    lacking = provenance.missing(facts)
    if lacking:
        raise Refused(f"{path}: refused, it does not say where it comes from: no {', '.join(lacking)}")
    return facts


def merge(files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One file of several from one device and commit, with their results added up.

    Raises:
        Refused: files of different devices or commits.
    """
    for name in ("device", "commit"):
        values = {facts[name] for facts in files}
        if len(values) > 1:
            raise Refused(f"files of more than one {name} cannot be merged: {', '.join(sorted(values))}")
    counts: dict[tuple[str, ...], int] = {}
    for facts in files:
        for row in facts["rows"]:
            key = (row["op"], row["backend"], row["dtype"], row["how"])
            counts[key] = counts.get(key, 0) + row["results"]
    names = ("op", "backend", "dtype", "how")
    tools = [facts.get("sanitizer", []) for facts in files]  # one name, or a list where the file was merged before
    about = {
        **files[-1],
        "sanitizer": sorted({n for found in tools for n in ([found] if isinstance(found, str) else found)}),
    }
    about["rows"] = [{**dict(zip(names, key, strict=True)), "results": count} for key, count in sorted(counts.items())]
    return about


def render(files: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown: a line per op, backend and dtype; in each cell the results that passed, and when."""
    cells: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for facts in sorted(files, key=lambda f: f["date"]):
        for row in facts["rows"]:
            where = cells.setdefault((row["op"], row["backend"], row["dtype"]), {})
            device = f" {facts['device']}" if row["how"] in ("gpu", "sanitized") else ""
            where.setdefault(row["how"], []).append(f"{row['results']} ({facts['date'][:10]}{device})")
    lines = []
    for op, backend, dtype in sorted(cells, key=_order):
        found = cells[op, backend, dtype]
        lines.append([f"`{op}`", backend, dtype, *("; ".join(found.get(how, ["no"])) for how in COLUMNS)])
    return "\n".join(table(["op", "backend", "dtype", *COLUMNS.values()], lines))


def _order(key: tuple[str, str, str]) -> tuple[str, str, int]:
    op, backend, dtype = key
    return op, backend, _DTYPES.index(dtype) if dtype in _DTYPES else len(_DTYPES)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.support",
        description="Markdown table of what has been shown of each op, backend and dtype, and how.",
        epilog="example: python -m benchmarks.support --write README.md",
    )
    parser.add_argument("files", nargs="*", type=Path, help="default: benchmarks/results/*/support.json")
    parser.add_argument("--write", type=Path, metavar="README.md", help="put the table between this file's marks")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="write the files put together as one, and no table")
    arguments = parser.parse_args(argv)
    paths = arguments.files or sorted((HERE / "results").glob("*/support.json"))
    try:
        if not paths:
            raise Refused("benchmarks/results holds no evidence; run pytest --evidence FILE")
        files = [load(path) for path in paths]
        if arguments.merge is not None:
            arguments.merge.parent.mkdir(parents=True, exist_ok=True)
            arguments.merge.write_text(json.dumps(merge(files), indent=1) + "\n")
        elif arguments.write is not None:
            replace(arguments.write, MARK, render(files))
        else:
            print(render(files))
    except (Refused, PageError) as error:
        print(f"support: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
