"""Generated subclasses: a swapped module is its own instance with another ``__class__``."""

from __future__ import annotations

import inspect
import linecache
from typing import Any, NamedTuple

from torch import nn

from .source import Source, evaluate

_ATTRIBUTE = "_dlkern_plan"


class SwappedSite(NamedTuple):
    """What a generated class says of one of its sites; ``path`` and ``conv`` are relative to the owner."""

    path: str
    kind: str
    label: str
    conv: str | None = None  # of a convolution and the norm behind it


class Plan(NamedTuple):
    """Everything a generated class is made of besides its base: strings only, so copies are free."""

    source: Source
    sites: tuple[SwappedSite, ...]


_classes: dict[tuple[type, Plan], type] = {}


def generated(base: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """The subclass of ``base`` that runs ``plan``'s forward (one class per base and plan)."""
    cls = _classes.get((base, plan))
    if cls is None:
        cls = _classes[base, plan] = _build(base, plan)
    return cls


def _build(base: type[nn.Module], plan: Plan) -> type[nn.Module]:
    scope = evaluate(plan.source.names)
    scope["_base"], scope["_forward"] = base, base.forward
    for p in inspect.signature(base.forward).parameters.values():
        if p.default is not p.empty:
            scope[f"_d_{p.name}"] = p.default
    filename = f"<dlkern swap of {base.__qualname__} #{len(_classes)}>"
    text = plan.source.text
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)  # for tracebacks
    exec(compile(text, filename, "exec"), scope)
    forward = scope["forward"]
    forward.__doc__, forward.__qualname__ = base.forward.__doc__, base.forward.__qualname__
    forward.__module__ = base.forward.__module__
    forward.__annotations__ = dict(getattr(base.forward, "__annotations__", {}))
    return type(
        base.__name__,
        (base,),
        {
            "forward": forward,
            "__doc__": base.__doc__,
            "__module__": base.__module__,  # fx, pickle and printing see the class they know
            "__qualname__": base.__qualname__,
            "__reduce_ex__": _reduce_ex,
            _ATTRIBUTE: (base, plan),
        },
    )


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    base, plan = plan_of(self)  # type: ignore[misc]
    reduced: Any = super(generated(base, plan), self).__reduce_ex__(max(protocol, 2))
    if is_extended(self):
        return reduced
    _, _, *state = reduced
    return (_rebuild, (base, tuple(map(tuple, (plan.source, plan.sites)))), *state)


def _rebuild(base: type[nn.Module], payload: Any) -> nn.Module:
    (text, names), sites = payload
    plan = Plan(Source(text, tuple(map(tuple, names))), tuple(SwappedSite(*s) for s in sites))
    cls = generated(base, plan)
    return cls.__new__(cls)


def plan_of(module: nn.Module) -> tuple[type[nn.Module], Plan] | None:
    """(base class, plan) of a swapped module, also one whose class was extended since; else None."""
    return getattr(type(module), _ATTRIBUTE, None)


def is_extended(module: nn.Module) -> bool:
    """Whether somebody made a subclass of the generated class (FSDP2 and parametrizations do)."""
    return plan_of(module) is not None and _ATTRIBUTE not in type(module).__dict__
