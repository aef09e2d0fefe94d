"""The rewrite of LSTM, GRU, RNN and their cells: leaf modules, recognised by their exact type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dlkern import dispatch
from dlkern import nn as layers
from dlkern.functional.dtypes import DTYPES
from dlkern.kernels.reference.recurrent import Request

from . import runtime
from .classes import Plan, SwappedSite, plan_of
from .results import Row
from .source import Source

Filter = Callable[[nn.Module, str], bool]


class _Recipe(NamedTuple):
    op: str
    layer: type[nn.Module]  # dlkern's, whose forward works on PyTorch's module


_RECIPES: dict[type[nn.Module], _Recipe] = {
    nn.LSTM: _Recipe("lstm", layers.LSTM),
    nn.GRU: _Recipe("gru", layers.GRU),
    nn.RNN: _Recipe("rnn", layers.RNN),
    nn.LSTMCell: _Recipe("lstm", layers.LSTMCell),
    nn.GRUCell: _Recipe("gru", layers.GRUCell),
    nn.RNNCell: _Recipe("rnn", layers.RNNCell),
}
KINDS = frozenset(recipe.op for recipe in _RECIPES.values())

_TEXT = "def forward(self, input, hx=_d_hx):\n    return _run(self, input, hx)\n"


def run(module: nn.Module, input: Any, hx: Any = None) -> Any:
    """What a swapped module's forward calls: dlkern's, or PyTorch's own where that alone can run the call."""
    base = plan_of(module)[0]  # type: ignore[index]
    counter = runtime.calls(module)
    reason = _why_not(input)
    if reason is not None:
        runtime.missed(module, counter, 1, lambda: reason)
        return base.forward(module, input, hx)  # type: ignore[arg-type]
    found = _RECIPES[base].layer.forward(module, input, hx)  # type: ignore[arg-type]
    if counter is not None:
        counter.fused += 1
    return found


def _why_not(input: Any) -> str | None:
    if type(input) is Tensor and input.dtype in DTYPES and not runtime.watched(input):
        return None
    data = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor):
        return f"its input is a {type(data).__name__}"
    if type(data) is not Tensor and type(data) is not nn.Parameter and not torch.compiler.is_compiling():
        return f"its input is a {type(data).__name__}"
    if data.dtype not in DTYPES:
        return f"its input is of {data.dtype}"
    return "a torch.func transform, torch.jit.trace or a lazy negation is active" if runtime.watched(data) else None


def kind_of(module: nn.Module | None) -> str | None:
    """The op of a recurrent layer or cell, of a subclass as well; None of any other module."""
    return next((recipe.op for base, recipe in _RECIPES.items() if isinstance(module, base)), None)


def add(model: nn.Module, filter_fn: Filter | None, plans: dict[str, Plan], reasons: dict[str, str]) -> None:
    """Plan every recurrent layer of a model, and say why one that looks like it stays."""
    for path, module in model.named_modules():
        recipe = _RECIPES.get(type(module))
        if recipe is None:
            if isinstance(module, tuple(_RECIPES)) and not type(module).__module__.startswith("dlkern."):
                name = type(module).__name__
                reasons[path] = f"a {name} is a class of its own: its forward may do more than PyTorch's"
            continue
        if "forward" in module.__dict__:
            reasons[path] = "its forward is an instance attribute"
        elif filter_fn is not None and not filter_fn(module, path):
            reasons[path] = "left out by filter_fn"
        else:
            source = Source(_TEXT, (("_run", __name__, "run"),))
            plans[path] = Plan(source, (SwappedSite("", recipe.op, type(module).__name__.lower()),))


def row(model: nn.Module, path: str, site: SwappedSite) -> Row:
    """A swapped layer, with the backend that it gets by default for a single sequence."""
    module = model.get_submodule(path)
    weight = next(module.parameters(), torch.empty(0))
    is_cell = isinstance(module, nn.RNNCellBase)
    request = Request(
        weight.device.type,
        weight.dtype,
        getattr(module, "nonlinearity", "tanh"),
        few=True,
        one_step=is_cell,
        cell=is_cell,
        tiny=False,
        packed=False,
        projected=bool(getattr(module, "proj_size", 0)),
        training=module.training,
    )
    try:
        choice = dispatch.choose(site.kind, request)
    except RuntimeError as error:  # a forced backend that cannot run it
        return Row(path, site.kind, "", str(error), path, site.label)
    reason = f"{choice.reason}; one sequence at a time, and chosen again at each call"
    if is_cell:
        whole = type(module).__name__.removesuffix("Cell")
        reason = f"{choice.reason}; a loop over steps stays a loop: a {whole} over the whole sequence is faster"
    return Row(path, site.kind, choice.backend, reason, path, site.label)
