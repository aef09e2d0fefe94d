"""dlkern.swap(policy="measured") at ASPP blocks and transposed convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measured_cases import slowly
from torch import Tensor, nn

import dlkern
from dlkern import dispatch
from dlkern.bench import measure, segmentation
from dlkern.tuning import answers, policy, race, record
from dlkern.tuning import step as stepping

SLOW = 0.01


pytestmark = pytest.mark.usefixtures("short_races")


def _paced(monkeypatch: pytest.MonkeyPatch, factor: Callable[[str], float]) -> list[str]:
    """A clock that says how long an op's last candidate, with every decision dlkern's, takes as a share of PyTorch's
    time; those between the two take longer."""
    real, race_of = measure.compare, race.race
    seen: list[str] = []

    def raced(call: record.Call, *rest: Any) -> race.Outcome:
        seen.append(call.name)
        return race_of(call, *rest)

    def compare(steps: Any, **options: Any) -> Any:
        found = real(steps, **{**options, "min_rounds": 1, "max_rounds": 1})
        *others, last = found.samples
        times = {**dict.fromkeys(others, 1.5), "PyTorch": 1.0, last: factor(seen[-1])}
        for name, share in times.items():
            found.samples[name] = [share * 1e-3] * found.rounds
        return found

    monkeypatch.setattr(race, "race", raced)
    monkeypatch.setattr(race.measure, "compare", compare)
    monkeypatch.setattr(policy, "compare", lambda *_, **__: (None, {"swapped": stepping.Bounds(1.5, 1.4, 1.6)}))
    return seen


def _answered(op: str) -> set[str]:
    return {answer.backend for key, answer in answers.everything() if key.op == op}


def _aspp() -> nn.Module:
    torch.manual_seed(0)
    return segmentation.ASPP(6, (2, 3), 4)


def _deconv(training: bool = True) -> nn.Module:
    torch.manual_seed(0)
    up, head = nn.ConvTranspose2d(4, 6, 4, 2, 1, bias=False), nn.ConvTranspose2d(6, 3, 3, 1, 1)
    return nn.Sequential(up, nn.BatchNorm2d(6), nn.ReLU(), head, nn.Tanh()).train(training)


def _assert_as_torch(model: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Outputs, and in training gradients and statistics, of the swapped model."""
    found = []
    for m in (model, plain):
        torch.manual_seed(3)
        with torch.set_grad_enabled(m.training):
            y = m(x)
        grads = torch.autograd.grad(y.square().sum(), list(m.parameters())) if m.training else ()
        found.append([y, *grads, *m.buffers()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


# ---------------------------------------------------------------------------------------- ASPP
@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 6, 7, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("prefix", ["", "0"])
def test_an_aspp_block_is_swapped_where_it_wins(
    monkeypatch: pytest.MonkeyPatch, images: Tensor, training: bool, prefix: str
) -> None:
    """The block is one site, kept with the layers inside of it; a model that is nothing but a block, too."""
    made = [_aspp() for _ in range(2)]
    model, plain = (nn.Sequential(m) if prefix else m for m in made)
    model.train(training), plain.train(training)
    with monkeypatch.context() as patch:
        seen = _paced(patch, lambda name: 0.5)
        dlkern.swap(model, sample=images, policy="measured")
    assert "atrous" in seen
    report = dlkern.report(model)
    rows = {row.path: row for row in report.swapped}
    assert (rows[prefix].kind, rows[prefix].backend, rows[prefix].ratio) == ("atrous", "cpu", 2.0)
    assert rows[prefix].reason.startswith("measured: 2.00x PyTorch")
    assert _answered("atrous") == {"cpu"}
    _assert_as_torch(model, plain, images)
    assert dlkern.report(model).calls.fused == 1


@pytest.mark.parametrize("prefix", ["", "0"])
def test_an_aspp_block_that_wins_alone_is_swapped_with_what_is_in_it(
    monkeypatch: pytest.MonkeyPatch, images: Tensor, prefix: str
) -> None:
    """Its layers by themselves are no gain, and it runs none of them as sites."""
    model = nn.Sequential(_aspp()) if prefix else _aspp()
    with monkeypatch.context() as patch:
        _paced(patch, lambda name: 0.5 if name == "atrous" else 1.25)
        dlkern.swap(model, sample=images, policy="measured")
    rows = {row.path: row for row in dlkern.report(model).swapped}
    assert rows[prefix].kind == "atrous"
    assert rows[prefix].backend == "cpu"
    model(images)
    assert dlkern.report(model).calls.fused == 1


@pytest.mark.parametrize("training", [True, False])
def test_an_aspp_block_that_loses_is_left(monkeypatch: pytest.MonkeyPatch, images: Tensor, training: bool) -> None:
    model = nn.Sequential(_aspp()).train(training)
    classes = [type(m) for m in model.modules()]
    with monkeypatch.context() as patch:
        _paced(patch, lambda name: 1.25)
        dlkern.swap(model, sample=images, policy="measured")
    report = dlkern.report(model)
    assert report.swapped == []
    assert [type(m) for m in model.modules()] == classes
    row = next(row for row in report.skipped if row.path == "0")
    assert row.kind == "atrous"
    assert row.ratio == pytest.approx(0.8)
    assert "0.80x PyTorch" in row.reason


def test_an_aspp_backend_with_wrong_numbers_is_set_aside(monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    module = dispatch.implementation("atrous", "cpu")
    original = module.forward

    def wrong(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, out: Tensor, **options: Any) -> Any:
        found = original(x, weight, bias, mean, var, out, **options)
        out[0, 0, 0, 0] += 0.01
        return found

    monkeypatch.setattr(module, "forward", wrong)
    model = nn.Sequential(_aspp())
    with monkeypatch.context() as patch:
        _paced(patch, lambda name: 0.5)
        dlkern.swap(model, sample=images, policy="measured")
    measured = dlkern.report(model).measured
    assert measured is not None
    assert any("cpu is set aside for atrous" in text and "relative L2 error" in text for text in measured.wrong)
    assert _answered("atrous") == {"torch"}


# ------------------------------------------------------------------------ transposed convolutions
@pytest.fixture
def latent() -> Tensor:
    return torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [True, False])
def test_transposed_convolutions_are_swapped_where_they_win(
    monkeypatch: pytest.MonkeyPatch, latent: Tensor, training: bool
) -> None:
    """Also in training, where the default leaves the convolution to PyTorch."""
    model, plain = _deconv(training), _deconv(training)
    with monkeypatch.context() as patch:
        seen = _paced(patch, lambda name: 0.5 if name == "transposed" else 1.25)
        dlkern.swap(model, sample=latent, policy="measured")
    assert seen.count("transposed") == 2
    report = dlkern.report(model)
    rows = {row.path: row for row in report.swapped}
    assert {path: (row.kind, row.backend) for path, row in rows.items()} == {
        "1": ("transposed", "cpu"),
        "3": ("transposed", "cpu"),
    }
    assert all(row.ratio == 2.0 and "2.00x PyTorch on 3x" in row.reason for row in rows.values())
    module, ran = dispatch.implementation("transposed", "cpu"), []
    for name in ("forward", "backward"):
        original = getattr(module, name)

        def spy(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            ran.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    _assert_as_torch(model, plain, latent)
    assert ran == ["forward"] * 2 + ["backward"] * 2 * training


def test_transposed_convolutions_that_lose_are_left(monkeypatch: pytest.MonkeyPatch, latent: Tensor) -> None:
    model = _deconv()
    with monkeypatch.context() as patch:
        _paced(patch, lambda name: 1.25)
        dlkern.swap(model, sample=latent, policy="measured")
    report = dlkern.report(model)
    assert report.swapped == []
    assert {row.path: (row.kind, row.ratio) for row in report.skipped} == {
        "1": ("transposed", 0.8),
        "3": ("transposed", 0.8),
    }
    assert type(model) is nn.Sequential


def test_the_reason_is_that_of_the_ratio(monkeypatch: pytest.MonkeyPatch, latent: Tensor) -> None:
    """Of the call as a whole, and not of the batch norm inside of it, which is within the noise."""
    model = _deconv()
    with monkeypatch.context() as patch:
        _paced(patch, lambda name: 1.25 if name == "transposed" else 1 / 1.01)
        dlkern.swap(model, sample=latent, policy="measured")
    for row in dlkern.report(model).skipped:
        assert row.ratio == 0.8
        assert "cpu, is 0.80x PyTorch on" in row.reason
    (norm,) = [answer for key, answer in answers.everything() if key.op == "batch_norm_act"]
    assert norm.in_words().endswith("cpu, is 1.01x PyTorch (1.01-1.01: too little to count on)")


def test_a_transposed_backend_with_wrong_gradients_is_set_aside(
    monkeypatch: pytest.MonkeyPatch, latent: Tensor
) -> None:
    module = dispatch.implementation("transposed", "cpu")
    original = module.backward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        dx, dweight, *rest = original(*args, **kwargs)
        return (dx, None if dweight is None else dweight * 1.01, *rest)

    monkeypatch.setattr(module, "backward", wrong)
    model = _deconv()
    with monkeypatch.context() as patch:
        _paced(patch, lambda name: 0.5)
        dlkern.swap(model, sample=latent, policy="measured")
    measured = dlkern.report(model).measured
    assert measured is not None
    assert any("cpu is set aside for transposed" in t and "gradient of weight" in t for t in measured.wrong)
    assert _answered("transposed") == {"torch"}


@pytest.mark.parametrize("make", [_aspp, _deconv])
def test_slow_kernels_lose_by_the_clock_itself(monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module]) -> None:
    for op in ("atrous", "transposed", "conv_bn_act", "batch_norm_act"):
        slowly(monkeypatch, dispatch.implementation(op, "cpu"), "forward", SLOW)
    model = nn.Sequential(make()).eval()
    dlkern.swap(model, sample=torch.randn(2, 6 if make is _aspp else 4, 6, 5), policy="measured")
    assert dlkern.report(model).swapped == []


@pytest.mark.parametrize("make", [_aspp, _deconv])
def test_the_second_swap_remembers(monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module]) -> None:
    x = torch.randn(2, 6 if make is _aspp else 4, 6, 5)
    with monkeypatch.context() as patch:
        _paced(patch, lambda name: 0.5)
        first = dlkern.report(dlkern.swap(make(), sample=x, policy="measured"))
        answers.clear()  # as in a fresh process
        second = dlkern.report(dlkern.swap(make(), sample=x, policy="measured"))
    assert first.measured is not None
    assert second.measured is not None
    assert first.measured.raced > 0
    assert second.measured.raced == 0
    assert [(r.path, r.backend, r.ratio) for r in second.swapped] == [
        (r.path, r.backend, r.ratio) for r in first.swapped
    ]
    assert second.swapped
