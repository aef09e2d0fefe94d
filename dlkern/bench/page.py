"""``dlkern bench --html``: one page with its table, its charts and their library inside; it asks no network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .results import Result

_HEADS = ("op", "case", "row", "backend", "ms", "ratio", "p20", "p80", "target", "roofline", "parity")
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem;color:#1b1b1b;background:#fff}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:left;border-bottom:1px solid #ddd}
th button{all:unset;cursor:pointer;font-weight:600}
th button:focus-visible{outline:2px solid #06c}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
td.n{text-align:right}
tr.red td{background:#fde8e8}
@media(prefers-color-scheme:dark){
body{background:#161616;color:#e6e6e6}th,td{border-color:#444}tr.red td{background:#502}
}
"""
_SCRIPT = """
"use strict";
const body = document.querySelector("tbody");
document.querySelectorAll("th").forEach((head, column) => {
  head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    document.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = Array.from(body.rows);
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return x === y ? 0 : x === "" ? 1 : -1;
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : Number(x) - Number(y);
      return up ? order : -order;
    });
    rows.forEach(row => body.appendChild(row));
  });
});
const data = JSON.parse(document.getElementById("data").textContent);
for (const chart of data) {
  const at = document.createElement("div");
  document.getElementById("charts").appendChild(at);
  Plotly.newPlot(at, chart.traces, chart.layout, {responsive: true, displaylogo: false});
}
"""


class MissingLibrary(RuntimeError):
    """plotly does not import."""


def library() -> str:
    """The text of plotly.js, which goes into the page.

    Raises:
        MissingLibrary: plotly does not import.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingLibrary(f'plotly does not import ({error}); pip install "dlkern[bench]"') from error
    return get_plotlyjs()


def page(results: Sequence[Result], facts: Mapping[str, Any]) -> str:
    """The whole page.

    Raises:
        MissingLibrary: plotly does not import.
    """
    title = f"dlkern bench: {facts['device']}"
    about = (
        f"{facts['cpu']['threads']} threads, torch {facts['versions']['torch']}, dlkern {facts['versions']['dlkern']}, "
        f"{facts['date']}, commit {facts['commit'] or 'unknown'}"
    )
    heads = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in _HEADS)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>"
        "<p>ratio: the baseline's time / the row's, median of pairs measured in turn; above 1 is faster. roofline: the "
        "least time that bytes and FLOPs allow at this run's copy bandwidth and matrix rate, divided by the row's.</p>"
        f'<div id="charts"></div><table><thead><tr>{heads}</tr></thead><tbody>'
        f"{''.join(map(_row, results))}</tbody></table>"
        f'<script id="data" type="application/json">{_json(_charts(results))}</script>'
        f"<script>{library()}</script><script>{_SCRIPT}</script></body></html>\n"
    )


def _row(result: Result) -> str:
    measured = result.comparison
    ratio = None if measured is None else measured.ratio(result.candidate).paired
    seconds = None if measured is None else measured.time(result.candidate).median
    share = None if result.roofline is None else result.roofline["share"]
    cells: list[Any] = [result.name, result.case, result.candidate, result.backend]
    numbers: list[tuple[float | None, str]] = [
        (None if seconds is None else seconds * 1e3, "{:.3f}"),
        *((None if ratio is None else value, "{:.2f}") for value in (ratio or (None, None, None))),
        (result.target, "{:g}"),
        (share, "{:.0%}"),
    ]
    text = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
    for value, form in numbers:
        own = "" if value is None else f"{value:.6g}"
        text += f'<td class="n" data-value="{own}">{"" if value is None else form.format(value)}</td>'
    return f"<tr{' class=red' if result.red else ''}>{text}<td>{html.escape(result.parity)}</td></tr>"


def _charts(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A bar chart of ratios for each op and model."""
    found = []
    for name in dict.fromkeys(result.name for result in results):
        rows = [r for r in results if r.name == name and r.comparison is not None]
        if not rows:
            continue
        spreads = [r.comparison.ratio(r.candidate).paired for r in rows]  # type: ignore[union-attr]
        bars = {
            "type": "bar",
            "orientation": "h",
            "y": [f"{r.case}: {r.candidate}" for r in rows],
            "x": [round(s.median, 4) for s in spreads],
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [round(s.p80 - s.median, 4) for s in spreads],
                "arrayminus": [round(s.median - s.p20, 4) for s in spreads],
            },
        }
        layout = {
            "title": {"text": name},
            "xaxis": {"title": {"text": "PyTorch's time / the row's"}, "rangemode": "tozero"},
            "yaxis": {"automargin": True, "autorange": "reversed"},
            "height": 140 + 26 * len(rows),
            "shapes": [{"type": "line", "x0": 1, "x1": 1, "yref": "paper", "y0": 0, "y1": 1, "line": {"dash": "dot"}}],
        }
        found.append({"traces": [bars], "layout": layout})
    return found


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value).replace("<", "\\u003c")
