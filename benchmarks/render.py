"""README tables and pictures from results files: ``python -m benchmarks.render [--write README.md] [--plot DIR]``.

Without ``--write`` the tables go to standard output; with it they replace what stands between the
README's two ``measured`` marks. No figure is typed by hand, and none is shown without its provenance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from dlkern.bench import plot, provenance

from .page import PageError, check, replace
from .tables import BARS, TABLES

HERE = Path(__file__).resolve().parent
MARK = "measured"


class Refused(Exception):
    """A results file that no table is made of; the message names it and what it lacks."""


def load(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        Refused: one that cannot be read, of an unknown benchmark, or with a figure without provenance.
    """
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: {error}") from error
    if not isinstance(facts, dict):
        raise Refused(f"{path}: expected a JSON object, got {type(facts).__name__}")
    lacking = provenance.missing(facts)
    if lacking:
        more = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
        raise Refused(
            f"{path}: refused, it does not say where its figures come from: no {', '.join(lacking[:8])}{more}"
        )
    if facts["benchmark"] not in TABLES:
        raise Refused(f"{path}: unknown benchmark {facts['benchmark']!r}; expected one of {', '.join(TABLES)}")
    return facts


def about(facts: dict[str, Any]) -> str:
    """Where and when a file was measured."""
    threads = next((row["measured"]["threads"] for row in facts["rows"] if "measured" in row), "?")
    commit, _, changed = facts["commit"].partition(" ")
    unsteady = " (allocator and OpenMP not steadied)" if facts.get("environment_missing") else ""
    return (
        f"{facts['device']}, {threads} threads, torch {facts['versions']['torch']}, "
        f"{facts['date']}, commit {commit[:10]}{' ' + changed if changed else ''}{unsteady}"
    )


def render(files: dict[Path, dict[str, Any]], pictures: dict[Path, str]) -> str:
    """All files as Markdown; ``pictures`` has the link of a file's picture."""
    lines: list[str] = []
    for path, facts in files.items():
        if not facts["rows"]:
            continue
        shown = path.relative_to(HERE.parent) if path.is_relative_to(HERE.parent) else path
        lines += [
            f"**{facts['benchmark']}** on {about(facts)}{_how(facts)}. File: `{shown}`.",
            "",
            *TABLES[facts["benchmark"]](facts["rows"]),
            "",
        ]
        if path in pictures:
            lines += [f"![{facts['benchmark']} on {facts['device']}]({pictures[path]})", ""]
    return "\n".join(lines)


def _how(facts: dict[str, Any]) -> str:
    compared = any(row.get("measured", {}).get("ratio") for row in facts["rows"])
    return "; ratios are medians of pairs measured in turn (p20-p80)" if compared else ""


def draw(files: dict[Path, dict[str, Any]], folder: Path) -> dict[Path, Path]:
    """A picture of each file's ratios in ``folder``; where they went."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for path, facts in files.items():
        bars = BARS[facts["benchmark"]](facts["rows"]) if facts["benchmark"] in BARS else []
        if bars:
            drawn[path] = folder / f"{path.parent.name}-{path.stem}.png"
            plot.draw(bars, f"{facts['benchmark']} on {about(facts)}", drawn[path])
    return drawn


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.render",
        description="Markdown tables and pictures from benchmarks/results; a file without versions, commit, date and "
        "device is refused.",
        epilog="example: python -m benchmarks.render --write README.md",
    )
    parser.add_argument("files", nargs="*", type=Path, help="results files (default: all of benchmarks/results)")
    parser.add_argument("--write", type=Path, metavar="README.md", help="put the tables between this file's marks")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="a picture per file; with --write, shown in the page")
    arguments = parser.parse_args(argv)
    paths = arguments.files or [p for p in sorted((HERE / "results").glob("*/*.json")) if p.name != "support.json"]
    if not paths:
        return _fail("benchmarks/results holds no file; run pytest benchmarks --results", 1)
    try:
        if arguments.write is not None:
            check(arguments.write, MARK)
        files = {path.resolve(): load(path) for path in paths}
    except (Refused, PageError) as error:
        return _fail(error, 2)
    drawn = draw(files, arguments.plot) if arguments.plot is not None else {}
    for path in drawn.values():
        print(f"picture: {path}", file=sys.stderr)
    if arguments.write is None:
        print(render(files, {}))
        return 0
    folder = arguments.write.resolve().parent
    links = {path: Path(os.path.relpath(picture.resolve(), folder)).as_posix() for path, picture in drawn.items()}
    replace(arguments.write, MARK, render(files, links))
    return 0


def _fail(message: object, code: int) -> int:
    print(f"render: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
