"""One recorded call: its candidates, each checked against PyTorch on that very shape, and then timed there."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dlkern import dispatch
from dlkern.bench import measure, parity
from dlkern.kernels.activation import Activation

from . import answers
from .answers import Answer, Key, Trial
from .record import Call

#: Assignments of one call that are raced at most; ops inside of ops multiply.
_MOST = 24
#: A candidate wins where it is faster by this much at least, and its p20 is above 1 too: a tie is PyTorch's.
LEAST_GAIN = 1.02
#: Where an activation bends: rounding decides there on which side an element falls.
_KINKS = {
    "relu": (0.0,),
    "leaky_relu": (0.0,),
    "relu6": (0.0, 6.0),
    "hardswish": (-3.0, 3.0),
    "hardsigmoid": (-3.0, 3.0),
}
_PYTORCH = "PyTorch"
#: Backends that take tensors of the CPU in an interpreter or a simulator alone.
_EMULATED = ("triton", "cuda", "numba")

Check = Callable[..., None]


class Effort(NamedTuple):
    """How long one comparison takes."""

    min_seconds: float = 0.15
    min_rounds: int = 7
    max_rounds: int = 400


EFFORT = Effort()


@dataclass
class Outcome:
    """What a race found: the answers, the call's own ratio, and the candidates that were wrong."""

    answers: dict[Key, Answer] = field(default_factory=dict)
    ratio: measure.Spread | None = None  # of the fastest correct candidate
    seconds: float = 0.0  # PyTorch's
    won: bool = False  # by a backend of dlkern's
    raced: bool = False
    reached: list[Key] = field(default_factory=list)  # with these answers


# --------------------------------------------------------------------------------- one replay
class Replay:
    """A call's arguments, made again, and the call on them: forward, and backward where a gradient is wanted."""

    def __init__(self, call: Call, leaves: list[Any] | None = None) -> None:
        self.call = call
        self.leaves = call.make() if leaves is None else leaves
        self._inputs = [t for t in self.leaves if isinstance(t, Tensor) and t.requires_grad]
        self._grads: list[Tensor] | None = None

    def forward(self) -> list[Tensor]:
        """The tensors that the call returns."""
        args, kwargs = self.call.arguments(self.leaves)
        found = self.call.function(*args, **kwargs)
        return [t for t in pytree.tree_leaves(found) if isinstance(t, Tensor)]

    def step(self, grads: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor | None]]:
        """Outputs, and the gradients of every input that wants one; the modes are the caller's."""
        outputs = self.forward()
        ends = [t for t in outputs if t.requires_grad]
        if not ends or not self._inputs:
            return outputs, []
        if grads is None:
            if self._grads is None:
                self._grads = directions(ends)
            grads = self._grads
        return outputs, list(torch.autograd.grad(ends, self._inputs, grads, allow_unused=True))

    def names(self) -> list[str]:
        """Of the inputs that want a gradient, for messages."""
        names = _names(self.call)
        return [n for n, t in zip(names, self.leaves, strict=True) if isinstance(t, Tensor) and t.requires_grad]


def directions(ends: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Fixed random gradients of outputs, laid out like them."""
    generator = torch.Generator(ends[0].device).manual_seed(seed)
    return [
        torch.empty_like(t).copy_(torch.randn(t.shape, generator=generator, device=t.device)) if t.numel() else t
        for t in (e.detach() for e in ends)
    ]


def _names(call: Call) -> list[str]:
    """A name for each leaf: the entry's argument that holds it."""
    indices = list(range(len(call.leaves)))
    args, kwargs = call.arguments(indices)
    bound = inspect.signature(call.function).bind(*args, **kwargs).arguments
    names = [""] * len(indices)
    for name, value in bound.items():
        for path, index in pytree.tree_flatten_with_path(value)[0]:
            names[index] = name + pytree.keystr(path)
    return names


@contextlib.contextmanager
def tried(trial: Trial) -> Iterator[Trial]:
    """A trial for the length of a block."""
    before = answers.attempt(trial)
    try:
        yield trial
    finally:
        answers.attempt(before)


# ------------------------------------------------------------------------------------ checking
class Judge:
    """The parity rule for one call.

    Truth is PyTorch's path in float64. The sums of absolute terms of the rule are estimated from below: by how far
    float64 results move, per eps, when every input moves by eps in a random direction, and by the results themselves.
    Where an activation bends, the incoming gradient is 0, as no rounding error can be told from the other side there.
    Dropout is off.

    Source: Higham, "Accuracy and Stability of Numerical Algorithms" (2002), section 1.5: forward error is conditioning
    times backward error.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self._leaves = _without_dropout(call, call.make())
        self._floats = [i for i, v in enumerate(self._leaves) if isinstance(v, Tensor) and v.is_floating_point()]
        data = [self._leaves[i].dtype for i in self._floats]
        self.dtype = max(data, key=lambda d: torch.finfo(d).eps)
        self._grads: list[Tensor] | None = None
        with tried(Trial({}, decided=False)), call.modes.entered():
            self._mask = self._away_from_kinks()
            self._peer = self._results(self._leaves)
        with tried(Trial({}, decided=False)), _exact(call):
            self._truth = self._results(self._leaves, wide=True)
            self._terms = self._conditioned()

    def check(self, trial: Trial) -> dict[Key, Any]:
        """Run the call under a trial and hold every result to the rule; returns what the trial was asked for.

        Raises:
            AssertionError: a result is farther from float64 than the rule allows.
            Whatever the candidate raises.
        """
        with tried(trial), self.call.modes.entered():
            found = self._results(self._leaves)
        if found.keys() != self._truth.keys():
            raise AssertionError(f"expected {', '.join(self._truth)}, got {', '.join(found)}")
        for name, result in found.items():
            peer = self._peer.get(name)
            parity.assert_parity(name, result, self._truth[name], self._terms[name], peer=peer, dtype=self.dtype)
        return trial.reached

    def _results(self, leaves: list[Any], wide: bool = False, seed: int | None = None) -> dict[str, Tensor]:
        """Outputs, gradients and whatever input was written to, by name."""
        own = [self._copied(leaf, wide, seed, index) for index, leaf in enumerate(leaves)]
        before = {i: own[i].detach().clone() for i in self._floats if not own[i].requires_grad}
        replay = Replay(self.call, own)
        outputs = replay.forward()
        ends = [t for t in outputs if t.requires_grad]
        found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
        inputs = [t for t in own if isinstance(t, Tensor) and t.requires_grad]
        if ends and inputs:
            if self._grads is None:
                self._grads = directions(ends)
                if self._mask is not None:
                    self._grads[0].mul_(self._mask)
            grads = [g.to(t.dtype) for g, t in zip(self._grads, ends, strict=True)]
            made = torch.autograd.grad(ends, inputs, grads, allow_unused=True)
            found |= {f"gradient of {n}": g for n, g in zip(replay.names(), made, strict=True) if g is not None}
        names = _names(self.call)
        for index, value in before.items():
            if not torch.equal(own[index], value):
                found[f"{names[index]} after the call"] = own[index].detach()
        return found

    def _copied(self, leaf: Any, wide: bool, seed: int | None, index: int) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        value = leaf.detach()
        if value.is_floating_point() and wide:
            value = value.double()
            if seed is not None:
                generator = torch.Generator().manual_seed(seed * 1000 + index)
                signs = torch.randint(0, 2, value.shape, generator=generator).to(value.device) * 2 - 1
                value = value * (1 + signs * self._delta)
        else:
            value = value.clone()
        if value.stride() != leaf.stride() and 0 not in leaf.stride():
            value = _like_strides(value, leaf)
        return value.requires_grad_(leaf.requires_grad)

    @property
    def _delta(self) -> float:
        return float(torch.finfo(self.dtype).eps) if self.dtype != torch.float64 else 1e-9

    def _conditioned(self) -> dict[str, Tensor]:
        terms = {name: t.abs() for name, t in self._truth.items()}
        for seed in (1, 2):
            moved = self._results(self._leaves, wide=True, seed=seed)
            for name, truth in self._truth.items():
                if name in moved:
                    terms[name] = torch.maximum(terms[name], (moved[name] - truth).abs() / self._delta)
        return terms

    def _away_from_kinks(self) -> Tensor | None:
        """1 where PyTorch's rounding, sixteen times over, does not reach a kink of the activation; else 0."""
        args, kwargs = self.call.arguments(self._leaves)
        bound = inspect.signature(self.call.function).bind(*args, **kwargs).arguments
        name = next((n for n, v in bound.items() if isinstance(v, Activation)), None)
        if name is None or bound[name].name not in _KINKS or not self.call.modes.grad:
            return None
        kinks, linear = _KINKS[bound[name].name], Activation("identity")

        def before(leaves: list[Any], wide: bool) -> Tensor:
            own = [self._copied(leaf, wide, None, i) for i, leaf in enumerate(leaves)]
            arguments, keywords = self.call.arguments(own)
            again = inspect.signature(self.call.function).bind(*arguments, **keywords)
            again.arguments[name] = linear
            with torch.no_grad(), _exact(self.call) if wide else contextlib.nullcontext():
                found = self.call.function(*again.args, **again.kwargs)
            return next(t for t in pytree.tree_leaves(found) if isinstance(t, Tensor)).double()

        narrow, z = before(self._leaves, False), before(self._leaves, True)
        margin = 16 * (narrow - z).square().mean().sqrt()
        mask = torch.ones_like(z)
        for kink in kinks:
            mask *= (z - kink).abs() > margin
        return mask


@contextlib.contextmanager
def _exact(call: Call) -> Iterator[None]:
    """The call's grad mode without autocast, for float64."""
    with call.modes._replace(autocast=()).entered():
        yield


def _like_strides(value: Tensor, like: Tensor) -> Tensor:
    made = torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device=value.device)
    return made.copy_(value)


def _without_dropout(call: Call, leaves: list[Any]) -> list[Any]:
    """Probabilities of dropout set to 0: two backends drop other elements."""
    return [
        0.0 if isinstance(v, float) and name.rpartition(".")[2] in ("dropout", "dropout_p") else v
        for name, v in zip(_names(call), leaves, strict=True)
    ]


# -------------------------------------------------------------------------------------- racing
def race(call: Call, effort: Effort = EFFORT, only: tuple[str, ...] | None = None) -> Outcome:
    """Find the fastest correct backends of a call, for every decision in it that has no answer yet.

    Args:
        effort: of the timing.
        only: the backends to try; None tries every one that is available and supports the request, but for the
            reference, which nobody would run.
    """
    replay, outcome = Replay(call), Outcome()
    with call.modes.entered():
        wrong: dict[Key, list[tuple[str, str]]] = {}
        found = _candidates(replay, only, wrong)
        outcome.reached = list(found[0].reached)
        open_keys = [k for k in dict.fromkeys(key for trial in found for key in trial.reached) if not answers.exact(k)]
    if not open_keys:
        return outcome
    outcome.raced = True
    device = next((str(t.device) for t in replay.leaves if isinstance(t, Tensor)), "cpu")
    right = _checked(call, found, wrong) if len(found) > 1 or found[0].overrides else found
    contenders = {f"{i}": trial for i, trial in enumerate(right)}
    baseline = Trial({}, decided=False)
    if any(_gains(trial) for trial in right):
        with call.modes.entered(), tried(baseline):
            steps = {_PYTORCH: _timed(replay, baseline)}
            steps |= {name: _timed(replay, trial) for name, trial in contenders.items() if _gains(trial)}
            comparison = measure.compare(steps, device=device, warmup=1, **effort._asdict())
        best = max((n for n in steps if n != _PYTORCH), key=lambda n: comparison.ratio(n).paired.median)
        outcome.ratio = comparison.ratio(best).paired
        outcome.seconds = comparison.time(_PYTORCH).median
        outcome.won = outcome.ratio.median >= LEAST_GAIN and outcome.ratio.p20 > 1
        rival = contenders[best]
    else:
        rival = baseline
    chosen = rival if outcome.won else next((t for t in found if set(t.overrides.values()) <= {"torch"}), baseline)
    outcome.reached = list(chosen.reached) or outcome.reached
    for key in open_keys:
        if key in chosen.reached:  # else asked for by no call that runs like the winner
            name = chosen.overrides.get(key, "torch")
            outcome.answers[key] = _answer(name, rival, outcome, tuple(wrong.get(key, ())))
    return outcome


def _answer(name: str, rival: Trial, outcome: Outcome, wrong: tuple[tuple[str, str], ...]) -> Answer:
    """The answer for one decision of the winner; the call's figures belong to what differs from PyTorch."""
    beside = name
    if name == "torch":
        other = next((b for b in rival.overrides.values() if b != "torch"), None)
        if other is None or outcome.won or outcome.ratio is None:  # the gain, if any, is another decision's
            return Answer(name, wrong=wrong)
        beside = other
    if outcome.ratio is None:
        return Answer(name, wrong=wrong)
    ratio, low, high, seconds = (float(f"{v:.4g}") for v in (*outcome.ratio, outcome.seconds))
    return Answer(name, ratio, low, high, seconds, beside, wrong)


def _gains(trial: Trial) -> bool:
    """Whether a trial runs anything that is not PyTorch's."""
    if any(name != "torch" for name in trial.overrides.values()):
        return True
    return any((a := answers.exact(key)) is not None and a.backend != "torch" for key in trial.reached)


def _timed(replay: Replay, trial: Trial) -> Callable[[], object]:
    def run() -> object:
        before = answers.attempt(trial)
        try:
            return replay.step()
        finally:
            answers.attempt(before)

    return run


def _candidates(replay: Replay, only: tuple[str, ...] | None, wrong: dict[Key, list[tuple[str, str]]]) -> list[Trial]:
    """Every assignment of backends to the decisions that a call reaches and nothing has decided; the first is torch."""
    found: list[Trial] = []

    def walk(overrides: dict[Key, str]) -> None:
        trial = Trial(overrides)
        try:
            with tried(trial):
                replay.step()
        except Exception as error:
            if not any(name != "torch" for name in overrides.values()):
                raise
            key = list(overrides)[-1]
            wrong.setdefault(key, []).append((overrides[key], f"{type(error).__name__}: {error}"))
            return
        still = [k for k in trial.reached if k not in overrides and answers.exact(k) is None]
        if not still or len(found) >= _MOST:
            trial.overrides.update(dict.fromkeys(still, "torch"))
            found.append(trial)
            return
        first = still[0]
        for name in ("torch", *_supporting(first, trial.reached[first], only)):
            walk({**overrides, first: name})

    walk({})
    return found


def _supporting(key: Key, request: Any, only: tuple[str, ...] | None) -> list[str]:
    names = [n for n in dispatch.operation(key.op).modules if n not in ("torch", "reference")]
    if only is not None:
        names = [n for n in names if n in only]
    elif request.device == "cpu":
        names = [n for n in names if n not in _EMULATED]
    return [n for n in names if dispatch.unsupported(key.op, n, request) is None]


def _checked(call: Call, found: list[Trial], wrong: dict[Key, list[tuple[str, str]]]) -> list[Trial]:
    """The candidates whose numbers are right; the others are named in ``wrong``."""
    judge = Judge(call)
    right = []
    for trial in found:
        ours = {key: name for key, name in trial.overrides.items() if name != "torch"}
        if not ours:
            right.append(trial)
            continue
        try:
            judge.check(Trial(trial.overrides, by_op={key.op: name for key, name in ours.items()}))
        except Exception as error:
            key, name = list(ours.items())[-1]
            note = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            if name not in dict(wrong.get(key, ())):
                wrong.setdefault(key, []).append((name, note))
        else:
            right.append(trial)
    return right
