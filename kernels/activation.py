"""The activations that kernels fuse, as plain values."""

from __future__ import annotations

from typing import NamedTuple


class Activation(NamedTuple):
    """An elementwise activation: its name and its one parameter.

    ``param`` is ``negative_slope`` for leaky_relu, ``alpha`` for elu, and unused elsewhere.
    """

    name: str
    param: float = 0.0


#: Codes shared by every backend; csrc/include/dlkern/activation.h carries the same table.
CODES: dict[str, int] = {
    "identity": 0,
    "relu": 1,
    "relu6": 2,
    "leaky_relu": 3,
    "silu": 4,
    "gelu": 5,
    "gelu_tanh": 6,
    "hardswish": 7,
    "hardsigmoid": 8,
    "sigmoid": 9,
    "tanh": 10,
    "elu": 11,
}

NAMES: tuple[str, ...] = tuple(CODES)

_DEFAULT_PARAM = {"leaky_relu": 0.01, "elu": 1.0}


def from_name(name: str) -> Activation:
    """The activation with PyTorch's default parameter; ValueError for an unknown name."""
    if name not in CODES:
        raise ValueError(f"unknown activation {name!r}; expected one of {', '.join(NAMES)}")
    return Activation(name, _DEFAULT_PARAM.get(name, 0.0))


def gradient_from_output(activation: Activation) -> bool:
    """Whether the derivative can be had from the output alone.

    A kernel that adds a residual then keeps its output for backward (which the next layer keeps
    anyway) instead of the residual.
    """
    if activation.name == "leaky_relu":
        return activation.param > 0.0
    if activation.name == "elu":
        return activation.param >= 0.0
    # not relu6 and hardsigmoid: an output that a half type rounds to the upper bound would have no gradient
    return activation.name in ("identity", "relu", "sigmoid", "tanh")
