"""Measured answers in memory: which backend was the fastest correct one, by op, request and sizes.

``dispatch.choose`` asks here only while something is loaded, tried or recorded (``epoch`` is then not 0), so that
without measurements a call costs what it did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

#: A size may be this many times larger or smaller than a measured one for that answer to hold.
NEAR = 2.0


class Key(NamedTuple):
    """What was decided: an op, its request in words (see :func:`in_words`), and the sizes of its tensors."""

    op: str
    request: str
    shape: tuple[int, ...]


class Answer(NamedTuple):
    """The backend that won, and by how much.

    ``ratio`` is PyTorch's time divided by the time of ``rival``: the winner's or, where PyTorch won, that of the
    fastest correct backend beside it (None where there was none). ``low`` and ``high`` are its p20 and p80, ``seconds``
    is PyTorch's time. ``wrong`` has the backends that gave wrong numbers on this device, with what was wrong. A
    ``shipped`` answer was not measured here but on another device of this name: it came with dlkern.
    """

    backend: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    seconds: float | None = None
    rival: str | None = None
    wrong: tuple[tuple[str, str], ...] = ()
    shipped: bool = False

    def in_words(self) -> str:
        """The reason that ``dispatch.Choice`` and reports show."""
        text = self._in_words()
        return text.replace("measured", "measured on a like device", 1) if self.shipped else text

    def _in_words(self) -> str:
        if self.backend != "torch":
            return f"measured: {self.ratio:.2f}x PyTorch" if self.ratio is not None else "measured"
        if self.rival is not None and self.ratio is not None:
            other = self.rival if self.rival.startswith("torch") else f"the fastest other, {self.rival},"
            text = f"measured: {other} is {self.ratio:.2f}x PyTorch"
            if self.ratio > 1 and self.low is not None and self.high is not None:
                text += f" ({self.low:.2f}-{self.high:.2f}: too little to count on)"
            return text
        if self.wrong:
            return f"measured: no other gives right numbers here ({', '.join(name for name, _ in self.wrong)})"
        return "measured: no other backend is faster, or none can run it"


class Trial:
    """A tentative assignment while candidates are raced; what it does not name runs by PyTorch.

    ``overrides`` is by key, ``by_op`` by op alone; with ``decided`` loaded answers count for what they name exactly.
    """

    def __init__(self, overrides: dict[Key, str], *, by_op: dict[str, str] | None = None, decided: bool = True) -> None:
        self.overrides, self.by_op, self.decided = overrides, by_op or {}, decided
        self.choices: dict[Any, Any] = {}  # dispatch's, for the length of this trial
        self.reached: dict[Key, Any] = {}  # what was asked for, in order, with the request

    def backend(self, key: Key, request: Any) -> str:
        """The backend that this trial gives a request."""
        self.reached.setdefault(key, request)
        name = self.overrides.get(key) or self.by_op.get(key.op)
        if name is None and self.decided:
            answer = exact(key)
            name = None if answer is None else answer.backend
        return name or "torch"


#: Not 0 while choices depend on more than the request; changes whenever the answers do. torch.compile guards on it.
epoch = 0
trial: Trial | None = None
#: Runs an op's entry and notes the call (see :mod:`dlkern.tuning.record`).
recorder: Callable[..., Any] | None = None

#: What ``dispatch.choose`` has chosen so far by these answers, or by the current trial.
choices: dict[Any, Any] = {}

_remembered = choices
_table: dict[tuple[str, str], dict[tuple[int, ...], Answer]] = {}
_counter = 0


def changed() -> None:
    """Recompute ``epoch`` after a change of the answers, the trial or the recorder."""
    global epoch, _counter
    _remembered.clear()
    _counter += 1
    epoch = _counter if _table or trial is not None or recorder is not None else 0


def attempt(new: Trial | None) -> Trial | None:
    """Make a trial the current one (None ends it); returns the one before."""
    global trial, choices
    before, trial = trial, new
    choices = _remembered if new is None else new.choices
    if (before is None) != (new is None):
        changed()
    return before


def record_with(new: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Make a recorder the current one (None ends it); returns the one before."""
    global recorder
    before, recorder = recorder, new
    changed()
    return before


def put(found: Iterable[tuple[Key, Answer]]) -> None:
    """Load answers; those for the same key replace older ones."""
    for key, answer in found:
        _table.setdefault((key.op, key.request), {})[key.shape] = answer
    changed()


def clear() -> None:
    """Forget every answer in memory (the file stays)."""
    _table.clear()
    changed()


def everything() -> list[tuple[Key, Answer]]:
    """All answers in memory."""
    return [(Key(*place, shape), answer) for place, shapes in _table.items() for shape, answer in shapes.items()]


def exact(key: Key) -> Answer | None:
    """The answer measured for this very key."""
    return _table.get((key.op, key.request), {}).get(key.shape)


def near(key: Key) -> tuple[Answer, tuple[int, ...]] | None:
    """The answer for this key or its nearest measured neighbour, with the shape that was measured.

    A neighbour has the same request and as many sizes, each within a factor of 2; the nearest is the one with the
    least sum of absolute logarithms. Without sizes (torch.compile) it is what all answers to the request agree on.
    """
    shapes = _table.get((key.op, key.request))
    if not shapes:
        return None
    if not key.shape:
        first = next(iter(shapes))
        return (shapes[first], first) if len({a.backend for a in shapes.values()}) == 1 else None
    if key.shape in shapes:
        return shapes[key.shape], key.shape
    found = [(far, shape) for shape in shapes if (far := _distance(key.shape, shape)) is not None]
    if not found:
        return None
    shape = min(found)[1]
    return shapes[shape], shape


def _distance(wanted: tuple[int, ...], measured: tuple[int, ...]) -> float | None:
    if len(wanted) != len(measured):
        return None
    total = 0.0
    for a, b in zip(wanted, measured, strict=True):
        if a == b:
            continue
        if a <= 0 or b <= 0 or not 1 / NEAR <= a / b <= NEAR:  # a flag is 0 or 1: it must be the same
            return None
        total += abs(math.log(a / b))
    return total


def in_words(request: Any, without: tuple[str, ...] = ()) -> str:
    """A request as one line of text: ``field=value`` for every field that is not a size."""
    pairs = zip(request._fields, request, strict=True)
    return " ".join(f"{name}={_text(value)}" for name, value in pairs if name not in without)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(_text, value))
    return str(value).removeprefix("torch.")
