"""dlkern.bench.measure: the statistics, the order of the calls, and the memory count."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dlkern.bench import measure


class FakeClock:
    """A clock that stands still except where a candidate moves it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def candidate(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        """Takes ``seconds(n)`` at its n-th call."""
        count = iter(range(10**9))

        def run() -> None:
            self.calls.append(name)
            self.now += seconds(next(count))

        return run


def test_quantiles_interpolate() -> None:
    assert measure.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert measure.quantile([5.0], 0.8) == 5.0
    assert measure.spread([float(v) for v in range(11)]) == measure.Spread(5.0, 2.0, 8.0)
    with pytest.raises(ValueError, match="empty"):
        measure.quantile([], 0.5)


def test_ratio_pairs_rounds_and_not_medians() -> None:
    # The machine is ten times slower in the last rounds: each pair still says 2, and so must the paired median.
    baseline, candidate = [2.0, 2.0, 20.0, 20.0, 20.0], [1.0, 1.0, 10.0, 10.0, 1.0]
    found = measure.ratio(baseline, candidate)
    assert found.paired.median == 2.0
    assert found.of_medians == 20.0
    with pytest.raises(ValueError, match="zip"):
        measure.ratio([1.0, 2.0], [1.0])


def test_order_rotates_and_turns() -> None:
    orders = ["".join(measure.order("ab", i)) for i in range(5)]
    assert orders == ["ab", "ba", "ba", "ab", "ab"]
    three = [measure.order("abc", i) for i in range(6)]
    for place in range(3):  # in six rounds each candidate stands twice in each place
        assert sorted(o[place] for o in three) == ["a", "a", "b", "b", "c", "c"]
    for a, b in (("a", "b"), ("b", "a"), ("b", "c"), ("c", "b"), ("a", "c"), ("c", "a")):
        assert any(o.index(a) + 1 == o.index(b) for o in three)  # each follows each


def test_compare_reads_the_clock() -> None:
    clock = FakeClock()
    candidates = {
        "slow": clock.candidate("slow", lambda n: 4.0 if n < 2 else 2.0),  # the warm-up takes longer
        "fast": clock.candidate("fast", lambda n: 0.5),
        "third": clock.candidate("third", lambda n: 1.0),
    }
    found = measure.compare(candidates, calls=1, warmup=2, min_rounds=4, min_seconds=0.0, max_rounds=4, clock=clock)
    assert found.baseline == "slow"
    assert found.rounds == 4
    assert found.samples == {"slow": [2.0] * 4, "fast": [0.5] * 4, "third": [1.0] * 4}
    assert found.time("fast") == measure.Spread(0.5, 0.5, 0.5)
    assert found.ratio("fast") == measure.Ratio(4.0, measure.Spread(4.0, 4.0, 4.0))
    assert found.difference("third").median == -1.0
    expected = [name for i in (0, 1, 0, 1, 2, 3) for name in measure.order(list(candidates), i)]
    assert clock.calls == expected


def test_compare_divides_by_the_calls_and_charges_the_right_candidate() -> None:
    clock = FakeClock()
    candidates = {"a": clock.candidate("a", lambda n: 1.0), "b": clock.candidate("b", lambda n: 3.0)}
    found = measure.compare(candidates, calls=5, warmup=0, min_rounds=3, min_seconds=0.0, clock=clock)
    assert found.samples == {"a": [1.0] * 3, "b": [3.0] * 3}
    assert clock.calls == ["a"] * 5 + ["b"] * 5 + ["b"] * 5 + ["a"] * 5 + ["b"] * 5 + ["a"] * 5


def test_compare_chooses_calls_from_the_fastest() -> None:
    clock = FakeClock()
    candidates = {"a": clock.candidate("a", lambda n: 1e-4), "b": clock.candidate("b", lambda n: 1e-2)}
    found = measure.compare(candidates, warmup=0, min_rounds=2, min_seconds=0.0, sample_seconds=1e-3, clock=clock)
    assert found.calls == 10


def test_compare_gives_short_calls_their_own_caches() -> None:
    clock = FakeClock()
    candidates = {  # the first call after another candidate's is slow; the slower one is no longer short, by itself
        "a": clock.candidate("a", lambda n: 1e-3 if clock.calls[-2:] == ["a", "a"] else 5e-3),
        "b": clock.candidate("b", lambda n: 4e-2 if clock.calls[-2:] == ["b", "b"] else 5e-2),
    }
    found = measure.compare(candidates, warmup=2, min_rounds=4, min_seconds=0.0, clock=clock)
    assert found.calls == 1
    assert found.time("a") == pytest.approx(measure.Spread(1e-3, 1e-3, 1e-3))
    assert found.time("b") == pytest.approx(measure.Spread(4e-2, 4e-2, 4e-2))


@pytest.mark.parametrize(
    ("seconds", "options"), [(0.03, {}), (1e-3, {"calls": 1}), (1e-3, {"cold_cache": True})], ids=str
)
def test_compare_adds_no_call(seconds: float, options: dict[str, Any]) -> None:
    """Where calls are long, their number was given (ranks count on it), or caches are to be cold."""
    clock = FakeClock()
    candidates = {name: clock.candidate(name, lambda n: seconds) for name in "ab"}
    measure.compare(candidates, warmup=0, min_rounds=2, min_seconds=0.0, max_rounds=2, clock=clock, **options)
    tried = [] if options else ["a", "b"]  # how long they take
    assert clock.calls == [*tried, "a", "b", "b", "a"]


def test_compare_goes_on_for_the_least_time() -> None:
    clock = FakeClock()
    candidates = {"a": clock.candidate("a", lambda n: 1.0)}
    found = measure.compare(candidates, calls=1, warmup=0, min_rounds=2, min_seconds=7.5, clock=clock)
    assert found.rounds == 8
    found = measure.compare(candidates, calls=1, warmup=0, min_rounds=2, min_seconds=7.5, max_rounds=3, clock=clock)
    assert found.rounds == 3


def test_compare_turns_the_collector_off_and_on_again() -> None:
    seen: list[bool] = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        measure.compare({"a": fail}, calls=1, warmup=0)
    assert seen == [False]
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "at least one candidate"),
        (({"a": print}, "b"), "unknown baseline 'b'; expected one of a"),
        (({"a": print}, None, {"max_rounds": 0}), "max_rounds >= 1"),
        (({"a": print}, None, {"calls": 3, "cold_cache": True}), "calls=3"),
    ],
)
def test_compare_refuses(arguments: tuple, message: str) -> None:
    candidates, baseline, options = (*arguments, None, {})[:3] if len(arguments) < 3 else arguments
    with pytest.raises(ValueError, match=message):
        measure.compare(candidates, baseline=baseline, **(options or {}))


def test_a_real_comparison_prints_and_serialises() -> None:
    x = torch.ones(64)
    candidates = {"one": lambda: x + 1, "cold": lambda: x * 2}
    found = measure.compare(candidates, min_rounds=3, max_rounds=3, cold_cache=True)
    assert found.calls == 1
    assert found.cold_cache
    assert all(seconds > 0 for samples in found.samples.values() for seconds in samples)
    text = str(found)
    assert "one / this" in text
    assert f"{torch.get_num_threads()} threads" in text
    facts = found.as_dict()
    assert facts["threads"] == torch.get_num_threads()
    assert set(facts["ratio"]) == {"cold"}
    assert len(facts["milliseconds"]["one"]) == 3


def test_saved_bytes_counts_each_storage_once() -> None:
    x, y = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    held: list[torch.Tensor] = []
    # x * y saves x and y; x.view(4, 8) * x.view(4, 8) saves views of x, of one storage
    size = x.numel() * 4
    assert measure.saved_bytes(lambda: held.append(x * y)) == 2 * size
    assert measure.saved_bytes(lambda: held.append(x * y), exclude=[y]) == size
    assert measure.saved_bytes(lambda: held.append(x.view(4, 8) * x.view(4, 8))) == size
    assert measure.saved_bytes(lambda: held.append(x[:2] * 3.0)) == 0
    with torch.no_grad():
        assert measure.saved_bytes(lambda: held.append(x * y)) == 0


def test_saved_bytes_of_a_layer() -> None:
    norm = nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    held: list[torch.Tensor] = []
    kept = measure.saved_bytes(lambda: held.append(torch.relu(norm(x))), norm.parameters())
    maps, statistics = 2 * x.numel() * 4, 2 * 3 * 4  # x and the ReLU's output; mean and 1 / deviation
    running = 2 * 3 * 4  # PyTorch may keep these as well
    assert maps + statistics <= kept <= maps + statistics + running
    held[0].sum().backward()  # what was counted can still be used
    assert x.grad is not None


def test_restart_sets_what_is_missing_once() -> None:
    program = (
        "import sys; from dlkern.bench import measure; print('start', flush=True); "
        "measure.restart_stable(); print('measuring', measure.missing_stability(), sys.argv[1:])"
    )
    environment = {k: v for k, v in os.environ.items() if k not in measure.stable_environment()}
    environment["MALLOC_TRIM_THRESHOLD_"] = "5"  # the user's own value stays
    done = subprocess.run(
        [sys.executable, "-c", program, "word"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["start", "start", "measuring [] ['word']"]
