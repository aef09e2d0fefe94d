"""From what users write (names, torch.nn modules, functions) to the activations that kernels fuse."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from dlkern.kernels.activation import CODES, NAMES, Activation, from_name

#: torch.nn's activation modules by exact type, each with how its Activation is read off an instance.
_MODULES: dict[type[nn.Module], Callable[[nn.Module], Activation | None]] = {
    nn.Identity: lambda m: Activation("identity"),
    nn.ReLU: lambda m: Activation("relu"),
    nn.ReLU6: lambda m: Activation("relu6"),
    nn.LeakyReLU: lambda m: Activation("leaky_relu", float(m.negative_slope)),  # type: ignore[arg-type]
    nn.SiLU: lambda m: Activation("silu"),
    nn.GELU: lambda m: Activation("gelu_tanh" if m.approximate == "tanh" else "gelu"),
    nn.Hardswish: lambda m: Activation("hardswish"),
    nn.Hardsigmoid: lambda m: Activation("hardsigmoid"),
    nn.Sigmoid: lambda m: Activation("sigmoid"),
    nn.Tanh: lambda m: Activation("tanh"),
    nn.ELU: lambda m: Activation("elu", float(m.alpha)),  # type: ignore[arg-type]
}

_BY_NAME = {name: from_name(name) for name in NAMES}


def from_module(module: nn.Module) -> Activation | None:
    """The Activation that a module of torch.nn computes, or None for any other type (subclasses too)."""
    read = _MODULES.get(type(module))
    return None if read is None else read(module)


def resolve(activation: str | nn.Module | Activation) -> Activation:
    """An Activation from a name, a torch.nn module or an Activation.

    Raises:
        ValueError: an unknown name or module type; the message lists the known ones.
    """
    if isinstance(activation, Activation):
        if activation.name not in CODES:
            from_name(activation.name)  # raises
        return activation
    if isinstance(activation, str):
        return _BY_NAME.get(activation) or from_name(activation)
    found = from_module(activation) if isinstance(activation, nn.Module) else None
    if found is None:
        known = ", ".join(t.__name__ for t in _MODULES)
        raise ValueError(
            f"unknown activation {activation!r}; expected one of {', '.join(NAMES)}, or a torch.nn module of {known}"
        )
    return found
