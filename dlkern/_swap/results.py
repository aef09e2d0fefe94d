"""What was done to a model, site by site."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .runtime import Calls

if TYPE_CHECKING:
    from dlkern.tuning.policy import Verdict


@dataclass(frozen=True)
class Row:
    """One site, or one layer that is none.

    ``path`` is the BatchNorm's, or the convolution's where there is none; ``owner`` is the module whose
    forward was rewritten; ``kind`` is the op ("separable": depthwise, and a pointwise convolution takes the
    site's output) and ``label`` what is fused (bn+add+relu); ``backend`` is the one that runs by default on
    the site's device and dtype ("" where nothing was done); ``reason`` says why. ``ratio`` is PyTorch's time divided by
    dlkern's where it was measured (``dlkern.swap(..., policy="measured")``): above 1 dlkern is faster.
    """

    path: str
    kind: str
    backend: str
    reason: str
    owner: str = ""
    label: str = ""
    ratio: float | None = None


@dataclass
class Report:
    """Per site what was done, by what, and the reason where nothing was done; prints as a table."""

    swapped: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)
    calls: Calls = field(default_factory=Calls)
    planned: bool = False  # an explanation: nothing was changed
    measured: Verdict | None = None  # of a measured swap

    def __str__(self) -> str:
        verb = "would be swapped" if self.planned else "swapped"
        lines = [f"{len(self.swapped)} sites {verb}, {len(self.skipped)} layers left as they are"]
        if not self.planned:
            lines[0] += f"; calls: {self.calls.fused} fused, {self.calls.fallback} fallback"
        if self.measured is not None:
            lines.append(self.measured.summary)
            lines += self.measured.wrong
        if self.swapped:
            lines += _table(("path", "fused", "owner", "backend", "reason"), (
                (r.path or "(model)", r.label, r.owner or "(model)", r.backend, r.reason) for r in self.swapped
            ))  # fmt: skip
        if self.skipped:
            lines += _table(("path", "left as it is because"), ((r.path or "(model)", r.reason) for r in self.skipped))
        if self.planned or self.measured is not None:
            lines += ["", *_how_to_change(self)]
        return "\n".join(lines)

    __repr__ = __str__


def _how_to_change(made: Report) -> list[str]:
    """What a user can do about a choice."""
    op = made.swapped[0].kind if made.swapped else "batch_norm_act"
    lines = ["To change a choice:"]
    if made.measured is None:
        lines.append('  measure it on this device:  dlkern.swap(model, sample=batch, policy="measured")')
    return [
        *lines,
        f'  for one op:                 with dlkern.backend({op}="torch"), or DLKERN_BACKEND={op}=torch outside',
        "  leave a site as it is:      dlkern.swap(model, filter_fn=lambda module, path: path != PATH)",
    ]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    body = [head, *rows]
    widths = [max(len(row[i]) for row in body) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body]
    return ["", text[0], "  ".join("-" * width for width in widths), *text[1:]]
