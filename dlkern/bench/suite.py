"""What ``dlkern bench`` runs: which cases, in which order, with a line of progress for each."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dlkern import dispatch
from dlkern.models import ModelError

from . import cases, models, ops
from .results import Result


class BenchError(RuntimeError):
    """The suite cannot run here; the message says what to do."""


@dataclass(frozen=True)
class Settings:
    """What ``dlkern bench`` is asked for. Without ``ops`` and ``models``: the quick suite of both."""

    ops: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    every: bool = False
    only: str | None = None
    training: bool | None = None
    dtype: str | None = None
    batch: int | None = None
    image_size: int | None = None
    backends: tuple[str, ...] = ()
    compile: bool | None = None
    device: str | None = None
    min_seconds: float | None = None
    json: str | None = None
    csv: str | None = None
    plot: str | None = None
    html: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """What was asked for, without where the results went."""
        return {n: v for n, v in asdict(self).items() if n not in ("json", "csv", "plot", "html")}


@dataclass
class Plan:
    """The cases that the settings ask for, with each case's rows; models are built already."""

    device: torch.device
    ops: list[tuple[cases.Case, str]]
    models: list[models.ModelProblem]
    compiled: bool
    left_out: list[str]

    def __len__(self) -> int:
        return len(self.ops) + len(self.models)


def plan(settings: Settings) -> Plan:
    """What will run.

    Raises:
        BenchError: the device asked for is missing.
        ValueError: an unknown op, model, dtype or backend, a path that cannot be written, or settings without a case.
    """
    device = checked(settings)
    compiled = device.type == "cuda" if settings.compile is None else settings.compile
    asked = settings.ops or settings.models
    names = settings.ops if asked else tuple(cases.OPS)
    wanted = [case for name in dict.fromkeys(names) for case in select(settings, name, device.type)]
    pairs = [(case, row) for case in wanted for row in rows(settings, case.op, device.type, compiled)]
    problems, left_out = [], []
    if settings.only is None:
        specs = settings.models if asked else models.DEFAULT
        for case in model_cases(settings, specs, device.type):
            try:
                problems.append(models.ModelProblem(case, device))
            except ModelError as error:
                if asked:
                    raise
                left_out.append(str(error))  # torchvision is not there, say: the ops still run
    if not pairs and not problems:
        why = f"; the models are left out: {left_out[0]}" if left_out else ""
        raise ValueError(f"no case is left to run: dlkern bench --list shows all of them{why}")
    return Plan(device, pairs, problems, compiled, list(dict.fromkeys(left_out)))


def select(settings: Settings, op: str, device_type: str, every: bool = False) -> list[cases.Case]:
    """The cases of an op that the settings ask for: the quick ones, or (``every``) all that fit."""
    dtypes = None if settings.dtype is None else (cases.DTYPES[settings.dtype],)
    found = cases.of(op, device_type, batch=settings.batch, dtypes=dtypes)
    if settings.training is not None:
        found = [case for case in found if case.training == settings.training]
    if settings.only is not None:
        return [case for case in found if settings.only in str(case)]
    return found if every or settings.every else [case for case in found if case.quick]


def rows(settings: Settings, op: str, device_type: str, compiled: bool) -> list[str]:
    """The rows of an op's cases: what dispatch chooses, and on a GPU, or where asked for, forced backends."""
    forced = list(settings.backends)
    if not forced and device_type == "cuda":
        forced = ops.backends(op, device_type)
    has = dispatch._all_ops()[op].modules if op in dispatch._all_ops() else {}
    return [*(["compile"] if compiled else []), "dlkern", *(f"dlkern-{name}" for name in forced if name in has)]


def model_cases(settings: Settings, specs: tuple[str, ...], device_type: str) -> list[models.ModelCase]:
    """Each model in training and in inference, as far as asked for."""
    cuda = device_type == "cuda"
    dtype = cases.DTYPES[settings.dtype or ("bfloat16" if cuda else "float32")]
    batch, size = settings.batch or (64 if cuda else 8), settings.image_size or (224 if cuda else 96)
    modes = (True, False) if settings.training is None else (settings.training,)
    layout = "channels_last" if cuda else "nchw"
    return [
        models.ModelCase(spec, training, batch, size, dtype, layout)
        for spec in dict.fromkeys(specs)
        for training in modes
    ]


def run(settings: Settings, plan: Plan) -> Iterator[Result]:
    """Run the plan; each row as soon as it is there."""
    count = len(plan)
    least = settings.min_seconds
    if least is None:
        least = 0.3 if plan.device.type == "cuda" else 1.0
    for index, (case, row) in enumerate(plan.ops):
        _progress(index, count, f"{case.op} {case}: {row}")
        yield ops.run(case, row, plan.device, least)
    while plan.models:  # each model is let go once it is done
        problem = plan.models.pop(0)
        _progress(count - len(plan.models) - 1, count, f"{problem.case.spec} {problem.case}")
        names = models.candidate_names(problem.case.training, plan.compiled)
        yield from models.run(problem, names=names, min_seconds=least)
        del problem
    _progress_done()


def _progress(index: int, count: int, text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[2K[{index + 1}/{count}] {text}"[:200], end="", file=sys.stderr, flush=True)
    else:
        print(f"[{index + 1}/{count}] {text}", file=sys.stderr, flush=True)


def _progress_done() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------- checks
def _device(wanted: str | None) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise BenchError("--device cuda: torch sees no CUDA device (dlkern info prints what it sees)")
    return torch.device(wanted or ("cuda" if available else "cpu"))


def checked(settings: Settings) -> torch.device:
    """The device that the settings ask for, once their words are known and their paths can be written."""
    wanted = ["rich", *(["matplotlib"] if settings.plot else []), *(["plotly"] if settings.html else [])]
    for name in wanted:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise BenchError(f'{name} does not import ({error}); pip install "dlkern[bench]"') from error
    if settings.dtype is not None and settings.dtype not in cases.DTYPES:
        raise ValueError(f"--dtype {settings.dtype}: expected one of {', '.join(cases.DTYPES)}")
    for op in settings.ops:
        if op not in cases.OPS:
            raise ValueError(f"--op {op}: expected one of {', '.join(cases.OPS)}")
    for name in settings.backends:
        if name not in dispatch.BACKENDS:
            raise ValueError(f"--backend {name}: expected one of {', '.join(dispatch.BACKENDS)}")
        if (why := dispatch.unavailable(name)) is not None:
            raise ValueError(f"--backend {name}: not available here: {why}")
    for flag, path, endings in (
        ("--json", settings.json, (".json",)),
        ("--csv", settings.csv, (".csv",)),
        ("--plot", settings.plot, (".png", ".pdf", ".svg")),
        ("--html", settings.html, (".html",)),
    ):
        if path is None:
            continue
        if not path.lower().endswith(endings):
            raise ValueError(f"{flag} {path}: expected a name that ends in {' or '.join(endings)}")
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(folder):
            raise ValueError(f"{flag} {path}: there is no folder {folder}")
    return _device(settings.device)
