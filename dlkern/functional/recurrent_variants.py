"""Checks of what the recurrent layers take beyond torch.nn's: activations, norms, peepholes, probabilities."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dlkern.kernels.reference.recurrent_variants import ACTIVATIONS
from dlkern.ops.recurrent import Family, Weights
from dlkern.ops.recurrent_layers import STOCK, Variant

from . import recurrent_checks as checks

#: Of one direction of one layer, in the order in which they are given.
NORMS = {"lstm": ("norm_ih", "norm_hh", "norm_c", "norm_c_bias"), "gru": ("norm_ih", "norm_hh"),
         "rnn": ("norm_ih", "norm_hh")}  # fmt: skip


def variant(
    activation: str,
    recurrent_activation: str,
    zoneout: float,
    recurrent_dropout: float,
    memory_efficient: bool = False,
    all_cells: bool = False,
) -> Variant:
    """The options of a variant.

    Raises:
        ValueError: an unknown activation, or what is no probability.
    """
    if (
        activation == "tanh"
        and recurrent_activation == "sigmoid"
        and zoneout == recurrent_dropout == 0.0
        and not (memory_efficient or all_cells)
    ):
        return STOCK  # (the short way, for calls of one step)
    for name, value in (("activation", activation), ("recurrent_activation", recurrent_activation)):
        if value not in ACTIVATIONS:
            raise ValueError(f"{name}: expected one of {', '.join(ACTIVATIONS)}, got {value!r}")
    for name, share in (("zoneout", zoneout), ("recurrent_dropout", recurrent_dropout)):
        checks.check_probability(name, share)
    return Variant(
        activation, recurrent_activation, float(zoneout), float(recurrent_dropout), bool(memory_efficient),
        bool(all_cells),
    )  # fmt: skip


def with_extras(
    op: Family, x: Tensor, layers: list[Weights], layer_norm: Sequence[Tensor], peephole: Sequence[Tensor]
) -> list[Weights]:
    """The weights with those of norms and peepholes, by layer and direction.

    Raises:
        ValueError: a count or a shape that does not fit.
        TypeError, RuntimeError: another dtype or device than x's.
    """
    if not layer_norm and not peephole:
        return layers
    names = NORMS[op.name]
    _check_count("layer_norm", layer_norm, len(names), len(layers))
    _check_count("peephole", peephole, 1, len(layers))
    width = layers[0].hh.size(0)
    hidden = width // op.gates
    sizes = {"norm_ih": width, "norm_hh": width, "norm_c": hidden, "norm_c_bias": hidden, "peephole": 3 * hidden}
    found = []
    for index, weights in enumerate(layers):
        given = dict(zip(names, layer_norm[index * len(names) : (index + 1) * len(names)], strict=False))
        if peephole:
            given["peephole"] = peephole[index]
        for name, value in given.items():
            checks.check_state(f"{name} of layer and direction {index}", value, x, (sizes[name],))
        found.append(weights._replace(**given))
    return found


def _check_count(name: str, given: Sequence[Tensor], each: int, count: int) -> None:
    if given and len(given) != each * count:
        raise ValueError(
            f"{name}: expected {each} for each of {count} layers and directions, or none; got {len(given)} tensors"
        )
