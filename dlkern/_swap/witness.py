"""What a forward does besides computing: what it reads, writes and asks while it is traced."""

from __future__ import annotations

import builtins
import contextlib
import inspect
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode

#: What a forward may ask of a tensor that does not depend on its input: metadata, which cannot change silently.
_METADATA = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "__len__", "ndimension"}
#: What every module keeps in its ``__dict__``.
_MODULE_INTERNALS = frozenset(nn.Module().__dict__)
#: The types of constants that a guard can compare.
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
CHANGES_MODE = "changes grad mode, autocast or saved-tensor hooks in its forward"


class Refused(BaseException):
    """A forward that cannot be rewritten, with the reason in words.

    A BaseException, so that an ``except Exception`` in the traced forward does not swallow it. It
    never leaves this package.
    """


class NoUnwitnessedCalls(TorchFunctionMode):
    """Refuses torch functions that see none of the forward's inputs: their result would be frozen in."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _has_proxy(args) and not _has_proxy(kwargs):
            name = getattr(func, "__name__", str(func))
            if name == "_set_grad_enabled":
                raise Refused(CHANGES_MODE)
            if name not in _METADATA:
                raise Refused(f"calls {name} on none of its inputs")
        return func(*args, **(kwargs or {}))


def _has_proxy(value: Any) -> bool:
    if issubclass(type(value), fx.Proxy):
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


# ------------------------------------------------------------------------------- what it writes
def _forward_of(m: nn.Module) -> FunctionType | None:
    function = inspect.unwrap(type(m).forward)
    return function if isinstance(function, FunctionType) else None


def plain_globals(function: FunctionType) -> dict[str, Any]:
    """The constants that a function reads from its module."""
    return {
        name: function.__globals__[name]
        for name in function.__code__.co_names
        if type(function.__globals__.get(name, ...)) in PLAIN
    }


def _reachable(value: Any, found: list[tuple[Any, Any]], depth: int = 0) -> None:
    """Collect the containers and plain objects that can be reached from a value, each with a copy of its contents."""
    if depth > 4 or len(found) > 2000:
        return
    kind = type(value)
    if isinstance(value, (dict, list, set)):
        found.append((value, value.copy()))
        for inner in list(value.values()) if isinstance(value, dict) else list(value):
            _reachable(inner, found, depth + 1)
    elif kind is tuple:
        for inner in value:
            _reachable(inner, found, depth + 1)
    elif (
        not isinstance(value, (nn.Module, torch.Tensor, ModuleType, type))
        and not callable(value)
        and not kind.__module__.startswith(("torch", "builtins", "typing"))
        and type(getattr(value, "__dict__", None)) is dict
    ):
        found.append((value.__dict__, value.__dict__.copy()))
        for inner in list(value.__dict__.values()):
            _reachable(inner, found, depth + 1)


def _same_contents(value: Any, copy: Any) -> bool:
    if isinstance(value, dict):
        return len(value) == len(copy) and all(k in copy and copy[k] is v for k, v in value.items())
    if isinstance(value, list):
        return len(value) == len(copy) and all(a is b for a, b in zip(value, copy, strict=True))
    return value == copy


def _put_back(value: Any, copy: Any) -> bool:
    """Give a container its former contents; True where they had changed."""
    if _same_contents(value, copy):
        return False
    value.clear()
    value.extend(copy) if isinstance(value, list) else value.update(copy)
    return True


class Untouched:
    """Puts modules, what their forwards reach, and random generators back as they were; tells what had changed.

    After the block, ``dirty`` lists the modules that wrote their own attributes or what their forward
    reaches from there or from its globals and defaults; ``drew_random_numbers`` says whether a generator
    of Python's, PyTorch's or NumPy's moved.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = list(root.modules())
        self.dirty: list[nn.Module] = []
        self.drew_random_numbers = False

    def __enter__(self) -> Untouched:
        self._own = [dict(m.__dict__) for m in self._modules]
        self._contents: list[list[tuple[Any, Any]]] = []
        for m in self._modules:
            found: list[tuple[Any, Any]] = []
            for value in m.__dict__.values():
                _reachable(value, found)
            self._contents.append(found)
        self._globals: dict[FunctionType, tuple[dict[str, Any], list[tuple[Any, Any]]]] = {}
        for m in self._modules:
            function = _forward_of(m)
            if function is not None and function not in self._globals and not _is_torchs(function):
                found = []
                names = function.__code__.co_names
                for value in [function.__globals__[n] for n in names if n in function.__globals__]:
                    if isinstance(value, (dict, list, set)):
                        _reachable(value, found)
                for value in (function.__defaults__ or ()) + tuple((function.__kwdefaults__ or {}).values()):
                    _reachable(value, found)
                for cell in function.__closure__ or ():
                    with contextlib.suppress(ValueError):  # an empty cell
                        _reachable(cell.cell_contents, found)
                self._globals[function] = (plain_globals(function), found)
        numpy = sys.modules.get("numpy")
        self._random = (random.getstate(), torch.get_rng_state(), numpy and numpy.random.get_state(legacy=False))
        return self

    def __exit__(self, *_: object) -> None:
        unclean = set()
        for function, (constants, found) in self._globals.items():
            changed = [k for k, v in constants.items() if function.__globals__.get(k) is not v]
            for name in changed:
                function.__globals__[name] = constants[name]
            written = [_put_back(*pair) for pair in found]
            if changed or any(written):
                unclean.add(function)
        for m, own, found in zip(self._modules, self._own, self._contents, strict=True):
            changed_own = not _same_contents(m.__dict__, own)
            if changed_own:
                for key in [k for k in m.__dict__ if k not in own]:
                    del m.__dict__[key]
                m.__dict__.update(own)
            written = [_put_back(*pair) for pair in found]
            if changed_own or any(written) or _forward_of(m) in unclean:
                self.dirty.append(m)
        python, pytorch, numpy_state = self._random
        moved = random.getstate() != python or not torch.equal(torch.get_rng_state(), pytorch)
        random.setstate(python)
        torch.set_rng_state(pytorch)
        if numpy_state is not None:
            numpy = sys.modules["numpy"]
            moved = moved or repr(numpy.random.get_state(legacy=False)) != repr(numpy_state)
            numpy.random.set_state(numpy_state)
        self.drew_random_numbers = moved


def _is_torchs(function: FunctionType) -> bool:
    return str(function.__globals__.get("__name__", "")).startswith("torch.")


# -------------------------------------------------------------------------------- what it reads
@dataclass
class Reads:
    """What user code read of the traced modules, by (path, name); all of it becomes guards."""

    values: dict[tuple[str, str], Any] = field(default_factory=dict)  # instance attributes
    registered: dict[tuple[str, str], tuple[str, bool]] = field(default_factory=dict)  # (table, is None)
    of_class: dict[str, set[str]] = field(default_factory=dict)  # names found on the class: no instance overrides them
    absent: set[tuple[str, str]] = field(default_factory=set)


def _reader(frame: FrameType | None) -> tuple[str, bool]:
    """The module whose code reads, and whether it reads through a method of nn.Module's (children, parameters)."""
    name, through = "", False
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != "torch.nn.modules.module":
            break
        frame, through = frame.f_back, True
    return name, through


@contextlib.contextmanager
def recorded_reads(paths: dict[int, str], reads: Reads, inlined: set[str]) -> Iterator[None]:
    """Record which attributes of the traced modules user code reads, and whose forward it calls directly."""
    thread = threading.get_ident()

    def __getattribute__(self: nn.Module, name: str) -> Any:
        if id(self) in paths and threading.get_ident() == thread and (not name.startswith("__") or name == "__dict__"):
            reader, through = _reader(sys._getframe(1))
            if not reader.startswith(("torch.fx.", "dlkern.")):
                if not through or name == "_modules":
                    record(self, name)
                elif name in ("_parameters", "_buffers"):
                    raise Refused("asks for its parameters or buffers")
        return object.__getattribute__(self, name)

    def record(m: nn.Module, name: str) -> None:
        path, own = paths[id(m)], object.__getattribute__(m, "__dict__")
        tables = [t for t in ("_modules", "_parameters", "_buffers") if name in own.get(t, ())]
        if name == "__dict__":
            raise Refused("reads its __dict__")
        if name == "forward":
            inlined.add(path)  # called directly, round __call__ and its hooks
        elif name == "_modules":
            reads.values[path, "_modules"] = tuple(own["_modules"])
        elif name in own:
            if name not in _MODULE_INTERNALS or (name == "training" and path):
                reads.values[path, name] = own[name]
        elif tables:
            reads.registered[path, name] = (tables[0], own[tables[0]][name] is None)
        elif hasattr(type(m), name):
            value = inspect.getattr_static(type(m), name)
            if not (callable(value) or type(value) in PLAIN or hasattr(type(value), "__get__")):
                raise Refused(f"reads its class's attribute {name}, a {type(value).__name__}")
            reads.of_class.setdefault(path, set()).add(name)
        else:
            reads.absent.add((path, name))

    nn.Module.__getattribute__ = __getattribute__  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__


# --------------------------------------------------------------------------------- what it asks
def _of_user(frame: FrameType) -> bool:
    return not str(frame.f_globals.get("__name__", "")).startswith(("torch.", "dlkern."))


@contextlib.contextmanager
def strict(proxies: tuple[type, ...]) -> Iterator[None]:
    """While a forward is traced: refuse what a proxy cannot witness, in this thread only.

    Queries and changes of global modes, custom autograd Functions (their backward would be lost), and
    ``isinstance`` of an intermediate that is not surely a tensor.
    """
    thread = threading.get_ident()
    undo: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = inspect.getattr_static(owner, name)
        undo.append((owner, name, original))
        setattr(owner, name, make(original))

    def refuses(reason: str, always: bool = True) -> Callable[[Any], Any]:
        def make(original: Any) -> Any:
            def refusing(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() == thread and (always or _of_user(sys._getframe(1))):
                    raise Refused(reason)
                return original(*args, **kwargs)

            return refusing

        return make

    def make_apply(original: Any) -> Any:
        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                raise Refused(f"calls the autograd Function {cls.__name__}")
            return original.__get__(None, cls)(*args, **kwargs)

        return classmethod(apply)

    def make_isinstance(original: Any) -> Any:
        def isinstance(value: Any, classes: Any) -> bool:
            if type(value) in proxies and threading.get_ident() == thread and _of_user(sys._getframe(1)):
                if not value.node.meta.get("tensor"):
                    raise Refused("tests the type of an intermediate value with isinstance")
                return issubclass(torch.Tensor, classes)
            return original(value, classes)

        return isinstance

    try:
        for name in ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"):
            patch(torch, name, refuses(f"asks torch.{name}()", always=False))
        patch(torch.compiler, "is_compiling", refuses("asks torch.compiler.is_compiling()", always=False))
        patch(torch.amp.autocast_mode.autocast, "__enter__", refuses(CHANGES_MODE))
        patch(torch.autograd.grad_mode.inference_mode, "__enter__", refuses(CHANGES_MODE))
        patch(torch.autograd.Function, "apply", make_apply)
        patch(builtins, "isinstance", make_isinstance)
        yield
    finally:
        for owner, name, original in reversed(undo):
            setattr(owner, name, original)


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module's ``training`` flag set, without calling anybody's ``train()``, and put back."""
    before = [(m, m.training) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
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
        or overrides_call(m)
        or _has_any_global_hook()
    )


def overrides_call(m: nn.Module) -> bool:
    """Whether a class between this module's and nn.Module has a ``__call__`` of its own."""
    return any("__call__" in cls.__dict__ for cls in type(m).__mro__ if cls not in (nn.Module, object))
