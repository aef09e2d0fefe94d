"""Models with recurrent layers train like PyTorch's: 50 steps, judged by PyTorch's distance from itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from recurrent_cases import spied
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import dlkern
import dlkern.nn
from dlkern.kernels.cpu import unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

STEPS = 50
Batch = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Classifier(nn.Module):
    """scikit-learn's digits, a row of 8 pixels a step."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(8, 24, num_layers=2, batch_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.body(images)[0][:, -1]), labels)


def digits() -> list[Batch]:
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    images, labels = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)
    return [(images[i * 32 : i * 32 + 32], labels[i * 32 : i * 32 + 32].long()) for i in range(STEPS)]


class LanguageModel(nn.Module):
    """The next character."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.body = nn.LSTM(16, 32, num_layers=2)
        self.head = nn.Linear(32, 32)

    def forward(self, text: Tensor) -> Tensor:
        scores = self.head(self.body(self.embedding(text[:-1]))[0])
        return nn.functional.cross_entropy(scores.flatten(0, 1), text[1:].flatten())


def text() -> list[Batch]:
    words = "the quick brown fox jumps over the lazy dog and runs back to the river before the night falls "
    codes = torch.tensor([ord(c) % 32 for c in words * 12])
    starts = torch.randint(0, len(codes) - 24, (STEPS, 8), generator=torch.Generator().manual_seed(1))
    return [(torch.stack([codes[s : s + 24] for s in row.tolist()], 1),) for row in starts]


class Translator(nn.Module):
    """A sequence into itself reversed: packed, bidirectional encoder; decoder that begins from its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 12)
        self.encoder = nn.GRU(12, 16, bidirectional=True)
        self.bridge = nn.Linear(32, 32)
        self.decoder = nn.LSTM(12, 32)
        self.head = nn.Linear(32, 12)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(source), lengths, enforce_sorted=False)
        _, last = self.encoder(packed)
        h = torch.tanh(self.bridge(last.transpose(0, 1).flatten(1))).unsqueeze(0)
        output, _ = self.decoder(self.embedding(target[:-1]), (h, torch.zeros_like(h)))
        return nn.functional.cross_entropy(self.head(output).flatten(0, 1), target[1:].flatten(), ignore_index=0)


def reversals() -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(STEPS):
        lengths = torch.randint(2, 6, (16,), generator=generator)
        source, target = torch.zeros(6, 16, dtype=torch.long), torch.zeros(7, 16, dtype=torch.long)
        for b, length in enumerate(lengths.tolist()):
            words = torch.randint(2, 12, (length,), generator=generator)
            source[:length, b], target[0, b], target[1 : length + 1, b] = words, 1, words.flip(0)
        found.append((source, lengths, target))
    return found


def curve(make: Callable[[], nn.Module], batches: list[Batch], *, ours: bool = False, ulp: int = 0) -> Tensor:
    """The losses of 50 steps; ``ulp`` seeds the direction in which the first weights move by one unit."""
    torch.manual_seed(0)
    model = make()
    if ulp:
        generator = torch.Generator().manual_seed(ulp)
        with torch.no_grad():
            for p in model.parameters():
                away = torch.where(torch.rand(p.shape, generator=generator) < 0.5, -torch.inf, torch.inf)
                p.copy_(torch.nextafter(p, away))
    if ours:
        dlkern.swap(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for batch in batches:
        loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("make", "batches"),
    [(Classifier, digits), (LanguageModel, text), (Translator, reversals)],
    ids=lambda f: f.__name__,
)
def test_trains_like_torch(make: Callable[[], nn.Module], batches: Callable[[], list[Batch]]) -> None:
    """At most twice as far from PyTorch's curve as PyTorch's own with one thread, or from weights an ulp away."""
    data = batches()
    torch.set_num_threads(2)
    plain = curve(make, data)
    with dlkern.backend("cpu"), spied() as calls:
        ours = curve(make, data, ours=True)
    others = [curve(make, data, ulp=seed) for seed in (1, 2)]
    torch.set_num_threads(1)
    others.append(curve(make, data))
    assert {("cpu", "forward"), ("cpu", "backward")} == set(calls)
    assert float(plain[-10:].mean()) < 0.8 * float(plain[:5].mean())
    yardstick = max(float((other - plain).norm()) for other in others)
    floor = 4 * torch.finfo(torch.float32).eps * float(plain.norm())
    assert float((ours - plain).norm()) <= max(2 * yardstick, floor)


def test_a_variant_trains() -> None:
    """A layer-norm LSTM with what only dlkern has, from a seed, twice alike."""

    def make() -> nn.Module:
        model = Classifier()
        model.body = dlkern.nn.LayerNormLSTM(
            8, 24, num_layers=2, batch_first=True, zoneout=0.1, recurrent_dropout=0.1, peephole=True,
            memory_efficient=True,
        )  # fmt: skip
        return model

    data = digits()
    first = curve(make, data)
    assert float(first[-10:].mean()) < 0.8 * float(first[:5].mean())
    assert torch.equal(first, curve(make, data))
