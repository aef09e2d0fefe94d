"""What only a GPU can show of every op: repeatability, CUDA graphs, streams, sizes beyond 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dlkern
from dlkern.functional import batch_norm_act, conv_act, depthwise_conv2d

pytestmark = pytest.mark.gpu

BACKENDS = ("triton", "cuda", "numba")
F32, F16 = torch.float32, torch.float16

Step = Callable[[], tuple[Tensor, ...]]


def _norm(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Step:
    """Forward and backward of batch norm + ReLU on fixed inputs."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cuda").to(dtype).contiguous(memory_format=layout)
    grad = torch.randn(shape, generator=generator, device="cuda").to(dtype).contiguous(memory_format=layout)
    weight = torch.rand(shape[1], generator=generator, device="cuda") + 0.5
    bias = torch.randn(shape[1], generator=generator, device="cuda")
    inputs = [v.requires_grad_() for v in (x, weight, bias)]

    def step() -> tuple[Tensor, ...]:
        y = batch_norm_act(x, None, None, weight, bias, training=True, activation="relu")
        return (y, *torch.autograd.grad(y, inputs, grad))

    return step


def _conv(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Step:
    """Forward and backward of convolution + ReLU on fixed inputs."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cuda").to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(24, shape[1], 3, 3, generator=generator, device="cuda").to(dtype) / (9 * shape[1]) ** 0.5
    bias = torch.randn(24, generator=generator, device="cuda").to(dtype)
    inputs = [v.requires_grad_() for v in (x, weight, bias)]

    def step() -> tuple[Tensor, ...]:
        y = conv_act(x, weight, bias, padding=1, activation="relu")
        return (y, *torch.autograd.grad(y, inputs, y.detach()))

    return step


def _depthwise(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Step:
    """Forward and backward of a 5x5 depthwise convolution on fixed inputs."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cuda").to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(shape[1], 1, 5, 5, generator=generator, device="cuda").to(dtype) / 5
    bias = torch.randn(shape[1], generator=generator, device="cuda").to(dtype)
    inputs = [v.requires_grad_() for v in (x, weight, bias)]

    def step() -> tuple[Tensor, ...]:
        y = depthwise_conv2d(x, weight, bias, padding=2)
        return (y, *torch.autograd.grad(y, inputs, y.detach()))

    return step


STEPS: dict[str, Any] = {"batch_norm_act": _norm, "conv_bn_act": _conv, "depthwise": _depthwise}
_PAIRS = [("batch_norm_act", name) for name in BACKENDS]
_PAIRS += [("conv_bn_act", "triton"), *(("depthwise", name) for name in BACKENDS)]
every_op = pytest.mark.parametrize(("op", "backend"), _PAIRS, ids=[f"{op}-{name}" for op, name in _PAIRS])
every_layout = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


def _available(backend: str) -> None:
    reason = dlkern.available_backends()[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def _same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(a, b), f"result {index} differs in {int((a != b).sum())} of {a.numel()} elements"


@every_layout
@every_op
def test_a_thousand_runs_are_bit_identical(op: str, backend: str, layout: torch.memory_format) -> None:
    _available(backend)
    step = STEPS[op]((16, 24, 15, 13), F32, layout)
    with dlkern.backend(**{op: backend}):
        first = step()
        for _ in range(1000):
            _same(step(), first)


@every_layout
@every_op
def test_a_hundred_replays_of_a_cuda_graph(op: str, backend: str, layout: torch.memory_format) -> None:
    _available(backend)
    if backend == "numba":
        pytest.skip("numba launches on its own stream objects, which a capture does not follow")
    step = STEPS[op]((8, 24, 15, 13), F32, layout)
    with dlkern.backend(**{op: backend}):
        wanted = step()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
    for _ in range(100):
        for tensor in captured:
            tensor.detach().fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        _same(captured, wanted)


@every_op
def test_two_streams_at_once(op: str, backend: str) -> None:
    _available(backend)
    steps = [STEPS[op]((8 + 8 * i, 24, 31, 29), F32, torch.channels_last) for i in range(2)]
    with dlkern.backend(**{op: backend}):
        wanted = [step() for step in steps]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in steps]
        found: list[list[tuple[Tensor, ...]]] = [[], []]
        for _ in range(50):
            for index, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    found[index].append(steps[index]())
        torch.cuda.synchronize()
    for runs, want in zip(found, wanted, strict=True):
        for run in runs:
            _same(run, want)


@every_layout
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_batch_norm_act_beyond_two_to_the_31_elements(backend: str, layout: torch.memory_format) -> None:
    """The last image is the first one again: an offset that wraps round would read and write elsewhere."""
    _available(backend)
    shape = (2**31 // (64 * 1024) + 8, 64, 32, 32)
    x = torch.empty(shape, dtype=F16, device="cuda", memory_format=layout).normal_()
    x[-1] = x[0]
    x.requires_grad_()
    weight = torch.ones(64, device="cuda", requires_grad=True)
    with dlkern.backend(batch_norm_act=backend):
        y = batch_norm_act(x, None, None, weight, None, training=True, activation="relu")
        grad = torch.empty_like(y).normal_()
        grad[-1] = grad[0]
        dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    assert torch.equal(y[-1], y[0])
    assert torch.equal(dx[-1], dx[0])
    half = shape[0] // 2
    with torch.no_grad():
        count = x.numel() // 64
        mean = sum(part.double().sum((0, 2, 3)) for part in (x[:half], x[half:])) / count
        square = sum((part.double() - mean.view(1, -1, 1, 1)).square().sum((0, 2, 3)) for part in x.split(256)) / count
        for index in (0, half, shape[0] - 2):
            xhat = (x[index].double() - mean.view(-1, 1, 1)) * torch.rsqrt(square + 1e-5).view(-1, 1, 1)
            torch.testing.assert_close(y[index].double(), xhat.relu(), rtol=2e-3, atol=2e-3)
    assert torch.isfinite(dweight).all()


@every_layout
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_depthwise_beyond_two_to_the_31_elements(backend: str, layout: torch.memory_format) -> None:
    """The last image is the first one again, as above."""
    _available(backend)
    shape = (2**31 // (64 * 1024) + 8, 64, 32, 32)
    x = torch.empty(shape, dtype=F16, device="cuda", memory_format=layout).normal_()
    x[-1] = x[0]
    x.requires_grad_()
    weight = torch.randn(64, 1, 3, 3, device="cuda", dtype=F16, requires_grad=True)
    with dlkern.backend(depthwise=backend):
        y = depthwise_conv2d(x, weight, None, padding=1)
        grad = torch.empty_like(y).normal_()
        grad[-1] = grad[0]
        dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    assert torch.equal(y[-1], y[0])
    assert torch.equal(dx[-1], dx[0])
    with torch.no_grad():
        wanted = torch.nn.functional.conv2d(x[-1:].double(), weight.double(), padding=1, groups=64)
        torch.testing.assert_close(y[-1:].double(), wanted, rtol=2e-3, atol=2e-3)
    assert torch.isfinite(dweight).all()


def test_bad_alignment_and_strided_gradients_on_the_device() -> None:
    base = torch.randn(4 * 24 * 9 * 7 + 1, device="cuda", dtype=F16)
    x = base[1:].view(4, 24, 9, 7).requires_grad_()
    peer = x.detach().double().requires_grad_()
    wanted = torch.nn.functional.batch_norm(peer, None, None, training=True).relu()
    wanted.backward(torch.ones_like(wanted))
    for backend in BACKENDS[:2]:
        if dlkern.available_backends()[backend] is not None:
            continue
        x.grad = None
        with dlkern.backend(batch_norm_act=backend):
            y = batch_norm_act(x, None, None, training=True)
            y.sum().backward()  # its gradient is expanded from one element
        torch.testing.assert_close(y.double(), wanted, rtol=2e-3, atol=2e-3)
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), peer.grad, rtol=2e-2, atol=2e-2)
