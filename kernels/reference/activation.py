"""Activations and their derivatives in plain PyTorch, differentiable any number of times.

Derivatives take the values that PyTorch's own backward takes at the kinks and at NaN.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation import Activation


def forward(z: Tensor, activation: Activation) -> Tensor:
    """act(z), elementwise."""
    name, param = activation
    if name == "identity":
        return z
    if name == "relu":
        return F.relu(z)
    if name == "relu6":
        return F.relu6(z)
    if name == "leaky_relu":
        return F.leaky_relu(z, param)
    if name == "silu":
        return F.silu(z)
    if name == "gelu":
        return F.gelu(z)
    if name == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if name == "hardswish":
        return F.hardswish(z)
    if name == "hardsigmoid":
        return F.hardsigmoid(z)
    if name == "sigmoid":
        return torch.sigmoid(z)
    if name == "tanh":
        return torch.tanh(z)
    if name == "elu":
        return F.elu(z, param)
    raise ValueError(f"unknown activation {name!r}")


_INPLACE = {"relu": torch.relu_, "sigmoid": torch.sigmoid_, "tanh": torch.tanh_}


def forward_inplace(z: Tensor, activation: Activation) -> Tensor:
    """act(z) written over z where PyTorch's own backward allows it (it keeps the output), else a new tensor."""
    write = _INPLACE.get(activation.name)
    return forward(z, activation) if write is None else write(z)


def derivative(z: Tensor, activation: Activation) -> Tensor:
    """act'(z), elementwise, from the activation's input."""
    name, param = activation
    one, zero = torch.ones_like(z), torch.zeros_like(z)
    if name == "identity":
        return one
    if name == "relu":
        return torch.where(z <= 0, zero, one)
    if name == "relu6":
        return torch.where((z <= 0) | (z >= 6), zero, one)
    if name == "leaky_relu":
        return torch.where(z > 0, one, torch.full_like(z, param))
    if name == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if name == "gelu":
        cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
        return cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    if name == "gelu_tanh":
        scale = math.sqrt(2 / math.pi)
        t = torch.tanh(scale * (z + 0.044715 * z * z * z))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * scale * (1 + 3 * 0.044715 * z * z)
    if name == "hardswish":
        return torch.where(z <= -3, zero, torch.where(z < 3, z / 3 + 0.5, one))
    if name == "hardsigmoid":
        return torch.where((z > -3) & (z < 3), one / 6, zero)
    if name == "sigmoid":
        s = torch.sigmoid(z)
        return s * (1 - s)
    if name == "tanh":
        t = torch.tanh(z)
        return 1 - t * t
    if name == "elu":
        # exp of the clamped input: the branch not taken must not overflow into a NaN gradient
        return torch.where(z > 0, one, param * torch.exp(torch.clamp(z, max=0)))
    raise ValueError(f"unknown activation {name!r}")


def derivative_from_output(y: Tensor, activation: Activation) -> Tensor:
    """act'(z) from y = act(z), for activations where ``gradient_from_output`` holds."""
    name, param = activation
    one, zero = torch.ones_like(y), torch.zeros_like(y)
    if name == "identity":
        return one
    if name == "relu":
        return torch.where(y <= 0, zero, one)
    if name == "relu6":
        return torch.where((y <= 0) | (y >= 6), zero, one)
    if name == "leaky_relu":
        return torch.where(y > 0, one, torch.full_like(y, param))
    if name == "hardsigmoid":
        return torch.where((y > 0) & (y < 1), one / 6, zero)
    if name == "sigmoid":
        return y * (1 - y)
    if name == "tanh":
        return 1 - y * y
    if name == "elu":
        return torch.where(y > 0, one, y + param)
    raise ValueError(f"the derivative of {name!r} cannot be had from its output")
