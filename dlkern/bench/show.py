"""What ``dlkern bench`` prints and draws. Every figure was measured in this run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from . import measure
from .results import Result

WIDTH = 170  # of tables that go to a file
NARROW = 140  # a terminal below this has a spread under its median


def heading(facts: Mapping[str, Any]) -> None:
    """Device, versions, and what keeps figures from being quoted."""
    versions = facts["versions"]
    print(
        f"{facts['device']}, {facts['cpu']['threads']} threads, torch {versions['torch']}, dlkern {versions['dlkern']}"
    )
    print(f"{facts['date']}, commit {facts['commit'] or 'unknown (not run from a clone)'}")
    if facts["load_average"]:
        print(f"load {facts['load_average'][0]:.1f} on {facts['cpu']['cores']} cores")
    if facts["environment_missing"]:
        wanted = " ".join(f"{name}={measure.stable_environment()[name]}" for name in facts["environment_missing"])
        print(f"CPU timings will scatter: allocator and OpenMP are not steadied; set {wanted}")


def tables(results: Sequence[Result]) -> None:
    """A table per op and model, and in full why a row is red."""
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    apart = " " if console.width >= NARROW else "\n"
    for name in dict.fromkeys((result.kind, result.name) for result in results):
        console.print(_table(name[1], [r for r in results if (r.kind, r.name) == name], apart))
    print("ratio: the baseline's time / the row's, median of pairs measured in turn (p20-p80); above 1 is faster")
    if any(result.equals is not None for result in results):
        print(
            "equals: the same ratio for a second copy of the plain model: nearer to 1 than that, a ratio says nothing"
        )
    roof = next((result.roofline for result in results if result.roofline is not None), None)
    if roof is not None:
        print(
            "roofline: the least time that a case's bytes and FLOPs allow / the row's; this run's copy bandwidth is "
            f"{roof['gigabytes_per_second']:.1f} GB/s, its matrix rate {roof['gigaflops']:.0f} GFLOP/s"
        )
    for why in dict.fromkeys(result.left_out for result in results if result.left_out is not None):
        print(f"not run: {why}")
    for result in results:
        if result.red is not None:
            print(f"\nRED, not timed: {result.name} {result.case} {result.candidate}\n{result.red}")


def _table(title: str, results: Sequence[Result], apart: str) -> Table:
    first = results[0]
    targets, peak = first.kind == "op", any(result.peak for result in results)
    heads = [f"{first.baseline} ms", f"ms{apart}(p20-p80)", f"ratio{apart}(p20-p80)", "target" if targets else "equals"]
    roofs = any(result.roofline is not None for result in results)
    heads += ["roofline"] if roofs else []
    heads += [f"MB kept,{apart}{first.baseline} / row", *(["MB peak"] if peak else [])]
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in ("case", "row"):
        table.add_column(column, overflow="fold")
    for column in heads:
        table.add_column(column, justify="right", overflow="fold")
    for result in results:
        backend = f" ({result.backend})" if result.backend and "-" not in result.candidate else ""
        cells = [result.case, result.candidate + backend, *_times(result, apart)]
        if targets:
            cells.append("" if result.target is None else f">= {result.target}")
        else:
            cells.append("" if result.equals is None else f"{result.equals:.2f}")
        if roofs:
            cells.append("" if result.roofline is None else f"{result.roofline['share']:.0%}")
        cells += [_pair(result, sizes) for sizes in (result.kept, *([result.peak] if peak else []))]
        table.add_row(*cells)
    return table


def _times(result: Result, apart: str) -> list[str]:
    if result.comparison is None:
        return ["", "PARITY IS RED" if result.red is not None else "not run", ""]
    base, own = result.comparison.time(result.baseline), result.comparison.time(result.candidate)
    ratio = result.comparison.ratio(result.candidate).paired
    return [
        f"{base.median * 1e3:.3f}",
        f"{own.median * 1e3:.3f}{apart}({own.p20 * 1e3:.3f}-{own.p80 * 1e3:.3f})",
        f"{ratio.median:.2f}{apart}({ratio.p20:.2f}-{ratio.p80:.2f})",
    ]


def _pair(result: Result, sizes: Mapping[str, int]) -> str:
    """Baseline / row, in MB."""
    names = (result.baseline, result.candidate)
    if not any(name in sizes for name in names):
        return ""
    return " / ".join(f"{sizes[name] / 1e6:.1f}" if name in sizes else "-" for name in names)


def picture(results: Sequence[Result], facts: Mapping[str, Any], path: str) -> None:
    """A bar for each row that was timed: its ratio, p20-p80, and the target."""
    from . import plot

    bars = []
    for result in results:
        if result.comparison is not None:
            ratio = result.comparison.ratio(result.candidate).paired
            bars.append(plot.Bar(f"{result.name} {result.case}: {result.candidate}", *ratio, result.target))
    title = f"{facts['device']}, {facts['cpu']['threads']} threads, torch {facts['versions']['torch']}, {facts['date']}"
    plot.draw(bars, title, path)
