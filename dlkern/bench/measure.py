"""The one timing primitive: candidates timed in turn, in one process, and compared round by round.

A machine that is shared or changes its clock makes two separate timings incomparable. Here every
round times each candidate once, in an order that rotates, so that a ratio is taken between times
measured milliseconds apart; the spread of those ratios says how far the median is to be believed.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Clock = Callable[[], float]

# Calls this short leave much of what they use in the caches, where the candidate before has put what it used itself.
_SHORT_SECONDS = 0.02


# --------------------------------------------------------------------------------- statistics
class Spread(NamedTuple):
    """Median and the 20th and 80th percentile of a sample."""

    median: float
    p20: float
    p80: float


class Ratio(NamedTuple):
    """The baseline's time divided by a candidate's: above 1, the candidate is faster.

    ``paired`` is the spread of the ratios taken round by round, ``of_medians`` the ratio of the two
    median times. Where they disagree, the machine was not quiet.
    """

    of_medians: float
    paired: Spread


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0 <= q <= 1) of a non-empty sample, interpolated linearly."""
    if not values:
        raise ValueError("quantile of an empty sample")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(values: Sequence[float]) -> Spread:
    """Median, p20 and p80 of a non-empty sample."""
    return Spread(quantile(values, 0.5), quantile(values, 0.2), quantile(values, 0.8))


def ratio(baseline: Sequence[float], candidate: Sequence[float]) -> Ratio:
    """Ratio of two samples whose entries at one index were measured in one round."""
    paired = [b / c for b, c in zip(baseline, candidate, strict=True)]
    return Ratio(quantile(baseline, 0.5) / quantile(candidate, 0.5), spread(paired))


def order(names: Sequence[str], round_index: int) -> list[str]:
    """The order of one round: it rotates, and every other full turn runs backwards.

    For two candidates that is A B, B A, B A, A B: a drift of the machine favours neither, and neither
    always runs on the caches the other left.
    """
    shift = round_index % len(names)
    turned = [*names[shift:], *names[:shift]]
    return turned[::-1] if (round_index // len(names)) % 2 else turned


# ------------------------------------------------------------------------------------- timing
class Stopwatch:
    """Times calls on one device: the wall clock on a CPU, a pair of events on CUDA.

    ``start()`` and ``stop()`` bracket a stretch of work; ``seconds()`` waits for the device and
    returns what was measured since it was last called, in order.
    """

    def __init__(self, device: torch.device | str = "cpu", clock: Clock = time.perf_counter) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._clock = clock
        self._marks: list[tuple[Any, Any]] = []
        self._started: Any = None

    def _mark(self) -> Any:
        if not self._cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._started = self._mark()

    def stop(self) -> None:
        self._marks.append((self._started, self._mark()))

    def seconds(self) -> list[float]:
        marks, self._marks = self._marks, []
        if not self._cuda:
            return [end - begin for begin, end in marks]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` measured. Times are seconds per call, one entry a round."""

    samples: dict[str, list[float]]
    baseline: str
    calls: int
    threads: int
    device: str
    cold_cache: bool
    stable: bool

    @property
    def rounds(self) -> int:
        return len(self.samples[self.baseline])

    def time(self, name: str) -> Spread:
        """Seconds per call."""
        return spread(self.samples[name])

    def ratio(self, name: str) -> Ratio:
        """The baseline's time / this candidate's."""
        return ratio(self.samples[self.baseline], self.samples[name])

    def difference(self, name: str) -> Spread:
        """Seconds per call that this candidate takes more than the baseline, round by round."""
        pairs = zip(self.samples[name], self.samples[self.baseline], strict=True)
        return spread([own - base for own, base in pairs])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a results file: times in milliseconds, ratios, and how they were taken."""
        return {
            "baseline": self.baseline,
            "rounds": self.rounds,
            "calls": self.calls,
            "threads": self.threads,
            "device": self.device,
            "cold_cache": self.cold_cache,
            "stable_environment": self.stable,
            "milliseconds": {n: [round(s * 1e3, 6) for s in self.time(n)] for n in self.samples},
            "ratio": {
                n: {
                    "of_medians": round(self.ratio(n).of_medians, 4),
                    "paired": [round(v, 4) for v in self.ratio(n).paired],
                }
                for n in self.samples
                if n != self.baseline
            },
        }

    def __str__(self) -> str:
        width = max(len(n) for n in self.samples)
        lines = [f"{'':{width}}  {'median ms':>10}  {'p20-p80':>17}  {self.baseline} / this (p20-p80)"]
        for name in self.samples:
            at = self.time(name)
            line = f"{name:{width}}  {at.median * 1e3:10.4f}  {f'{at.p20 * 1e3:.4f}-{at.p80 * 1e3:.4f}':>17}"
            if name != self.baseline:
                paired = self.ratio(name).paired
                line += f"  {paired.median:.3f} ({paired.p20:.3f}-{paired.p80:.3f})"
            lines.append(line)
        quiet = "" if self.stable else ", allocator and OpenMP not steadied"
        lines.append(f"{self.rounds} rounds of {self.calls} calls, {self.threads} threads, {self.device}{quiet}")
        return "\n".join(lines)


def compare(
    candidates: Mapping[str, Callable[[], object]],
    *,
    baseline: str | None = None,
    device: torch.device | str = "cpu",
    min_seconds: float = 1.0,
    min_rounds: int = 15,
    max_rounds: int = 2000,
    warmup: int = 3,
    calls: int | None = None,
    sample_seconds: float = 5e-4,
    cold_cache: bool = False,
    clock: Clock = time.perf_counter,
) -> Comparison:
    """Time the candidates against each other.

    Args:
        candidates: callables without arguments; what they return is dropped inside the timed stretch.
        baseline: the name that ratios refer to; the first one by default.
        device: where the work runs. On CUDA times come from events, and the device is waited for.
        min_seconds, min_rounds, max_rounds: rounds go on until both minima are reached, or the maximum.
        warmup: untimed rounds before the first.
        calls: calls per timed stretch; None chooses as many as make the fastest candidate's stretch
            ``sample_seconds`` long, the same number for all. Where the fastest takes less than 20 ms, an
            untimed call then precedes each stretch, so that a candidate always finds its own tensors in the
            caches, as where it runs again and again, and never at times those of another.
        cold_cache: overwrite a buffer larger than the last-level cache before each stretch (with
            ``calls`` 1), as where the tensors come from memory in a real step.
        clock: the CPU's clock in seconds; tests give their own.

    Raises:
        ValueError: no candidates, an unknown baseline, or limits that leave no round to time.
    """
    names = list(candidates)
    if not names:
        raise ValueError("compare() needs at least one candidate")
    first = names[0] if baseline is None else baseline
    if first not in candidates:
        raise ValueError(f"unknown baseline {first!r}; expected one of {', '.join(names)}")
    if max_rounds < 1 or (calls is not None and calls < 1):
        raise ValueError(f"expected max_rounds >= 1 and calls >= 1, got {max_rounds} and {calls}")
    if cold_cache and calls not in (None, 1):
        raise ValueError(f"cold_cache times single calls; got calls={calls}")

    watch = Stopwatch(device, clock)
    flush = _cache_flush(device) if cold_cache else None
    for index in range(max(warmup, 0)):
        for name in order(names, index):
            candidates[name]()
    leads = False
    if calls is None and cold_cache:
        calls = 1
    elif calls is None:
        fastest = _fastest(candidates, watch)
        calls = max(1, min(10_000, round(sample_seconds / fastest)))
        leads = len(names) > 1 and fastest < _SHORT_SECONDS

    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection inside one candidate's stretch would be charged to it
    try:
        begun, index = clock(), 0
        while index < max_rounds and (index < min_rounds or clock() - begun < min_seconds):
            this_round = order(names, index)
            for name in this_round:
                fn = candidates[name]
                if flush is not None:
                    flush()
                if leads:
                    fn()
                watch.start()
                for _ in range(calls):
                    fn()
                watch.stop()
            for name, seconds in zip(this_round, watch.seconds(), strict=True):
                samples[name].append(seconds / calls)
            index += 1
    finally:
        if collecting:
            gc.enable()
    return Comparison(
        samples, first, calls, torch.get_num_threads(), str(torch.device(device)), cold_cache, not missing_stability()
    )


def _fastest(candidates: Mapping[str, Callable[[], object]], watch: Stopwatch) -> float:
    """Seconds of one call of the fastest candidate."""
    for fn in candidates.values():
        watch.start()
        fn()
        watch.stop()
    return max(min(watch.seconds()), 1e-7)


def _cache_flush(device: torch.device | str) -> Callable[[], object]:
    where = torch.device(device)
    size = 256 << 20 if where.type == "cuda" else 128 << 20  # twice the largest caches of today or more
    buffer = torch.empty(size, dtype=torch.uint8, device=where)
    return buffer.zero_


def graphed(fn: Callable[[], object], warmup: int = 3) -> Callable[[], object]:
    """``fn`` captured in a CUDA graph; what it returns replays it.

    A replay has the device work of ``fn`` without the host's cost of launching it, which would otherwise be
    what is timed on small tensors. ``fn`` must be capturable: no synchronisation, the same tensors at each call.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = fn()  # held, so that its memory stays the graph's

    def replay() -> object:
        graph.replay()
        return kept

    return replay


# ------------------------------------------------------------------------------------- memory
def saved_bytes(fn: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward while ``fn`` runs forward.

    Each storage counts once and whole, however many saved tensors are views of it. The storages of
    ``exclude`` (a model's parameters, say) do not count. ``fn`` should hold its result until it
    returns and not run backward, which would count what recomputation saves as well.
    """
    excluded = {t.untyped_storage().data_ptr() for t in exclude}
    storages: dict[int, Any] = {}  # holding each one keeps its address from being used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages.setdefault(storage.data_ptr(), storage)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn()
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(fn: Callable[[], object], device: torch.device | str) -> int | None:
    """The most bytes that ``fn`` holds on a CUDA device beyond what was held before; None on a CPU."""
    where = torch.device(device)
    if where.type != "cuda":
        return None
    torch.cuda.synchronize(where)
    torch.cuda.reset_peak_memory_stats(where)
    before = torch.cuda.memory_allocated(where)
    fn()
    torch.cuda.synchronize(where)
    return torch.cuda.max_memory_allocated(where) - before


# -------------------------------------------------------------------------------- environment
def stable_environment() -> dict[str, str]:
    """Environment variables under which CPU timings hold still; they act only when set before start.

    glibc gives large blocks back to the system and takes them again as fresh pages, which costs more
    than many an op; the two MALLOC thresholds keep them. GOMP_SPINCOUNT lets libgomp's threads sleep
    soon when a core is taken from them, instead of waiting for the scheduler in steps of 8 ms.
    """
    return {
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        "MALLOC_MMAP_THRESHOLD_": "100000000000",
        "GOMP_SPINCOUNT": "10000",
    }


def missing_stability() -> list[str]:
    """The names of :func:`stable_environment` that are not set (a value of the user's own counts)."""
    return [name for name in stable_environment() if name not in os.environ]


def restart_stable() -> None:
    """Start this very command again with :func:`stable_environment` set, if some of it is missing.

    It does not return when it does so. For scripts, before they import torch or at least before they measure.
    """
    missing = missing_stability()
    if not missing:
        return
    wanted = stable_environment()
    environment = {**os.environ, **{name: wanted[name] for name in missing}}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, sys.orig_argv, environment)
