"""``dlkern tune``: measure a model's sites, or the suite's cases, and remember the answers."""

from __future__ import annotations

import torch

import dlkern
from dlkern._swap import Report
from dlkern.bench import cases
from dlkern.bench.cases.base import Problem
from dlkern.bench.models import ModelCase, ModelProblem

from . import answers, cache, progress, race, record
from .answers import Answer, Key


def model(
    spec: str, *, training: bool, batch: int, image_size: int, dtype: str, device: torch.device, any_format: bool
) -> Report:
    """Measure a model on random images; the report of its swap.

    Raises:
        ModelError: a spec that leads to no model, or a model that does not take images.
    """
    problem = ModelProblem(ModelCase(spec, training, batch, image_size, cases.DTYPES[dtype]), device)
    with problem.amp(), cache.measuring():
        dlkern.swap(
            problem.plain,
            sample=problem.images,
            policy="measured",
            memory_format="auto" if any_format else None,
        )
    return dlkern.report(problem.plain)


def suite(device: torch.device) -> int:
    """Measure the quick cases of every op in ``dlkern bench``; how many calls were raced."""
    wanted = [case for op in cases.OPS for case in cases.of(op, device.type) if case.quick]
    answers.put(cache.load(device.type))
    fresh: dict[Key, Answer] = {}
    raced = 0
    with progress.bar() as say:
        for index, case in enumerate(wanted):
            say(index, len(wanted), f"{case.op} {case}")
            problem = Problem(case, device)
            with record.recording() as recorded, problem.candidate("dlkern") as (_, step):
                step()
            for call in recorded.calls:
                outcome = race.race(call)
                raced += outcome.raced
                answers.put(outcome.answers.items())
                fresh |= outcome.answers
    cache.store(device.type, fresh.items())
    return raced


def checked_device(name: str | None) -> torch.device:
    """The device asked for, by default the GPU where there is one.

    Raises:
        ValueError: "cuda" where torch sees no CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device (dlkern info prints what it sees)")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
