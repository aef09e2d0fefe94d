"""act(batch_norm(conv2d(x, weight) + bias) + residual) in Triton; the contract is kernels/reference/conv_bn_act.py.

Everything runs in channels_last; other tensors are copied on the way in and out. Inference and "none" are one
kernel: an implicit product whose epilogue normalises, adds the residual and activates. With the batch's statistics
the product writes c and the partial statistics of its tiles, and the normalisation of batch_norm_act is the only
other pass. Backward: batch_norm_act's gives dc, of which two implicit products make the gradients of x and weight.
Partial sums are merged in a fixed order: results are bit for bit repeatable.

Source: Chetlur et al., "cuDNN: Efficient primitives for deep learning" (2014), for the implicit product.
"""

from __future__ import annotations

import struct

import torch
import triton
from torch import Tensor

from .. import layout
from ..activation import CODES, Activation
from ..reference.conv_bn_act import NORMS, Convolution, Needs, Request, accumulate_dtype
from . import batch_norm_act, gemm_plan, interpreted, tiles
from . import implicit_gemm as gemm
from .statistics import condense_statistics
from .target import device_of, runs_on

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NORM_CODES = {
    "none": gemm.NORM_NONE.value,
    "running": gemm.NORM_RUNNING.value,
    "batch": gemm.NORM_BATCH.value,
}
IDENTITY = Activation("identity")
_SUM_BLOCK = 1024
_INT32_END = 2**31


def supports(request: Request) -> str | None:
    """None where this backend runs the request, else the reason."""
    reason = runs_on(request.device)
    if reason is not None:
        return reason
    if request.dtype not in _DTYPES:
        return f"the triton backend convolves float16, bfloat16, float32 and float64, not {request.dtype}"
    if interpreted() and torch.bfloat16 in (request.dtype, request.param_dtype):
        return "Triton's interpreter computes bfloat16 products wrongly"
    weights = request.out_channels * (request.in_channels // request.groups)
    if weights * request.kernel[0] * request.kernel[1] >= _INT32_END:
        return "the triton backend takes weights of fewer than 2**31 elements"
    return None


# ------------------------------------------------------------------------------------------ layouts
def _memory_format(*tensors: Tensor) -> torch.memory_format:
    return torch.channels_last if any(map(layout.strides_channels_last, tensors)) else torch.contiguous_format


def _channels_last(t: Tensor) -> Tensor:
    """t, or a copy of it, with its channels innermost."""
    if t.is_neg():  # a view that PyTorch negates when it is read
        t = t.resolve_neg()
    return t.contiguous(memory_format=torch.channels_last)


def _empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=torch.channels_last)


def _stored(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """t, whose channels are innermost, with the strides of a fresh tensor of ``memory_format``."""
    if memory_format == torch.channels_last:
        return t
    if t.is_contiguous():  # the memory is the same, the strides of sizes of 1 need not be
        n, c, h, w = t.shape
        return t.as_strided((n, c, h, w), (c * h * w, h * w, w, 1))
    return t.contiguous()


def _like(t: Tensor, reference: Tensor) -> Tensor:
    """t, whose channels are innermost, with the strides of ``torch.empty_like(reference)``."""
    return t if t.stride() == reference.stride() else torch.empty_like(reference).copy_(t)


def _geometry(convolution: Convolution) -> tuple[int, ...]:
    return *convolution.stride, *convolution.padding, *convolution.dilation


# ------------------------------------------------------------------------------------------ forward
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
    """y, c, mean and invstd; see the reference's ``forward``."""
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; expected one of {', '.join(NORMS)}")
    if norm == "running" and (running_mean is None or running_var is None):
        raise ValueError("running statistics are needed where batch statistics are not used")
    memory_format = _memory_format(x, weight)
    shape = convolution.output_size(x, weight)
    if 0 in (*x.shape, *shape):
        raise ValueError(f"the triton backend has nothing to convolve from {tuple(x.shape)} to {shape}")
    x, weight = _channels_last(x), _channels_last(weight)
    residual = None if residual is None else _channels_last(residual)
    bias, bn_weight, bn_bias = (batch_norm_act._dense1(v) for v in (bias, bn_weight, bn_bias))
    batch = norm == "batch"
    y = _empty(shape, x.dtype, x.device)
    c = _empty(shape, x.dtype, x.device) if saves or batch else None
    mean = invstd = None
    if norm != "none":
        mean = torch.empty(shape[1], dtype=accumulate_dtype(x.dtype), device=x.device)
        invstd = torch.empty_like(mean)
    options = {"EPS": eps, "CODE": CODES[activation.name], "PARAM": activation.param}
    with device_of(x):
        rows, columns, depth = shape[0] * shape[2] * shape[3], shape[1] // convolution.groups, weight.size(1)
        mode = gemm_plan.mode(weight, convolution, depth)
        skip = gemm_plan.skips(weight, convolution, mode, *x.shape[2:])
        launch = gemm_plan.choose(rows, columns, convolution.groups, x.dtype, mode, x.device, skip=skip)
        tiles_m, tiles_n = triton.cdiv(rows, launch.block_m), triton.cdiv(columns, launch.block_n)
        partial = torch.empty(3, tiles_m, shape[1], dtype=mean.dtype, device=x.device) if batch else None
        running = (None, None)
        if norm == "running":
            running = running_mean.contiguous(), running_var.contiguous()
        gemm.forward_kernel[(tiles_m * tiles_n * convolution.groups,)](
            x, weight, bias, None if batch else residual, bn_weight, bn_bias, *running,
            None if batch else y, c, *((None, None) if batch else (mean, invstd)), partial,
            rows, tiles_m, tiles_n, convolution.groups, x.size(2), x.size(3), x.size(1), depth,
            shape[2], shape[3], shape[1], columns, *_geometry(convolution),
            NORM=_NORM_CODES[norm], **options,
            **gemm_plan.meta(
                launch, x.dtype, _kernel(weight), mode, gemm_plan.needs_int64(x, y), depth, skip=skip
            ),
            enable_fp_fusion=False,  # as batch_norm_act: backward recomputes forward's mask exactly
        )  # fmt: skip
        if batch:
            _merge_statistics(partial, running_mean, running_var, mean, invstd, momentum, eps, rows)
            plan = tiles.plan(c, reduction=False)
            batch_norm_act._forward_kernel[plan.grid](
                c, bn_weight, bn_bias, residual, mean, invstd, y, mean, invstd, *plan.sizes,
                RUNNING=False, **options, **plan.meta, **tiles.registers(c.dtype, activation.name),
            )  # fmt: skip
    kept = _stored(c, memory_format) if saves and c is not None else None
    return _stored(y, memory_format), kept, mean, invstd


def _kernel(weight: Tensor) -> tuple[int, int]:
    return weight.size(2), weight.size(3)


def _merge_statistics(
    partial: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    momentum: float,
    eps: float,
    count: int,
) -> None:
    """Fill mean and invstd from partial [3, shares, channels] and move the running statistics."""
    partial = condense_statistics(partial)
    _, shares, channels = partial.shape
    moved = [r if r is None else r.contiguous() for r in (running_mean, running_var)]
    near = struct.unpack("f", struct.pack("f", momentum))[0]
    batch_norm_act._merge_statistics_kernel[batch_norm_act._merge_grid(channels)](
        partial, mean, invstd, *moved, near, momentum - near, count, channels, shares, EPS=eps, num_warps=4
    )
    for original, new in zip((running_mean, running_var), moved, strict=True):
        if original is not None and new is not original:
            original.copy_(new)


# ----------------------------------------------------------------------------------------- backward
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias, bn_weight, bn_bias and residual; see the reference's ``backward``."""
    needs_dc = needs.x or needs.weight or needs.bias
    given, c = c, _channels_last(c)
    dbn_weight = dbn_bias = dresidual = dx = dweight = dbias = None
    if norm == "none" and activation.name == "identity" and not needs.residual:
        dc = _channels_last(grad_y)
    else:
        if mean is None or invstd is None:
            mean = torch.zeros(c.size(1), dtype=accumulate_dtype(c.dtype), device=c.device)
            invstd = torch.ones_like(mean)
        dc, dbn_weight, dbn_bias, dresidual = batch_norm_act.backward(
            grad_y,
            c,
            bn_weight,
            bn_bias,
            residual,
            y,
            mean,
            invstd,
            batch_stats=norm == "batch",
            activation=activation,
            needs_x=needs_dc,
            needs_params=needs.norm,
            needs_residual=needs.residual,
        )
    with device_of(x):
        if needs.x:
            dx = _like(_input_gradient(dc, x, weight, convolution), x)
        if needs.weight:
            dweight = _like(_weight_gradient(dc, x, weight, convolution), weight)
        if needs.bias and bias is not None:
            dbias = dc.sum((0, 2, 3))
    if dresidual is not None:
        dresidual = _like(dresidual, given)
    return dx, dweight, dbias, dbn_weight, dbn_bias, dresidual


def _input_gradient(dc: Tensor, x: Tensor, weight: Tensor, convolution: Convolution) -> Tensor:
    """dx, channels_last."""
    dx = _empty(x.shape, x.dtype, x.device)
    run_input_gradient(dc, weight, convolution, dx)
    return dx


def run_input_gradient(
    dc: Tensor,
    weight: Tensor,
    convolution: Convolution,
    dx: Tensor | None,
    y: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: Activation = IDENTITY,
) -> None:
    """Fill dx, and y, channels_last, from dc, channels_last; see ``input_gradient_kernel``."""
    like = dx if y is None else y
    assert like is not None
    weight = _channels_last(weight)
    stride, groups = convolution.stride, convolution.groups
    n, channels, height, width = like.shape
    phase = triton.cdiv(height, stride[0]), triton.cdiv(width, stride[1])
    rows, columns, depth = n * phase[0] * phase[1], weight.size(1), weight.size(0) // groups
    products = groups * stride[0] * stride[1]
    mode = gemm_plan.mode(weight, convolution, depth, phases=True)
    skip = gemm_plan.skips(weight, convolution, mode, *dc.shape[2:])
    launch = gemm_plan.choose(rows, columns, products, dc.dtype, mode, dc.device, skip=skip)
    tiles_n = triton.cdiv(columns, launch.block_n)
    gemm.input_gradient_kernel[(triton.cdiv(rows, launch.block_m) * tiles_n * products,)](
        dc, weight, dx, scale, shift, y, rows, tiles_n, groups, *phase, height, width, channels, columns,
        dc.size(2), dc.size(3), dc.size(1), depth, *_geometry(convolution),
        CODE=CODES[activation.name], PARAM=activation.param,
        **gemm_plan.meta(
            launch, dc.dtype, _kernel(weight), mode, gemm_plan.needs_int64(like, dc), depth, skip=skip
        ),
    )  # fmt: skip


def _weight_gradient(dc: Tensor, x: Tensor, weight: Tensor, convolution: Convolution) -> Tensor:
    """dweight, channels_last: shares of the positions, summed in their order."""
    x = _channels_last(x)
    dweight = _empty(weight.shape, x.dtype, x.device)
    groups, taps = convolution.groups, weight.size(2) * weight.size(3)
    rows, columns, depth = dc.numel() // dc.size(1), weight.size(0) // groups, weight.size(1)
    mode = gemm_plan.mode(weight, convolution, depth)
    flat = mode == gemm.FLAT.value
    wide, products = (taps * depth, groups) if flat else (depth, groups * taps)
    skip = gemm_plan.skips(weight, convolution, mode, *x.shape[2:])
    launch = gemm_plan.choose(columns, wide, products, x.dtype, mode, x.device, shared=True, skip=skip)
    meta = gemm_plan.meta(launch, x.dtype, _kernel(weight), mode, gemm_plan.needs_int64(x, dc), skip=skip)
    tiles_m = triton.cdiv(columns, launch.block_m)
    tiles_n = triton.cdiv(taps * depth, launch.block_n) if flat else taps * triton.cdiv(depth, launch.block_n)
    programs, steps = tiles_m * tiles_n * groups, triton.cdiv(rows, meta["BLOCK_K"])
    wanted = gemm_plan.splits(programs, steps, weight.numel(), x.device)
    per_split = triton.cdiv(steps, wanted)
    splits = triton.cdiv(steps, per_split)
    partial = dweight
    if splits > 1:
        partial = torch.empty(splits, weight.numel(), dtype=accumulate_dtype(x.dtype), device=x.device)
    gemm.weight_gradient_kernel[(programs, splits)](
        dc, x, partial, rows, steps, per_split, tiles_m, tiles_n, x.size(2), x.size(3), x.size(1), depth,
        dc.size(2), dc.size(3), dc.size(1), columns, *_geometry(convolution), **meta,
    )  # fmt: skip
    if splits > 1:
        gemm.sum_splits_kernel[(triton.cdiv(weight.numel(), _SUM_BLOCK),)](
            partial, dweight, weight.numel(), splits, BLOCK=_SUM_BLOCK
        )
    return dweight
