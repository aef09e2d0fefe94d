"""Depthwise convolution alone, on the shapes of MobileNets, ConvNeXt and separable atrous layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import dlkern.nn

from .base import Case, Plain, Problem, dtype_name


class Shape(NamedTuple):
    """A convolution's input without the batch, and its geometry; padding keeps the size at stride 1.

    ``trains`` and ``infers`` are the ratios that forward + backward and forward alone must reach in float32 on a CPU.
    """

    channels: int
    size: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    trains: float | None = None
    infers: float | None = None

    @property
    def padding(self) -> int:
        return self.dilation * (self.kernel // 2)

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1


SHAPES = (
    Shape(96, 56, trains=1.5),
    Shape(192, 28, trains=1.8),
    Shape(144, 56, stride=2, trains=1.5),
    Shape(192, 28, kernel=7, trains=2.2),
    Shape(256, 32, dilation=2, trains=6),
    Shape(256, 33, dilation=6, trains=6, infers=6),
    Shape(256, 33, dilation=12, trains=6, infers=6),
    Shape(256, 33, dilation=18, trains=6, infers=6),
)


def cases(device_type: str, batch: int, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """Every shape, layout and dtype, in training and in inference."""
    return [
        _case(device_type, batch, shape, layout, training, dtype, dtype == dtypes[0])
        for training in (True, False)
        for dtype in dtypes
        for layout in ("channels_last", "nchw")
        for shape in SHAPES
    ]


def _case(
    device_type: str, batch: int, at: Shape, layout: str, training: bool, dtype: torch.dtype, quick: bool
) -> Case:
    shape = (batch, at.channels, at.size, at.size)
    words = [f"{'x'.join(map(str, shape))}-k{at.kernel}", *[f"s{at.stride}"] * (at.stride > 1)]
    wanted = at.trains if training else at.infers
    return Case(
        op="depthwise",
        label="".join([*words, *[f"d{at.dilation}"] * (at.dilation > 1)]),
        shape=shape,
        out_shape=(batch, at.channels, at.out_size, at.out_size),
        format=layout,
        residual=False,
        training=training,
        dtype=dtype,
        plain=lambda: _plain(at),
        fused=_fused,
        terms=_terms,
        target=wanted if device_type == "cpu" and dtype == torch.float32 and layout == "channels_last" else None,
        quick=quick and layout == "channels_last" and (at.dilation in (1, 6) if training else at.dilation == 6),
        facts={
            "shape": list(shape),
            "kernel": at.kernel,
            "stride": at.stride,
            "dilation": at.dilation,
            "format": layout,
            "residual": False,
            "training": training,
            "dtype": dtype_name(dtype),
        },
    )


def _plain(at: Shape) -> Plain:
    conv = nn.Conv2d(
        at.channels, at.channels, at.kernel, at.stride, at.padding, at.dilation, groups=at.channels, bias=False
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        conv.weight.normal_(0, 1 / at.kernel, generator=generator)
    return Plain(None, conv)


class _Fused(nn.Module):
    """Called as the plain module is."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = dlkern.nn.DepthwiseConv2d.from_module(conv)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        del residual  # there is none
        return self.conv(x)


def _fused(plain: Plain) -> nn.Module:
    assert plain.conv is not None
    return _Fused(plain.conv)


def _terms(problem: Problem) -> dict[str, Tensor]:
    """The sums of absolute terms behind y and the gradients, by name."""
    conv = problem.wide.conv
    assert conv is not None
    with torch.no_grad():
        x, weight, grad = problem.x.double().abs(), conv.weight.abs(), problem.grad.double().abs()
        y = conv._conv_forward(x, weight, None)
        if not problem.case.training:
            return {"y": y}
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups,
            [True, True, False],
        )  # fmt: skip
    return {"y": y, "dx": dx, "dconv.weight": dweight}
