"""The rewrite of attention: leaf modules by their exact type, and direct calls of F.scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from dlkern import dispatch
from dlkern.functional.dtypes import DTYPES
from dlkern.kernels.reference.attention import Request
from dlkern.nn import attention as layer
from dlkern.ops import attention as op

from . import retarget, runtime, windows
from .classes import Plan, SwappedSite, plan_of
from .results import Row
from .source import Source

Filter = Callable[[nn.Module, str], bool]

KIND = op.NAME
MULTIHEAD, WINDOW, WINDOW2, CALL = "multihead", "window", "window-v2", "sdpa"

_ARGUMENTS = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
_MULTIHEAD_TEXT = (
    f"def forward(self, query, key, value, {', '.join(f'{name}=_d_{name}' for name in _ARGUMENTS)}):\n"
    f"    return _run(self, query, key, value, {', '.join(_ARGUMENTS)})\n"
)
_WINDOW_TEXT = "def forward(self, x):\n    return _run(self, x)\n"
_CALL_TEXT = "forward = _retargeted(_base)\n"
_TORCHVISION = "torchvision.models.swin_transformer"
_WINDOWS = {"ShiftedWindowAttention": WINDOW, "ShiftedWindowAttentionV2": WINDOW2}


# ---------------------------------------------------------------------------------------- runtime
def run_multihead(module: Any, query: Any, key: Any, value: Any, *options: Any) -> Any:
    """What a swapped MultiheadAttention's forward calls: dlkern's, or PyTorch's own where that alone can run it."""
    base = plan_of(module)[0]  # type: ignore[index]
    counter = runtime.calls(module)
    key_padding_mask, need_weights, attn_mask, _, is_causal = options
    reason = _unfit(query) or layer.why_not(
        module, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal
    )
    if reason is not None:
        runtime.missed(module, counter, 1, lambda: reason)
        return base.forward(module, query, key, value, *options)  # type: ignore[arg-type]
    found = layer.attend(module, query, key, value, key_padding_mask, attn_mask, is_causal)
    if counter is not None:
        counter.fused += 1
    return found, None


def run_window(module: Any, x: Any) -> Any:
    """The same for torchvision's ShiftedWindowAttention, of either version."""
    base = plan_of(module)[0]  # type: ignore[index]
    counter = runtime.calls(module)
    reason = _unfit(x)
    if reason is None and (x.dim() != 4 or module.qkv.weight.device != x.device):
        reason = f"its input has {x.dim()} dimensions, or is on another device"
    if reason is not None:
        runtime.missed(module, counter, 1, lambda: reason)
        return base.forward(module, x)  # type: ignore[arg-type]
    found = windows.attend(module, x, _WINDOWS[base.__name__] == WINDOW2)
    if counter is not None:
        counter.fused += 1
    return found


def _unfit(x: Any) -> str | None:
    if not isinstance(x, Tensor) or (type(x) not in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()):
        return f"its input is a {type(x).__name__}"
    if x.dtype not in DTYPES:
        return f"its input is of {x.dtype}"
    return "a torch.func transform, torch.jit.trace or a lazy negation is active" if runtime.watched(x) else None


# ------------------------------------------------------------------------------------------ plans
def _label(module: nn.Module) -> str | None:
    """What of this op a module is, by its exact type; None where it is nothing."""
    if type(module) is nn.MultiheadAttention:
        return MULTIHEAD
    if type(module).__module__ == _TORCHVISION and type(module).__name__ in _WINDOWS:
        return _WINDOWS[type(module).__name__]
    if type(module).__module__.split(".")[0] in ("torch", "dlkern"):
        return None
    try:
        return CALL if retarget.count(type(module)) else None
    except ValueError:
        return None


def is_attention(module: nn.Module | None) -> bool:
    """Whether a report's row about this module is about attention."""
    return isinstance(module, nn.MultiheadAttention) or (module is not None and _label(module) is not None)


def _source(label: str) -> Source:
    if label == CALL:
        return Source(_CALL_TEXT, (("_retargeted", retarget.__name__, "retargeted"),))
    if label == MULTIHEAD:
        return Source(_MULTIHEAD_TEXT, (("_run", __name__, "run_multihead"),))
    return Source(_WINDOW_TEXT, (("_run", __name__, "run_window"),))


def add(model: nn.Module, filter_fn: Filter | None, plans: dict[str, Plan], reasons: dict[str, str]) -> None:
    """Plan every attention of a model, and say why one that looks like it stays."""
    closed: list[str] = []
    for path, module in model.named_modules():
        if any(not c or path.startswith(f"{c}.") for c in closed):
            continue
        if isinstance(module, (fx.GraphModule, torch.jit.ScriptModule)):
            closed.append(path)
            continue
        label = _label(module)
        if label is None:
            if isinstance(module, nn.MultiheadAttention) and not type(module).__module__.startswith("dlkern."):
                name = type(module).__name__
                reasons[path] = f"a {name} is a class of its own: its forward may do more than PyTorch's"
        elif "forward" in module.__dict__:
            reasons[path] = "its forward is an instance attribute"
        elif filter_fn is not None and not filter_fn(module, path):
            reasons[path] = "left out by filter_fn"
        elif path in plans:
            reasons[path] = "its forward is rewritten for other sites"
        else:
            plans[path] = Plan(_source(label), (SwappedSite("", KIND, label),))


# ------------------------------------------------------------------------------------------- rows
def row(model: nn.Module, path: str, site: SwappedSite) -> Row:
    """A swapped attention, with the backend that it gets by default for a call such as its kind makes."""
    module = model.get_submodule(path)
    weight = next(module.parameters(), torch.empty(0))
    window = site.label in (WINDOW, WINDOW2)
    training = module.training
    dropout = getattr(module, "attention_dropout" if window else "dropout", 0.0)
    dropout = dropout if isinstance(dropout, float) else 0.0

    def backend(**asked: Any) -> dispatch.Choice:
        request = Request(
            weight.device.type, weight.dtype, 64, 64, 1, "none", "none", "positions" if window else "none",
            False, False, False, bool(dropout and training), False, False,
        )  # fmt: skip
        return dispatch.choose(KIND, request._replace(**asked))

    try:
        plain, padded = backend(), backend(padding=True)
    except RuntimeError as error:  # a forced backend that cannot run it
        return Row(path, KIND, "", str(error), path, site.label)
    reason = plain.reason
    if plain.backend != padded.backend:
        reason = f"{reason}; {padded.backend} with padding, a window or a causal mask"
    if site.label == MULTIHEAD:
        reason += "; with need_weights=True PyTorch's forward runs"
        around = _fast_layer(model, path)
        if around is not None:
            reason += (
                f"; in inference without gradients the fast path of the {around} around it computes the whole layer "
                "and does not call it (torch.backends.mha.set_fastpath_enabled(False) ends that)"
            )
    return Row(path, KIND, plain.backend, reason, path, site.label)


def _fast_layer(model: nn.Module, path: str) -> str | None:
    """The name of PyTorch's layer that may run this self-attention without calling it."""
    parent, _, name = path.rpartition(".")
    if name != "self_attn":
        return None
    owner = model.get_submodule(parent)
    return type(owner).__name__ if isinstance(owner, nn.TransformerEncoderLayer) else None
