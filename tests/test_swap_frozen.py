"""What a trace could freeze or lose: each model must go on computing what the plain one does, or say so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from swap_models import ConvBN, pair
from test_swap import calls
from torch import Tensor, nn

import dlkern

FLAG = False
COUNT = [0]


@pytest.fixture
def h() -> Tensor:
    return torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))


def same(model: nn.Module, plain: nn.Module, *args: Any) -> None:
    ours, theirs = model(*args), plain(*args)
    assert ours.dtype == theirs.dtype
    assert ours.requires_grad == theirs.requires_grad
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Net(ConvBN):
    """conv, bn, and whatever a case adds; ``site`` is what a swap rewrites."""

    def __init__(self) -> None:
        super().__init__()
        self.extend()

    def extend(self) -> None:
        pass

    def site(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class ReversesGradients(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(Reverse.apply(self.conv(x))))


class FloatIsland(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.site(x)
        with torch.autocast("cpu", enabled=False):
            return self.conv(y.float())


class TurnsGradientsOn(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.site(x)
        with torch.enable_grad():
            return y * self.conv.weight.sum()


class SwallowsErrors(Net):
    def forward(self, x: Tensor) -> Tensor:
        try:
            k = float(x.abs().sum())
        except Exception:
            k = 0.0
        return self.site(x) * k


class AsksType(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.site(x)
        return y if type(x) is Tensor else y * 2


class CountsGlobally(Net):
    def forward(self, x: Tensor) -> Tensor:
        COUNT[0] += 1
        return self.site(x)


class CountsNested(Net):
    def extend(self) -> None:
        self.stats = {"n": [0]}

    def forward(self, x: Tensor) -> Tensor:
        self.stats["n"][0] += 1
        return self.site(x)


class WritesSource(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        y = self.bn(h)
        h.mul_(3.0)
        return F.relu(y) + h


class WritesResidual(Net):
    def extend(self) -> None:
        self.down, self.act = nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        r = self.down(x)
        z = self.bn(self.conv(x)) + r
        skip = self.act(r)
        return F.relu(z) + skip


class WritesOut(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        y = self.bn(h)
        torch.add(x, x, out=h)
        return F.relu(y) + h


class ReadsStatistics(Net):
    def forward(self, x: Tensor) -> Tensor:
        z = self.bn(self.conv(x))
        m = x.mean((0, 2, 3)) + self.bn.running_mean
        return F.relu(z + x) + m.view(1, -1, 1, 1)


class ActivatesIntoABuffer(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.sigmoid(self.bn(self.conv(x)), out=out)
        return out * 2


class WritesItsList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, xs: list[Tensor]) -> Tensor:
        xs[0] = self.conv(xs[0])
        return xs[1]


class PassesAList(Net):
    def extend(self) -> None:
        self.writer = WritesItsList()

    def forward(self, x: Tensor) -> Tensor:
        xs = [x, x * 2]
        z = self.writer(xs)
        return F.relu(self.bn(self.conv(xs[0]))) + z


class TwiceCalled(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class OverridesCall(Net):
    def extend(self) -> None:
        self.conv = TwiceCalled(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x)


class Aliased(Net):
    def extend(self) -> None:
        self.other = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.other(x)))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (ReversesGradients, "calls the autograd Function Reverse"),
        (FloatIsland, "changes grad mode, autocast"),
        (TurnsGradientsOn, "changes grad mode, autocast"),
        (SwallowsErrors, "depends on values of its input"),
        (AsksType, "asks for a type()"),
        (CountsGlobally, "writes attributes of itself"),
        (CountsNested, "writes attributes of itself"),
        (WritesSource, "may write to its input before the activation"),
        (WritesOut, "may write to its input before the activation"),
        (PassesAList, "uses what writer may have written into a list or dict"),
        (OverridesCall, "whose class has a __call__ of its own"),
        (Aliased, "registered as conv and as other"),
    ],
)
def test_left_alone_with_a_reason(h: Tensor, build: Callable[[], nn.Module], reason: str) -> None:
    model, plain = pair(build().eval())
    counted = COUNT[0]
    with torch.no_grad():  # a swap's own surroundings must not hide a region of the same kind
        dlkern.swap(model)
    assert COUNT[0] == counted
    report = dlkern.report(model)
    assert report.swapped == []
    assert any(reason in row.reason for row in report.skipped), report
    with torch.no_grad():
        same(model, plain, h.clone())
        with torch.autocast("cpu", torch.bfloat16):
            same(model, plain, h.clone())


@pytest.mark.parametrize("build", [WritesResidual, ReadsStatistics, ActivatesIntoABuffer])
def test_without_the_activation_it_is_conv_and_norm(h: Tensor, build: Callable[[], nn.Module]) -> None:
    for training in (True, False):
        model, plain = pair(build().train(training))
        dlkern.swap(model)
        assert [(row.path, row.label) for row in dlkern.report(model).swapped] == [("bn", "conv+bn")]
        with torch.set_grad_enabled(training and build is not ActivatesIntoABuffer):  # out= takes no gradient
            same(model, plain, h.clone())


class Base(Net):
    double = False
    post = None

    def shape(self, y: Tensor) -> Tensor:
        return y

    def extend(self) -> None:
        self.register_module("extra", None)
        self.register_buffer("mask", None)
        self.drop = nn.Dropout(0.5)
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.shape(self.site(x))
        if self.double:
            y = y * 2
        if hasattr(self, "scale"):
            y = y * self.scale
        if self.extra is not None:
            y = self.extra(y)
        if self.mask is not None:
            y = y * self.mask
        if FLAG:
            y = y + 1
        if self.drop.training:
            y = y + 3
        for child in self.layers.children():
            y = child(y)
        return y


def _set(name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda m: setattr(m, name, value)


@pytest.mark.parametrize(
    "change",
    [
        _set("double", True),
        _set("shape", lambda y: y * 3),
        _set("scale", 3.0),
        _set("extra", nn.Tanh()),
        _set("mask", torch.tensor(0.5)),
        lambda m: m.drop.train(),
        lambda m: m.layers.append(nn.Conv2d(8, 8, 1)),
        lambda m: globals().update(FLAG=True),
        lambda m: setattr(Base, "forward", lambda self, x: self.site(x) * 7),
    ],
    ids=["class attribute", "method", "absent", "module", "buffer", "a child's mode", "children", "global", "forward"],
)
def test_what_a_forward_reads_is_guarded(h: Tensor, change: Callable[[nn.Module], None]) -> None:
    model = Base().eval()
    dlkern.swap(model)
    forward = Base.forward
    try:
        plain = dlkern.unswap(copy.deepcopy(model))
        same(model, plain, h)
        assert calls(model) == (1, 0)
        torch.manual_seed(0)
        change(model)
        plain = dlkern.unswap(copy.deepcopy(model))
        same(model, plain, h)
        assert calls(model) == (1, 1)
    finally:
        globals()["FLAG"] = False
        Base.forward = forward


class Names(Net):
    """Arguments named as generated code names things."""

    def forward(self, type: Tensor, isinstance: Tensor | None = None, len: float = 1.0) -> Tensor:
        return F.relu(self.bn(self.conv(type)) + type) * len


class DtypeArgument(Net):
    def forward(self, x: Tensor, dtype: torch.dtype = torch.float32, size: tuple[int, ...] = (1, 2)) -> Tensor:
        return self.site(x).to(dtype)


class ReadsWeights(Net):
    def extend(self) -> None:
        self.stages = nn.Sequential(nn.Conv2d(8, 8, 1))
        self.register_parameter("w-1", nn.Parameter(torch.ones(1)))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.site(x), self.stages[0].weight) * self._parameters["w-1"] * getattr(self, "w-1")


@pytest.mark.parametrize("build", [Names, DtypeArgument])
def test_awkward_forwards_run_fused(h: Tensor, build: Callable[[], nn.Module]) -> None:
    model, plain = pair(build())
    dlkern.swap(model)
    with dlkern.no_fallback():
        same(model, plain, h)
    assert calls(model) == (1, 0)


def test_awkward_forwards_do_not_break_a_swap(h: Tensor) -> None:
    model, plain = pair(ReadsWeights())
    same(dlkern.swap(model), plain, h)

    class Shared(Net):
        def extend(self) -> None:
            self.relu = nn.ReLU()
            self.features = nn.Sequential(self.conv, self.bn, self.relu)

        def forward(self, x: Tensor) -> Tensor:
            return self.features(x)

    model, plain = pair(Shared())
    same(dlkern.swap(model), plain, h)


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.use_aux = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x * 2, (x if self.use_aux else None)


class UsesChoice(Net):
    def extend(self) -> None:
        self.child = Chooses()

    def forward(self, x: Tensor) -> Tensor:
        y, aux = self.child(self.site(x))
        return y if aux is None else y + aux


def test_a_child_that_returns_something_else_is_an_error_not_a_silence(h: Tensor) -> None:
    model, plain = pair(UsesChoice())
    same(dlkern.swap(model), plain, h)
    assert calls(model) == (1, 0)
    model.child.use_aux = True
    with pytest.raises(RuntimeError, match="child no longer returns what it returned"):
        model(h)


def test_jit_trace_runs_the_stock_modules(h: Tensor) -> None:
    model = dlkern.swap(ConvBN().eval())
    other = torch.randn_like(h)
    with torch.no_grad():
        traced = torch.jit.trace(model, h)
        torch.testing.assert_close(traced(other), model(other), rtol=1e-4, atol=1e-4)


def test_another_default_device(h: Tensor) -> None:
    model, plain = pair(ConvBN())
    dlkern.swap(model)
    torch.set_default_device("meta")
    try:
        same(model, plain, h)
    finally:
        torch.set_default_device(None)
    assert calls(model) == (1, 0)


def test_replicas_and_weights_that_are_plain_tensors(h: Tensor) -> None:
    model, plain = pair(ConvBN())
    dlkern.swap(model)
    for m in (model, plain):
        weight = m.bn.weight.detach() * 2
        del m.bn.weight
        m.bn.weight = weight
    same(model, plain, h)
    assert calls(model) == (1, 0)


def test_a_report_on_a_copy_does_not_trace(h: Tensor) -> None:
    model = copy.deepcopy(dlkern.swap(nn.Sequential(ConvBN(), nn.BatchNorm2d(8))))
    flags = [m.training for m in model.modules()]
    seen: list[bool] = []
    model[1].__dict__["_forward_hooks"][0] = lambda *_: seen.append(True)
    report = dlkern.report(model)
    assert [row.path for row in report.skipped] == ["1"]
    assert "dlkern.explain" in report.skipped[0].reason
    assert [m.training for m in model.modules()] == flags
    assert seen == []


def test_a_failed_memory_format_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv3d(4, 4, 1))
    before = [(type(m), m.__dict__.copy()) for m in model.modules()]
    with pytest.raises(ValueError, match="5-D parameters"):
        dlkern.swap(model, memory_format=torch.channels_last)
    assert [(type(m), m.__dict__) for m in model.modules()] == before
