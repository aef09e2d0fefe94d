"""Conv2d + BatchNorm2d [+ residual] + ReLU on the shapes of ResNets."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

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
        peers={"cudnn": _Cudnn} if device_type == "cuda" and not training else {},
    )


def _plain(at: Shape) -> Plain:
    conv = nn.Conv2d(at.channels, at.out_channels, at.kernel, at.stride, at.padding, bias=False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # so that outputs have about the variance that the batch norm's statistics say
        conv.weight.normal_(0, (at.channels * at.kernel**2) ** -0.5, generator=generator)
    return Plain(norm(at.out_channels), conv)


def _fused(plain: Plain) -> nn.Module:
    assert plain.conv is not None
    assert plain.bn is not None
    return dlkern.nn.ConvBNAct2d.from_modules(plain.conv, plain.bn, "relu")


class _Cudnn(nn.Module):
    """cuDNN's fused convolution + bias (+ addition) + ReLU, with the batch norm folded into it once."""

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        conv, bn = plain.conv, plain.bn
        assert conv is not None
        assert bn is not None
        assert bn.running_mean is not None
        assert bn.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight.float(), None, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        layout = torch.channels_last if conv.weight.is_contiguous(memory_format=torch.channels_last) else None
        self.weight = nn.Parameter(weight.to(conv.weight.dtype, memory_format=layout or torch.contiguous_format))
        self.bias = nn.Parameter(bias.to(conv.weight.dtype))
        assert not isinstance(conv.padding, str)
        self.geometry: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.geometry)
        return torch.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, self.bias, *self.geometry)
