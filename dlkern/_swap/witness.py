"""What a forward does besides computing: what it reads, writes and asks while it is traced."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode

#: What a forward may ask of a tensor that does not depend on its input: metadata, which cannot change silently.
_METADATA = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "__len__", "ndimension"}
#: What every module keeps in its ``__dict__``; ``training`` is guarded on its own.
_MODULE_INTERNALS = frozenset(nn.Module().__dict__)


class Refused(Exception):
    """A forward that cannot be rewritten, with the reason in words."""


class NoUnwitnessedCalls(TorchFunctionMode):
    """Refuses torch functions that see none of the forward's inputs: their result would be frozen in."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _has_proxy(args) and not _has_proxy(kwargs):
            name = getattr(func, "__name__", str(func))
            if name not in _METADATA and name != "_set_grad_enabled":  # create_node sees what that does
                raise Refused(f"calls {name} on none of its inputs")
        return func(*args, **(kwargs or {}))


def _has_proxy(value: Any) -> bool:
    if isinstance(value, fx.Proxy):
        return True
    if isinstance(value, (list, tuple)):
        return any(map(_has_proxy, value))
    if isinstance(value, dict):
        return any(map(_has_proxy, value.values()))
    return False


def modes() -> tuple[Any, ...]:
    """What a region of a forward could change for the ops in it."""
    saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda"),
        torch.is_autocast_enabled("cpu"),
        saved_tensors_hooks is None,
    )


def _snapshot(m: nn.Module) -> dict[str, tuple[Any, Any]]:
    return {k: (v, _shallow(v)) for k, v in m.__dict__.items()}


def _shallow(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else None


def _same_contents(value: Any, copy: Any) -> bool:
    if isinstance(value, dict):
        return len(value) == len(copy) and all(k in copy and copy[k] is v for k, v in value.items())
    if isinstance(value, list):
        return len(value) == len(copy) and all(a is b for a, b in zip(value, copy, strict=True))
    return value == copy if isinstance(value, set) else True


def _restore(m: nn.Module, before: dict[str, tuple[Any, Any]]) -> bool:
    """Put a module's attributes back as they were; True where one had been written."""
    now = m.__dict__
    changed = False
    for key in [k for k in now if k not in before]:
        del now[key]
        changed = True
    for key, (value, copy) in before.items():
        if key not in now or now[key] is not value:
            now[key] = value
            changed = True
        if copy is not None and not _same_contents(value, copy):
            changed = True
            value.clear()
            value.extend(copy) if isinstance(value, list) else value.update(copy)
    return changed


class Untouched:
    """Puts modules and random generators back as they were, and tells what had changed.

    After the block, ``dirty`` lists the modules that wrote their own attributes, and
    ``drew_random_numbers`` says whether Python's or PyTorch's generator moved.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = list(root.modules())
        self.dirty: list[nn.Module] = []
        self.drew_random_numbers = False

    def __enter__(self) -> Untouched:
        self._before = [_snapshot(m) for m in self._modules]
        self._random = (random.getstate(), torch.get_rng_state())
        return self

    def __exit__(self, *_: object) -> None:
        self.dirty = [m for m, before in zip(self._modules, self._before, strict=True) if _restore(m, before)]
        python, pytorch = self._random
        self.drew_random_numbers = random.getstate() != python or not torch.equal(torch.get_rng_state(), pytorch)
        random.setstate(python)
        torch.set_rng_state(pytorch)


@contextlib.contextmanager
def recorded_reads(paths: dict[int, str], reads: dict[tuple[str, str], Any], inlined: set[str]) -> Iterator[None]:
    """Record which instance attributes of the traced modules user code reads, and whose forward it calls directly."""
    thread = threading.get_ident()

    def __getattribute__(self: nn.Module, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("__") or id(self) not in paths or threading.get_ident() != thread:
            return value
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith(("torch.fx.", "dlkern.")) or caller == "torch.nn.modules.module":
            return value
        path = paths[id(self)]
        if name == "forward":
            inlined.add(path)  # called directly, round __call__ and its hooks
        elif name == "_modules":
            reads[path, "_modules"] = tuple(value)
        elif name not in _MODULE_INTERNALS and name in object.__getattribute__(self, "__dict__"):
            reads[path, name] = value
        return value

    nn.Module.__getattribute__ = __getattribute__  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__


@contextlib.contextmanager
def unreadable_modes() -> Iterator[None]:
    """A forward that branches on a global mode would have that branch frozen in: refuse."""
    names = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled")
    originals = {name: getattr(torch, name) for name in names}
    thread = threading.get_ident()

    def guarded(name: str) -> Callable[..., Any]:
        def query(*args: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if threading.get_ident() == thread and not caller.startswith(("torch.", "dlkern.")):
                raise Refused(f"asks torch.{name}()")
            return originals[name](*args)

        return query

    for name in names:
        setattr(torch, name, guarded(name))
    try:
        yield
    finally:
        for name in names:
            setattr(torch, name, originals[name])


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module's ``training`` flag set, without calling anybody's ``train()``, and put back."""
    before = [(m, m.training) for m in model.modules()]
    for m, _ in before:
        m.__dict__["training"] = training
    try:
        yield
    finally:
        for m, was in before:
            m.__dict__["training"] = was


def has_hooks(m: nn.Module) -> bool:
    """Whether calling this module runs more than its class's forward."""
    return bool(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
        or _has_any_global_hook()
    )
