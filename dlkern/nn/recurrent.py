"""What LSTM, GRU, RNN and their cells share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dlkern.functional import recurrent_variants

#: What torch.nn's layers do not have, with what they do.
_DEFAULTS: dict[str, Any] = {
    "activation": "tanh",
    "recurrent_activation": "sigmoid",
    "layer_norm": False,
    "peephole": False,
    "zoneout": 0.0,
    "recurrent_dropout": 0.0,
    "return_all_cells": False,
    "memory_efficient": False,
}


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
    found = {
        "num_layers": module.num_layers,
        "bidirectional": module.bidirectional,
        "batch_first": module.batch_first,
        "dropout": module.dropout,
        "training": module.training,
    }
    return found | _variant(module) if "_varied" in module.__dict__ else found


def cell_options(module: nn.RNNCellBase) -> dict[str, Any]:
    """The keyword arguments that a cell's function takes from its module."""
    return {**_variant(module), "training": module.training} if "_varied" in module.__dict__ else {}


def _variant(module: nn.Module) -> dict[str, Any]:
    found = dict(module._varied)  # type: ignore[arg-type]
    for name, names in module._extra_names.items():  # type: ignore[union-attr,operator]
        found[name] = [getattr(module, each) for each in names]
    return found


class Varied(nn.Module):
    """The variants' part of a layer's constructor; a layer that is torch.nn's own has none of these attributes.

    Args:
        changed: options of ``_DEFAULTS``; Parameters of norms and peepholes are named as those of torch.nn's layers
            ("norm_ih_l0_reverse"), a cell's without a layer.
    """

    def _vary(self, op: str, **changed: Any) -> None:
        recurrent_variants.variant(
            *(changed.get(name, _DEFAULTS[name]) for name in ("activation", "recurrent_activation", "zoneout",
                                                              "recurrent_dropout"))
        )  # fmt: skip
        changed = {name: value for name, value in changed.items() if value != _DEFAULTS[name]}
        if not changed:
            return
        norms, peephole = changed.pop("layer_norm", False), changed.pop("peephole", False)
        self._varied = changed
        self._extra_names: dict[str, list[str]] = {}
        for ending in self._endings():
            weight: Any = getattr(self, f"weight_hh{ending}")
            width, hidden = weight.size(0), int(self.hidden_size)  # type: ignore[arg-type]
            kinds = {name: width if name in ("norm_ih", "norm_hh") else hidden for name in recurrent_variants.NORMS[op]}
            for group, wanted, sizes in (
                ("layer_norm", norms, kinds),
                ("peephole", peephole, {"peephole": 3 * hidden}),
            ):
                for name, size in sizes.items() if wanted else ():
                    self.register_parameter(f"{name}{ending}", nn.Parameter(weight.new_empty(size)))
                    self._extra_names.setdefault(group, []).append(f"{name}{ending}")
        self._reset_extras()

    def _endings(self) -> list[str]:
        if isinstance(self, nn.RNNCellBase):
            return [""]
        return [name.removeprefix("weight_hh") for name in self._flat_weights_names if name.startswith("weight_hh")]  # type: ignore[union-attr,operator]

    def _reset_extras(self) -> None:
        bound = float(self.hidden_size) ** -0.5  # type: ignore[arg-type]
        with torch.no_grad():
            for names in self._extra_names.values():
                for name in names:
                    parameter: Any = getattr(self, name)
                    if name.startswith("peephole"):
                        parameter.uniform_(-bound, bound)
                    else:
                        parameter.fill_(0.0 if name.startswith("norm_c_bias") else 1.0)

    def reset_parameters(self) -> None:
        """PyTorch's initial weights; norms of 1 and their biases of 0, peepholes like weights."""
        super().reset_parameters()  # type: ignore[misc]
        if "_extra_names" in self.__dict__:
            self._reset_extras()

    def extra_repr(self) -> str:
        """PyTorch's, and what is not PyTorch's."""
        words = [super().extra_repr()]
        if "_varied" in self.__dict__:
            words += [f"{name}={value!r}" for name, value in self._varied.items()]
            words += [f"{name}=True" for name in self._extra_names]
        return ", ".join(words)
