"""Sums of absolute terms behind what [convolution +] batch norm [+ addition] + ReLU computes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Problem


def terms(problem: Problem) -> dict[str, Tensor]:
    """By name, as in ``Problem.names()``; float64 (see :mod:`dlkern.bench.parity`)."""
    with torch.no_grad():
        return _terms(problem)


def _terms(problem: Problem) -> dict[str, Tensor]:
    conv, bn = problem.wide.conv, problem.wide.bn
    assert bn is not None
    x, dims, shape = problem.x.double(), (0, 2, 3), (1, -1, 1, 1)
    c, size = x, x.abs()
    if conv is not None:
        c, size = conv(x), sizes(conv, x.abs())
        # half inputs are exact, and summed in float32
        dtype = problem.case.dtype
        size = c.abs() + size * (torch.finfo(torch.float32).eps / torch.finfo(dtype).eps)
    if problem.case.training:
        var, mean = torch.var_mean(c, dims, correction=0)
    else:
        assert bn.running_mean is not None
        assert bn.running_var is not None
        mean, var = bn.running_mean, bn.running_var
    invstd = torch.rsqrt(var + bn.eps).view(shape)
    scale, normalised = bn.weight.abs().view(shape) * invstd, (size + mean.abs().view(shape)) * invstd
    y = normalised * bn.weight.abs().view(shape) + bn.bias.abs().view(shape)
    if problem.residual is not None:
        y = y + problem.residual.double().abs()
    if not problem.case.training:
        return {"y": y}

    dz = problem.grad.double().abs()
    dbias, dweight, count = dz.sum(dims), (dz * normalised).sum(dims), dz.numel() / dz.shape[1]
    dc = (dz + (dbias.view(shape) + normalised * dweight.view(shape)) / count) * scale
    found = {"y": y, "dx": dc, "dresidual": dz, "dbn.weight": dweight, "dbn.bias": dbias}
    if conv is not None:
        found["dx"], found["dconv.weight"], _ = torch.ops.aten.convolution_backward(
            dc,
            x.abs(),
            conv.weight.abs(),
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.transposed,
            conv.output_padding,
            conv.groups,
            [True, True, False],
        )
    return found


def sizes(conv: nn.Module, x: Tensor) -> Tensor:
    """What a convolution of absolute values makes with its weights' absolute values."""
    assert isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d))
    weight = conv.weight.abs()
    if isinstance(conv, nn.Conv2d):
        return conv._conv_forward(x, weight, None)
    geometry: Any = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
    return F.conv_transpose2d(x, weight, None, *geometry)
