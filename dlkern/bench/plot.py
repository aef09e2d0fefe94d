"""Ratios as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Bar(NamedTuple):
    """One row: PyTorch's time / its time, with p20 and p80 of the pairs, and the least that was wanted."""

    label: str
    ratio: float
    p20: float
    p80: float
    target: float | None = None


def draw(bars: Sequence[Bar], title: str, path: str | Path) -> None:
    """Save the bars, from the top down. ``path`` ends in .png, .pdf or .svg.

    Raises:
        ValueError: no bars.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not bars:
        raise ValueError("there is no timed row to draw")
    figure = Figure(figsize=(11, 1.4 + 0.26 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(bars))
    ratios = [bar.ratio for bar in bars]
    spans = [[max(bar.ratio - bar.p20, 0) for bar in bars], [max(bar.p80 - bar.ratio, 0) for bar in bars]]
    colours = ["#d9541e" if ratio >= 1 else "#7f7f7f" for ratio in ratios]
    axes.barh(places, ratios, xerr=spans, color=colours, capsize=2, error_kw={"elinewidth": 0.8})
    for place, bar in enumerate(bars):
        axes.text(0.02, place, f"{bar.ratio:.2f}", va="center", color="white", fontsize=7)
        if bar.target is not None:
            axes.plot([bar.target] * 2, [place - 0.42, place + 0.42], color="black", linewidth=1.4)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(places, [bar.label for bar in bars], fontsize=7)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, None)
    axes.set_xlabel("PyTorch's time / dlkern's: median of pairs, p20-p80; the upright strokes are targets")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
