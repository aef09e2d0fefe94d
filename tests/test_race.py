"""What a measured swap rests on: calls are recorded, made again on random tensors, judged and timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from measured_cases import SHORT
from torch import nn

import dlkern
from dlkern import dispatch
from dlkern.tuning import answers, race, record

pytestmark = pytest.mark.usefixtures("own_answers")


def _depthwise() -> Any:
    conv = dlkern.nn.ConvBNAct2d(8, 8, 3, groups=8)
    return lambda: conv(torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last))


def _conv() -> Any:
    """Its batch norm may overwrite the convolution's output where no gradient is wanted."""
    conv = dlkern.nn.ConvBNAct2d(6, 8, 3).eval()
    return lambda: conv(torch.randn(2, 6, 9, 9), torch.randn(2, 8, 9, 9))


def _lstm() -> Any:
    layer = dlkern.nn.LSTM(5, 6, 2, bidirectional=True, dropout=0.5)
    return lambda: layer(torch.randn(7, 3, 5))


def _packed() -> Any:
    layer = dlkern.nn.GRU(5, 6)
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 5) for n in (4, 3, 1)])
    return lambda: layer(packed)


def _attention() -> Any:
    qkv = torch.randn(2, 11, 3, 4, 8, requires_grad=True)
    return lambda: dlkern.functional.attention(
        *(t.transpose(1, 2) for t in qkv.unbind(2)), is_causal=True, dropout_p=0.25
    )


def _cell() -> Any:
    cell = dlkern.nn.GRUCell(5, 6)
    return lambda: cell(torch.randn(3, 5))


@pytest.mark.parametrize("make", [_conv, _depthwise, _lstm, _packed, _attention, _cell])
@pytest.mark.parametrize("grad", [True, False])
def test_every_op_can_be_recorded_and_raced(make: Callable[[], Any], grad: bool) -> None:
    run = make()
    with record.recording() as recorded, torch.set_grad_enabled(grad):
        run()
    assert recorded.calls
    for call in recorded.calls:
        outcome = race.race(call, SHORT)
        assert outcome.raced
        assert not any(answer.wrong for answer in outcome.answers.values()), outcome
        answers.put(outcome.answers.items())
    with answers_watched() as trial:  # an ordinary call asks for what was answered
        with torch.set_grad_enabled(grad):
            run()
        assert [key for key in trial.reached if answers.exact(key) is None] == []


@contextlib.contextmanager
def answers_watched() -> Iterator[answers.Trial]:
    with race.tried(answers.Trial({})) as trial:
        yield trial


def test_random_tensors_are_as_large_as_the_call_s_own() -> None:
    layer = dlkern.nn.GRU(8, 32)
    with record.recording() as recorded:
        layer(torch.randn(3, 2, 8) * 7)
    made = [t for t in recorded.calls[-1].make() if isinstance(t, torch.Tensor) and t.dim() > 1]
    found = sorted(float(t.detach().square().mean().sqrt()) for t in made if t.numel() and t.any())
    assert found[0] < 0.15  # a weight: uniform within 1 / sqrt(32)
    assert 5 < found[-1] < 9  # the input


def test_relu_gradients_are_judged_away_from_the_kink() -> None:
    norm = dlkern.nn.BatchNormAct2d(64)
    with record.recording() as recorded:
        norm(torch.randn(16, 64, 28, 28, requires_grad=True))
    (call,) = recorded.calls
    judge = race.Judge(call)
    assert judge._mask is not None
    assert 0 < int((judge._mask == 0).sum()) < judge._mask.numel() // 1000
    judge.check(answers.Trial({}, by_op={"batch_norm_act": "cpu"}))


def test_a_gradient_that_is_off_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = dlkern.nn.BatchNormAct2d(4)
    with record.recording() as recorded:
        norm(torch.randn(4, 4, 5, 5, requires_grad=True))
    module = dispatch.implementation("batch_norm_act", "cpu")
    original = module.backward
    monkeypatch.setattr(module, "backward", lambda *a, **k: (g := original(*a, **k))[:1] + (g[1] * 1.001, *g[2:]))
    with pytest.raises(AssertionError, match="gradient of weight"):
        race.Judge(recorded.calls[0]).check(answers.Trial({}, by_op={"batch_norm_act": "cpu"}))


def test_nothing_is_recorded_outside() -> None:
    with record.recording() as recorded:
        pass
    dlkern.nn.BatchNormAct2d(4)(torch.randn(2, 4, 5, 5))
    assert recorded.calls == []
    assert answers.recorder is None
