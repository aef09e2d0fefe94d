"""memory_efficient=True: the same gradients, fewer bytes kept."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dlkern
from dlkern.bench.measure import saved_bytes
from dlkern.nn import ConvBNAct2d
from dlkern.ops import recompute


class Chain(nn.Module):
    """Three layers, the last with a residual; remembers its intermediate outputs without keeping them."""

    def __init__(self, memory_efficient: bool, activation: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            ConvBNAct2d(8, 8, activation_layer=activation, memory_efficient=memory_efficient) for _ in range(3)
        )
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        a = self.layers[0](x)
        b = self.layers[1](a)
        self.seen = [weakref.ref(a), weakref.ref(b)]
        return self.layers[2](b, x)


def step(model: Chain, x: Tensor, between: Callable[[], None] = lambda: None) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    between()
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_same_gradients(activation: str, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.randn(2, 8, 9, 7, dtype=dtype).contiguous(memory_format=memory_format)
    plain, efficient = (Chain(flag, activation).to(dtype) for flag in (False, True))
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    for ours, theirs in zip(step(efficient, x), step(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(efficient.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_bytes() -> None:
    """Two of the three outputs are not kept (the last is nobody's input), and the residual ReLU keeps bits."""
    x = torch.randn(2, 8, 16, 16)
    size = x.numel() * 4
    held: list[Tensor] = []
    kept = {}
    for flag in (False, True):
        model = Chain(flag, "relu")
        statistics = 3 * 2 * 8 * 4
        kept[flag] = saved_bytes(lambda m=model: held.append(m(x)), model.parameters()) - statistics
    # x, three convolution outputs, two layer outputs and that of the residual ReLU
    assert kept[False] == 7 * size
    assert kept[True] == 4 * size + size // 32


def test_intermediates_are_freed() -> None:
    x = torch.randn(2, 8, 9, 7)
    alive: list[list[bool]] = []
    for flag in (False, True):
        model = Chain(flag, "relu")

        def look(model: Chain = model) -> None:
            gc.collect()
            alive.append([ref() is not None for ref in model.seen])

        step(model, x, look)
    assert alive[1] == [False, False]


def test_writes_are_noticed() -> None:
    """A parameter changed between forward and backward: the output cannot be made again."""
    model = Chain(True, "relu")

    def write() -> None:
        with torch.no_grad():
            model.layers[0].bn.weight.add_(1)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(model, torch.randn(2, 8, 9, 7), write)


def test_an_output_that_was_written_is_kept() -> None:
    plain, efficient = (Chain(flag, "relu") for flag in (False, True))
    results = []
    for model in (plain, efficient):
        x = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
        a = model.layers[0](x)
        a = a.mul_(2) if model is efficient else a * 2  # plain: relu's output is needed for nothing else
        results.append(torch.autograd.grad(model.layers[1](a).sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_double_backward() -> None:
    results = []
    for flag in (False, True):
        model = Chain(flag, "silu").double()
        x = torch.randn(2, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*results)


def test_copies_and_compile() -> None:
    model = copy.deepcopy(Chain(True, "relu"))
    assert all(layer.memory_efficient for layer in model.layers)
    layer = model.layers[0]
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 65])
def test_bits(size: int) -> None:
    y = torch.randn(size)
    assert torch.equal(recompute.unpack(recompute.pack(y), y), (y > 0).float())
    assert recompute.pack(y).numel() == -(-size // 8)


def test_transposed_memory() -> None:
    y = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    made = recompute.unpack(recompute.pack(y), y)
    assert torch.equal(made, (y > 0).float())
    assert made.stride() == y.stride()


def test_forced_torch_keeps_everything() -> None:
    x = torch.randn(2, 8, 9, 7)
    with dlkern.backend("torch"):
        step(Chain(True, "relu"), x)
