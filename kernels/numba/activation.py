"""Activations and their gradients as device functions; the definitions are kernels/reference/activation.py.

A literal is float64 on the device, and would make float64 of everything: constants are made in the type that a kernel
computes in. exp takes no positive number, so that nothing overflows (the simulator raises where a GPU has infinity).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import cuda

from ..activation import Activation


class Functions(NamedTuple):
    """act(z); g * act'(z); g * act'(z) from y = act(z), where ``kernels.activation.gradient_from_output`` holds."""

    value: Any
    gradient: Any
    gradient_from_output: Any


@functools.cache
def functions(activation: Activation, wide: type) -> Functions:
    """An activation's device functions in the NumPy type ``wide``."""
    make = {
        "identity": _identity,
        "relu": _relu,
        "relu6": _relu6,
        "leaky_relu": _leaky_relu,
        "silu": _silu,
        "gelu": _gelu,
        "gelu_tanh": _gelu_tanh,
        "hardswish": _hardswish,
        "hardsigmoid": _hardsigmoid,
        "sigmoid": _sigmoid,
        "tanh": _tanh,
        "elu": _elu,
    }.get(activation.name)
    if make is None:
        raise ValueError(f"unknown activation {activation.name!r}")
    value, gradient, *from_output = make(wide, wide(activation.param))
    # without a gradient from the output none is asked for: what stands in its place is not compiled
    return Functions(*(cuda.jit(f, device=True) for f in (value, gradient, *(from_output or [gradient]))))


_Made = tuple[Callable[..., Any], ...]


def _identity(wide: type, param: Any) -> _Made:
    def value(z):
        return z

    def gradient(g, z):
        return g

    return value, gradient, gradient


def _relu(wide: type, param: Any) -> _Made:
    zero = wide(0)

    def value(z):
        return zero if z <= zero else z

    def gradient(g, z):
        return zero if z <= zero else g

    return value, gradient, gradient


def _clamp6(wide: type) -> Any:
    zero, six = wide(0), wide(6)

    def clamp6(z):
        return zero if z <= zero else (six if z >= six else z)

    return cuda.jit(clamp6, device=True)


def _relu6(wide: type, param: Any) -> _Made:
    zero, six, clamp6 = wide(0), wide(6), _clamp6(wide)

    def value(z):
        return clamp6(z)

    def gradient(g, z):
        return zero if z <= zero or z >= six else g

    return value, gradient, gradient


def _leaky_relu(wide: type, param: Any) -> _Made:
    zero = wide(0)

    def value(z):
        return z if z > zero else z * param

    def gradient(g, z):
        return g if z > zero else g * param

    return value, gradient, gradient


def _logistic(wide: type) -> Any:
    zero, one = wide(0), wide(1)

    def logistic(z):
        t = wide(math.exp(-abs(z)))
        s = one / (one + t)
        return s if z >= zero else t * s

    return cuda.jit(logistic, device=True)


def _silu(wide: type, param: Any) -> _Made:
    one, logistic = wide(1), _logistic(wide)

    def value(z):
        return z * logistic(z)

    def gradient(g, z):
        s = logistic(z)
        return g * (s * (one + z * (one - s)))

    return value, gradient


def _gelu(wide: type, param: Any) -> _Made:
    one, half = wide(1), wide(0.5)
    sqrt_half, inv_sqrt_2_pi = wide(math.sqrt(0.5)), wide(1 / math.sqrt(2 * math.pi))

    def value(z):
        return half * z * (one + wide(math.erf(z * sqrt_half)))

    def gradient(g, z):
        cdf = half * (one + wide(math.erf(z * sqrt_half)))
        return g * (cdf + z * wide(math.exp(-half * z * z)) * inv_sqrt_2_pi)

    return value, gradient


def _gelu_tanh(wide: type, param: Any) -> _Made:
    one, half, cubic, scale = wide(1), wide(0.5), wide(0.044715), wide(math.sqrt(2 / math.pi))
    cubic_slope = wide(3 * 0.044715)

    def value(z):
        return half * z * (one + wide(math.tanh((z + z * z * z * cubic) * scale)))

    def gradient(g, z):
        t = wide(math.tanh((z + z * z * z * cubic) * scale))
        inner = (one + z * z * cubic_slope) * scale
        return g * (half * (one + t) + half * z * (one - t * t) * inner)

    return value, gradient


def _hardswish(wide: type, param: Any) -> _Made:
    zero, half, three, six, clamp6 = wide(0), wide(0.5), wide(3), wide(6), _clamp6(wide)

    def value(z):
        return z * clamp6(z + three) / six

    def gradient(g, z):
        return zero if z <= -three else (g * (z / three + half) if z < three else g)

    return value, gradient


def _hardsigmoid(wide: type, param: Any) -> _Made:
    zero, one, three, six, clamp6 = wide(0), wide(1), wide(3), wide(6), _clamp6(wide)

    def value(z):
        return clamp6(z + three) / six

    def gradient(g, z):
        return g / six if z > -three and z < three else zero

    def from_output(g, y):
        return g / six if y > zero and y < one else zero

    return value, gradient, from_output


def _sigmoid(wide: type, param: Any) -> _Made:
    one, logistic = wide(1), _logistic(wide)

    def value(z):
        return logistic(z)

    def from_output(g, y):
        return g * (y * (one - y))

    def gradient(g, z):
        s = logistic(z)
        return g * (s * (one - s))

    return value, gradient, from_output


def _tanh(wide: type, param: Any) -> _Made:
    one = wide(1)

    def value(z):
        return wide(math.tanh(z))

    def gradient(g, z):
        t = wide(math.tanh(z))
        return g * (one - t * t)

    def from_output(g, y):
        return g * (one - y * y)

    return value, gradient, from_output


def _elu(wide: type, param: Any) -> _Made:
    zero = wide(0)

    def value(z):
        return z if z > zero else wide(math.expm1(z)) * param

    def gradient(g, z):
        return g if z > zero else g * (wide(math.exp(z)) * param)

    def from_output(g, y):
        return g if y > zero else g * (y + param)

    return value, gradient, from_output
