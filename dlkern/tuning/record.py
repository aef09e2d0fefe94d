"""What one pass of a model asked of the ops: every call of an op's entry, to be made again on random tensors."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import answers

#: Values of integer and boolean tensors (masks, lengths) are kept; so are those of float tensors of one dimension
#: (a variance must stay positive). Of others only the form is.
_KEPT_DIMENSIONS = 1
#: Integer tensors up to this size tell two calls apart by their values.
_TOLD_APART = 4096


class Form(NamedTuple):
    """A tensor without its values; ``offset`` is the storage offset modulo 64 elements (for alignment)."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    told: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) or "scalar"


class Modes(NamedTuple):
    """What a call runs under."""

    grad: bool
    autocast: tuple[tuple[str, torch.dtype], ...]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The same modes again, on any thread."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for device in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device, enabled=False))
            for device, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype))
            yield


@dataclass
class Call:
    """One call of an op's entry. ``tensors`` are the ids of its tensor arguments (held in ``Recording.held``)."""

    function: Callable[..., Any]
    leaves: list[Any]  # Forms in the tensors' places
    values: dict[int, Tensor]  # of leaves whose values are kept
    sizes: dict[int, float]  # root mean square of the other tensors
    spec: Any
    modes: Modes
    tensors: frozenset[int]
    owner: nn.Module | None
    parent: int | None
    key: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """The op's name, from the module that has its entry."""
        family = self.leaves[0]
        own = self.function.__module__.rpartition(".")[2]
        return family if own == "recurrent_layers" and isinstance(family, str) else own

    @property
    def where(self) -> str:
        """The sizes of the first tensor, for people."""
        return next((str(leaf) for leaf in self.leaves if isinstance(leaf, Form)), "")

    def make(self, seed: int = 0) -> list[Any]:
        """Arguments of the same form, leaf by leaf: random floats as large as the call's own, and the kept values.

        Of another size they could be another problem: with large weights a recurrent layer's gates saturate, and what
        is left of a gradient is rounding.
        """
        found: list[Any] = []
        generators: dict[torch.device, torch.Generator] = {}
        for index, leaf in enumerate(self.leaves):
            if not isinstance(leaf, Form):
                found.append(leaf)
                continue
            generator = generators.setdefault(leaf.device, torch.Generator(leaf.device).manual_seed(seed))
            found.append(_made(leaf, self.values.get(index), self.sizes.get(index, 1.0), generator))
        return found

    def arguments(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of leaves."""
        return pytree.tree_unflatten(leaves, self.spec)


def _made(form: Form, values: Tensor | None, size: float, generator: torch.Generator) -> Tensor:
    span = form.offset + 1 + sum((n - 1) * s for n, s in zip(form.shape, form.stride, strict=True))
    if 0 in form.shape:
        span = form.offset
    if values is None:
        wide = form.dtype if form.dtype in (torch.float32, torch.float64) else torch.float32
        storage = torch.randn(span, generator=generator, device=form.device, dtype=wide).mul_(size).to(form.dtype)
    else:
        storage = torch.zeros(span, device=form.device, dtype=form.dtype)
    made = storage.as_strided(form.shape, form.stride, form.offset)
    if values is not None and 0 in form.stride:  # expanded: written to it would be an error
        made = values.clone()
    elif values is not None:
        made.copy_(values)
    return made.requires_grad_(form.requires_grad)


class Recording:
    """The calls of one pass, inner ones before the outer one that made them."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.held: list[Any] = []  # so that an id stays that tensor's
        self._local = threading.local()

    def __call__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an entry and note the call."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return function(*args, **kwargs)
        call = self._noted(function, args, kwargs)
        depth = getattr(self._local, "open", [])
        self._local.open = [*depth, call]
        first = len(self.calls)
        try:
            result = function(*args, **kwargs)
        finally:
            self._local.open = depth
        if call is not None:  # after the inner ones
            self.calls.append(call)
            for index in range(first, len(self.calls) - 1):
                if self.calls[index].parent is None:
                    self.calls[index].parent = len(self.calls) - 1
        return result

    def _noted(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        forms: list[Any] = []
        values: dict[int, Tensor] = {}
        sizes: dict[int, float] = {}
        ids = []
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                forms.append(leaf)
                continue
            if type(leaf) not in (Tensor, nn.Parameter) or leaf.layout != torch.strided:
                return None  # a subclass: what it does cannot be made again
            ids.append(id(leaf))
            self.held.append(leaf)
            kept = not leaf.is_floating_point()
            told: tuple[Any, ...] = ()
            if kept or leaf.dim() <= _KEPT_DIMENSIONS:
                values[index] = leaf.detach().clone()
                if kept and leaf.numel() <= _TOLD_APART:
                    told = tuple(leaf.flatten().tolist())
            else:
                sizes[index] = _size(leaf.detach())
            forms.append(
                Form(
                    tuple(leaf.shape),
                    leaf.stride(),
                    int(leaf.storage_offset()) % 64,
                    leaf.dtype,
                    leaf.device,
                    leaf.requires_grad,
                    told,
                )
            )
        modes = Modes(
            torch.is_grad_enabled(),
            tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)),
        )
        call = Call(function, forms, values, sizes, spec, modes, frozenset(ids), _running_owner(), None)
        call.key = (function, modes, str(spec), *(_hashable(leaf) for leaf in forms))
        return call


def _size(t: Tensor) -> float:
    """Root mean square; 1 where that says nothing."""
    found = float(torch.linalg.vector_norm(t.float())) / max(t.numel(), 1) ** 0.5
    return found if 0 < found < float("inf") else 1.0


def _hashable(leaf: Any) -> Any:
    if isinstance(leaf, FunctionType):  # a closure made for this call: the same code does the same
        return leaf.__qualname__
    try:
        hash(leaf)
    except TypeError:
        return repr(leaf)
    return leaf


def _running_owner() -> nn.Module | None:
    """The module whose generated forward is on the stack, the innermost one."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<dlkern swap of "):
            found = frame.f_locals.get("self")
            return found if isinstance(found, nn.Module) else None
        frame = frame.f_back  # type: ignore[assignment]
    return None


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Note every call of an op's entry inside of the block, in all threads."""
    found = Recording()
    before = answers.record_with(found)
    try:
        yield found
    finally:
        answers.record_with(before)
