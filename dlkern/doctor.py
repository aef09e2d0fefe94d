"""A live check of each backend that claims to be available: ``dlkern doctor``.

``dlkern info`` tells what a backend says of itself; here every op that it has runs on a small case, forward and
backward, and is held to the parity rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from . import dispatch, functional
from . import nn as layers
from .bench import cases
from .bench.cases.base import Case, Problem, Unsupported, chosen
from .tuning import race, record
from .tuning.answers import Trial

#: What to do where a backend is broken.
_REMEDIES = {
    "cpu": "build the extension for this machine again: pip install --force-reinstall --no-cache-dir dlkern "
    "(in a clone: pip install -e .)",
    "triton": "install the Triton that this torch asks for (pip show torch | grep Requires), or remove ~/.triton/cache",
    "cuda": "build it again with this machine's nvcc on the path, or pip install --force-reinstall cupy-cuda12x / 13x",
    "numba": "pip install --upgrade numba-cuda",
}


class Finding(NamedTuple):
    """One backend's op on one case. ``state`` is "ok", "broken" or "not run"; ``why`` says more."""

    backend: str
    op: str
    case: str
    state: str
    why: str = ""


def examine(device: torch.device | None = None, backends: tuple[str, ...] = ()) -> Iterator[Finding]:
    """Run what can run here, on the GPU where there is one; a finding as soon as it is there.

    Args:
        backends: only these; by default all, but for emulated ones (Triton's interpreter, numba's simulator).

    Raises:
        ValueError: an unknown backend.
    """
    where = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in backends:
        if name not in dispatch.BACKENDS:
            raise ValueError(f"--backend {name}: expected one of {', '.join(dispatch.BACKENDS)}")
    for backend in backends or dispatch.BACKENDS:
        if backend in ("torch", "reference") and not backends:
            continue
        reason = dispatch.unavailable(backend)
        if reason is not None:
            yield Finding(backend, "", "", "not run", reason)
            continue
        device_of = torch.device("cpu") if backend == "cpu" else where
        if backend not in ("cpu", "torch", "reference") and device_of.type == "cpu" and not backends:
            yield Finding(backend, "", "", "not run", "it is emulated here; dlkern doctor --backend runs it, slowly")
            continue
        for op in dispatch.operations():
            if backend in dispatch.operation(op).modules:
                yield from (_examine if op in cases.OPS else _examine_call)(backend, op, device_of)


def _examine(backend: str, op: str, device: torch.device) -> Iterator[Finding]:
    ran = 0
    for training in (True, False):
        for case in sorted(_small(op, device, training), key=lambda c: torch.Size(c.shape).numel()):
            try:
                _run(case, backend, device)
            except Unsupported:
                continue  # another case may suit it
            except Exception as error:
                yield Finding(backend, op, str(case), "broken", f"{type(error).__name__}: {error}")
            else:
                yield Finding(backend, op, str(case), "ok")
            ran += 1
            break
    if not ran:
        yield Finding(backend, op, "", "not run", "it supports none of the cases of dlkern bench")


def _examine_call(backend: str, op: str, device: torch.device) -> Iterator[Finding]:
    """An op without cases in ``dlkern bench``: a small call of its layer, recorded, and made again."""
    if op not in _CALLS:
        yield Finding(backend, op, "", "not run", "it has no small case")
        return
    for grad in (True, False):
        with record.recording() as recorded, torch.set_grad_enabled(grad):
            _CALLS[op](device)
        call = recorded.calls[-1]
        name = f"{call.where}-{'training' if grad else 'inference'}"
        trial = Trial({}, by_op={op: backend})
        try:
            judge = race.Judge(call)
            reached = judge.check(trial)
            supported = [dispatch.unsupported(op, backend, request) for key, request in reached.items() if key.op == op]
            if any(supported):
                yield Finding(backend, op, name, "not run", str(next(filter(None, supported))))
                continue
        except Exception as error:
            yield Finding(backend, op, name, "broken", f"{type(error).__name__}: {error}")
        else:
            yield Finding(backend, op, name, "ok")


def _recurrent(kind: type[nn.Module]) -> Callable[[torch.device], object]:
    return lambda device: kind(24, 32, device=device)(torch.randn(9, 3, 24, device=device))


def _attention(device: torch.device) -> object:
    qkv = torch.randn(3, 2, 2, 17, 32, device=device, requires_grad=torch.is_grad_enabled())
    return functional.attention(*qkv.unbind(0))


#: A small call of each op that has no cases in ``dlkern bench``.
_CALLS: dict[str, Callable[[torch.device], object]] = {
    "lstm": _recurrent(layers.LSTM),
    "gru": _recurrent(layers.GRU),
    "rnn": _recurrent(layers.RNN),
    "attention": _attention,
}


def _small(op: str, device: torch.device, training: bool) -> list[Case]:
    found = cases.of(op, device.type, batch=2, dtypes=(torch.float32,))
    return [case for case in found if case.training is training]


def _run(case: Case, backend: str, device: torch.device) -> None:
    """Raises AssertionError where the numbers are wrong, Unsupported where the backend cannot run the case."""
    problem = Problem(case, device)
    eager = problem.step(problem.module("eager"))
    with problem.candidate(f"dlkern-{backend}") as (_, step), chosen(case.op) as names:
        problem.check(step, eager)
    if backend not in names:
        raise AssertionError(f"{backend} was forced, but {', '.join(names) or 'nothing of dlkern'} ran")


def remedy(backend: str) -> str:
    """What to do where a backend is broken."""
    return (
        f"{_REMEDIES.get(backend, 'report it')}; until then DLKERN_BACKEND=torch runs PyTorch's own ops, and "
        'dlkern.swap(model, sample=batch, policy="measured") leaves it out'
    )


def render(findings: list[Finding]) -> str:
    """The findings as a table for people, with what to do."""
    width = max(len(f"{f.backend} {f.op}") for f in findings)
    lines = []
    for f in findings:
        first = f.why.splitlines()[0] if f.why else ""
        lines.append(f"{f'{f.backend} {f.op}':{width}}  {f.state:8}{f.case}{': ' if f.case and first else ''}{first}")
    broken = list(dict.fromkeys(f.backend for f in findings if f.state == "broken"))
    lines += [f"\n{backend} is broken here: {remedy(backend)}" for backend in broken]
    return "\n".join([*lines, *([] if broken else ["\nevery backend that is available gives right numbers"])])
