"""A DeepLabV3+ in plain PyTorch, as its paper and the usual libraries have it, for ``--model`` and the tests.

    pytest benchmarks/bench_models.py --model dlkern.bench.segmentation:deeplabv3plus --image-size 257 --batch 2

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation" (2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn_relu(channels: int, out: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def separable(channels: int, out: int, rate: int = 1, stride: int = 1) -> nn.Sequential:
    """A dilated depthwise convolution and the 1 x 1 convolution behind it."""
    depthwise = nn.Conv2d(channels, channels, 3, stride, rate, rate, groups=channels, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(channels, out, 1, bias=False))


def separable_bn_relu(channels: int, out: int, rate: int = 1, stride: int = 1) -> list[nn.Module]:
    return [separable(channels, out, rate, stride), nn.BatchNorm2d(out), nn.ReLU()]


class Pooling(nn.Sequential):
    """The image's mean through a 1 x 1 convolution, in every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for mod in self:
            x = mod(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling with separable branches."""

    def __init__(self, channels: int, rates: Sequence[int], out: int = 256) -> None:
        super().__init__()
        branches = [nn.Sequential(*conv_bn_relu(channels, out, 1))]
        branches += [nn.Sequential(*separable_bn_relu(channels, out, rate)) for rate in rates]
        pooling = Pooling(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(channels, out, 1))
        self.convs = nn.ModuleList([*branches, pooling])
        self.project = nn.Sequential(*conv_bn_relu(len(self.convs) * out, out, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        res: Any = []  # in the words that a swap knows an ASPP block's forward by
        for conv in self.convs:
            res.append(conv(x))
        res = torch.cat(res, dim=1)
        return self.project(res)


class Block(nn.Module):
    """An Xception block: separable convolutions beside a 1 x 1 one, or where no size changes beside nothing."""

    def __init__(self, channels: int, out: int, stride: int = 1, rate: int = 1) -> None:
        super().__init__()
        self.rep = nn.Sequential(
            *separable_bn_relu(channels, out, rate),
            *separable_bn_relu(out, out, rate),
            separable(out, out, rate, stride),
            nn.BatchNorm2d(out),
        )
        self.skip: nn.Module = nn.Identity()
        if channels != out or stride != 1:
            self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.rep(x) + self.skip(x))


class DeepLabV3Plus(nn.Module):
    """An Xception-like encoder with dilated separable convolutions, ASPP, and the decoder; logits of x's size."""

    def __init__(
        self, width: int = 32, out: int = 256, classes: int = 21, rates: Sequence[int] = (6, 12, 18), depth: int = 2
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn_relu(3, width, 3, 2), *conv_bn_relu(width, 2 * width))
        self.low = Block(2 * width, 4 * width, stride=2)
        self.entry = nn.Sequential(Block(4 * width, 8 * width, stride=2), Block(8 * width, 16 * width))
        self.middle = nn.Sequential(*(Block(16 * width, 16 * width, rate=2) for _ in range(depth)))
        self.aspp = ASPP(16 * width, rates, out)
        self.lateral = nn.Sequential(*conv_bn_relu(4 * width, 48, 1))
        self.decoder = nn.Sequential(*separable_bn_relu(out + 48, out), *separable_bn_relu(out, out))
        self.head = nn.Conv2d(out, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(self.stem(x))
        deep = self.aspp(self.middle(self.entry(low)))
        deep = F.interpolate(deep, size=low.shape[-2:], mode="bilinear", align_corners=False)
        y = self.head(self.decoder(torch.cat([deep, self.lateral(low)], dim=1)))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


def deeplabv3plus() -> nn.Module:
    """The model at a width that trains on a CPU within a second or two a step."""
    return DeepLabV3Plus()


def deeplabv3plus_deep() -> nn.Module:
    """The same with the sixteen blocks in the middle that the paper's Xception has."""
    return DeepLabV3Plus(depth=16)


def tiny() -> nn.Module:
    """The same of a few channels, for tests."""
    return DeepLabV3Plus(4, 8, 5, (2, 3, 9))
