"""Hugging Face models inside of a model: entered by their own door, the registry of attention implementations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from dlkern.integrations import transformers as door

from .results import Row

Filter = Callable[[nn.Module, str], bool]
KIND, LABEL = "attention", "transformers"
_STOCK = "sdpa"


def _models(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost transformers models of a model, with their paths."""
    modeling = sys.modules.get("transformers.modeling_utils")
    base = getattr(modeling, "PreTrainedModel", None)
    if base is None:
        return
    outer: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, base) and not any(not o or path.startswith(f"{o}.") for o in outer):
            outer.append(path)
            yield path, module


def _implementation(module: Any) -> str:
    return getattr(module.config, "_attn_implementation", "")


def enter(model: nn.Module, filter_fn: Filter | None) -> None:
    """Give every transformers model in ``model`` that has "sdpa" dlkern's attention."""
    for path, module in _models(model):
        if _implementation(module) == _STOCK and (filter_fn is None or filter_fn(module, path)):
            module.set_attn_implementation(door.register())


def leave(model: nn.Module) -> None:
    """Give them "sdpa" back."""
    for _, module in _models(model):
        if _implementation(module) == door.NAME:
            module.set_attn_implementation(_STOCK)


def rows(model: nn.Module, planned: bool) -> list[Row]:
    """A row for each transformers model that is entered, or would be."""
    wanted = (_STOCK, door.NAME) if planned else (door.NAME,)
    reason = "by transformers' registries of attention and of masks; set_attn_implementation('sdpa') ends it"
    return [
        Row(path, KIND, "", reason, path, LABEL) for path, module in _models(model) if _implementation(module) in wanted
    ]
