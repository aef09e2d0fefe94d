"""README tables from results files: ``python benchmarks/report.py [--write README.md]``.

Without ``--write`` the tables go to standard output; with it they replace what stands between the
README's two ``measured`` marks. No figure is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def _paired(row: dict[str, Any], name: str) -> str:
    median, low, high = row["measured"]["ratio"][name]["paired"]
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def _milliseconds(row: dict[str, Any], name: str) -> str:
    return f"{row['measured']['milliseconds'][name][0]:.3g}"


def batch_norm_act(rows: list[dict[str, Any]]) -> list[str]:
    """Eager's time / the row's, a line per case; torch.compile beside it where it was measured."""
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "measured" in row:
            key = (tuple(row["shape"]), row["format"], row["residual"], row["training"], row["dtype"])
            cases.setdefault(key, {})[row["row"]] = row
    names = list(dict.fromkeys(name for found in cases.values() for name in found))
    lines = []
    for (shape, layout, residual, training, dtype), found in cases.items():
        what = "training, forward + backward" if training else "inference"
        first = next(iter(found.values()))
        targets = [row["target"] for row in found.values() if row.get("target")]
        cells = [f"BN{' + add' if residual else ''} + ReLU, {what}", "x".join(map(str, shape)), layout, dtype]
        cells.append(_milliseconds(first, "eager"))
        cells += [_paired(found[name], name) if name in found else "" for name in names]
        lines.append([*cells, f">= {targets[0]}" if targets else ""])
    heads = ["case", "shape", "format", "dtype", "eager ms", *(f"eager / {name}" for name in names), "target"]
    return table(heads, lines)


def call_overhead(rows: list[dict[str, Any]]) -> list[str]:
    """Microseconds over PyTorch's own call."""
    lines = [
        [
            f"BN{' + add' if row['residual'] else ''} + ReLU, {row['mode']}",
            f"{row['microseconds_over']:.1f}",
            f"<= {row['budget']:.0f}",
        ]
        for row in rows
    ]
    return table(["one call", "us over PyTorch's own", "target"], lines)


def models(rows: list[dict[str, Any]]) -> list[str]:
    """Training steps, plain against swapped."""
    lines = []
    for row in rows:
        kept = row["kept_for_backward_mb"]
        lines.append(
            [
                row["model"],
                f"{row['batch']}x3x{row['image_size']}x{row['image_size']}",
                row["format"],
                _milliseconds(row, "plain"),
                _paired(row, "swapped"),
                f"{kept['plain']:.0f} / {kept['swapped']:.0f}",
                str(row["sites"]["swapped"]),
            ]
        )
    heads = ["training step", "input", "format", "plain ms", "plain / swapped", "MB kept, plain / swapped", "sites"]
    return table(heads, lines)


TABLES = {"batch_norm_act": batch_norm_act, "call_overhead": call_overhead, "models": models}


def render(paths: list[Path]) -> str:
    """All files as Markdown, each with where and when it was measured."""
    lines: list[str] = []
    for path in paths:
        facts = json.loads(path.read_text())
        if not facts["rows"]:
            continue
        threads = next((row["measured"]["threads"] for row in facts["rows"] if "measured" in row), "?")
        commit, _, changed = facts["commit"].partition(" ")
        unsteady = " (allocator and OpenMP not steadied)" if facts["environment_missing"] else ""
        lines += [
            f"**{facts['benchmark']}** on {facts['device']}, {threads} threads, torch {facts['versions']['torch']}, "
            f"{facts['date']}, commit {commit[:10]}{' ' + changed if changed else ''}{unsteady}; "
            f"ratios are medians of pairs measured in turn (p20-p80). File: `{path.relative_to(HERE.parent)}`.",
            "",
            *TABLES[facts["benchmark"]](facts["rows"]),
            "",
        ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Markdown tables from benchmarks/results.", epilog="example: benchmarks/report.py --write README.md"
    )
    parser.add_argument("files", nargs="*", type=Path, help="results files (default: all of benchmarks/results)")
    parser.add_argument("--write", type=Path, metavar="README.md", help="put the tables between this file's marks")
    arguments = parser.parse_args(argv)
    paths = arguments.files or sorted((HERE / "results").glob("*/*.json"))
    if not paths:
        print("report: benchmarks/results holds no file; run pytest benchmarks --results", file=sys.stderr)
        return 1
    text = render([path.resolve() for path in paths])
    if arguments.write is None:
        print(text)
        return 0
    page = arguments.write.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        print(f"report: {arguments.write} needs the lines {BEGIN} and {END}, once each", file=sys.stderr)
        return 2
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    arguments.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
