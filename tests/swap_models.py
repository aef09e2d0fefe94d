"""Small models for the swap tests: each holds one situation. They live in a module so that they pickle."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBN(nn.Module):
    """conv and bn as children; subclasses say what follows."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """A residual block with one ReLU shared by both of its sites."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Stack(nn.Sequential):
    """conv-bn-relu, two residual blocks, conv-bn-silu: 6 sites, from containers nested in a container."""

    def __init__(self, channels: int = 8) -> None:
        conv = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        stem = nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        head = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.SiLU())
        super().__init__(stem, Block(channels), Block(channels), head, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Masked(ConvBN):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        if mask is not None:
            y = y * mask
        return y


class Switched(ConvBN):
    """Reads plain attributes."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__(channels)
        self.scale = 1.0
        self.extra: nn.Module | None = None
        self.act = F.relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        if self.extra is not None:
            y = self.extra(y)
        return y * self.scale


class InPlaceResidual(ConvBN):
    """``x += bn(...)`` writes into a tensor that is used again."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        first = h * 2
        alias = first
        first += self.bn(h)
        return F.relu(first) + alias


class CallersResidual(ConvBN):
    """``x += bn(...)`` where x is the caller's tensor."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x * 1)
        x += self.bn(h)
        return F.relu(x)


class Noisy(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x))) + torch.rand(1)


class StopsGradient(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.conv(x)
        return F.relu(self.bn(h))


class AutocastRegion(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.conv(x)
        return F.relu(self.bn(h.float()))


class AsksGradMode(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        return y if torch.is_grad_enabled() else y * 2


class Remembers(ConvBN):
    """Keeps an intermediate and counts its calls."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__(channels)
        self.count = 0
        self.history: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.history.append(self.count)
        self.feat = self.bn(self.conv(x))
        return F.relu(self.feat)


class BranchesOnType(ConvBN):
    def forward(self, x: Any) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        shape = y.shape
        return y if isinstance(shape, torch.Size) else y * 2


class BranchesOnValue(nn.Module):
    """A forward that no trace can follow, round a child that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ConvBN()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > -1e9 else x


class NormTwice(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.conv(x)))
        return F.relu(self.bn(self.conv(h)))


class WritesBetween(ConvBN):
    """The norm's input is overwritten before the activation."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).view(x.shape)
        y = self.bn(h)
        h.zero_()
        return F.relu(y + h)


class TakesList(nn.Module):
    """Takes a list and writes into it, as HRNet's modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ConvBN(), ConvBN()
        self.norm, self.act = nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        x[0] = self.a(x[0])
        return [self.act(self.norm(x[0])), self.b(x[1])]


class ListOwner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = TakesList()

    def forward(self, x: Tensor) -> Tensor:
        xs = [x, x * 2]
        ys = self.inner(xs)
        return ys[0] + ys[1] + xs[0]


class AcrossContainers(nn.Module):
    """The norm ends a container, the activation stands outside: DenseNet's end."""

    def __init__(self) -> None:
        super().__init__()
        conv, norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.features = nn.Sequential(ConvBN(), nn.BatchNorm2d(8), nn.ReLU(inplace=True), conv, norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.features(x), inplace=True)


class LaterWrite(ConvBN):
    """The output of a residual SiLU is overwritten later, which PyTorch's own backward allows."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn(self.conv(x)) + x)
        y.mul_(2)
        return y


class PromotesResidual(ConvBN):
    """A residual of another dtype, added in place and out of place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.in_place:
            y += residual
        else:
            y = y + residual
        return F.relu(y)


class SavedTensorsRegion(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return F.relu(self.bn(self.conv(x)))


class OptionalResult(nn.Module):
    """Its inner module cannot be traced, and returns None sometimes."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor | None:
        if float(x.detach().sum()) == float("inf"):
            return x
        return x if self.answer else None


class UsesOptional(ConvBN):
    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.inner = OptionalResult(answer)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        z = self.inner(y)
        return y * 3 if z is None else z


class Gate(nn.Module):
    """A squeeze-and-excitation block without its squeeze."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x))


class GatedBlock(Block):
    """The residual is added in place to the output of a module that a local trace does not look into."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__(channels)
        self.gate = Gate(channels)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.gate(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out += self.shortcut(x)
        return self.relu(out)


class CachesInEval(ConvBN):
    """Keeps a piece of its graph between calls."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__(channels)
        self.table = nn.Parameter(torch.randn(channels, 1, 1))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self.cache:
            self.cache["scale"] = self.table.exp()
        return F.relu(self.bn(self.conv(x))) * self.cache["scale"]


class InvertedResidual(nn.Sequential):
    """MobileNetV2's: pointwise, depthwise, pointwise, each with its norm."""

    def __init__(self, channels: int = 8) -> None:
        wide = 2 * channels
        super().__init__(
            nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True)),
            nn.Sequential(
                nn.Conv2d(wide, wide, 3, 2, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True)
            ),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )


class ConvNeXtBlock(nn.Module):
    """A depthwise 7 x 7 with a pointwise convolution behind it, and no norm that dlkern fuses."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.pw = nn.Conv2d(channels, channels, 1)
        self.norm = nn.GroupNorm(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.pw(self.dw(x)))


class Separable(nn.Module):
    """Depthwise and pointwise without anything in between."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.dw = nn.Conv2d(channels, 2 * channels, (3, 5), padding=(1, 2), groups=channels, bias=False)
        self.skip = nn.Identity()
        self.pw = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.pw(self.skip(self.dw(x)))))


class DepthwiseResidual(nn.Module):
    """The residual is added to the depthwise convolution's norm."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.dw(x)) + x)


class DepthwiseActivation(nn.Module):
    """An activation right behind a depthwise convolution, and a depthwise convolution at the end."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 3, padding="same", groups=channels)
        self.head = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.dw(x)))


class Temporal(nn.Sequential):
    """Depthwise convolutions over one dimension."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__(
            nn.Conv1d(channels, channels, 5, padding=2, groups=channels),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
            nn.Conv1d(channels, 2 * channels, 4, padding="same", groups=channels, bias=False),
        )


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A model and an independent copy of it."""
    return model, copy.deepcopy(model)
