"""The whole step of a model: run on a sample without leaving a trace, and compared between variants of the model."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dlkern import verification
from dlkern._swap.witness import Untouched
from dlkern.bench import measure

from .race import directions

#: Of the confidence interval of the whole step's ratio.
_LEVEL = 0.95
_RESAMPLES = 2000


class Bounds(NamedTuple):
    """The median of paired ratios (above 1: faster than the stock model), and its confidence interval."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.3f}x ({self.low:.3f}-{self.high:.3f})"


def bounds(ratios: Sequence[float]) -> Bounds:
    """The median with its bootstrap interval; the same for the same ratios.

    Source: Efron, "Bootstrap methods: another look at the jackknife" (1979); percentile interval.
    """
    generator = random.Random(0)
    medians = [
        measure.quantile(generator.choices(ratios, k=len(ratios)), 0.5) for _ in range(_RESAMPLES)
    ]  # fmt: skip
    tail = (1 - _LEVEL) / 2
    return Bounds(
        measure.quantile(ratios, 0.5), measure.quantile(medians, tail), measure.quantile(medians, 1 - tail)
    )  # fmt: skip


class Step:
    """Forward, and in training backward to every parameter, from a random projection of all outputs."""

    def __init__(self, model: nn.Module, sample: Any) -> None:
        parallel = torch.nn.parallel.DistributedDataParallel
        self.model = model.module if isinstance(model, parallel) else model
        self._args, self._kwargs = verification._arguments(sample)
        self.training = model.training and any(p.requires_grad for p in model.parameters())
        self._directions: list[Tensor] | None = None
        leaves = pytree.tree_leaves((self._args, self._kwargs))
        self.tensors = [t for t in leaves if isinstance(t, Tensor)]
        anchor = next((t for t in [*self.tensors, *model.parameters()]), torch.empty(0))
        self.device = next((t.device for t in self.tensors if t.is_cuda), anchor.device)

    def __call__(self) -> None:
        """One step. Gradients are not added to ``.grad``; buffers and random state move as in any step."""
        args, kwargs = verification._mapped(verification._own_copy, self._args, self._kwargs)
        if not self.training:
            with torch.no_grad():
                self.model(*args, **kwargs)
            return
        with torch.enable_grad():
            found = pytree.tree_leaves(verification._plain(self.model(*args, **kwargs)))
        ends = [t for t in found if isinstance(t, Tensor) and t.requires_grad]
        if not ends:
            raise ValueError("the model is in training mode, but no output of it has a gradient; call model.eval()")
        if self._directions is None or [d.shape for d in self._directions] != [e.shape for e in ends]:
            self._directions = directions(ends)
        wanted = [p for p in self.model.parameters() if p.requires_grad]
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.grad(ends, [*wanted, *given], self._directions, allow_unused=True)

    @contextlib.contextmanager
    def untraced(self) -> Iterator[None]:
        """Steps inside of the block leave buffers, modes, attributes and random state as they were."""
        cuda = sorted({t.get_device() for t in self.tensors if t.is_cuda})
        with verification._preserved(self.model), torch.random.fork_rng(devices=cuda), Untouched(self.model):
            yield


@dataclass
class Variant:
    """Classes of modules, and data of parameters, gradients and buffers, that make a model one of its variants."""

    classes: list[tuple[nn.Module, type]] = field(default_factory=list)
    data: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> Variant:
        """The model as it is now."""
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        tensors = [t for t in [*model.parameters(), *model.buffers(), *grads] if t.dim() in (4, 5)]
        return cls([(m, type(m)) for m in model.modules()], [(t, t.data) for t in tensors])

    def put(self) -> None:
        """Make the model this variant."""
        for module, own in self.classes:
            if type(module) is not own:
                object.__setattr__(module, "__class__", own)
        for tensor, data in self.data:
            if tensor.data_ptr() != data.data_ptr() or tensor.stride() != data.stride():
                tensor.data = data


def compare(
    step: Step, variants: Mapping[str, Variant], *, seconds: float, rounds: int, together: bool
) -> tuple[measure.Comparison, dict[str, Bounds]]:
    """Time a step of each variant in turn; the first is the baseline. ``together``: other ranks take part in steps,
    and every rank makes the same number of rounds."""
    if together:
        seconds = 0.0

    def run(variant: Variant) -> None:
        variant.put()
        step()

    with step.untraced():
        found = measure.compare(
            {name: lambda v=variant: run(v) for name, variant in variants.items()},  # type: ignore[misc]
            device=step.device,
            calls=1,
            warmup=2,
            min_seconds=seconds,
            min_rounds=rounds,
            max_rounds=rounds if together else max(rounds, 300),
        )
    stock = found.samples[found.baseline]
    ratios = {n: [a / b for a, b in zip(stock, own, strict=True)] for n, own in found.samples.items()}
    return found, {name: bounds(own) for name, own in ratios.items() if name != found.baseline}
