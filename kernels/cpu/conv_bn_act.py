"""conv + batch norm + activation on the CPU; the contract is that of kernels/reference/conv_bn_act.py.

In inference the batch norm is folded into oneDNN's convolution, which takes activation and residual along; in
training it is PyTorch's convolution with the kernels of csrc/cpu/batch_norm_act.cpp behind it.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(2018), section 3.2, for the folding.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .. import layout
from ..activation import Activation
from ..reference import conv_bn_act as reference
from ..reference.conv_bn_act import Convolution, Needs, Request
from . import batch_norm_act, refuses

#: oneDNN's post-ops as PyTorch names them: (name, scalars, algorithm) of an activation.
POST_OPS: dict[str, Any] = {
    "identity": lambda a: ("none", [], None),
    "relu": lambda a: ("relu", [], None),
    "relu6": lambda a: ("hardtanh", [0.0, 6.0], None),
    "leaky_relu": lambda a: ("leaky_relu", [a.param], None),
    "silu": lambda a: ("swish", [], None),
    "gelu": lambda a: ("gelu", [], "none"),
    "gelu_tanh": lambda a: ("gelu", [], "tanh"),
    "hardswish": lambda a: ("hardswish", [], None),
    "hardsigmoid": lambda a: ("hardsigmoid", [], None),
    "sigmoid": lambda a: ("sigmoid", [], None),
    "tanh": lambda a: ("tanh", [], None),
}


def supports(request: Request) -> str | None:
    """None for training, and for inference in float32 with what oneDNN fuses; else the reason in words."""
    return composes(request, residual=request.residual)


def composes(request: Any, *, residual: bool) -> str | None:
    """``supports`` for a request of this op, or of op transposed, which has no residual."""
    reason = refuses(request.device, ())
    if reason is not None:
        return reason
    if request.norm == "batch" or request.saves:
        return batch_norm_act.supports(
            batch_norm_act.Request(
                request.device,
                request.dtype,
                request.param_dtype,
                request.channels_last,
                request.norm == "batch",
                residual,
                request.activation,
            )
        )
    if request.dtype != torch.float32 or request.param_dtype != torch.float32:
        return f"the cpu backend folds in float32, not in {request.dtype}"
    if request.activation not in POST_OPS:
        return f"oneDNN's convolution has no activation {request.activation!r}"
    if residual and request.activation not in ("identity", "relu"):
        return f"oneDNN's convolution adds a residual before relu or nothing, not before {request.activation!r}"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    return None


def fold(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that computes batch_norm(conv2d(x, weight) + bias)."""
    scale, shift = affine(bias, bn_weight, bn_bias, running_mean, running_var, eps)
    return weight * scale.view(-1, 1, 1, 1), shift


def affine(
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """scale and shift of batch_norm(c + bias) = c * scale + shift, by running statistics."""
    scale = torch.rsqrt(running_var + eps)
    if bn_weight is not None:
        scale = scale * bn_weight
    shift = (-running_mean if bias is None else bias - running_mean) * scale
    return scale, shift if bn_bias is None else shift + bn_bias


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    convolution: Convolution,
    activation: Activation,
) -> Tensor:
    """act(conv2d(x, weight) + bias + residual) by oneDNN, in one pass."""
    stride, padding, dilation, groups = convolution
    name, scalars, algorithm = POST_OPS[activation.name](activation)
    op = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        return op.default(x, weight, bias, padding, stride, dilation, groups, name, scalars, algorithm)
    unary = None if name == "none" else name
    return op.binary(
        x, residual, weight, bias, padding, stride, dilation, groups, "add", 1.0, unary, scalars, algorithm
    )


#: Weights that do not change, in oneDNN's own order, by the address of the tensor object: (the tensor, the copy).
_arranged: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}


def convolve_constant(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    convolution: Convolution,
    activation: Activation,
) -> Tensor:
    """``convolve`` for a weight that is the same tensor with the same values at each call.

    With x in channels_last a copy of the weight in the order that oneDNN wants is kept (for as long as the
    tensor lives), where else oneDNN makes one at each call. The copy is made for the first x's shape.
    """
    if not layout.is_channels_last(x) or x.is_contiguous():  # such a weight makes the output channels_last
        return convolve(x, weight, bias, residual, convolution, activation)
    entry = _arranged.get(id(weight))
    if entry is None or entry[0]() is not weight:
        stride, padding, dilation, groups = convolution
        ours = torch._C._nn.mkldnn_reorder_conv2d_weight(
            weight.contiguous().to_mkldnn(), padding, stride, dilation, groups, x.shape
        )
        key = id(weight)
        entry = _arranged[key] = weakref.ref(weight, lambda _: _arranged.pop(key, None)), ours
    return convolve(x, entry[1], bias, residual, convolution, activation)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    convolution: Convolution,
    norm: str,
    momentum: float,
    eps: float,
    activation: Activation,
    saves: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, c, mean and invstd; None but for y in inference."""
    if norm == "batch" or saves:
        return reference.compose_forward(
            batch_norm_act, x, weight, bias, bn_weight, bn_bias, residual, running_mean, running_var,
            convolution, norm, momentum, eps, activation, saves,
        )  # fmt: skip
    if norm == "running":
        if running_mean is None or running_var is None:
            raise ValueError("running statistics are needed where batch statistics are not used")
        weight, bias = fold(weight, bias, bn_weight, bn_bias, running_mean, running_var, eps)
    return convolve(x, weight, bias, residual, convolution, activation), None, None, None


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    c: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    *,
    convolution: Convolution,
    norm: str,
    activation: Activation,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, bn_weight, bn_bias and residual (None where not needed)."""
    return reference.compose_backward(
        batch_norm_act, grad_y, x, weight, bias, bn_weight, bn_bias, residual, y, c, mean, invstd,
        convolution, norm, activation, needs,
    )  # fmt: skip
