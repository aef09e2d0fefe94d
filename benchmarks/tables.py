"""A Markdown table, and the bars of a picture, for each kind of results file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dlkern.bench.plot import Bar

Rows = list[dict[str, Any]]


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def _paired(row: dict[str, Any], name: str) -> str:
    if name not in row["measured"]["ratio"]:
        return ""
    median, low, high = row["measured"]["ratio"][name]["paired"]
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def _milliseconds(row: dict[str, Any], name: str) -> str:
    return f"{row['measured']['milliseconds'][name][0]:.3g}"


def _shape(values: list[int]) -> str:
    return "x".join(map(str, values))


def _mode(row: dict[str, Any]) -> str:
    return "training, forward + backward" if row["training"] else "inference"


def _added(row: dict[str, Any]) -> str:
    return f"BN{' + add' if row['residual'] else ''} + ReLU"


# ---------------------------------------------------------------------------------------- ops
Key = tuple[Any, ...]
_FACTS = (
    *("shape", "out_channels", "kernel", "stride", "dilation", "rates", "separable"),
    *("format", "residual", "training", "dtype"),
)


def _by_case(rows: Rows) -> dict[Key, dict[str, dict[str, Any]]]:
    """The timed rows of each case, by the row's name; eager's own has no ratio."""
    cases: dict[Key, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "measured" in row:
            cases.setdefault(tuple(str(row.get(fact)) for fact in _FACTS), {})[row["row"]] = row
    return cases


def _op(rows: Rows, heads: list[str], describe: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    """Eager's time / the row's, a line per case; torch.compile beside it where it was measured."""
    cases = _by_case(rows)
    names = list(dict.fromkeys(name for found in cases.values() for name in found))
    lines = []
    for found in cases.values():
        first = next(iter(found.values()))
        targets = [row["target"] for row in found.values() if row.get("target")]
        cells = [*describe(first), first["format"], first["dtype"], _milliseconds(first, "eager")]
        cells += [_paired(found[name], name) if name in found else "" for name in names]
        lines.append([*cells, f">= {targets[0]}" if targets else ""])
    return table([*heads, "format", "dtype", "eager ms", *(f"eager / {name}" for name in names), "target"], lines)


def batch_norm_act(rows: Rows) -> list[str]:
    return _op(rows, ["case", "shape"], lambda row: [f"{_added(row)}, {_mode(row)}", _shape(row["shape"])])


def conv_bn_act(rows: Rows) -> list[str]:
    def describe(row: dict[str, Any]) -> list[str]:
        what = f"conv + {_added(row)}, {_mode(row)}"
        return [what, f"{_shape(row['shape'])} -> {row['out_channels']}", _window(row)]

    return _op(rows, ["case", "input", "kernel"], describe)


def depthwise(rows: Rows) -> list[str]:
    return _op(rows, ["case", "input", "kernel"], lambda row: [_mode(row), _shape(row["shape"]), _window(row)])


def transposed(rows: Rows) -> list[str]:
    def describe(row: dict[str, Any]) -> list[str]:
        return [_mode(row), f"{_shape(row['shape'])} -> {row['out_channels']}", _window(row)]

    return _op(rows, ["case", "input", "kernel"], describe)


def atrous(rows: Rows) -> list[str]:
    def describe(row: dict[str, Any]) -> list[str]:
        kind = f"{'separable ' if row['separable'] else ''}ASPP, rates {', '.join(map(str, row['rates']))}"
        return [f"{kind}, {_mode(row)}", f"{_shape(row['shape'])} -> {row['out_channels']}"]

    return _op(rows, ["case", "input"], describe)


def _window(row: dict[str, Any]) -> str:
    words = [f"{row['kernel']}x{row['kernel']}"]
    words += [f"{name} {row[name]}" for name in ("stride", "dilation") if row.get(name, 1) != 1]
    return ", ".join(words)


def _op_bars(rows: Rows) -> list[Bar]:
    bars = []
    for found in _by_case(rows).values():
        for name, row in found.items():
            if name not in row["measured"]["ratio"]:
                continue
            words = [_shape(row["shape"])]
            if "out_channels" in row:
                words.append(f"-> {row['out_channels']}")
            if "kernel" in row:
                words.append(_window(row))
            words += [row["format"], "training" if row["training"] else "inference", row["dtype"]]
            words += ["+ add"] if row["residual"] else []
            bars.append(Bar(f"{' '.join(words)}: {name}", *row["measured"]["ratio"][name]["paired"], row.get("target")))
    return bars


# --------------------------------------------------------------------------- calls and models
def call_overhead(rows: Rows) -> list[str]:
    """Microseconds over PyTorch's own call."""
    lines = [
        [f"{_added(row)}, {row['mode']}", f"{row['microseconds_over']:.1f}", f"<= {row['budget']:.0f}"] for row in rows
    ]
    return table(["one call", "us over PyTorch's own", "target"], lines)


def _sample(row: dict[str, Any]) -> str:
    return _shape(row.get("shape") or [row["batch"], 3, row["image_size"], row["image_size"]])


_CANDIDATES = ("swapped", "measured", "frozen", "compile")


def models(rows: Rows) -> list[str]:
    """Plain against swapped, and plain against itself where that was measured: the resolution of the row."""
    present = [name for name in _CANDIDATES if any(name in row["measured"]["ratio"] for row in rows)]
    equals = any("plain again" in row["measured"]["ratio"] for row in rows)
    lines = []
    for row in rows:
        kept = row.get("kept_for_backward_mb")
        lines.append(
            [
                f"{row['model']}, {'training step' if row.get('training', True) else 'inference'}",
                _sample(row),
                row["format"],
                _milliseconds(row, "plain"),
                *(_paired(row, name) for name in present),
                *([_paired(row, "plain again")] if equals else []),
                " / ".join(f"{size:.0f}" for size in kept.values()) if kept else "",
                str(row["sites"]["swapped"]),
            ]
        )
    heads = ["model", "input", "format", "plain ms", *(f"plain / {name}" for name in present)]
    heads += ["plain / plain again"] if equals else []
    return table([*heads, "MB kept, plain / swapped", "sites"], lines)


def _model_bars(rows: Rows) -> list[Bar]:
    return [
        Bar(
            f"{row['model']} {_sample(row)} {row['format']} "
            f"{'training' if row.get('training', True) else 'inference'}: {name}",
            *found["paired"],
        )
        for row in rows
        for name, found in row["measured"]["ratio"].items()
    ]


def recurrent(rows: Rows) -> list[str]:
    """torch.nn's time / dlkern's, a line per case and backend."""
    lines = [
        [
            f"{row['op']} cell" if row["cell"] else str(row["op"]),
            f"{row['steps']} x {row['batch']} x {row['hidden']}",
            ", ".join(
                [
                    "training" if row["training"] else "inference",
                    *["packed"] * bool(row["packed"]),
                    *[row["variant"]] * bool(row.get("variant")),
                ]
            ),
            f"{row['row']} ({row['backend']})",
            _milliseconds(row, "eager"),
            _paired(row, row["row"]),
            f">= {row['target']}" if row.get("target") else "",
        ]
        for row in rows
    ]
    heads = ["layer", "steps x batch x hidden", "mode", "row (backend)", "torch.nn ms", "torch.nn / row", "target"]
    return table(heads, lines)


def attention(rows: Rows) -> list[str]:
    """PyTorch's time / dlkern's, a line per case and backend."""
    lines = [
        [
            f"{row['kind']}, lengths {min(row['lengths'])} to {max(row['lengths'])}" if row["lengths"] else row["kind"],
            " x ".join(str(row[name]) for name in ("batch", "heads", "length", "dim")),
            _mode(row),
            row["dtype"],
            f"{row['row']} ({row['backend']})",
            _milliseconds(row, "eager"),
            _paired(row, row["row"]),
            f">= {row['target']}" if row.get("target") else "",
        ]
        for row in rows
    ]
    heads = ["kind", "batch x heads x length x dim", "mode", "dtype", "row (backend)", "PyTorch ms", "PyTorch / row"]
    return table([*heads, "target"], lines)


def device(rows: Rows) -> list[str]:
    """The device's own ceilings."""
    lines = [[row["what"], f"{row['rate']:.4g} {row['unit']}"] for row in rows]
    return table(["what", "median rate"], lines)


# -------------------------------------------------------------------------------- dlkern bench
def suite(rows: Rows) -> list[str]:
    """The file that ``dlkern bench --json`` writes."""
    lines = []
    for row in rows:
        timed = "measured" in row
        base = row["measured"]["baseline"] if timed else ""
        cells = (
            [_milliseconds(row, base), _paired(row, row["row"])] if timed else ["", row["parity"].partition("\n")[0]]
        )
        wanted = f">= {row['target']}" if row.get("target") else ""
        lines.append([row["name"], row["case"], row["row"], row["backend"], *cells, wanted])
    return table(["what", "case", "row", "backend", "PyTorch ms", "PyTorch / row", "target"], lines)


def _suite_bars(rows: Rows) -> list[Bar]:
    return [
        Bar(
            f"{row['name']} {row['case']}: {row['row']}",
            *row["measured"]["ratio"][row["row"]]["paired"],
            row.get("target"),
        )
        for row in rows
        if "measured" in row
    ]


TABLES: dict[str, Callable[[Rows], list[str]]] = {
    "attention": attention,
    "batch_norm_act": batch_norm_act,
    "conv_bn_act": conv_bn_act,
    "depthwise": depthwise,
    "atrous": atrous,
    "transposed": transposed,
    "call_overhead": call_overhead,
    "device": device,
    "recurrent": recurrent,
    "models": models,
    "measured_swap": models,
    "suite": suite,
}

#: A picture of call_overhead would be one of microseconds, not of ratios: it has none.
BARS: dict[str, Callable[[Rows], list[Bar]]] = {
    "batch_norm_act": _op_bars,
    "conv_bn_act": _op_bars,
    "depthwise": _op_bars,
    "atrous": _op_bars,
    "transposed": _op_bars,
    "models": _model_bars,
    "measured_swap": _model_bars,
    "suite": _suite_bars,
}
