"""The op's place in PyTorch: library ops, autograd twice, torch.func, compile, strides of gradients, the choice."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batch_norm_act_cases import spied
from conftest import HAS_CUDA
from torch import Tensor

import dlkern
from dlkern import dispatch
from dlkern.functional import depthwise_conv2d
from dlkern.ops.depthwise import DepthwiseConv2dFunction, Request

DEVICE = "cuda" if HAS_CUDA else "cpu"
#: The implementations that run on the machine at hand (without a GPU Triton runs in its interpreter).
BACKENDS = ["reference", "triton"] if HAS_CUDA else ["reference", "cpu", "triton"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

#: Geometry, kernel and multiplier: padding beyond the kernel, taps outside of the image, holes left by a stride.
GEOMETRIES: list[tuple[dict[str, Any], tuple[int, int], int]] = [
    ({"padding": 1}, (3, 3), 1),
    ({"stride": (2, 1), "padding": (0, 2, 1, 3), "dilation": (1, 2)}, (2, 3), 2),
    ({"stride": 2, "padding": (4, 0)}, (3, 1), 1),
]


def _leaves(
    kernel: tuple[int, int], multiplier: int, channels_last: bool, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 5, 4, dtype=dtype, device=DEVICE)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(2 * multiplier, 1, *kernel, dtype=dtype, device=DEVICE)
    bias = torch.randn(2 * multiplier, dtype=dtype, device=DEVICE)
    return [t.requires_grad_() for t in (x, weight, bias)]


@every_backend
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("which", range(len(GEOMETRIES)))
def test_gradcheck(which: int, channels_last: bool, backend: str) -> None:
    geometry, kernel, multiplier = GEOMETRIES[which]
    leaves = _leaves(kernel, multiplier, channels_last)

    def run(*leaves: Tensor) -> Tensor:
        with dlkern.backend(depthwise=backend):
            return depthwise_conv2d(*leaves, **geometry)

    with spied() as calls:
        assert torch.autograd.gradcheck(run, leaves, fast_mode=backend == "triton")
    assert set(calls) == {(backend, "forward"), (backend, "backward")}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("which", range(len(GEOMETRIES)))
def test_double_backward(which: int, channels_last: bool) -> None:
    geometry, kernel, multiplier = GEOMETRIES[which]
    leaves = _leaves(kernel, multiplier, channels_last)

    def run(*leaves: Tensor) -> Tensor:
        with dlkern.backend(depthwise="reference"):
            return depthwise_conv2d(*leaves, **geometry, activation="silu")

    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@every_backend
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_what_is_needed(needed: tuple[int, ...], backend: str) -> None:
    leaves = _leaves((3, 3), 1, True)
    want = torch.autograd.grad(F.conv2d(*leaves, padding=1, groups=2).sum(), leaves)
    inputs = [leaf.detach().requires_grad_(i in needed) for i, leaf in enumerate(leaves)]
    with dlkern.backend(depthwise=backend):
        y = depthwise_conv2d(*inputs, padding=1)
    assert type(y.grad_fn).__name__ == DepthwiseConv2dFunction.__name__ + "Backward"
    for i, grad in zip(needed, torch.autograd.grad(y.sum(), [inputs[i] for i in needed]), strict=True):
        torch.testing.assert_close(grad, want[i])


@every_backend
@pytest.mark.parametrize("grad", ["contiguous", "channels_last", "expanded", "sliced"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_strides(layout: str, grad: str, backend: str) -> None:
    """y and the gradients have the strides that PyTorch gives them, whatever the gradient comes with."""
    x, weight, bias = _leaves((3, 3), 2, layout == "channels_last", torch.float32)
    if layout == "sliced":
        x = torch.randn(2, 2, 5, 9, device=DEVICE)[..., 1::2].requires_grad_()
    with dlkern.backend(depthwise=backend):
        y = depthwise_conv2d(x, weight, bias, padding=1)
    want = F.conv2d(x, weight, bias, padding=1, groups=2)
    assert y.stride() == want.stride()
    g = torch.randn(2, 4, 5, 4, device=DEVICE)
    g = {
        "contiguous": g,
        "channels_last": g.contiguous(memory_format=torch.channels_last),
        "expanded": g[:1, :1, :1, :1].expand(2, 4, 5, 4),
        "sliced": torch.randn(2, 4, 5, 8, device=DEVICE)[..., ::2],
    }[grad]
    ours, theirs = (torch.autograd.grad(t, (x, weight, bias), g) for t in (y, want))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert ours[0].is_contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    assert ours[1].is_contiguous()


@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last: bool) -> None:
    x, weight, bias = (t.detach() for t in _leaves((3, 2), 2, channels_last, torch.float32))
    for statistics, activation in ((False, "relu"), (True, "identity")):
        inputs = (x, weight, bias, [2, 1], [1, 0, 2, 1], [1, 2], activation, 0.0, statistics, "reference")
        torch.library.opcheck(torch.ops.dlkern.depthwise_conv2d.default, inputs)
        torch.library.opcheck(torch.ops.dlkern.depthwise_conv2d.default, (*inputs[:2], None, *inputs[3:]))
    y = torch.ops.dlkern.depthwise_conv2d(*inputs)[0]
    geometry = ([2, 1], [1, 0, 2, 1], [1, 2])
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        inputs = (torch.randn_like(y), x, weight, *geometry, *needs, "reference")
        torch.library.opcheck(torch.ops.dlkern.depthwise_conv2d_backward.default, inputs)


@pytest.mark.parametrize("backend", ["torch", *BACKENDS[:-1]])
@pytest.mark.parametrize("channels_last", [False, True])
def test_compile_fullgraph(channels_last: bool, backend: str) -> None:
    torch._dynamo.reset()
    leaves = _leaves((3, 3), 2, channels_last, torch.float32)

    def run(*leaves: Tensor) -> Tensor:
        return depthwise_conv2d(*leaves, padding="same", activation="silu").square()

    with dlkern.backend(depthwise=backend):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        ours, theirs = compiled(*leaves), run(*leaves)
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()
        for mine, other in zip(*(torch.autograd.grad(t.sum(), leaves) for t in (ours, theirs)), strict=True):
            torch.testing.assert_close(mine, other)
            assert mine.stride() == other.stride()
        with torch.no_grad():
            torch.testing.assert_close(compiled(*leaves), theirs)


# ------------------------------------------------------------------------------------- torch.func
def test_func_grad() -> None:
    leaves = [t.detach() for t in _leaves((3, 3), 1, True)]

    def loss(*leaves: Tensor) -> Tensor:
        return depthwise_conv2d(*leaves, padding=1, activation="silu").square().sum()

    with dlkern.backend(depthwise="reference"), spied() as calls:
        ours = torch.func.grad(loss, (0, 1, 2))(*leaves)
    assert calls == [("reference", "forward")]  # torch.func differentiates gradients: they are PyTorch's own
    with dlkern.backend(depthwise="torch"):
        theirs = torch.func.grad(loss, (0, 1, 2))(*leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_vmap_and_jvp_are_pytorchs(backend: str | None) -> None:
    x, weight, _ = (t.detach() for t in _leaves((3, 3), 1, True))

    def run(x: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight, padding=1, activation="relu")

    with contextlib.nullcontext() if backend is None else dlkern.backend(depthwise=backend), spied() as calls:
        want = F.conv2d(x, weight, padding=1, groups=2).relu()
        torch.testing.assert_close(torch.func.vmap(run)(x[None])[0], want)
        y, tangent = torch.func.jvp(run, (x,), (torch.ones_like(x),))
        torch.testing.assert_close(y, want)
        assert tangent.abs().sum() > 0
        per_sample = torch.func.vmap(torch.func.grad(lambda x: run(x).sum()))(x[:, None])
        assert per_sample.shape == (2, 1, 2, 5, 4)
    assert calls == []


def test_vmap_and_jvp_raise_elsewhere() -> None:
    x, weight, _ = (t.detach() for t in _leaves((3, 3), 1, True))

    def run(x: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight, padding=1, activation="relu")

    with dlkern.backend(depthwise="reference"):
        for call in (
            lambda: torch.func.vmap(run)(x[None]),
            lambda: torch.func.jvp(run, (x,), (torch.ones_like(x),)),
            lambda: torch.func.vmap(torch.func.grad(lambda x: run(x).sum()))(x[:, None]),
        ):
            with pytest.raises(RuntimeError, match="reference backend has no vmap and no forward-mode"):
                call()
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
            run(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


# ------------------------------------------------------------------------------------- the choice
def _request(**changes: Any) -> Request:
    good = Request("cpu", torch.float32, True, (3, 3), (1, 1), (1, 1), 1, "identity", False)
    return good._replace(**changes)


@pytest.mark.skipif(HAS_CUDA, reason="the default order of a machine without a GPU")
def test_default_order() -> None:
    if dispatch.unavailable("cpu") is not None:
        pytest.fail(dispatch.unavailable("cpu"))
    choices: list[tuple[str, dict[str, Any]]] = [
        ("cpu", {}),
        ("cpu", {"plane": 1024}),
        ("cpu", {"plane": 256}),
        ("torch", {"plane": 256, "stride": (2, 2)}),
        ("cpu", {"plane": 256, "gradients": True}),
        ("torch", {"plane": 256, "gradients": True, "stride": (2, 2)}),
        ("cpu", {"plane": 256, "gradients": True, "stride": (2, 2), "kernel": (5, 5)}),
        ("cpu", {"plane": 256, "dilation": (1, 2)}),
        ("torch", {"device": "cuda"}),
    ]
    planes: list[tuple[str, dict[str, Any]]] = [
        ("cpu", {"plane": 64}),
        ("cpu", {"plane": 256, "stride": (2, 2)}),
        ("torch", {"plane": 64, "stride": (2, 2)}),
        ("torch", {"plane": 1024, "kernel": (5, 5)}),
        ("cpu", {"plane": 1024, "kernel": (5, 5), "gradients": True}),
        ("cpu", {"plane": 1024, "gradients": True}),
        ("torch", {"plane": 256, "gradients": True}),
        ("torch", {"plane": 1024, "gradients": True, "stride": (2, 2)}),
        ("torch", {"gradients": True}),
        ("cpu", {"plane": 64, "dilation": (2, 1), "gradients": True}),
    ]
    for backend, changes in [*choices, *((name, {"channels_last": False, **c}) for name, c in planes)]:
        assert dispatch.choose("depthwise", _request(**changes)).backend == backend, changes
    too_large = dispatch.choose("depthwise", _request(kernel=(33, 3)))
    assert too_large.backend == "torch"
    assert "31" in too_large.reason


def test_a_forced_backend_never_falls_back() -> None:
    x = torch.randn(1, 2, 40, 40, device=DEVICE)
    with (
        dlkern.backend(depthwise=BACKENDS[1]),
        pytest.raises(RuntimeError, match=f"'{BACKENDS[1]}' was forced for depthwise but cannot run it: .*31"),
    ):
        depthwise_conv2d(x, torch.randn(2, 1, 33, 33, device=DEVICE))


def test_the_choice_of_forward_holds_in_backward() -> None:
    leaves = _leaves((3, 3), 1, True)
    with dlkern.backend(depthwise="reference"):
        y = depthwise_conv2d(*leaves)
    with spied() as calls, dlkern.backend(depthwise="torch"):
        y.sum().backward()
    assert calls == [("reference", "backward")]


def test_writes_between_forward_and_backward_are_seen() -> None:
    x, weight, bias = _leaves((3, 3), 1, True)
    with dlkern.backend(depthwise="reference"):
        y = depthwise_conv2d(x, weight, bias)
    with torch.no_grad():
        weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
