"""The measured swap: which sites of a model are rewritten is what was measured on the user's own batch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dlkern._swap import runtime
from dlkern._swap.classes import plan_of
from dlkern._swap.find import Filter, join
from dlkern.nn.batch_norm_act import sync_group

from . import answers, cache, progress, race, record
from .answers import Answer, Key
from .race import Effort, Outcome
from .record import Call, Recording
from .step import Bounds, Step, Variant, compare

#: Of the whole step's comparison.
_STEP_SECONDS = 2.0
_STEP_ROUNDS = 11
#: channels_last must gain this much over the model's own format.
_LEAST_GAIN = race.LEAST_GAIN

#: Swaps a model's sites by default order: ``default(filter_fn)``.
Default = Callable[[Filter | None], None]


@dataclass(frozen=True)
class SiteVerdict:
    """What was measured at a site; ``ratio`` is PyTorch's time divided by dlkern's fastest."""

    kind: str
    backend: str
    reason: str
    ratio: float | None
    kept: bool


@dataclass
class Verdict:
    """What a measured swap found of a model."""

    sites: dict[str, SiteVerdict] = field(default_factory=dict)
    step: Bounds | None = None
    kept: bool = True
    summary: str = ""
    raced: int = 0
    remembered: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass
class _Found:
    """One memory format's measurement."""

    sites: dict[str, SiteVerdict] = field(default_factory=dict)
    raced: int = 0
    remembered: int = 0
    wrong: list[str] = field(default_factory=list)
    fresh: dict[Key, Answer] = field(default_factory=dict)


# -------------------------------------------------------------------------------- distributed
def _rank() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _from_first(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on every rank; its error, too."""
    rank, world = _rank()
    if world == 1:
        return make()
    box: list[Any] = [None, None]
    failure: BaseException | None = None
    if rank == 0:
        try:
            box[0] = make()
        except BaseException as error:
            failure, box[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise RuntimeError(f"the measured swap failed on rank 0: {box[1]}")
    return box[0]


# ------------------------------------------------------------------------------------ the swap
def measured_swap(
    model: nn.Module,
    sample: Any,
    filter_fn: Filter | None,
    try_channels_last: bool,
    default: Default,
    *,
    effort: Effort = race.EFFORT,
    shown: bool | None = None,
) -> Verdict:
    """Swap a model by measurement; see :func:`dlkern.swap`. Every rank of a process group calls it.

    ``default`` swaps the model by default order with a filter. Whatever is raised, the model is as it was.
    """
    before = Variant.of(model)
    counters = {m: dataclasses.replace(c) for m in model.modules() if plan_of(m) and (c := runtime.calls(m))}
    loaded = answers.everything()
    try:
        with progress.bar(shown if _rank()[0] == 0 else False) as say:
            verdict = _measured_swap(model, sample, filter_fn, try_channels_last, default, effort, say)
    except BaseException:
        before.put()
        for module, counter in counters.items():
            runtime.restore(module, counter)
        answers.clear()
        answers.put(loaded)
        raise
    for module in model.modules():
        runtime.reset(module)
    return verdict


def _measured_swap(
    model: nn.Module,
    sample: Any,
    filter_fn: Filter | None,
    try_channels_last: bool,
    default: Default,
    effort: Effort,
    say: progress.Say,
) -> Verdict:
    step = Step(model, sample)
    remembered = _from_first(lambda: [*cache.load(step.device.type), *cache.shipped(step.device.type)])
    answers.put((key, answer) for key, answer in remembered if answers.exact(key) is None)
    native = _measure(model, step, filter_fn, default, effort, say)
    variants = {"swapped": Variant.of(model)}
    found = {"swapped": native}
    with _stock_classes(model):
        stock = Variant.of(model)
    if try_channels_last and any(t.dim() == 4 for t, _ in stock.data):
        for tensor, data in stock.data:
            if tensor.dim() == 4:
                tensor.data = data.contiguous(memory_format=torch.channels_last)
        found["channels_last"] = _measure(model, step, filter_fn, default, effort, say)
        variants["channels_last"] = Variant.of(model)
    fresh = {key: answer for one in found.values() for key, answer in one.fresh.items()}
    if fresh and _rank()[0] == 0:
        cache.store(step.device.type, fresh.items())
    if not any(site.kept for site in native.sites.values()):
        del variants["swapped"]  # it is the stock model
    return _judged(model, step, stock, variants, found, say)


def _judged(
    model: nn.Module,
    step: Step,
    stock: Variant,
    variants: dict[str, Variant],
    found: dict[str, _Found],
    say: progress.Say,
) -> Verdict:
    """Compare whole steps, and leave the model as the variant that is faster, or stock."""
    native, world = found["swapped"], _rank()[1]
    verdict = Verdict(native.sites, None, False, "no site is faster than PyTorch's: nothing is swapped")
    verdict.raced = sum(one.raced for one in found.values())
    verdict.remembered = sum(one.remembered for one in found.values())
    verdict.wrong = list(dict.fromkeys(text for one in found.values() for text in one.wrong))
    if not variants:
        stock.put()
        return verdict
    say(0, 1, "the whole step, before and after")
    _, limits = compare(
        step, {"stock": stock, **variants}, seconds=_STEP_SECONDS, rounds=_STEP_ROUNDS, together=world > 1
    )
    limits = _from_first(lambda: limits)
    best = max(limits, key=lambda name: limits[name].ratio)
    own = limits.get("swapped", Bounds(1.0, 1.0, 1.0))
    if best == "channels_last" and limits[best].low < _LEAST_GAIN * own.ratio:
        best = "swapped"
    kind = "training step" if step.training else "inference"
    if best not in variants:
        stock.put()
        return verdict
    verdict.step, verdict.sites = limits[best], found[best].sites
    if limits[best].high < 1:
        stock.put()
        verdict.summary = f"undone: the whole {kind} was slower swapped, {limits[best]} of the stock model's speed"
        return verdict
    variants[best].put()
    if best == "channels_last":
        model.to(memory_format=torch.channels_last)  # gradients, too
    verdict.kept = True
    kept = sum(site.kept for site in verdict.sites.values())
    verdict.summary = f"whole {kind}: {limits[best]} of the stock model's speed, {kept} sites swapped" + (
        ", in channels_last" if best == "channels_last" else ""
    )
    return verdict


@contextlib.contextmanager
def _stock_classes(model: nn.Module) -> Iterator[None]:
    """The modules under their own classes."""
    swapped = [(m, type(m), plan) for m in model.modules() if (plan := plan_of(m)) is not None]
    for module, _, plan in swapped:
        object.__setattr__(module, "__class__", plan[0])
    try:
        yield
    finally:
        for module, cls, _ in swapped:
            object.__setattr__(module, "__class__", cls)


# -------------------------------------------------------------------------------- one format
def _measure(
    model: nn.Module, step: Step, filter_fn: Filter | None, default: Default, effort: Effort, say: progress.Say
) -> _Found:
    """Swap by default order, record, race, and swap again what won."""
    default(filter_fn)
    say(0, 1, "one pass of the sample")
    with step.untraced(), record.recording() as recorded:
        step()
    places = _places(model)
    found = _from_first(lambda: _raced(recorded, places, effort, say))
    answers.put(found.fresh.items())
    kept = {path for path, site in found.sites.items() if site.kept}

    def is_kept(module: nn.Module, path: str) -> bool:
        # the layers inside of a block that is one site (ASPP) are asked for, too
        inside = any(site in ("", path) or path.startswith(f"{site}.") for site in kept)
        return inside and (filter_fn is None or filter_fn(module, path))

    default(is_kept)
    return found


def _raced(recorded: Recording, places: _Places, effort: Effort, say: progress.Say) -> _Found:
    unique = list(dict.fromkeys(call.key for call in recorded.calls))
    by_key: dict[Any, Outcome] = {}
    found = _Found()
    for call in recorded.calls:  # inner ones first
        if call.key in by_key:
            continue
        say(len(by_key), len(unique), f"{call.name} {call.where}")
        outcome = by_key[call.key] = race.race(call, effort)
        answers.put(outcome.answers.items())
        found.fresh |= outcome.answers
        found.raced += outcome.raced
        found.remembered += not outcome.raced
    keys = {key for outcome in by_key.values() for key in outcome.reached}
    for key in sorted(keys):
        answer = answers.exact(key)
        for name, why in () if answer is None else answer.wrong:
            found.wrong.append(f"{name} is set aside for {key.op} {'x'.join(map(str, key.shape))}: {why}")
    outcomes = [by_key[call.key] for call in recorded.calls]
    for path, indices in places.calls_of(recorded.calls).items():
        if path in places.synchronised:
            why = "not measured: the batch norm takes the statistics of several ranks; default order"
            found.sites[path] = SiteVerdict(places.kinds[path], "", why, None, True)
            continue
        found.sites[path] = _site(places.kinds[path], recorded.calls, outcomes, indices)
    return found


@dataclass
class _Places:
    """Where calls belong: a site's tensors, and the sites of each owner."""

    tensors: dict[str, frozenset[int]] = field(default_factory=dict)
    owners: dict[int, list[str]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    synchronised: set[str] = field(default_factory=set)  # statistics of several ranks: a rank cannot race alone

    def calls_of(self, calls: list[Call]) -> dict[str, list[int]]:
        """Indices of each site's calls: by its own tensors, else by the forward that made the call."""
        found: dict[str, list[int]] = {path: [] for path in self.tensors}
        for index, call in enumerate(calls):
            sites = [path for path, own in self.tensors.items() if own & call.tensors]
            if not sites and call.owner is not None:
                sites = self.owners.get(id(call.owner), [])
            for path in sites:
                found[path].append(index)
        return found


def _places(model: nn.Module) -> _Places:
    modules, found = dict(model.named_modules()), _Places()
    for owner, module in modules.items():
        plan = plan_of(module)
        for site in plan[1].sites if plan is not None else ():
            path = join(owner, site.path)
            parts = [modules[path], *([modules[join(owner, site.conv)]] if site.conv is not None else [])]
            own = frozenset(id(t) for m in parts for t in [*m.parameters(), *m.buffers()])
            found.tensors[path], found.kinds[path] = own, site.kind
            if sync_group(modules[path]) is not None:
                found.synchronised.add(path)
            found.owners.setdefault(id(module), []).append(path)
    return found


def _site(kind: str, calls: list[Call], outcomes: list[Outcome], indices: list[int]) -> SiteVerdict:
    if not indices:
        return SiteVerdict(kind, "", "measured: the sample did not reach it in this mode", None, False)
    keys = list(dict.fromkeys(key for i in indices for key in outcomes[i].reached))
    found = {key: answer for key in keys if (answer := answers.exact(key)) is not None}
    names = list(dict.fromkeys(a.backend for a in found.values() if a.backend != "torch"))
    chosen = set(indices)
    outer = [i for i in indices if calls[i].parent not in chosen]
    costs = [pair for i in outer for pair in _costs(i, calls, outcomes, chosen)]
    stock, ours = sum(seconds for seconds, _ in costs), sum(seconds / gain for seconds, gain in costs)
    ratio = round(stock / ours, 3) if ours else None
    where = calls[outer[0]].where
    contradicted = any(
        a.rival is not None and a.rival.startswith(race.INNER) and a.ratio is not None and a.ratio < 1
        for a in found.values()
    )  # an op won by itself, and the call that it is part of was slower with it
    if names and not contradicted:
        gain = f"{ratio:.2f}x PyTorch" if ratio is not None else "faster than PyTorch"
        return SiteVerdict(kind, ", ".join(names), f"measured: {gain} on {where}", ratio, True)
    first = dict.fromkeys(key for i in outer for key in outcomes[i].reached)  # whose ratio it is
    told = [a.in_words() for key in (*first, *keys) if (a := found.get(key)) is not None and a.backend == "torch"]
    reason = next((text for text in told if "x PyTorch" in text), told[0] if told else "measured: nothing to choose")
    return SiteVerdict(kind, "torch", f"{reason} on {where}", ratio, False)


def _costs(index: int, calls: list[Call], outcomes: list[Outcome], chosen: set[int]) -> list[tuple[float, float]]:
    """(PyTorch's seconds, ratio) of a call, or of those inside of it where it has none of its own."""
    outcome = outcomes[index]
    if outcome.ratio is not None:
        return [(outcome.seconds, outcome.ratio.median)]
    for key in outcome.reached:  # remembered: its own decision comes first, those inside of it behind
        answer = answers.exact(key)
        if answer is not None and answer.ratio is not None and answer.seconds is not None:
            return [(answer.seconds, answer.ratio)]
    inner = [i for i in chosen if calls[i].parent == index]
    return [pair for i in inner for pair in _costs(i, calls, outcomes, chosen)]
