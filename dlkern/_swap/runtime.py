"""What generated forwards call while they run: guards, counters, the reaction to a miss."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dlkern.functional.dtypes import DTYPES, HALF_DTYPES
from dlkern.ops import library

#: A plain global, as dispatch's forced backends are: threads of the user's see it.
_fallback_forbidden = False


@contextlib.contextmanager
def no_fallback() -> Iterator[None]:
    """Inside this block a swapped site that would run the stock modules raises RuntimeError with the reason."""
    global _fallback_forbidden
    before, _fallback_forbidden = _fallback_forbidden, True
    try:
        yield
    finally:
        _fallback_forbidden = before


@dataclass
class Calls:
    """How often rewritten sites ran fused, and how often a guard sent them to the stock modules."""

    fused: int = 0
    fallback: int = 0

    def __add__(self, other: Calls) -> Calls:
        return Calls(self.fused + other.fused, self.fallback + other.fallback)


# Keyed by id, since a module may define __eq__; nothing is written to an instance's __dict__.
_COUNTS: dict[int, Calls] = {}


def calls(module: nn.Module) -> Calls | None:
    """The counter of one swapped module; None while torch.compile traces (a graph does not count)."""
    if torch.compiler.is_compiling():
        return None
    counter = _COUNTS.get(id(module))
    if counter is None:
        counter = _COUNTS[id(module)] = Calls()
        weakref.finalize(module, _COUNTS.pop, id(module), None)
    return counter


def reset(module: nn.Module) -> None:
    """Start a module's counter at zero."""
    counter = _COUNTS.get(id(module))
    if counter is not None:
        counter.fused = counter.fallback = 0


def restore(module: nn.Module, counter: Calls) -> None:
    """Give a module's counter former values."""
    _COUNTS[id(module)].fused, _COUNTS[id(module)].fallback = counter.fused, counter.fallback


def unhooked(module: Any) -> bool:
    """Whether bypassing this module's call skips nothing: no hooks, no forward of its own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def watched(x: Any) -> bool:
    """Whether something looks at a call on x that would not see through a fused op: a transform, torch.jit.trace."""
    if library.transformed():
        return True
    return not torch.compiler.is_compiling() and (torch._C._get_tracing_state() is not None or x.is_neg())


def agree(x: Tensor, parameter: Tensor | None) -> bool:
    """Whether a batch norm's parameter, if any, is on x's device and of a dtype that may stand beside x's."""
    if parameter is None:
        return True
    dtype, data = parameter.dtype, x.dtype
    return (
        parameter.device == x.device
        and data in DTYPES
        and (dtype == data or (dtype == torch.float32 and data in HALF_DTYPES))
    )


def swapped_from(module: Any, base: type[nn.Module]) -> bool:
    """Whether a module's class is one that a swap generated from ``base``."""
    return type(module).__dict__.get("_dlkern_plan", (None,))[0] is base


def missed(module: nn.Module, counter: Calls | None, sites: int, why: Callable[[], str]) -> None:
    """Count sites that run stock modules, or raise where that is forbidden."""
    if counter is not None:
        counter.fallback += sites
    if _fallback_forbidden:
        raise RuntimeError(f"dlkern.no_fallback: {type(module).__name__} runs its stock forward: {why()}")


def structured(value: Any, kind: Any, path: str) -> Any:
    """The result of a module whose result the rewritten forward takes apart: of the kind it was traced with."""
    if not _is_kind(value, kind):
        raise RuntimeError(
            f"dlkern: {path} no longer returns what it returned when the forward around it was swapped; swap the "
            "model again"
        )
    return value


def _is_kind(value: Any, kind: Any) -> bool:
    if kind == "tensor":
        return isinstance(value, Tensor)
    if not isinstance(kind, tuple):
        return True
    tag, inner = kind
    if tag == "const":
        return type(value) is type(inner) and value == inner
    same = type(value) is {"list": list, "tuple": tuple}[tag] and len(value) == len(inner)
    return same and all(map(_is_kind, value, inner))


def tensor(value: Any, path: str) -> Any:
    """The result of a module that could not be traced, which the rewritten forward takes for a tensor."""
    if not isinstance(value, Tensor):
        raise RuntimeError(
            f"dlkern: {path} returned a {type(value).__name__} where the swapped forward around it expects a tensor; "
            "leave its owner out with dlkern.swap(..., filter_fn=...)"
        )
    return value
