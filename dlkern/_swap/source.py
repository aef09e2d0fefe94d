"""Generated source, and what the names in it stand for: importable names and literals, as strings.

So a class that is made of them can be copied, pickled and rebuilt in a fresh process.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from dlkern.kernels.activation import Activation

from .witness import Refused


class Source(NamedTuple):
    """A generated forward: its text and what the names in it stand for (all strings)."""

    text: str
    names: tuple[tuple[str, str, str], ...]  # (name, module, qualified name), or (name, "", literal)


class Names:
    """Gives every function, class and constant a name in the generated source."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}

    def imported(self, value: Any) -> str:
        return self._name("g", *_importable(value))

    def literal(self, value: Any) -> str:
        text = self._text(value)
        return text if len(text) <= 8 and "(" not in text else self._name("k", "", text)

    def builtin(self, name: str) -> str:
        """A builtin, under a name that no argument can hide."""
        return self._name("b", "builtins", name)

    def module(self, name: str) -> str:
        """A module itself, for what is read from it at the call."""
        return self._name("i", name, "")

    def table(self) -> tuple[tuple[str, str, str], ...]:
        return tuple((name, module, text) for (module, text), name in self._names.items())

    def _name(self, prefix: str, module: str, text: str) -> str:
        return self._names.setdefault((module, text), f"_{prefix}{len(self._names)}")

    def _text(self, value: Any) -> str:
        if isinstance(value, Activation):
            return f"Activation({value.name!r}, {self._text(value.param)})"
        if type(value) is float and not math.isfinite(value):
            return f"float({str(value)!r})"
        if isinstance(value, torch.dtype):
            return str(value)
        if isinstance(value, (torch.device, torch.memory_format, torch.layout)):
            return f"torch.{value!r}" if isinstance(value, torch.device) else str(value)
        if type(value) is list:
            return f"[{', '.join(map(self._text, value))}]"
        if type(value) is tuple:
            return f"({''.join(self._text(v) + ', ' for v in value)})"
        if type(value) is dict:
            return "{" + ", ".join(f"{self._text(k)}: {self._text(v)}" for k, v in value.items()) + "}"
        if value is None or value is ... or type(value) in (bool, int, float, complex, str):
            return "..." if value is ... else repr(value)
        raise Refused(f"uses a constant of type {type(value).__name__}")


def evaluate(names: Iterable[tuple[str, str, str]]) -> dict[str, Any]:
    """The globals of a generated forward."""
    scope: dict[str, Any] = {}
    for name, module, text in names:
        if module and not text:
            scope[name] = importlib.import_module(module)
        elif module:
            scope[name] = operator.attrgetter(text)(importlib.import_module(module))
        else:
            scope[name] = eval(text, {"torch": torch, "Activation": Activation})
    return scope


def _importable(value: Any) -> tuple[str, str]:
    """(module, qualified name) under which a fresh process finds this function or class."""
    name, qualname = getattr(value, "__name__", ""), getattr(value, "__qualname__", "")
    homes = (
        getattr(value, "__module__", None),
        "torch",
        "torch.nn.functional",
        "torch._C._nn",
        "_operator",
        "builtins",
    )
    for module in homes:
        for candidate in filter(None, (qualname, name)):
            with contextlib.suppress(ImportError, AttributeError):
                if module and operator.attrgetter(candidate)(importlib.import_module(module)) is value:
                    return module, candidate
    raise Refused(f"uses {qualname or name or value!r}, which cannot be imported by name")
