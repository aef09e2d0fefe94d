"""Activations and their gradients as device functions; the definitions are kernels/reference/activation.py.

Choices are made by ``tl.where``, never ``tl.maximum``, which turns a NaN into a number. tanh and elu are
built from exp, with an absolute error of about one eps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..activation import CODES

IDENTITY = tl.constexpr(CODES["identity"])
RELU = tl.constexpr(CODES["relu"])
RELU6 = tl.constexpr(CODES["relu6"])
LEAKY_RELU = tl.constexpr(CODES["leaky_relu"])
SILU = tl.constexpr(CODES["silu"])
GELU = tl.constexpr(CODES["gelu"])
GELU_TANH = tl.constexpr(CODES["gelu_tanh"])
HARDSWISH = tl.constexpr(CODES["hardswish"])
HARDSIGMOID = tl.constexpr(CODES["hardsigmoid"])
SIGMOID = tl.constexpr(CODES["sigmoid"])
TANH = tl.constexpr(CODES["tanh"])
ELU = tl.constexpr(CODES["elu"])

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)
# Constants stand on the right of a product: the interpreter takes none on the left.
_CUBIC = tl.constexpr(0.044715)
_CUBIC_SLOPE = tl.constexpr(3 * 0.044715)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _tanh(z):
    # exp of a negative number: no overflow, so no inf / inf
    t = tl.exp(-2.0 * tl.abs(z))
    r = (1.0 - t) / (1.0 + t)
    return tl.where(z < 0, -r, r)


@triton.jit
def _clamp6(z):
    return tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))


@triton.jit
def forward(z, CODE: tl.constexpr, PARAM: tl.constexpr):
    """act(z)."""
    if CODE == RELU:
        z = tl.where(z <= 0, 0.0, z)
    elif CODE == RELU6:
        z = _clamp6(z)
    elif CODE == LEAKY_RELU:
        z = tl.where(z > 0, z, z * PARAM)
    elif CODE == SILU:
        z = z / (1.0 + tl.exp(-z))
    elif CODE == GELU:
        z = 0.5 * z * (1.0 + tl.erf(z * _SQRT_HALF))
    elif CODE == GELU_TANH:
        z = 0.5 * z * (1.0 + _tanh((z + z * z * z * _CUBIC) * _SQRT_2_OVER_PI))
    elif CODE == HARDSWISH:
        z = z * _clamp6(z + 3.0) / 6.0
    elif CODE == HARDSIGMOID:
        z = _clamp6(z + 3.0) / 6.0
    elif CODE == SIGMOID:
        z = _sigmoid(z)
    elif CODE == TANH:
        z = _tanh(z)
    elif CODE == ELU:
        z = tl.where(z > 0, z, (tl.exp(z) - 1.0) * PARAM)
    return z


@triton.jit
def gradient(g, z, CODE: tl.constexpr, PARAM: tl.constexpr):
    """g * act'(z)."""
    if CODE == RELU:
        g = tl.where(z <= 0, 0.0, g)
    elif CODE == RELU6:
        g = tl.where((z <= 0) | (z >= 6), 0.0, g)
    elif CODE == LEAKY_RELU:
        g = tl.where(z > 0, g, g * PARAM)
    elif CODE == SILU:
        s = _sigmoid(z)
        g = g * (s * (1.0 + z * (1.0 - s)))
    elif CODE == GELU:
        g = g * (0.5 * (1.0 + tl.erf(z * _SQRT_HALF)) + z * tl.exp(-0.5 * z * z) * _INV_SQRT_2_PI)
    elif CODE == GELU_TANH:
        t = _tanh((z + z * z * z * _CUBIC) * _SQRT_2_OVER_PI)
        inner = (1.0 + z * z * _CUBIC_SLOPE) * _SQRT_2_OVER_PI
        g = g * (0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner)
    elif CODE == HARDSWISH:
        g = tl.where(z <= -3, 0.0, tl.where(z < 3, g * (z / 3.0 + 0.5), g))
    elif CODE == HARDSIGMOID:
        g = tl.where((z > -3) & (z < 3), g / 6.0, 0.0)
    elif CODE == SIGMOID:
        s = _sigmoid(z)
        g = g * (s * (1.0 - s))
    elif CODE == TANH:
        t = _tanh(z)
        g = g * (1.0 - t * t)
    elif CODE == ELU:
        g = tl.where(z > 0, g, g * (tl.exp(z) * PARAM))
    return g


@triton.jit
def _positive(y):
    """y > 0.

    Not written so: of a y that was widened from float16 LLVM makes a comparison in float16, on which Triton 3.8's code
    generation for compute capability 9.0 crashes. 1e-45 is rounded to the least positive float32.
    """
    if y.dtype == tl.float64:
        return y > 0
    return y >= 1e-45


@triton.jit
def gradient_from_output(g, y, CODE: tl.constexpr, PARAM: tl.constexpr):
    """g * act'(z) from y = act(z), where ``kernels.activation.gradient_from_output`` holds."""
    if CODE == RELU:
        g = tl.where(_positive(y) | (y != y), g, 0.0)  # the gradient passes at NaN
    elif CODE == RELU6:
        g = tl.where(_positive(y) & (y < 6) | (y != y), g, 0.0)
    elif CODE == LEAKY_RELU:
        g = tl.where(_positive(y), g, g * PARAM)
    elif CODE == HARDSIGMOID:
        g = tl.where(_positive(y) & (y < 1), g / 6.0, 0.0)
    elif CODE == SIGMOID:
        g = g * (y * (1.0 - y))
    elif CODE == TANH:
        g = g * (1.0 - y * y)
    elif CODE == ELU:
        g = tl.where(_positive(y), g, g * (y + PARAM))
    return g
