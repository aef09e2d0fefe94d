"""What the demo says and draws. Every figure was measured in this run."""

from __future__ import annotations

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dlkern import info
from dlkern.bench import measure

from . import Settings
from .data import Digits
from .train import YARDSTICK, Outcome

LAST = 20  # steps that the mean train loss is taken over


def opening(settings: Settings, device: torch.device, digits: Digits) -> None:
    """What is about to run, on what."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else info.cpu()["model"]
    print(f"ResNet-18 (stem for 28x28) on {where}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"digits: {digits.source}")
    print(
        f"{len(digits.train_labels)} to train on, {len(digits.test_labels)} to test, batches of {digits.batch}, "
        f"{settings.epochs} epoch(s), seed {settings.seed}"
    )


def closing(outcome: Outcome) -> None:
    """The comparison, the parity and the swap report."""
    plain, swapped = outcome.plain, outcome.swapped
    last = min(LAST, len(plain.losses))
    times = {name: measure.spread(run.seconds[outcome.warmup :]) for name, run in _runs(outcome).items()}
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "plain", "swapped"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    table.add_row("train loss, last step", f"{plain.losses[-1]:.4f}", f"{swapped.losses[-1]:.4f}")
    table.add_row(
        f"train loss, mean of last {last}", *(f"{sum(r.losses[-last:]) / last:.4f}" for r in (plain, swapped))
    )
    table.add_row("test accuracy", f"{plain.accuracy:.1%}", f"{swapped.accuracy:.1%}")
    table.add_row("time per step, median ms", *(f"{t.median * 1e3:.1f}" for t in times.values()))
    table.add_row("  p20-p80", *(f"{t.p20 * 1e3:.1f}-{t.p80 * 1e3:.1f}" for t in times.values()))
    table.add_row(f"kept for backward, MB (batch {outcome.batch})", f"{plain.kept_mb:.1f}", f"{swapped.kept_mb:.1f}")
    Console().print(table)

    ratio = outcome.ratio()
    print(
        f"time, plain / swapped: {ratio.paired.median:.3f} (p20-p80 {ratio.paired.p20:.3f}-{ratio.paired.p80:.3f}), "
        f"median of {len(plain.seconds) - outcome.warmup} pairs of steps; ratio of medians {ratio.of_medians:.3f}"
    )
    if len(plain.seconds) - outcome.warmup < 30:
        print("(fewer than 30 pairs: a time to look at, not to quote)")
    print(f"memory kept for backward, swapped / plain: {swapped.kept_mb / plain.kept_mb:.3f}")
    _parity(outcome)
    print(f"\nswap report\n{outcome.report}")


def _parity(outcome: Outcome) -> None:
    plain, swapped = outcome.plain.losses, outcome.swapped.losses
    short = min(YARDSTICK, len(plain))
    print(f"\nparity before training, one batch: {_verified(outcome)}\n")
    print(f"largest difference of the loss curves: {_apart(plain, swapped, len(plain)):.2e} over {len(plain)} steps")
    here = _apart(plain, swapped, short)
    itself = {name: _apart(plain, run.losses, short) for name, run in outcome.itself.items()}
    verdict = "within" if here <= 2 * max(itself.values()) else "BEYOND"
    print(f"over the first {short} steps, where rounding has grown least: {here:.2e}, {verdict} twice the largest of")
    for name, apart in itself.items():
        print(f"  PyTorch against itself, {name:24}{apart:.2e}")


def _verified(outcome: Outcome) -> str:
    """verify's verdict and the farthest row of each kind; its whole table where it is red."""
    report = outcome.verified
    if not report.ok:
        return str(report)
    lines = [str(report).partition("\n")[0]]
    for kind in dict.fromkeys(row.kind for row in report.rows):
        worst = max((row for row in report.rows if row.kind == kind), key=lambda row: row.difference)
        itself = f"PyTorch against itself {worst.yardstick:.2e}; {worst.name}"
        lines.append(f"  {kind + 's, largest':20}{worst.difference:.2e}  ({itself})")
    return "\n".join(lines)


def _apart(a: list[float], b: list[float], steps: int) -> float:
    return max(abs(x - y) for x, y in zip(a[:steps], b[:steps], strict=True))


def _runs(outcome: Outcome) -> dict:
    return {"plain": outcome.plain, "swapped": outcome.swapped}


def picture(outcome: Outcome, path: str) -> None:
    """Loss curves, test accuracy, time per step and memory kept, in one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = _runs(outcome)
    colours = ("#7f7f7f", "#d9541e")
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    curves, *bars = figure.subplots(1, 4, width_ratios=(2.6, 1, 1, 1))
    for (name, run), colour, style in zip(runs.items(), colours, ("-", "--"), strict=True):
        curves.plot(range(1, len(run.losses) + 1), run.losses, style, color=colour, label=name)
    curves.set(title="train loss", xlabel="step", ylim=(0, None))
    curves.legend()
    ratio = outcome.ratio().paired
    times = [measure.spread(run.seconds[outcome.warmup :]) for run in runs.values()]
    spans = [[(t.median - t.p20) * 1e3 for t in times], [(t.p80 - t.median) * 1e3 for t in times]]
    panels = (
        ("test accuracy, %", [run.accuracy * 100 for run in runs.values()], None),
        (f"ms per step (x{ratio.median:.2f} in pairs)", [t.median * 1e3 for t in times], spans),
        ("MB kept for backward", [run.kept_mb for run in runs.values()], None),
    )
    for axes, (title, heights, error) in zip(bars, panels, strict=True):
        drawn = axes.bar(list(runs), heights, color=colours, yerr=error, capsize=4)
        axes.bar_label(drawn, fmt="%.1f", label_type="center", color="white")
        axes.set_title(title, fontsize=10)
    where = "GPU" if outcome.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    figure.suptitle(
        f"ResNet-18 on handwritten digits, plain and after dlkern.swap ({where}, torch {torch.__version__})"
    )
    figure.savefig(path, dpi=110)
