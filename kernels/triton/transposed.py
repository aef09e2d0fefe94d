"""act(batch_norm(conv_transpose2d(x, weight) + bias)) in Triton; the contract is kernels/reference/transposed.py.

A transposed convolution is the input gradient of a convolution, and has its kernel (implicit_gemm.py): a product for
each phase (row modulo stride, column modulo stride) of the output, over the taps that reach whole pixels from it: 4 of
16 where a kernel of 4 has a stride of 2. Its input gradient is the convolution's forward pass, its weight gradient the
convolution's with the roles of input and gradient exchanged. Inference and "none" are one kernel, whose epilogue
normalises and activates; in training the kernels of batch_norm_act follow. All runs in channels_last; other tensors are
copied on the way in and out.

Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning" (2016), for the phases.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..activation import CODES, Activation
from ..reference import transposed as reference
from ..reference.batch_norm_act import accumulate_dtype
from ..reference.conv_bn_act import Convolution
from ..reference.transposed import Geometry, Needs, Request
from . import batch_norm_act, gemm_plan
from . import conv_bn_act as conv
from . import implicit_gemm as gemm
from .target import device_of


def supports(request: Request) -> str | None:
    """None where this backend runs the request, else the reason."""
    return conv.supports(request)  # type: ignore[arg-type]  # it looks at the fields that both have


def _convolution(geometry: Geometry) -> Convolution:
    """The convolution whose input gradient the transposed one is."""
    return Convolution(geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    geometry: Geometry,
    norm: str,
    momentum: float,
    eps: float,
    activation: Activation,
    saves: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, c, mean and invstd; see the reference's ``forward``."""
    if norm == "running" and (running_mean is None or running_var is None):
        raise ValueError("running statistics are needed where batch statistics are not used")
    shape = geometry.output_size(x, weight)
    if 0 in (*x.shape, *shape):
        raise ValueError(f"the triton backend has nothing to convolve from {tuple(x.shape)} to {shape}")
    memory_format = conv._memory_format(x, weight)
    x = conv._channels_last(x)
    bias, bn_weight, bn_bias = (batch_norm_act._dense1(v) for v in (bias, bn_weight, bn_bias))
    normalised = norm == "batch" or (norm == "running" and saves)
    c = conv._empty(shape, x.dtype, x.device) if saves or normalised else None
    y = None if normalised else conv._empty(shape, x.dtype, x.device)
    scale, shift, mean, invstd = None, bias, None, None
    if norm == "running" and not saves:
        assert running_mean is not None
        assert running_var is not None
        wide = accumulate_dtype(x.dtype)
        mean, invstd = running_mean.to(wide, copy=True), torch.rsqrt(running_var.to(wide) + eps)
        scale = invstd if bn_weight is None else invstd * bn_weight.to(wide)
        shift = ((0.0 if bias is None else bias.to(wide)) - mean) * scale
        shift = shift if bn_bias is None else shift + bn_bias.to(wide)
    with device_of(x):
        conv.run_input_gradient(x, weight, _convolution(geometry), c, y, scale, shift, activation)
    if normalised:
        assert c is not None
        y, mean, invstd = batch_norm_act.forward(
            c,
            bn_weight,
            bn_bias,
            None,
            running_mean,
            running_var,
            batch_stats=norm == "batch",
            momentum=momentum,
            eps=eps,
            activation=activation,
        )
    assert y is not None
    kept = conv._stored(c, memory_format) if saves and c is not None else None
    return conv._stored(y, memory_format), kept, mean, invstd


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    c: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    *,
    geometry: Geometry,
    norm: str,
    activation: Activation,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias, bn_weight and bn_bias; see the reference's ``backward``."""
    dbn_weight = dbn_bias = dx = dweight = dbias = None
    dc: Tensor | None = conv._channels_last(grad_y)
    if norm != "none" or activation.name != "identity":
        dc, dbn_weight, dbn_bias = reference.before_convolution(
            batch_norm_act, grad_y, bn_weight, bn_bias, conv._channels_last(c), mean, invstd, norm, activation, needs
        )  # type: ignore[arg-type]  # a module with the reference's functions
    convolution = _convolution(geometry)
    if dc is not None:
        with device_of(x):
            if needs.x:
                dx = conv._like(_convolved(dc, x, weight, convolution), x)
            if needs.weight:
                dweight = conv._like(conv._weight_gradient(conv._channels_last(x), dc, weight, convolution), weight)
            if needs.bias and bias is not None:
                dbias = dc.sum((0, 2, 3))
    return dx, dweight, dbias, dbn_weight, dbn_bias


def _convolved(dc: Tensor, x: Tensor, weight: Tensor, convolution: Convolution) -> Tensor:
    """conv2d(dc, weight) of x's shape, channels_last."""
    weight = conv._channels_last(weight)
    dx = conv._empty(x.shape, x.dtype, x.device)
    n, channels, height, width = x.shape
    groups, depth = convolution.groups, weight.size(1)
    rows, columns = n * height * width, channels // groups
    mode = gemm_plan.mode(weight, convolution, depth)
    skip = gemm_plan.skips(weight, convolution, mode, *dc.shape[2:])
    launch = gemm_plan.choose(rows, columns, groups, x.dtype, mode, x.device, skip=skip)
    tiles_m, tiles_n = triton.cdiv(rows, launch.block_m), triton.cdiv(columns, launch.block_n)
    gemm.forward_kernel[(tiles_m * tiles_n * groups,)](
        dc, weight, None, None, None, None, None, None, dx, None, None, None, None,
        rows, tiles_m, tiles_n, groups, dc.size(2), dc.size(3), dc.size(1), depth,
        height, width, channels, columns, *conv._geometry(convolution),
        EPS=0.0, CODE=CODES["identity"], PARAM=0.0, NORM=gemm.NORM_NONE.value,
        **gemm_plan.meta(
            launch, x.dtype, (weight.size(2), weight.size(3)), mode, gemm_plan.needs_int64(dc, dx), depth, skip=skip
        ),
        enable_fp_fusion=False,
    )  # fmt: skip
    return dx
