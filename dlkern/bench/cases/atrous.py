"""Atrous spatial pyramid pooling: DeepLabV3's block and the separable one of DeepLabV3+, without their dropout."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

import dlkern.nn

from .base import Case, Plain, Problem, dtype_name


class Shape(NamedTuple):
    """A block's input without the batch, and its branches; ``trains``: the ratio that training must reach on a CPU."""

    channels: int
    size: int
    rates: tuple[int, ...]
    separable: bool
    out_channels: int = 256
    trains: float = 1.0


SHAPES = (
    Shape(320, 33, (6, 12, 18), separable=True, trains=1.3),
    Shape(320, 33, (6, 12, 18), separable=False),
    Shape(2048, 17, (12, 24, 36), separable=False),
)


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
    gated = device_type == "cpu" and dtype == torch.float32
    kind = "separable" if at.separable else "dense"
    return Case(
        op="atrous",
        label=f"{'x'.join(map(str, shape))}-to-{at.out_channels}-{kind}-rates-{'-'.join(map(str, at.rates))}",
        shape=shape,
        out_shape=(batch, at.out_channels, at.size, at.size),
        format=layout,
        residual=False,
        training=training,
        dtype=dtype,
        plain=lambda: Block(at),
        fused=_fused,
        terms=_terms,
        target=(at.trains if training else 0.98) if gated else None,
        quick=quick and layout == liked and at.channels < 2048,
        facts={
            "shape": list(shape),
            "out_channels": at.out_channels,
            "rates": list(at.rates),
            "separable": at.separable,
            "format": layout,
            "residual": False,
            "training": training,
            "dtype": dtype_name(dtype),
        },
    )


class Block(Plain):
    """PyTorch's own: the branches one after the other, their concatenation, and the projection."""

    def __init__(self, at: Shape) -> None:
        super().__init__(None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.block = dlkern.nn.ASPP(at.channels, at.rates, at.out_channels, separable=at.separable, dropout=0.0)

    @property
    def activates(self) -> bool:
        return True

    def before(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The projection's batch norm."""
        del residual  # there is none
        conv, norm, _, _ = self.block.project
        return norm(conv(torch.cat([branch(x) for branch in self.block.convs], 1)))


class _Fused(nn.Module):
    """Called as the plain module is."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        del residual
        return self.block(x)


def _fused(plain: Plain) -> nn.Module:
    assert isinstance(plain, Block)
    return _Fused(copy.deepcopy(plain.block))


def _terms(problem: Problem) -> dict[str, Tensor]:
    """Sizes behind each result, by name: sums over all pixels behind two norms, so larger than most results."""
    truths = problem.step(copy.deepcopy(problem.wide), wide=True)()
    return {
        name: t.detach().abs() + 4 * t.detach().abs().mean() for name, t in zip(problem.names(), truths, strict=True)
    }
