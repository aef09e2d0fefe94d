"""ConvTranspose2d + BatchNorm2d + ReLU on the shapes of DCGAN's generator (images of 64 x 64) and of a decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import dlkern.nn

from .base import Case, Plain, dtype_name
from .batch_norm_act import norm
from .terms import terms


class Shape(NamedTuple):
    """A transposed convolution's input without the batch, and its geometry."""

    channels: int
    size: int
    out_channels: int
    kernel: int = 4
    stride: int = 2
    padding: int = 1
    output_padding: int = 0

    @property
    def out_size(self) -> int:
        return (self.size - 1) * self.stride - 2 * self.padding + self.kernel + self.output_padding


SHAPES = (
    Shape(512, 4, 256),
    Shape(256, 8, 128),
    Shape(128, 16, 64),
    Shape(64, 28, 32, kernel=3, output_padding=1),
)

#: "never below 0.98 on any swapped site", in float32 on a CPU.
CPU_TARGET = 0.98


def cases(device_type: str, batch: int, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """Every shape, layout and dtype, in training and in inference."""
    return [
        _case(device_type, batch, shape, layout, training, dtype, dtype == dtypes[0])
        for training in (True, False)
        for dtype in dtypes
        for layout in (("channels_last",) if device_type == "cuda" else ("nchw", "channels_last"))
        for shape in SHAPES
    ]


def _case(
    device_type: str, batch: int, at: Shape, layout: str, training: bool, dtype: torch.dtype, quick: bool
) -> Case:
    shape = (batch, at.channels, at.size, at.size)
    liked = "channels_last" if device_type == "cuda" else "nchw"
    return Case(
        op="transposed",
        label=f"{'x'.join(map(str, shape))}-to-{at.out_channels}-k{at.kernel}s{at.stride}",
        shape=shape,
        out_shape=(batch, at.out_channels, at.out_size, at.out_size),
        format=layout,
        residual=False,
        training=training,
        dtype=dtype,
        plain=lambda: _plain(at),
        fused=_fused,
        terms=terms,
        target=CPU_TARGET if device_type == "cpu" and dtype == torch.float32 else None,
        quick=quick and layout == liked and at.kernel == 4,
        facts={
            "shape": list(shape),
            "out_channels": at.out_channels,
            "kernel": at.kernel,
            "stride": at.stride,
            "format": layout,
            "residual": False,
            "training": training,
            "dtype": dtype_name(dtype),
        },
    )


def _plain(at: Shape) -> Plain:
    conv = nn.ConvTranspose2d(
        at.channels, at.out_channels, at.kernel, at.stride, at.padding, at.output_padding, bias=False
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # so that outputs have about the variance that the batch norm's statistics say
        conv.weight.normal_(0, (at.channels * at.kernel**2) ** -0.5 * at.stride, generator=generator)
    return Plain(norm(at.out_channels), conv)  # type: ignore[arg-type]  # called as a Conv2d is


class _Fused(nn.Module):
    """Called as the plain module is."""

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        conv: nn.Module | None = plain.conv
        assert isinstance(conv, nn.ConvTranspose2d)
        self.block = dlkern.nn.ConvTransposeBNAct2d.from_modules(conv, plain.bn, "relu")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        del residual  # there is none
        return self.block(x)


def _fused(plain: Plain) -> nn.Module:
    return _Fused(plain)
