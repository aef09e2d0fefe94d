"""Whole models: a training step or an inference, plain, swapped, frozen and by torch.compile."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkern
from dlkern import models

from . import measure
from .cases import dtype_name
from .cases.base import FORMATS
from .results import Result

#: What ``dlkern bench`` runs by default.
DEFAULT = ("torchvision:resnet18",)

PLAIN, AGAIN = "plain", "plain again"
#: Candidates that are dlkern's: swapped by the default orders or by a measured swap, and frozen.
SWAPPED = ("swapped", "measured")
OURS = (*SWAPPED, "frozen")


@dataclass(frozen=True)
class ModelCase:
    """A model (see :func:`dlkern.models.build`) on square images, in training or in inference.

    A half ``dtype`` is autocast's; parameters stay in float32.
    """

    spec: str
    training: bool
    batch: int
    image_size: int
    dtype: torch.dtype = torch.float32
    format: str = "nchw"

    def __str__(self) -> str:
        size = f"{self.batch}x{self.image_size}x{self.image_size}"
        return f"{size}-{self.format}-{'training' if self.training else 'inference'}-{dtype_name(self.dtype)}"

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "model": self.spec,
            "batch": self.batch,
            "image_size": self.image_size,
            "format": self.format,
            "training": self.training,
            "dtype": dtype_name(self.dtype),
        }


class ModelProblem:
    """The model with its images and labels on a device. A model with a ``sample_shape`` gets that instead of images.

    Raises:
        ModelError: a spec that leads to no model, or a model that does not take the images.
    """

    def __init__(self, case: ModelCase, device: torch.device) -> None:
        self.case, self.device, layout = case, device, FORMATS[case.format]
        torch.manual_seed(0)
        self.plain = models.build(case.spec).to(device).to(memory_format=layout).train(case.training)
        shape = (case.batch, *_sample_shape(self.plain, case.image_size))
        self.images = torch.randn(shape, device=device)
        if self.images.dim() == 4:
            self.images = self.images.contiguous(memory_format=layout)
        try:
            with torch.no_grad(), self.amp():
                scores = logits(copy.deepcopy(self.plain)(self.images))
        except Exception as error:
            wanted = "x".join(map(str, shape))
            raise models.ModelError(
                f"MODEL {case.spec!r}: expected a model of images, but it does not take {wanted}: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.labels = torch.randint(scores.shape[1], (case.batch, *scores.shape[2:]), device=device)

    def amp(self) -> contextlib.AbstractContextManager[Any]:
        """autocast for a half dtype."""
        half = self.case.dtype != torch.float32
        return torch.autocast(self.device.type, self.case.dtype) if half else contextlib.nullcontext()

    def candidate(self, name: str) -> nn.Module:
        """A copy of the model; "plain again" tells how far from 1 a ratio of equals is on this machine."""
        if name == PLAIN:
            return self.plain
        model = copy.deepcopy(self.plain)
        if name == "swapped":
            return dlkern.swap(model)
        if name == "measured":
            return dlkern.swap(model, sample=self.images, policy="measured")
        if name == "frozen":
            return dlkern.freeze(model)
        if name == "compile":
            torch._dynamo.reset()
            model.compile()
        return model

    def verify(self, model: nn.Module) -> str | None:
        """None where a model that no step has moved agrees with the plain one (:func:`dlkern.verify`), else why not."""
        with self.amp():
            report = dlkern.verify(self.plain, model, self.images, backward=self.case.training)
        return None if report.ok else str(report)

    def step(self, model: nn.Module) -> Callable[[], object]:
        """A step of SGD, or a forward without gradients."""
        if not self.case.training:

            def infer() -> object:
                with torch.no_grad(), self.amp():
                    return model(self.images)

            return infer
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

        def train() -> object:
            optimizer.zero_grad()
            with self.amp():
                loss = F.cross_entropy(logits(model(self.images)).float(), self.labels)
            loss.backward()
            optimizer.step()
            return loss

        return train

    def kept(self, model: nn.Module) -> int:
        """Bytes that autograd keeps for backward."""
        held: list[Any] = []

        def forward() -> None:
            with self.amp():
                held.append(model(self.images))

        return measure.saved_bytes(forward, model.parameters())


def logits(output: Any) -> Tensor:
    """The first output of models that return several (inception_v3, segmentation models)."""
    if isinstance(output, Mapping):
        return logits(next(iter(output.values())))
    return output if isinstance(output, Tensor) else logits(output[0])


def _sample_shape(model: nn.Module, image_size: int) -> tuple[int, ...]:
    """Of one sample: what the model says itself, or an image with the channels of its first convolution."""
    shape: tuple[int, ...] | None = getattr(model, "sample_shape", None)
    if shape is not None:
        return shape
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    return channels, image_size, image_size


def run(
    problem: ModelProblem,
    *,
    names: Sequence[str],
    min_seconds: float,
    min_rounds: int = 10,
    max_rounds: int = 200,
    made: Mapping[str, nn.Module] | None = None,
) -> list[Result]:
    """A row per candidate, all timed in turn with the plain model; ``made`` are those that the caller has already.

    dlkern's candidates are verified first; a red one is not timed. torch.compile's is PyTorch's own, and a peer.
    """
    case, device = problem.case, problem.device
    rows = {name: Result("model", case.spec, str(case), name, case.facts, PLAIN) for name in names}
    models_by_name: dict[str, nn.Module] = {}
    for name in (PLAIN, AGAIN, *rows):  # all of them before a step moves the plain model's parameters
        with _red(rows.get(name)):
            model = made[name] if made and name in made else problem.candidate(name)
            if name in OURS and (why := problem.verify(model)):
                raise AssertionError(why)
            models_by_name[name] = model
    steps: dict[str, Callable[[], object]] = {}
    kept: dict[str, int] = {}
    peaks: dict[str, int] = {}
    for name, model in models_by_name.items():
        with _red(rows.get(name)):
            step = problem.step(model)
            step()
            if case.training and name in (PLAIN, *OURS):
                kept[name] = problem.kept(model)
            peak = measure.peak_bytes(step, device)
            if peak is not None:
                peaks[name] = peak
            if name in SWAPPED:
                rows[name].backend = ", ".join(dict.fromkeys(r.backend for r in dlkern.report(model).swapped))
            steps[name] = step
    comparison = measure.compare(
        steps, device=device, calls=1, min_rounds=min_rounds, min_seconds=min_seconds, max_rounds=max_rounds
    )
    for name, row in rows.items():
        if row.red is None:
            row.comparison = comparison
            row.equals = comparison.ratio(AGAIN).paired.median
        row.kept = {n: size for n, size in kept.items() if n in (PLAIN, name)}
        row.peak = {n: size for n, size in peaks.items() if n in (PLAIN, name)}
    return list(rows.values())


def candidate_names(training: bool, compiled: bool) -> list[str]:
    """What ``dlkern bench`` compares with the plain model."""
    return ["swapped", *([] if training else ["frozen"]), *(["compile"] if compiled else [])]


@contextlib.contextmanager
def _red(row: Result | None) -> Iterator[None]:
    """What raises makes the row red, with the error as its reason; the plain model has no row, and must run."""
    try:
        yield
    except Exception as error:
        if row is None:
            raise
        row.red = f"{'' if isinstance(error, AssertionError) else type(error).__name__ + ': '}{error}"
