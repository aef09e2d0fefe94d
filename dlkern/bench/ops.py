"""One op case: parity on the very call that is timed, then the candidate against eager in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import dlkern
from dlkern import dispatch

from . import measure, roofline
from .cases import Case, Problem
from .cases.base import Unsupported, chosen
from .results import Result

#: Rounds of one comparison, at least: those that decide where a call takes long.
_ROUNDS = 7


def backends(op: str, device_type: str) -> list[str]:
    """The backends of dlkern's own that can run an op at full speed here (Triton's interpreter does not)."""
    from dlkern.kernels import triton

    has = dispatch._all_ops()[op].modules
    left_out = {"torch", "reference", *(["triton"] if triton.interpreted() else [])}
    left_out |= {"cpu"} if device_type == "cuda" else {"triton", "cuda", "numba"}
    return [n for n, why in dlkern.available_backends().items() if why is None and n in has and n not in left_out]


def run(case: Case, row: str, device: torch.device, min_seconds: float) -> Result:
    """A row of a case (see :class:`Problem`) beside eager. What raises is a red row, with the error as its reason."""
    result = Result("op", case.op, str(case), row, case.facts, "eager", target=case.target)
    if not row.startswith("dlkern"):
        result.target = None
    try:
        measured(Problem(case, device), row, min_seconds, result)
    except Unsupported as error:
        result.left_out = str(error)
    except Exception as error:
        result.comparison = None
        result.red = f"{'' if isinstance(error, AssertionError) else type(error).__name__ + ': '}{error}"
    return result


def measured(
    problem: Problem, row: str, min_seconds: float, result: Result, then: Callable[[Any], object] | None = None
) -> None:
    """Fill in ``result``; ``then`` is called with the row's call at the end, while its backend is still forced.

    Raises:
        AssertionError: parity is red; nothing was timed.
        Unsupported: the row's backend is forced and cannot run the case.
    """
    device = problem.device
    eager_module = problem.module("eager")
    eager = problem.step(eager_module)
    with problem.candidate(row) as (module, step):
        with chosen(problem.case.op) as names:
            problem.check(step, eager)
        result.backend = names[0] if names else ""
        pairs = {"eager": (eager_module, eager), row: (module, step)}
        for name, (candidate, call) in pairs.items():
            if problem.case.training and name != "compile":  # its saved tensors are not autograd's
                result.kept[name] = measure.saved_bytes(problem.forward(candidate), candidate.parameters())
            peak = measure.peak_bytes(call, device)
            if peak is not None:
                result.peak[name] = peak
        if row != "eager":
            result.comparison = _compared({"eager": eager, row: step}, device, min_seconds)
            result.roofline = roofline.facts(problem.case, result.comparison.time(row).median, device)
        if then is not None:
            then(step)


def _compared(steps: dict[str, Callable[[], object]], device: torch.device, min_seconds: float) -> measure.Comparison:
    """The calls in turn: on a GPU as replays of CUDA graphs, on a cold cache as in a whole step."""
    if device.type != "cuda":
        return measure.compare(steps, device=device, min_seconds=min_seconds, min_rounds=_ROUNDS)
    replays = {name: measure.graphed(step) for name, step in steps.items()}
    return measure.compare(replays, device=device, min_seconds=min_seconds, cold_cache=True)
