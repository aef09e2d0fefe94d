"""Two trainings in lockstep: every batch is a step of the plain model and a step of the swapped one."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import dlkern
from dlkern.bench import measure

from .data import Digits

WARMUP = 3  # first steps left out of the times: memory is allocated, kernels are chosen
PEAK_RATE = 0.02
YARDSTICK = 5  # first steps over which PyTorch is compared with itself


@dataclass
class Run:
    """One model and its training."""

    model: nn.Module
    steps: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    kept_mb: float = 0.0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=PEAK_RATE, momentum=0.9)
        rise = max(1, self.steps // 6)
        # up over the first sixth, then down to 0: both runs settle, and end near each other
        self.rate = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / rise, 1.0) * (1 - step / self.steps)
        )

    def step(self, images: Tensor, labels: Tensor, watch: measure.Stopwatch) -> None:
        watch.start()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        watch.stop()
        self.rate.step()
        self.seconds += watch.seconds()
        self.losses.append(loss.item())


@dataclass
class Outcome:
    """All that the demo measured."""

    plain: Run
    swapped: Run
    itself: dict[str, Run]
    verified: Any
    report: Any
    batch: int
    device: torch.device
    warmup: int

    def ratio(self) -> measure.Ratio:
        """Plain time / swapped time, the steps after the warm-up."""
        return measure.ratio(self.plain.seconds[self.warmup :], self.swapped.seconds[self.warmup :])


def resnet18() -> nn.Module:
    """torchvision's ResNet-18 with a stem for 28x28 images of one channel, and ten classes."""
    from torchvision.models import resnet18 as build

    model = build(weights=None, num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 3, stride=1, padding=1, bias=False)
    return model


def side_by_side(digits: Digits, epochs: int, seed: int, device: torch.device) -> Outcome:
    """Train a plain and a swapped ResNet-18 from the same weights on the same batches."""
    torch.manual_seed(seed)
    steps = epochs * (len(digits.train_labels) // digits.batch)
    plain = Run(resnet18().to(device), steps)
    swapped = Run(dlkern.swap(copy.deepcopy(plain.model)), steps)
    images, labels = digits.train_images.to(device), digits.train_labels.to(device)

    verified = dlkern.verify(copy.deepcopy(plain.model), copy.deepcopy(swapped.model), images[: min(16, digits.batch)])
    for run in (plain, swapped):
        run.kept_mb = _kept_mb(copy.deepcopy(run.model), images[: digits.batch])
    itself = {
        "input moved by one ulp": Run(copy.deepcopy(plain.model), steps),
        "channels_last": Run(copy.deepcopy(plain.model).to(memory_format=torch.channels_last), steps),
    }
    outcome = Outcome(
        plain, swapped, itself, verified, None, digits.batch, device, WARMUP if steps >= 3 * WARMUP else 0
    )

    with _progress() as progress:
        task = progress.add_task("training", total=steps, losses="", ratio="")
        for index, batch in enumerate(_batches(len(labels), digits.batch, epochs, seed)):
            _lockstep(outcome, index, images[batch], labels[batch])
            losses = f"loss {plain.losses[-1]:.4f} plain, {swapped.losses[-1]:.4f} swapped"
            ratio = f"time x{outcome.ratio().paired.median:.2f}" if index >= outcome.warmup else ""
            progress.update(task, advance=1, losses=losses, ratio=ratio)
    for run in (plain, swapped):
        run.accuracy = _accuracy(run.model, digits.test_images.to(device), digits.test_labels.to(device))
    outcome.report = dlkern.report(swapped.model)
    return outcome


def _lockstep(outcome: Outcome, index: int, images: Tensor, labels: Tensor) -> None:
    runs = {"plain": outcome.plain, "swapped": outcome.swapped}
    watch = measure.Stopwatch(outcome.device)
    for name in measure.order(list(runs), index):
        runs[name].step(images, labels, watch)
    if index < YARDSTICK:
        generator = torch.Generator().manual_seed(index)
        signs = torch.randint(0, 2, images.shape, generator=generator).to(images) - 0.5
        moved = torch.nextafter(images, signs * float("inf"))
        outcome.itself["input moved by one ulp"].step(moved, labels, watch)
        outcome.itself["channels_last"].step(images.contiguous(memory_format=torch.channels_last), labels, watch)


def _batches(count: int, batch: int, epochs: int, seed: int) -> list[Tensor]:
    """The indices of every batch of every epoch; what is left over at an epoch's end is not used."""
    generator = torch.Generator().manual_seed(seed + 1)
    found: list[Tensor] = []
    for _ in range(epochs):
        shuffled = torch.randperm(count, generator=generator)
        found += shuffled[: count // batch * batch].split(batch)
    return found


def _kept_mb(model: nn.Module, images: Tensor) -> float:
    held: list[Tensor] = []
    kept = measure.saved_bytes(lambda: held.append(model(images)), model.parameters())
    return kept / 1e6


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(200), labels.split(200), strict=True)
        )
    return right / len(labels)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TextColumn("{task.fields[ratio]}"),
        TimeRemainingColumn(),
        console=Console(),
    )
