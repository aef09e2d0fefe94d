"""Cases of atrous spatial pyramid pooling: a block's tensors, the block by PyTorch's own functions, and by dlkern."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import evidence
import parity
import torch
import torch.nn.functional as F
from batch_norm_act_cases import arrange, spied
from guard import guarded
from torch import Tensor

import dlkern
from dlkern.functional import ConvNorm


class Case(NamedTuple):
    """One block on x (N, C, H, W): rates of 3 x 3 branches beside one of 1 x 1, K channels each."""

    shape: tuple[int, int, int, int]
    rates: tuple[int, ...] = (2, 3, 20)
    out: int = 4
    separable: bool = False
    pooled: bool = True
    training: bool = True
    activation: str = "silu"
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    seed: int = 0

    def __str__(self) -> str:
        changed = [
            f"{k}={str(v).removeprefix('torch.')}"
            for k, v in self._asdict().items()
            if k != "shape" and v != self._field_defaults[k]
        ]
        return "-".join(["x".join(map(str, self.shape)), *changed]).replace(" ", "")


class Block(NamedTuple):
    """What dlkern.functional.aspp takes."""

    x: Tensor
    branches: list[ConvNorm]
    pooled: ConvNorm | None
    projection: ConvNorm

    @property
    def parts(self) -> list[ConvNorm]:
        return [*self.branches, *([] if self.pooled is None else [self.pooled]), self.projection]

    @property
    def differentiable(self) -> list[Tensor]:
        found = [self.x]
        for part in self.parts:
            found += [t for t in (part.weight, part.depthwise_weight, part.bn_weight, part.bn_bias) if t is not None]
        return found

    @property
    def statistics(self) -> list[Tensor]:
        return [t for part in self.parts for t in (part.running_mean, part.running_var) if t is not None]

    def mapped(self, function: Any) -> Block:
        """The same with every tensor changed."""

        def part(p: ConvNorm) -> ConvNorm:
            return p._replace(**{k: function(v) for k, v in p._asdict().items() if isinstance(v, Tensor)})

        pooled = None if self.pooled is None else part(self.pooled)
        return Block(function(self.x), [part(b) for b in self.branches], pooled, part(self.projection))


@functools.lru_cache(maxsize=32)
def block(case: Case) -> tuple[Block, Tensor]:
    """A block's values and the gradient of its output."""
    generator = torch.Generator().manual_seed(case.seed)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    n, channels, height, width = case.shape
    param_dtype = case.param_dtype or case.dtype

    def part(channels: int, kernel: int, rate: int = 1, separable: bool = False) -> ConvNorm:
        size = (case.out, channels, 1, 1) if separable else (case.out, channels, kernel, kernel)
        return ConvNorm(
            (randn(size) / (size[1] * size[2]) ** 0.5).to(case.dtype),
            (0.2 * randn(case.out)).to(param_dtype),
            (0.5 + randn(case.out).abs()).to(param_dtype),
            (1 + 0.3 * randn(case.out)).to(param_dtype),
            (0.4 * randn(case.out)).to(param_dtype),
            dilation=rate,
            depthwise_weight=(randn(channels, 1, kernel, kernel) / kernel).to(case.dtype) if separable else None,
            training=case.training,
            activation=case.activation,
        )

    branches = [part(channels, 1), *(part(channels, 3, rate, case.separable) for rate in case.rates)]
    pooled = part(channels, 1) if case.pooled else None
    projection = part(case.out * (len(branches) + case.pooled), 1)
    x, grad = (randn(case.shape) + 0.3).to(case.dtype), randn(n, case.out, height, width).to(case.dtype)
    return Block(x, branches, pooled, projection), grad


def plain(b: Block) -> Tensor:
    """The block by PyTorch's own functions in a row, the pooled branch in every pixel and the concatenation copied."""

    def normed(x: Tensor, p: ConvNorm) -> Tensor:
        z = F.batch_norm(x, p.running_mean, p.running_var, p.bn_weight, p.bn_bias, p.training, p.momentum, p.eps)
        return {"silu": F.silu, "relu": F.relu, "identity": lambda z: z, "tanh": torch.tanh}[str(p.activation)](z)

    made = []
    for p in b.branches:
        h, rate = b.x, p.dilation
        if p.depthwise_weight is not None:
            h = F.conv2d(h, p.depthwise_weight, padding=rate, dilation=rate, groups=h.size(1))
            rate = 1
        made.append(normed(F.conv2d(h, p.weight, padding=rate if p.weight.size(2) > 1 else 0, dilation=rate), p))
    if b.pooled is not None:
        pool = normed(F.conv2d(F.adaptive_avg_pool2d(b.x, 1), b.pooled.weight), b.pooled)
        made.append(F.interpolate(pool, size=b.x.shape[2:], mode="bilinear", align_corners=False))
    return normed(F.conv2d(torch.cat(made, 1), b.projection.weight), b.projection)


def results(b: Block, y: Tensor, grad: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, b.differentiable, grad), *b.statistics]


@functools.lru_cache(maxsize=32)
def expected(case: Case, dtype: torch.dtype | None) -> list[Tensor]:
    values, grad = block(case)
    b = values.mapped(lambda t: t.detach().to(dtype or t.dtype, copy=True))
    for t in b.differentiable:
        t.requires_grad_()
    return results(b, plain(b), grad.to(b.x.dtype))


def run(case: Case, backend: str) -> list[Tensor]:
    """The block through dlkern.functional, op atrous forced; x and weights between guard zones."""
    values, grad = block(case)
    with guarded() as guards:
        b = values.mapped(lambda t: guards.place(t.detach()))
        b = b._replace(x=arrange(values.x, case.layout, guards))
        for t in b.differentiable:
            t.requires_grad_()
        with spied() as calls, dlkern.backend(atrous=backend):
            y = dlkern.functional.aspp(*b)
        with spied() as later:
            found = results(b, y, grad)
        if backend != "torch":
            assert calls.count((backend, "forward")) >= len(b.branches), calls
            assert later.count((backend, "backward")) >= len(b.branches), later
    return found


def check(case: Case, backend: str) -> None:
    """Run the case; a chain of convolutions and norms is held to PyTorch's own distance from float64, twice over."""
    truth, peer = expected(case, torch.float64), expected(case, None)
    for i, (ours, like, exact) in enumerate(zip(run(case, backend), peer, truth, strict=True)):
        assert ours.dtype == like.dtype
        if case.dtype == torch.float64:
            torch.testing.assert_close(ours, exact)
        else:  # sums over all pixels behind two norms: terms larger than most results
            size = exact.abs() + 4 * exact.abs().mean()
            parity.assert_parity(f"result {i}", ours, exact, size, peer=like, dtype=case.dtype)
    evidence.record("atrous", backend, case.dtype)
