"""What LSTM, GRU, RNN and their cells share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def flat_weights(module: nn.RNNBase) -> list[Tensor]:
    """The weights in PyTorch's order, read at the call: whatever put them there (functional_call, parametrizations)."""
    table = module._parameters
    return [table[name] if name in table else getattr(module, name) for name in module._flat_weights_names]  # type: ignore[misc]


def cell_weights(module: nn.RNNCellBase) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """weight_ih, weight_hh, bias_ih and bias_hh of a cell."""
    table = module._parameters
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return tuple(table[name] if name in table else getattr(module, name) for name in names)  # type: ignore[return-value]


def options(module: nn.RNNBase) -> dict[str, Any]:
    """The keyword arguments that a sequence's function takes from its module."""
    return {
        "num_layers": module.num_layers,
        "bidirectional": module.bidirectional,
        "batch_first": module.batch_first,
        "dropout": module.dropout,
        "training": module.training,
    }
