"""Which implementation of an op runs: the one place that decides.

Order of authority: what the user forced (``dlkern.backend``, then ``DLKERN_BACKEND``), then the
op's default order, of which the first implementation that supports the request is taken.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

BACKENDS = ("torch", "reference", "cpu", "triton", "cuda", "numba")


class Op(NamedTuple):
    """An op's table: where each backend implements it, and which it tries first by default."""

    name: str
    modules: dict[str, str]
    default_order: Callable[[Any], Sequence[str]]


class Choice(NamedTuple):
    """The backend that runs, and why."""

    backend: str
    reason: str


_OPS: dict[str, Op] = {}

#: Forced backends by op name; the key "*" stands for every op that has the backend. A plain global, as
#: torch.backends' flags are: worker threads of the user's see it, and torch.compile guards on it.
_forced: dict[str, str] = {}
_choices: dict[tuple[Any, ...], Choice] = {}


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


def choose(op_name: str, request: Any) -> Choice:
    """The backend that runs this request.

    Raises:
        RuntimeError: a forced backend does not support the request.
    """
    return _choose(op_name, forced(op_name), type(request), *request)


@_constant
def _choose(op_name: str, forced_name: str | None, request_type: type, *fields: Any) -> Choice:
    # Fields, not the request: Dynamo hands a constant function named tuples that it made itself empty.
    key = (op_name, forced_name, fields)
    choice = _choices.get(key)
    if choice is None:
        choice = _choices[key] = _decide(op_name, forced_name, request_type(*fields))
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


def first_supporting(op_name: str, backends: Sequence[str], request: Any) -> str:
    """The first of several backends that is available and supports the request (the last one if none does)."""
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
