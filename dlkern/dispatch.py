"""Which implementation of an op runs: the one place that decides.

Order of authority: what the user forced (``dlkern.backend``, then ``DLKERN_BACKEND``), then the
op's default order, of which the first implementation that supports the request is taken. Between the two stand
measured answers, where some are loaded (``dlkern.swap(..., policy="measured")``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch

from .tuning import answers

BACKENDS = ("torch", "reference", "cpu", "triton", "cuda", "numba")


class Op(NamedTuple):
    """An op's table: where each backend implements it, and which it tries first by default.

    ``sizes`` names fields of the request that say no more than the sizes given to ``choose``: a measured answer holds
    for near values of them, too.
    """

    name: str
    modules: dict[str, str]
    default_order: Callable[[Any], Sequence[str]]
    sizes: tuple[str, ...] = ()


class Choice(NamedTuple):
    """The backend that runs, why, and whether a measurement says so."""

    backend: str
    reason: str
    measured: bool = False


_OPS: dict[str, Op] = {}

#: Forced backends by op name; the key "*" stands for every op that has the backend. A plain global, as
#: torch.backends' flags are: worker threads of the user's see it, and torch.compile guards on it.
_forced: dict[str, str] = {}
_choices: dict[tuple[Any, ...], Choice] = {}
_PLAIN = frozenset((int, bool, type(None)))  # sizes that are no tensors
_is_grad_enabled = torch.is_grad_enabled
_F = TypeVar("_F", bound=Callable[..., Any])


def register(op: Op) -> Op:
    """Add an op's table (done by each module of dlkern.ops when it is imported)."""
    _OPS[op.name] = op
    return op


def _all_ops() -> dict[str, Op]:
    importlib.import_module("dlkern.ops")
    return _OPS


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.compile call a function while it traces and take the answer as a constant.

    For what imports modules or reads a cache; everything that may change between two calls is an
    argument (of plain values), and guarded. The same as torch.compiler.assume_constant_result, without its import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# ------------------------------------------------------------------------------- availability
@functools.cache
def unavailable(backend: str) -> str | None:
    """None where the backend can run on this machine, else the reason in words."""
    if backend in ("torch", "reference"):
        return None
    if not any(backend in op.modules for op in _all_ops().values()):
        return f"no op of this version has a {backend} implementation"
    module = importlib.import_module(f"dlkern.kernels.{backend}")
    return module.unavailable()


def available_backends() -> dict[str, str | None]:
    """Every backend's name, with None where it can run here, else the reason it cannot."""
    return {name: unavailable(name) for name in BACKENDS}


# ------------------------------------------------------------------------------------- forcing
@contextlib.contextmanager
def backend(name: str | None = None, /, **per_op: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block, for all threads of this process.

    ``backend("triton")`` forces every op that has a triton implementation;
    ``backend(batch_norm_act="cpu")`` forces one op. A forced backend that does not support a
    request raises RuntimeError at the call, with the reason: it never falls back.

    Raises:
        ValueError: an unknown backend or op, or an op that has no such implementation.
        RuntimeError: a backend that is not available on this machine.
    """
    if name is None and not per_op:
        raise ValueError("backend() needs a backend's name or op=backend pairs")
    wanted = {**({} if name is None else {"*": name}), **per_op}
    _validate(wanted)
    global _forced
    outer = _forced
    _forced = {**(outer if name is None else {}), **wanted}  # the innermost block wins
    try:
        yield
    finally:
        _forced = outer


def _validate(wanted: dict[str, str]) -> None:
    ops = _all_ops()
    for op_name, backend_name in wanted.items():
        if backend_name not in BACKENDS:
            raise ValueError(f"unknown backend {backend_name!r}; expected one of {', '.join(BACKENDS)}")
        if op_name != "*":
            if op_name not in ops:
                raise ValueError(f"unknown op {op_name!r}; expected one of {', '.join(sorted(ops))}")
            if backend_name not in ops[op_name].modules:
                has = ", ".join(ops[op_name].modules)
                raise ValueError(f"{op_name} has no {backend_name!r} implementation; it has {has}")
        reason = unavailable(backend_name)
        if reason is not None:
            raise RuntimeError(f"backend {backend_name!r} is not available: {reason}")


@functools.cache
def _environment(value: str) -> dict[str, str]:
    """DLKERN_BACKEND: a backend's name, or op=backend pairs, separated by commas."""
    wanted = {}
    for part in filter(None, (p.strip() for p in value.split(","))):
        op_name, sep, backend_name = part.partition("=")
        wanted[op_name.strip() if sep else "*"] = backend_name.strip() if sep else part
    try:
        _validate(wanted)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"DLKERN_BACKEND={value!r}: {error}") from None
    return wanted


def forced(op_name: str) -> str | None:
    """The backend that is forced for this op here and now, if any."""
    if _forced:
        name = _named(_forced, op_name)
        if name is not None:
            return name
    value = os.environ.get("DLKERN_BACKEND")
    return _forced_outside(value, op_name) if value else None


def _reader(name: str) -> Callable[[], object]:
    """Whether an environment variable is set, without os.environ's work on the name at each call (0.6 us)."""
    data, encode = getattr(os.environ, "_data", None), getattr(os.environ, "encodekey", None)
    if not isinstance(data, dict) or encode is None:
        return lambda: os.environ.get(name)
    key, get = encode(name), data.get
    return lambda: get(key)


_set_outside = _reader("DLKERN_BACKEND")


@_constant
def _forced_outside(value: str, op_name: str) -> str | None:
    return _named(_environment(value), op_name)


def _named(wanted: dict[str, str], op_name: str) -> str | None:
    if op_name in wanted:
        return wanted[op_name]
    everywhere = wanted.get("*")
    return everywhere if everywhere in _OPS[op_name].modules else None


# ------------------------------------------------------------------------------------ choosing
@functools.cache
def implementation(op_name: str, backend_name: str) -> ModuleType:
    """The module that implements an op on a backend."""
    return importlib.import_module(_OPS[op_name].modules[backend_name])


def entry(function: _F) -> _F:
    """Decorate the function through which every call of an op goes, so that a measured swap can note the call."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if answers.recorder is not None:
            return answers.recorder(function, args, kwargs)
        return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def recording() -> bool:
    """Whether calls are noted now: a site then takes its call even where PyTorch would run it."""
    return answers.recorder is not None


def weighs() -> bool:
    """Whether measured answers are loaded, or calls noted, so that ``choose`` may differ from the default order."""
    return answers.epoch != 0


def choose(op_name: str, request: Any, *sizes: Any) -> Choice:
    """The backend that runs this request.

    ``sizes`` are the tensors (and further numbers) whose sizes the time depends on; None stands for an absent one.
    Of a tensor its shape counts, and whether its gradient is wanted.

    Raises:
        RuntimeError: a forced backend does not support the request.
    """
    if torch.compiler.is_compiling():  # sizes may be symbols
        if answers.epoch:
            return _weighed(answers.epoch, op_name, forced(op_name), (), type(request), *request)
        return _choose(op_name, forced(op_name), type(request), *request)
    forced_name = forced(op_name) if _forced or _set_outside() else None
    if not answers.epoch:
        choice = _choices.get((op_name, forced_name, request))  # a named tuple equals its fields
        return _choose(op_name, forced_name, type(request), *request) if choice is None else choice
    parts: list[Any] = [op_name, forced_name, request, _is_grad_enabled()]
    for v in sizes:
        if type(v) in _PLAIN:
            parts.append(v)
        else:
            parts += (v.shape, v.requires_grad)
    key = tuple(parts)
    choice = answers.choices.get(key)
    if choice is None:
        choice = _weighed(answers.epoch, op_name, forced_name, _shape(sizes), type(request), *request)
        answers.choices[key] = choice
    return choice


@_constant
def _choose(op_name: str, forced_name: str | None, request_type: type, *fields: Any) -> Choice:
    # Fields, not the request: Dynamo hands a constant function named tuples that it made itself empty.
    key = (op_name, forced_name, fields)
    choice = _choices.get(key)
    if choice is None:
        choice = _choices[key] = _decide(op_name, forced_name, request_type(*fields))
        _log(op_name, choice, request_type(*fields), ())
    return choice


def _decide(op_name: str, forced_name: str | None, request: Any) -> Choice:
    op = _OPS[op_name]
    if forced_name is not None:
        reason = _unsupported(op, forced_name, request)
        if reason is not None:
            raise RuntimeError(f"backend {forced_name!r} was forced for {op_name} but cannot run it: {reason}")
        return Choice(forced_name, "forced")
    reasons: list[str] = []
    for name in op.default_order(request):
        reason = _unsupported(op, name, request)
        if reason is None:
            return Choice(name, "; ".join([*reasons, "default"]))
        reasons.append(f"not {name}: {reason}")
    raise AssertionError(f"the default order of {op_name} ends without an implementation")  # "torch" runs all


# ------------------------------------------------------------------------------------ measured
def _shape(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """The sizes as plain numbers: of a tensor its shape, and 1 where its gradient is wanted; -1 for None."""
    found: list[int] = []
    grad = torch.is_grad_enabled()
    for value in sizes:
        if type(value) in _PLAIN:
            found.append(-1 if value is None else int(value))
        else:
            found += value.shape
            found.append(int(grad and value.requires_grad))
    return tuple(found)


@_constant
def _weighed(
    epoch: int, op_name: str, forced_name: str | None, shape: tuple[int, ...], request_type: type, *fields: Any
) -> Choice:
    del epoch  # torch.compile guards on it
    request = request_type(*fields)
    choice = _weigh(op_name, forced_name, shape, request)
    if choice.measured:
        _log(op_name, choice, request, shape)
    return choice


def _weigh(op_name: str, forced_name: str | None, shape: tuple[int, ...], request: Any) -> Choice:
    if forced_name is None:
        op = _OPS[op_name]
        key = answers.Key(op_name, answers.in_words(request, op.sizes), shape)
        if answers.trial is not None:
            return Choice(answers.trial.backend(key, request), "tried")
        found = answers.near(key)
        if found is not None and _unsupported(op, found[0].backend, request) is None:
            where = "on this shape" if found[1] == key.shape else "on a near shape"
            return Choice(found[0].backend, f"{found[0].in_words()} {where}", True)
    return _choose(op_name, forced_name, type(request), *request)


# ------------------------------------------------------------------------------------- the log
@functools.cache
def _logger() -> logging.Logger | None:
    """The logger "dlkern", writing to stderr, where DLKERN_LOG asks for it."""
    if os.environ.get("DLKERN_LOG", "0") in ("", "0"):
        return None
    logger = logging.getLogger("dlkern")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("dlkern: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return logger


def _log(op_name: str, choice: Choice, request: Any, shape: tuple[int, ...]) -> None:
    """One line for a decision; decisions are remembered, so each is logged once."""
    logger = _logger()
    if logger is not None:
        at = f" sizes={'x'.join(str(int(n)) for n in shape)}" if shape else ""
        logger.info("%s -> %s (%s): %s%s", op_name, choice.backend, choice.reason, answers.in_words(request), at)


def operation(op_name: str) -> Op:
    """An op's table."""
    return _all_ops()[op_name]


def operations() -> tuple[str, ...]:
    """Every op's name."""
    return tuple(_all_ops())


def unsupported(op_name: str, backend_name: str, request: Any) -> str | None:
    """None where a backend is available and runs this request, else the reason."""
    return _unsupported(_OPS[op_name], backend_name, request)


def first_supporting(op_name: str, backends: Sequence[str], request: Any) -> str:
    """The first of several backends that is available and supports the request (the last one if none does)."""
    return _first_supporting(op_name, tuple(backends), type(request), *request)


@_constant
def _first_supporting(op_name: str, backends: tuple[str, ...], request_type: type, *fields: Any) -> str:
    request = request_type(*fields)
    for name in backends:
        if _unsupported(_OPS[op_name], name, request) is None:
            return name
    return backends[-1]


def _unsupported(op: Op, backend_name: str, request: Any) -> str | None:
    if backend_name == "torch":
        return None
    reason = unavailable(backend_name)
    if reason is not None:
        return reason
    return implementation(op.name, backend_name).supports(request)
