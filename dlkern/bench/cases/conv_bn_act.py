"""Conv2d + BatchNorm2d [+ residual] + ReLU on the shapes of ResNets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

import dlkern.nn

from .base import Case, Plain, dtype_name
from .batch_norm_act import norm
from .terms import terms


class Shape(NamedTuple):
    """A convolution's input without the batch, and its geometry; padding keeps the size at stride 1."""

    channels: int
    size: int
    out_channels: int
    kernel: int
    stride: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1


SHAPES = (
    Shape(64, 56, 64, 3),
    Shape(256, 56, 64, 1),
    Shape(512, 7, 512, 3),
    Shape(128, 56, 128, 3, stride=2),
    Shape(3, 224, 64, 7, stride=2),  # the stem
)

#: "never below 0.98 on any swapped site", in float32 on a CPU.
CPU_TARGET = 0.98


def cases(device_type: str, batch: int, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """Every shape and dtype in training and in inference, the first shape with a residual as well."""
    return [
        _case(device_type, batch, shape, layout, residual, training, dtype, dtype == dtypes[0])
        for training in (True, False)
        for dtype in dtypes
        for layout in (("channels_last",) if device_type == "cuda" else ("nchw", "channels_last"))
        for residual in (False, True)
        for shape in (SHAPES[:1] if residual else SHAPES)
    ]


def _case(
    device_type: str,
    batch: int,
    at: Shape,
    layout: str,
    residual: bool,
    training: bool,
    dtype: torch.dtype,
    quick: bool,
) -> Case:
    shape = (batch, at.channels, at.size, at.size)
    liked = "channels_last" if device_type == "cuda" else "nchw"
    stride = f"s{at.stride}" if at.stride > 1 else ""
    return Case(
        op="conv_bn_act",
        label=f"{'x'.join(map(str, shape))}-to-{at.out_channels}-k{at.kernel}{stride}",
        shape=shape,
        out_shape=(batch, at.out_channels, at.out_size, at.out_size),
        format=layout,
        residual=residual,
        training=training,
        dtype=dtype,
        plain=lambda: _plain(at),
        fused=_fused,
        terms=terms,
        target=CPU_TARGET if device_type == "cpu" and dtype == torch.float32 else None,
        quick=quick and layout == liked and (at.channels > 3 if training else not residual),
        facts={
            "shape": list(shape),
            "out_channels": at.out_channels,
            "kernel": at.kernel,
            "stride": at.stride,
            "format": layout,
            "residual": residual,
            "training": training,
            "dtype": dtype_name(dtype),
        },
    )


def _plain(at: Shape) -> Plain:
    conv = nn.Conv2d(at.channels, at.out_channels, at.kernel, at.stride, at.padding, bias=False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # so that outputs have about the variance that the batch norm's statistics say
        conv.weight.normal_(0, (at.channels * at.kernel**2) ** -0.5, generator=generator)
    return Plain(norm(at.out_channels), conv)


def _fused(plain: Plain) -> nn.Module:
    assert plain.conv is not None
    return dlkern.nn.ConvBNAct2d.from_modules(plain.conv, plain.bn, "relu")
