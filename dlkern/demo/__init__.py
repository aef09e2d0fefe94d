"""``dlkern demo``: one ResNet-18 trained twice on handwritten digits, plain and swapped, side by side."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass

import torch


class DemoError(RuntimeError):
    """The demo cannot run here; the message says what to do."""


@dataclass(frozen=True)
class Settings:
    """What ``dlkern demo`` is asked for; None leaves the choice to the demo."""

    epochs: int = 1
    samples: int | None = None
    seed: int = 0
    threads: int | None = None
    out: str = "dlkern-demo.png"
    device: str | None = None


def run(settings: Settings) -> int:
    """Run the demo: print what was measured, save the picture. Returns the exit code (1: parity is red).

    Raises:
        DemoError: an extra package or the device asked for is missing.
        ValueError: settings that leave nothing to train on, or a picture's path that cannot be written.
    """
    for name in ("torchvision", "rich", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise DemoError(f'{name} does not import ({error}); pip install "dlkern[demo]"') from error
    folder = os.path.dirname(os.path.abspath(settings.out))
    if not os.path.isdir(folder):
        raise ValueError(f"--out {settings.out}: there is no folder {folder}")
    if not settings.out.lower().endswith((".png", ".pdf", ".svg")):
        raise ValueError(f"--out {settings.out}: expected a name that ends in .png, .pdf or .svg")
    device = _device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)

    from . import data, show, train

    digits = data.load(settings.samples, settings.seed)
    show.opening(settings, device, digits)
    outcome = train.side_by_side(digits, settings.epochs, settings.seed, device)
    show.closing(outcome)
    show.picture(outcome, settings.out)
    print(f"picture: {os.path.abspath(settings.out)}")
    if not outcome.verified.ok:
        print("PARITY IS RED: the swapped model differs from the plain one by more than PyTorch from itself")
        return 1
    return 0


def _device(wanted: str | None) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise DemoError("--device cuda: torch sees no CUDA device (dlkern info prints what it sees)")
    return torch.device(wanted or ("cuda" if available else "cpu"))
