"""activation(depthwise conv2d(x, weight) + bias) in Triton; the contract is kernels/reference/depthwise.py.

Each memory format is computed in place, by kernels that differ in their addresses. Small kernels slide a window of
rows through registers; the others loop over taps (see depthwise_kernels). Statistics are gathered in forward's epilogue
and merged by Chan's formula; the weight's gradient is summed in shares, and these in their order. No atomics: results
are bit for bit repeatable.

Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import layout
from ..activation import CODES, Activation
from ..reference import depthwise as reference
from ..reference.batch_norm_act import accumulate_dtype
from ..reference.depthwise import Padding, Request
from . import depthwise_kernels as kernels
from . import depthwise_plan as planning
from . import depthwise_weight_kernels as weight_kernels
from . import interpreted
from .depthwise_plan import Geometry
from .statistics import merge_statistics
from .target import device_of, runs_on, stored_dtype

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MERGE_SHARES, _MERGE_CHANNELS = 32, 32


def supports(request: Request) -> str | None:
    """None where this backend runs the request, else the reason."""
    reason = runs_on(request.device)
    if reason is not None:
        return reason
    if request.dtype not in _DTYPES:
        return f"the triton backend convolves float16, bfloat16, float32 and float64, not {request.dtype}"
    if request.statistics and request.activation != "identity":
        return f"statistics are those of a convolution without activation, not with {request.activation!r}"
    if request.statistics and request.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter does not round to bfloat16, so it cannot take statistics of what is stored"
    return None


def _geometry(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: Padding, dilation: tuple[int, int]
) -> Geometry:
    kernel = weight.size(2), weight.size(3)
    return Geometry(kernel, stride, padding, dilation, weight.size(0) // x.size(1))


def _taps(geometry: Geometry, window: bool) -> int:
    """Taps that stay in registers."""
    return geometry.kernel[0] * geometry.kernel[1] if window else 1


# ------------------------------------------------------------------------------------------ forward
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
    activation: Activation,
    statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, and mean and variance or None, None; see the reference's ``forward``."""
    if statistics and activation.name != "identity":
        raise ValueError(f"statistics go with the activation 'identity', not {activation.name!r}")
    x, weight = layout.dense(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    shape = reference.output_size(x, weight, stride, padding, dilation)
    if min(*x.shape, *shape) < 1:
        raise ValueError(f"the triton backend has nothing to convolve from {tuple(x.shape)} to {shape}")
    g, channels_last = _geometry(x, weight, stride, padding, dilation), reference.channels_last(x)
    y = torch.empty(shape, dtype=stored_dtype(x.dtype), device=x.device, memory_format=reference.memory_format(x))
    launch = planning.choose(shape[1], _taps(g, g.window), x.itemsize, channels_last)
    plan = planning.plan(launch, shape[0], shape[2], shape[3], shape[1], x.device, window=g.window)
    partial = None
    if statistics:
        partial = torch.empty(3, plan.splits, shape[1], dtype=accumulate_dtype(x.dtype), device=x.device)
    int64 = planning.needs_int64(g, launch, x, y)
    with device_of(x):
        kernels.forward_kernel[plan.grid](
            x, weight, bias, y, partial, *plan.sizes, x.size(2), x.size(3), x.size(1), shape[2], shape[3],
            *stride, *dilation, padding[0], padding[2],
            CODE=CODES[activation.name], PARAM=activation.param, WINDOW=g.window,
            STRIDE_H=stride[0] if g.window else 1, **planning.meta(g, launch, x.dtype, channels_last, int64),
        )  # fmt: skip
        if partial is None:
            return y.to(x.dtype), None, None
        count, mean, m2 = merge_statistics(partial).unbind()
    return y.to(x.dtype), mean, m2 / count


# ----------------------------------------------------------------------------------------- backward
def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    stride: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, None where not needed; see the reference's ``backward``."""
    x, weight = layout.dense(x), weight.contiguous()
    grad_y = reference.gradient_as(grad_y, x)
    g = _geometry(x, weight, stride, padding, dilation)
    dx = dweight = dbias = None
    with device_of(x):
        if needs_x:
            dx = _input_gradient(grad_y, x, weight, g).to(x.dtype)
        if needs_weight:
            dweight, dbias = _weight_gradient(grad_y, x, weight, g, needs_bias)
    if needs_bias and dbias is None:
        dbias = grad_y.sum((0, 2, 3), dtype=accumulate_dtype(x.dtype)).to(weight.dtype)
    return dx, dweight, dbias


def _input_gradient(grad_y: Tensor, x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    channels_last, window = reference.channels_last(x), g.gradient_window
    batch, channels, height, width = x.shape
    dx = torch.empty_like(x, dtype=stored_dtype(x.dtype))
    taps, (top, _, left, _) = _taps(g, window), g.padding
    launch = planning.choose(channels, taps, x.itemsize, channels_last)
    rows, columns, first = height, width, (0, 0)
    if window:
        first = top // g.stride[0], left // g.stride[1]
        rows = triton.cdiv(top + height, g.stride[0]) - first[0]
        columns = triton.cdiv(left + width, g.stride[1]) - first[1]
    plan = planning.plan(launch, batch, rows, columns, channels, x.device, window=window)
    strides = g.stride if window else (1, 1)
    kernels.input_gradient_kernel[plan.grid](
        grad_y, weight, dx, *plan.sizes, columns, *first,
        height, width, channels, grad_y.size(2), grad_y.size(3), *g.stride, *g.dilation, top, left,
        STRIDE_H=strides[0], STRIDE_W=strides[1], WINDOW=window,
        **planning.meta(g, launch, x.dtype, channels_last, planning.needs_int64(g, launch, x, grad_y)),
    )  # fmt: skip
    return dx


def _weight_gradient(
    grad_y: Tensor, x: Tensor, weight: Tensor, g: Geometry, needs_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """dweight, and dbias where it comes with it."""
    channels_last = reference.channels_last(x)
    taps, out = g.kernel[0] * g.kernel[1], grad_y.shape
    bias = needs_bias and g.window
    held = taps + 1 if g.window else planning.loop_columns(g.kernel)
    launch = planning.choose(out[1], held, x.itemsize, channels_last)
    meta = planning.meta(g, launch, x.dtype, channels_last, planning.needs_int64(g, launch, x, grad_y))
    sizes = x.size(2), x.size(3), x.size(1), out[2], out[3]
    left = out[1] * (taps + bias)

    def empty(splits: int) -> Tensor:
        return torch.empty(splits, taps + bias, out[1], dtype=accumulate_dtype(x.dtype), device=x.device)

    if g.window:
        plan = planning.plan(launch, out[0], out[2], out[3], out[1], x.device, window=True, reduction=left)
        splits, partial = plan.splits, empty(plan.splits)
        weight_kernels.weight_gradient_kernel[plan.grid](
            grad_y, x, partial, *plan.sizes, *sizes, g.stride[1], g.dilation[1], g.padding[0], g.padding[2],
            BIAS=bias, STRIDE_H=g.stride[0], **meta,
        )  # fmt: skip
    else:
        columns = planning.loop_columns(g.kernel)
        blocks, products = triton.cdiv(out[1], launch.block_c), g.kernel[0] * triton.cdiv(g.kernel[1], columns)
        n_tiles = triton.cdiv(out[0] * out[2] * out[3], launch.block_p)
        splits = planning.shares(n_tiles, blocks * products, x.device, left)
        partial = empty(splits)
        weight_kernels.weight_gradient_loop_kernel[(blocks, splits, products)](
            grad_y, x, partial, out[0], *sizes, *g.stride, *g.dilation, g.padding[0], g.padding[2],
            COLUMNS=columns, **meta,
        )  # fmt: skip
    dweight = torch.empty(weight.shape, dtype=stored_dtype(weight.dtype), device=x.device)
    dbias = torch.empty(out[1], dtype=stored_dtype(weight.dtype), device=x.device) if bias else None
    weight_kernels.merge_weight_gradient_kernel[(triton.cdiv(out[1], _MERGE_CHANNELS), taps + bias)](
        partial, dweight, dbias, out[1], splits, TAPS=taps, BLOCK_S=_MERGE_SHARES, BLOCK_C=_MERGE_CHANNELS, num_warps=4
    )
    return dweight.to(weight.dtype), None if dbias is None else dbias.to(weight.dtype)
