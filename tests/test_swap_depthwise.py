"""The swap of depthwise convolutions: in front of a norm or an activation, alone, over one dimension."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import swap_models as models
import torch
from batch_norm_act_cases import spied
from conftest import HAS_CUDA
from test_swap import assert_same, calls
from torch import Tensor, nn

import dlkern

#: A backend of depthwise other than PyTorch's, that runs on the machine at hand.
OURS = "reference"


@pytest.fixture
def h() -> Tensor:
    return torch.randn(4, 8, 10, 10, generator=torch.Generator().manual_seed(1))


def labels(model: nn.Module) -> list[tuple[str, str, str]]:
    return sorted((row.path, row.kind, row.label) for row in dlkern.report(model).swapped)


def backends(ran: list[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """What ran on OURS: that is depthwise alone."""
    return Counter(call for call in ran if call[0] == OURS)


SITES = {
    "inverted": [
        ("0.1", "conv_bn_act", "conv+bn+relu6"), ("1.1", "separable", "depthwise+bn+relu6"),
        ("3", "conv_bn_act", "conv+bn"),
    ],
    "convnext": [("dw", "separable", "depthwise")],
    "separable": [("bn", "conv_bn_act", "conv+bn+relu"), ("dw", "separable", "depthwise")],
    "residual": [("bn", "depthwise", "depthwise+bn+add+relu")],
    "activation": [("dw", "depthwise", "depthwise+silu"), ("head", "depthwise", "depthwise")],
    "temporal": [("0", "depthwise", "depthwise"), ("1", "batch_norm_act", "bn+relu"), ("3", "depthwise", "depthwise")],
}  # fmt: skip
MODELS = {
    "inverted": models.InvertedResidual, "convnext": models.ConvNeXtBlock, "separable": models.Separable,
    "residual": models.DepthwiseResidual, "activation": models.DepthwiseActivation, "temporal": models.Temporal,
}  # fmt: skip


def data(name: str, h: Tensor, channels_last: bool) -> Tensor:
    if name == "temporal":
        h = h[:, :, 0]
        return h.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else h.contiguous()
    return h.contiguous(memory_format=torch.channels_last) if channels_last else h


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_and_calls(name: str, channels_last: bool, h: Tensor) -> None:
    """Both modes with gradients, and inference: each depthwise convolution runs on the op, each site is counted."""
    torch.manual_seed(0)
    model, plain = models.pair(MODELS[name]())
    dlkern.swap(model)
    assert labels(model) == SITES[name]
    depthwise = sum(label.startswith("depthwise") for *_, label in SITES[name])
    x = data(name, h, channels_last)
    for training in (True, False):
        model.train(training), plain.train(training)
        with dlkern.no_fallback(), dlkern.backend(depthwise=OURS), spied() as ran:
            assert_same(model, plain, x)
        assert backends(ran) == {(OURS, "forward"): depthwise, (OURS, "backward"): depthwise}
    with_norm = sum("bn" in label for *_, label in SITES[name])
    alone = sum("bn" not in label for *_, label in SITES[name])
    assert calls(model) == (2 * (with_norm + alone), 0)
    with torch.no_grad(), dlkern.no_fallback(), dlkern.backend(depthwise=OURS), spied() as ran:
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert backends(ran) == {(OURS, "forward"): depthwise}
    dlkern.unswap(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.skipif(HAS_CUDA, reason="the default of a machine without a GPU")
@pytest.mark.parametrize("name", MODELS)
def test_by_default(name: str, h: Tensor) -> None:
    """PyTorch's convolution or ours, by layout, size and pass: the same numbers."""
    torch.manual_seed(0)
    model, plain = models.pair(MODELS[name]())
    dlkern.swap(model)
    with dlkern.no_fallback():
        assert_same(model, plain, data(name, h, False))
        assert_same(model, plain, data(name, h, True))
        with dlkern.backend("torch"), spied() as ran:
            assert_same(model, plain, data(name, h, True))
    assert ran == []
    for row in dlkern.report(model).swapped:
        if row.label.startswith("depthwise"):
            assert row.backend == "cpu"
            assert "torch for layouts, sizes and passes in which that is faster" in row.reason


def test_what_a_swap_keeps(h: Tensor) -> None:
    model = models.ConvNeXtBlock()
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    text = repr(model)
    before = {k: id(v) for k, v in model.dw.__dict__.items()}
    dlkern.swap(model)
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    assert {k: id(v) for k, v in model.dw.__dict__.items()} == before
    assert repr(model) == text
    assert isinstance(model.dw, nn.Conv2d)
    assert type(model.dw) is not nn.Conv2d
    assert dlkern.unswap(model) is model
    assert type(model.dw) is nn.Conv2d


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["inverted", "convnext", "temporal"])
def test_copies_stay_fused(name: str, how: str, h: Tensor) -> None:
    plain = MODELS[name]()
    model = dlkern.swap(copy.deepcopy(plain))
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    with dlkern.no_fallback(), dlkern.backend(depthwise=OURS):
        assert_same(other, plain, data(name, h, True))
    assert calls(other) == (len(SITES[name]), 0)
    assert calls(model) == (0, 0)
    assert labels(other) == SITES[name]
    dlkern.unswap(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in plain.modules()]


def test_convolutions_with_hooks_are_left(h: Tensor) -> None:
    model, plain = models.pair(models.ConvNeXtBlock())
    seen: list[str] = []
    model.dw.register_forward_hook(lambda *_: seen.append("dw"))
    dlkern.swap(model)
    report = dlkern.report(model)
    assert report.swapped == []
    assert [(row.path, row.kind, row.reason) for row in report.skipped] == [("dw", "depthwise", "has hooks")]
    with dlkern.backend(depthwise=OURS), spied() as ran:
        assert_same(model, plain, h)
    assert seen == ["dw"]
    assert ran == []


def test_hooks_set_later(h: Tensor) -> None:
    """On a convolution alone they run round the op; on one of a site they send it to PyTorch's."""
    seen: list[str] = []
    model, plain = models.pair(models.ConvNeXtBlock())
    dlkern.swap(model).dw.register_forward_hook(lambda *_: seen.append("dw"))
    with dlkern.backend(depthwise=OURS), spied() as ran:
        assert_same(model, plain, h)
    assert seen == ["dw"]
    assert backends(ran) == {(OURS, "forward"): 1, (OURS, "backward"): 1}
    model, plain = models.pair(models.InvertedResidual())
    dlkern.swap(model)[1][0].register_forward_hook(lambda *_: seen.append("0"))
    with dlkern.backend(depthwise=OURS), spied() as ran:
        assert_same(model, plain, h)
    assert seen == ["dw", "0"]
    assert backends(ran) == {}
    assert calls(model) == (3, 0)  # the norm behind it is fused all the same


def test_filter_fn(h: Tensor) -> None:
    model, plain = models.pair(nn.Sequential(models.ConvNeXtBlock(), models.DepthwiseResidual()))
    dlkern.swap(model, filter_fn=lambda module, path: path != "0.dw")
    assert labels(model) == [("1.bn", "depthwise", "depthwise+bn+add+relu")]
    assert [(row.path, row.reason) for row in dlkern.report(model).skipped] == [("0.dw", "left out by filter_fn")]
    assert_same(model, plain, h)


def test_what_is_not_depthwise() -> None:
    """One channel, groups of several channels, subclasses, graph modules."""

    class Special(nn.Conv2d):
        pass

    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)))
    model = nn.ModuleList(
        [nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), Special(4, 4, 3, groups=4), nn.Conv3d(4, 4, 1, groups=4),
         nn.ConvTranspose2d(4, 4, 3, groups=4), graph]
    )  # fmt: skip
    dlkern.swap(model)
    assert dlkern.report(model).swapped == []
    assert dlkern.report(model).skipped == []


def test_a_convolution_that_is_changed_later(h: Tensor) -> None:
    """Everything is read at the call."""
    model, plain = models.pair(models.ConvNeXtBlock())
    dlkern.swap(model)
    for m in (model, plain):
        m.dw.padding, m.dw.dilation, m.dw.padding_mode = "same", (2, 1), "circular"
        m.dw._reversed_padding_repeated_twice = [3, 3, 6, 6]
        m.dw.weight = nn.Parameter(torch.ones(8, 1, 7, 7))
    with dlkern.backend(depthwise=OURS), spied() as ran:
        assert_same(model, plain, h)
    assert (OURS, "forward") in ran
    model.dw.groups = plain.dw.groups = 4
    model.dw.weight = plain.dw.weight = nn.Parameter(torch.ones(8, 2, 7, 7))
    with dlkern.backend(depthwise=OURS), spied() as ran:
        torch.testing.assert_close(model(h), plain(h))
    assert ran == []


def outcome(model: nn.Module, x: Tensor) -> Any:
    try:
        return model(x)
    except Exception as error:
        return type(error), str(error)


def test_errors_are_pytorchs_own(h: Tensor) -> None:
    for make in (models.ConvNeXtBlock, models.DepthwiseResidual, models.Temporal):
        model, plain = models.pair(make())
        dlkern.swap(model)
        for x in (h[:, :5], h.double(), h[:, :, :1, :1], torch.randn(2, 3)):
            want = outcome(plain, x)
            with dlkern.backend(depthwise=OURS):
                got = outcome(model, x)
            if isinstance(want, Tensor):
                torch.testing.assert_close(got, want)
            else:
                assert got == want


@pytest.mark.parametrize("name", ["inverted", "convnext", "activation"])
def test_autocast(name: str, h: Tensor) -> None:
    torch.manual_seed(0)
    model, plain = models.pair(MODELS[name]())
    dlkern.swap(model)
    x = data(name, h, True)
    with torch.autocast("cpu", torch.bfloat16), dlkern.no_fallback():
        with dlkern.backend(depthwise=OURS), spied() as ran:
            y = model(x)
        want = plain(x)
        with torch.no_grad(), dlkern.backend(depthwise=OURS):
            torch.testing.assert_close(model(x), want, rtol=5e-2, atol=5e-2)
    assert (OURS, "forward") in ran
    assert y.dtype == want.dtype
    torch.testing.assert_close(y, want, rtol=5e-2, atol=5e-2)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_torch_func_and_jit_run_the_stock_convolution(h: Tensor) -> None:
    model, plain = models.pair(models.ConvNeXtBlock())
    dlkern.swap(model)
    with dlkern.backend(depthwise=OURS), spied() as ran:
        torch.testing.assert_close(torch.func.vmap(model)(h[None]), plain(h)[None])
        _, tangent = torch.func.jvp(model, (h,), (torch.ones_like(h),))
        torch.testing.assert_close(tangent, torch.func.jvp(plain, (h,), (torch.ones_like(h),))[1])
    assert ran == []


@pytest.mark.parametrize("name", ["inverted", "convnext"])
def test_compile_fullgraph(name: str, h: Tensor) -> None:
    torch._dynamo.reset()
    model, plain = models.pair(MODELS[name]())
    dlkern.swap(model)
    x = data(name, h, True)
    with dlkern.backend(depthwise=OURS), spied() as ran:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)
    assert (OURS, "forward") in ran


def test_freeze(h: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(models.InvertedResidual(), models.DepthwiseActivation())
    with torch.no_grad():
        for b in model.buffers():
            b.copy_(torch.rand(b.shape) + 0.5)
    plain = copy.deepcopy(model).eval()
    dlkern.freeze(model.eval())
    x = data("", h, True)
    with torch.no_grad(), dlkern.no_fallback(), dlkern.backend(depthwise=OURS), spied() as ran:
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert backends(ran) == {(OURS, "forward"): 3}
    dlkern.unfreeze(model)
    model.train()


def test_verify(h: Tensor) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(models.InvertedResidual(), models.ConvNeXtBlock(), models.DepthwiseResidual())
    model = dlkern.swap(copy.deepcopy(plain))
    for training in (True, False):
        plain.train(training), model.train(training)
        with dlkern.backend(depthwise=OURS):
            verified = dlkern.verify(plain, model, h)
        assert verified.ok, str(verified)
