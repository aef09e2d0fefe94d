"""``dlkern bench --compare A.json B.json``: what moved between two results files, beyond the noise of both."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import provenance

#: A median must move by this much, too.
_LEAST = 0.02


@dataclass
class Difference:
    """Rows by what became of them; each as (name, before, after) in words."""

    faster: list[tuple[str, str, str]] = field(default_factory=list)
    slower: list[tuple[str, str, str]] = field(default_factory=list)
    reddened: list[tuple[str, str, str]] = field(default_factory=list)
    healed: list[tuple[str, str, str]] = field(default_factory=list)
    alike: int = 0
    only: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load(path: str) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: one that cannot be read, or without its provenance.
    """
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--compare {path}: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"--compare {path}: expected a JSON object, got {type(facts).__name__}")
    lacking = [name for name in provenance.missing(facts) if name != "commit"]
    if lacking:
        raise ValueError(f"--compare {path}: it does not say where its figures come from: no {', '.join(lacking[:5])}")
    return facts


def compare(before: dict[str, Any], after: dict[str, Any]) -> Difference:
    """Row by row, by the ratio to the baseline: a change of the machine's clock moves both, and cancels.

    A row moved where the p20-p80 intervals do not overlap and the medians differ by 2 % at least.
    """
    found = Difference()
    for name in ("device", "versions"):
        if before.get(name) != after.get(name):
            found.notes.append(f"{name}: {_words(before.get(name))} -> {_words(after.get(name))}")
    old, new = _rows(before), _rows(after)
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if a is None or b is None:
            found.only.append((name, "-" if a is None else _ratio(a), "-" if b is None else _ratio(b)))
            continue
        shown = (name, _ratio(a), _ratio(b))
        if (a["parity"] == "ok") != (b["parity"] == "ok"):
            (found.healed if b["parity"] == "ok" else found.reddened).append(shown)
            continue
        first, second = _spread(a), _spread(b)
        if first is None or second is None:
            found.alike += 1
        elif second[1] > first[2] and second[0] >= first[0] * (1 + _LEAST):
            found.faster.append(shown)
        elif second[2] < first[1] and second[0] <= first[0] * (1 - _LEAST):
            found.slower.append(shown)
        else:
            found.alike += 1
    return found


def _rows(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{row.get('name', '')} {row.get('case', '')}: {row.get('row', '')}".strip(): row for row in facts["rows"]}


def _spread(row: dict[str, Any]) -> list[float] | None:
    """Median, p20 and p80 of the ratio."""
    measured = row.get("measured")
    return None if not measured else measured["ratio"].get(row["row"], {}).get("paired")


def _ratio(row: dict[str, Any]) -> str:
    found = _spread(row)
    if found is None:
        return str(row.get("parity", "")).splitlines()[0][:40]
    return f"{found[0]:.2f} ({found[1]:.2f}-{found[2]:.2f})"


def _words(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items() if v) if isinstance(value, dict) else str(value)


def render(found: Difference) -> str:
    """The difference for people."""
    lines = [f"note: {note}" for note in found.notes]
    groups = (
        ("parity is red now", found.reddened),
        ("slower", found.slower),
        ("faster", found.faster),
        ("parity is right now", found.healed),
        ("in one file alone", found.only),
    )
    for title, rows in groups:
        if rows:
            width = max(len(name) for name, _, _ in rows)
            lines += [f"\n{title} ({len(rows)}):", *(f"  {n:{width}}  {a} -> {b}" for n, a, b in rows)]
    lines.append(f"\n{found.alike} rows are where they were, within the noise of both (p20-p80 overlap, or below 2 %)")
    return "\n".join(lines).lstrip("\n")
