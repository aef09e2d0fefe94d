"""Classifiers of sequences by torch.nn's recurrent layers, for ``--model dlkern.bench.sequences:lstm``."""

from __future__ import annotations

from torch import Tensor, nn


class Classifier(nn.Module):
    """Two recurrent layers of 256 units; classes from the last step. x: (N, steps, features) to (N, 10)."""

    sample_shape = (64, 64)

    def __init__(self, layers: nn.RNNBase) -> None:
        super().__init__()
        self.layers = layers
        self.head = nn.Linear(layers.hidden_size, 10)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.layers(x)
        return self.head(outputs[:, -1])


def lstm() -> nn.Module:
    return Classifier(nn.LSTM(64, 256, num_layers=2, batch_first=True))


def gru() -> nn.Module:
    return Classifier(nn.GRU(64, 256, num_layers=2, batch_first=True))
