"""dlkern.swap(policy="measured"): what it keeps, what it leaves, what it undoes, and what an error leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measured_cases import slowly
from torch import nn

import dlkern
from dlkern import dispatch
from dlkern._swap.classes import plan_of
from dlkern.tuning import answers, cache, policy, race
from dlkern.tuning import step as stepping

SLOW = 0.05


pytestmark = pytest.mark.usefixtures("short_races")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.head(self.drop(x.mean((2, 3))))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return Block()


@pytest.fixture
def torch_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, F, "batch_norm", SLOW)


@pytest.fixture
def ours_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("batch_norm_act", "conv_bn_act"):
        slowly(monkeypatch, dispatch.implementation(op, "cpu"), "forward", SLOW)


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a measured swap must not move."""
    return {
        "classes": [type(m) for m in model.modules()],
        "parameters": [(id(p), p.data_ptr(), p._version, p.grad) for p in model.parameters()],
        "buffers": [(id(b), b.clone()) for b in model.buffers()],
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def _assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    for name in ("classes", "parameters", "modes", "attributes"):
        assert a[name] == b[name], name
    assert all(i == j and torch.equal(t, u) for (i, t), (j, u) in zip(a["buffers"], b["buffers"], strict=True))
    assert torch.equal(a["random"], b["random"])


# ------------------------------------------------------------------------------------ decisions
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("torch_is_slow")
def test_where_dlkern_wins_the_site_is_swapped(model: nn.Module, x: torch.Tensor, training: bool) -> None:
    before = _state(model.train(training))
    assert dlkern.swap(model, sample=x, policy="measured") is model
    report = dlkern.report(model)
    (row,) = report.swapped
    assert row.path == "bn"
    assert row.backend == "cpu"
    assert row.ratio is not None
    assert row.ratio > 2
    assert row.reason.startswith("measured: ")
    assert "x PyTorch on 4x3x12x12" in row.reason or "x PyTorch on 4x8x12x12" in row.reason
    assert report.measured is not None
    assert report.measured.kept
    assert report.measured.step is not None
    assert report.measured.step.low > 1.5
    assert report.calls.fused == 0  # what was measured does not count
    after = _state(model)
    _assert_same({**before, "classes": 0}, {**after, "classes": 0})
    model(x)
    assert dlkern.report(model).calls.fused == 1
    assert "To change a choice:" in str(report)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("ours_is_slow")
def test_where_pytorch_wins_nothing_is_swapped(model: nn.Module, x: torch.Tensor, training: bool) -> None:
    before = _state(model.train(training))
    dlkern.swap(model, sample=x, policy="measured")
    _assert_same(before, _state(model))
    report = dlkern.report(model)
    assert report.swapped == []
    (row,) = report.skipped
    assert row.path == "bn"
    assert row.ratio is not None
    assert row.ratio < 1
    assert "the fastest other, cpu, is" in row.reason
    assert report.measured is not None
    assert not report.measured.kept
    assert "nothing is swapped" in str(report)


def test_a_slower_whole_step_undoes_the_swap(
    model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faster site by site, and slower as a whole, as where something outside of the sites pays for it."""
    before = _state(model)

    def slower(step: Any, variants: Any, **_: Any) -> Any:
        return None, {"swapped": stepping.Bounds(0.9, 0.85, 0.95)}

    with monkeypatch.context() as patch:
        slowly(patch, F, "batch_norm", SLOW)
        patch.setattr(policy, "compare", slower)
        dlkern.swap(model, sample=x, policy="measured")
    _assert_same(before, _state(model))
    report = dlkern.report(model)
    assert report.swapped == []
    assert report.measured is not None
    assert not report.measured.kept
    assert "undone: the whole training step was slower swapped, 0.900x (0.850-0.950)" in str(report)
    (row,) = report.skipped
    assert row.ratio is not None
    assert row.ratio > 1
    assert "undone" in row.reason


@pytest.mark.parametrize("again", [False, True])
def test_an_op_that_wins_by_itself_alone_is_left(
    model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """The batch norm is faster, and the convolution with it is not: the site stays, now and from the cache."""
    real = race.measure.compare

    def compare(steps: Any, **options: Any) -> Any:
        found = real(steps, **options)
        outer = "conv" in str(seen[-1])
        for name in found.samples:
            factor = 1.0 if name == "PyTorch" else 1.25 if outer else 0.5
            found.samples[name] = [factor * 1e-3] * found.rounds
        return found

    seen: list[str] = []
    race_of = race.race
    monkeypatch.setattr(race, "race", lambda call, *rest: (seen.append(call.name), race_of(call, *rest))[1])
    monkeypatch.setattr(race.measure, "compare", compare)
    for _ in range(1 + again):
        dlkern.swap(dlkern.unswap(model), sample=x, policy="measured")
        answers.clear()
    report = dlkern.report(model)
    assert report.swapped == []
    (row,) = report.skipped
    assert row.ratio == pytest.approx(0.8)
    assert "0.80x PyTorch" in row.reason


def test_an_interval_that_holds_one_undoes_nothing(
    model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        slowly(patch, F, "batch_norm", SLOW)
        patch.setattr(policy, "compare", lambda *_, **__: (None, {"swapped": stepping.Bounds(0.97, 0.9, 1.01)}))
        dlkern.swap(model, sample=x, policy="measured")
    assert [row.path for row in dlkern.report(model).swapped] == ["bn"]


@pytest.mark.usefixtures("torch_is_slow")
def test_a_backend_with_wrong_numbers_is_set_aside_and_named(
    model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for op in ("batch_norm_act", "conv_bn_act"):
        module = dispatch.implementation(op, "cpu")
        original = module.forward

        def wrong(*args: Any, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            y, *rest = original(*args, **kwargs)
            y.view(-1)[3] += 0.01
            return (y, *rest)

        monkeypatch.setattr(module, "forward", wrong)
    dlkern.swap(model, sample=x, policy="measured")
    report = dlkern.report(model)
    assert report.swapped == []
    assert report.measured is not None
    assert any("cpu is set aside for batch_norm_act" in text for text in report.measured.wrong)
    assert "relative L2 error" in str(report)
    remembered = dict(cache.load("cpu"))
    assert any("cpu" in dict(answer.wrong) for answer in remembered.values())


def test_a_backend_that_fails_is_set_aside(model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel image")

    for op in ("batch_norm_act", "conv_bn_act"):
        monkeypatch.setattr(dispatch.implementation(op, "cpu"), "forward", fails)
    # the recorded pass runs by PyTorch, or it would fail like the user's own
    torch_first = dispatch.operation("batch_norm_act")._replace(default_order=lambda request: ("torch",))
    monkeypatch.setitem(dispatch._OPS, "batch_norm_act", torch_first)
    monkeypatch.setattr(dispatch, "_choices", {})
    dlkern.swap(model, sample=x, policy="measured")
    report = dlkern.report(model)
    assert report.swapped == []
    assert report.measured is not None
    assert any("no kernel image" in text for text in report.measured.wrong)


# ---------------------------------------------------------------------------------- interruption
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["race", "compare", "store"])
def test_an_interruption_leaves_the_model_as_it_was(
    model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch, where: str, error: type[BaseException]
) -> None:
    dlkern.swap(model)
    model(x)
    model.bn.weight.grad, model.conv.weight.grad = torch.ones(8), torch.ones(8, 3, 3, 3)
    before, calls = _state(model), dlkern.report(model).calls

    def interrupt(*_: Any, **__: Any) -> Any:
        raise error("planned")

    slowly(monkeypatch, F, "batch_norm", SLOW)
    owner = {"race": race, "compare": policy, "store": cache}[where]
    monkeypatch.setattr(owner, where, interrupt)
    with pytest.raises(error, match="planned"):
        dlkern.swap(model, sample=x, policy="measured", memory_format="auto")
    _assert_same(before, _state(model))
    assert dlkern.report(model).calls == calls
    assert dlkern.report(model).measured is None
    assert answers.everything() == []
    assert answers.epoch == 0


def test_a_forward_that_raises_leaves_the_model_as_it_was(model: nn.Module) -> None:
    sample = torch.ones(2, 7, 4, 4)
    before = _state(model)
    with pytest.raises(RuntimeError):
        dlkern.swap(model, sample=sample, policy="measured")
    _assert_same(before, _state(model))


# -------------------------------------------------------------------------------------- the rest
@pytest.mark.usefixtures("torch_is_slow")
def test_the_second_swap_measures_no_op_again(
    model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dlkern.swap(model, sample=x, policy="measured")
    first = dlkern.report(model).measured
    assert first is not None
    assert first.raced > 0
    answers.clear()  # as in a fresh process
    other = copy.deepcopy(dlkern.unswap(model))
    dlkern.swap(other, sample=x, policy="measured")
    second = dlkern.report(other).measured
    assert second is not None
    assert second.raced == 0
    assert second.remembered > 0
    (row,) = dlkern.report(other).swapped
    assert row.ratio is not None
    assert row.ratio > 2


@pytest.mark.usefixtures("torch_is_slow")
def test_filter_fn_is_still_asked(model: nn.Module, x: torch.Tensor) -> None:
    dlkern.swap(model, sample=x, policy="measured", filter_fn=lambda module, path: path != "bn")
    assert dlkern.report(model).swapped == []


@pytest.mark.usefixtures("torch_is_slow")
def test_channels_last_is_tried_where_it_is_allowed(
    model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = policy.compare

    def compare(step: Any, variants: Any, **options: Any) -> Any:
        seen.append(list(variants))
        comparison, limits = real(step, variants, **options)
        return comparison, {**limits, "channels_last": stepping.Bounds(900.0, 800.0, 1000.0)}

    monkeypatch.setattr(policy, "compare", compare)
    weight = model.conv.weight
    dlkern.swap(model, sample=x, policy="measured", memory_format="auto")
    assert seen == [["stock", "swapped", "channels_last"]]
    assert model.conv.weight is weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert "in channels_last" in str(dlkern.report(model))


@pytest.mark.usefixtures("torch_is_slow")
def test_channels_last_is_put_back_where_it_is_not_faster(
    model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"swapped": stepping.Bounds(2.0, 1.9, 2.1), "channels_last": stepping.Bounds(2.01, 1.9, 2.2)}
    monkeypatch.setattr(policy, "compare", lambda *_, **__: (None, limits))
    before = _state(model)
    dlkern.swap(model, sample=x, policy="measured", memory_format="auto")
    assert _state(model)["parameters"] == before["parameters"]
    assert model.conv.weight.is_contiguous()
    assert [row.path for row in dlkern.report(model).swapped] == ["bn"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "measured"}, "pass sample=batch"),
        ({"sample": torch.ones(1)}, "only policy"),
        ({"policy": "fastest"}, "expected one of default, measured"),
    ],
)
def test_sample_and_policy_belong_together(model: nn.Module, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dlkern.swap(model, **options)
    assert plan_of(model) is None


def test_a_forced_backend_leaves_nothing_to_measure(model: nn.Module, x: torch.Tensor) -> None:
    with (
        dlkern.backend(batch_norm_act="torch"),
        pytest.raises(RuntimeError, match="'torch' is forced for batch_norm_act"),
    ):
        dlkern.swap(model, sample=x, policy="measured")
    assert plan_of(model) is None


@pytest.mark.parametrize("training", [True, False])
def test_a_measured_model_compiles_whole(
    model: nn.Module, x: torch.Tensor, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.drop = nn.Identity()
    with monkeypatch.context() as patch:
        slowly(patch, F, "batch_norm", SLOW)
        dlkern.swap(model.train(training), sample=x, policy="measured")
    assert dlkern.report(model).swapped
    torch._dynamo.reset()
    expected = copy.deepcopy(model)(x)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_auto_needs_a_measurement(model: nn.Module) -> None:
    with pytest.raises(TypeError, match='"auto" needs policy="measured"'):
        dlkern.swap(model, memory_format="auto")


@pytest.mark.usefixtures("torch_is_slow")
def test_explain_measures_and_changes_nothing(model: nn.Module, x: torch.Tensor) -> None:
    before = _state(model)
    report = dlkern.explain(model, sample=x, policy="measured")
    assert report.swapped[0].ratio is not None
    assert "x PyTorch" in str(report)
    _assert_same(before, _state(model))
    assert dlkern.report(model).measured is None


def test_a_model_without_outputs_that_have_a_gradient_is_an_error() -> None:
    class Detached(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).detach()

    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        dlkern.swap(Detached(), sample=torch.randn(4, 3, 8, 8), policy="measured")


def test_bounds_hold_the_median() -> None:
    found = stepping.bounds([1.0, 1.1, 1.2, 1.3, 1.1, 1.2, 0.5])
    assert found.low <= found.ratio == 1.1 <= found.high
    assert stepping.bounds([1.5] * 9) == (1.5, 1.5, 1.5)
