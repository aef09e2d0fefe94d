"""One row of a benchmark, and rows as plain values, CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .measure import Comparison


@dataclass
class Result:
    """One candidate of one case beside the baseline ("eager" for an op, "plain" for a model).

    ``red`` is None where parity holds, else why it does not; a red row has no comparison. ``left_out`` says why a
    forced backend cannot run the case; such a row has none either. ``kept`` (bytes that
    autograd keeps for backward) and ``peak`` (most bytes on a GPU) are by candidate. ``equals`` is the ratio of
    the baseline to a second copy of itself: how far from 1 a ratio means nothing. ``roofline`` is of an op's row (see
    :mod:`.roofline`).
    """

    kind: str
    name: str
    case: str
    candidate: str
    facts: Mapping[str, Any]
    baseline: str
    red: str | None = None
    left_out: str | None = None
    backend: str = ""
    comparison: Comparison | None = None
    kept: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    target: float | None = None
    equals: float | None = None
    roofline: Mapping[str, Any] | None = None

    @property
    def parity(self) -> str:
        """ok, not run, or why it is red."""
        if self.left_out is not None:
            return f"not run: {self.left_out}"
        return self.red or "ok"

    @property
    def ratio(self) -> float | None:
        """Median of the paired ratios; above 1 the candidate is faster."""
        return None if self.comparison is None else self.comparison.ratio(self.candidate).paired.median

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {
            "kind": self.kind,
            "name": self.name,
            "case": self.case,
            **self.facts,
            "row": self.candidate,
            "backend": self.backend,
            "parity": self.parity,
            "ratio": self.ratio,
            "ratio_of_equals": self.equals,
            "target": self.target,
            "kept_for_backward_mb": _megabytes(self.kept),
            "peak_mb": _megabytes(self.peak),
            **({} if self.roofline is None else {"roofline": dict(self.roofline)}),
            **({} if self.comparison is None else {"measured": self.comparison.as_dict()}),
        }

    def cells(self) -> dict[str, Any]:
        """One flat row for a CSV file; empty where nothing was measured."""
        found: dict[str, Any] = {
            "kind": self.kind,
            "name": self.name,
            "case": self.case,
            "mode": "training" if self.facts["training"] else "inference",
            "dtype": self.facts["dtype"],
            "format": self.facts["format"],
            "baseline": self.baseline,
            "candidate": self.candidate,
            "backend": self.backend,
            "parity": self.parity,
        }
        times = {"baseline": self.baseline, "candidate": self.candidate}
        for column, row in times.items():
            spread = None if self.comparison is None else self.comparison.time(row)
            for name in ("median", "p20", "p80"):
                found[f"{column}_{name}_ms"] = "" if spread is None else round(getattr(spread, name) * 1e3, 6)
        ratio = None if self.comparison is None else self.comparison.ratio(self.candidate).paired
        for name in ("median", "p20", "p80"):
            found[f"ratio_{name}"] = "" if ratio is None else round(getattr(ratio, name), 4)
        found["target"] = "" if self.target is None else self.target
        found["roofline_share"] = "" if self.roofline is None else self.roofline["share"]
        for what, table in (("kept_for_backward", self.kept), ("peak", self.peak)):
            for column, row in times.items():
                found[f"{column}_{what}_bytes"] = table.get(row, "")
        return found


def _megabytes(table: Mapping[str, int]) -> dict[str, float]:
    return {name: round(size / 1e6, 2) for name, size in table.items()}


def write_json(path: str, results: Sequence[Result], facts: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """The rows with their provenance, in the form of the files in benchmarks/results."""
    about = {"benchmark": "suite", **facts, "settings": dict(settings), "rows": [r.as_dict() for r in results]}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(about, file, indent=1)
        file.write("\n")


def write_csv(path: str, results: Sequence[Result], facts: Mapping[str, Any]) -> None:
    """A line per row; each has device, torch version, date and commit."""
    about = {"device": facts["device"], "torch": facts["versions"]["torch"]}
    about |= {name: facts[name] or "" for name in ("date", "commit")}
    rows = [{**result.cells(), **about} for result in results]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
