"""The rewrite of atrous spatial pyramid pooling: blocks built as torchvision's is, recognised by their code.

A block's class, and that of its pooled branch, have a forward whose code is that of one of the functions below: those
of torchvision and segmentation_models_pytorch, and of the many copies of them. Then its children are looked at.

The sites inside of a block (its convolutions with norm and activation) are rewritten as anywhere else. The block itself
becomes a site on top of them: it runs as one, and where it cannot, for a hook say, its own forward calls its children,
which are rewritten.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlkern import dispatch
from dlkern.functional.dtypes import DTYPES
from dlkern.kernels.reference.batch_norm_act import Request
from dlkern.nn import atrous as layer
from dlkern.nn.batch_norm_act import own
from dlkern.ops import atrous as op
from dlkern.ops import library

from . import runtime
from .classes import Plan, SwappedSite, plan_of
from .results import Row
from .source import Source

Filter = Callable[[nn.Module, str], bool]

KIND = "atrous"
LABEL = "aspp"
_TEXT = "def forward(self, x):\n    return _run(self, x)\n"


def _concatenated(self: Any, x: Any) -> Any:
    _res = []
    for conv in self.convs:
        _res.append(conv(x))
    res = torch.cat(_res, dim=1)
    return self.project(res)


def _concatenated_in_one_name(self: Any, x: Any) -> Any:
    res: Any = []
    for conv in self.convs:
        res.append(conv(x))
    res = torch.cat(res, dim=1)
    return self.project(res)


def _pooled(self: Any, x: Any) -> Any:
    size = x.shape[-2:]
    for mod in self:
        x = mod(x)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


_BLOCKS = (_concatenated, _concatenated_in_one_name)


def _has_code(cls: type, functions: tuple[Callable[..., Any], ...]) -> bool:
    """Whether a class's forward is, instruction by instruction, one of the functions, and means the same by names."""
    forward: Any = getattr(cls, "forward", None)
    code = getattr(forward, "__code__", None)
    if code is None or any(forward.__globals__.get(n) is not m for n, m in _NAMES.items() if n in code.co_names):
        return False
    return _means(code) in [_means(function.__code__) for function in functions]


def _means(code: CodeType) -> tuple[Any, ...]:
    """What a function's code does: all but its names of variables, its docstring and where it stands."""
    flags = code.co_flags & 0xFF  # of arguments and generators, and not of __future__ imports
    return code.co_code, code.co_consts[1:], code.co_names, code.co_freevars, code.co_argcount, flags


_NAMES = {"torch": torch, "F": F}


def is_block(module: nn.Module) -> bool:
    """Whether a module is an ASPP block built as torchvision's is."""
    return isinstance(getattr(module, "convs", None), nn.ModuleList) and _has_code(_base(module), _BLOCKS)


def _base(module: nn.Module) -> type:
    plan = plan_of(module)
    return type(module) if plan is None else plan[0]


def _is_module(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of a kind (or was, before a swap) and bypassing its call skips nothing."""
    base = _base(module)
    known = base is kind or (kind is nn.BatchNorm2d and base is nn.SyncBatchNorm)
    if kind is nn.Sequential and issubclass(base, nn.Sequential):
        pools = len(module._modules) > 0 and type(next(iter(module._modules.values()))) is nn.AdaptiveAvgPool2d
        known = _has_code(base, (_pooled,)) if pools else base.forward is nn.Sequential.forward
    return known and runtime.unhooked(module)


def run(module: nn.Module, x: Any) -> Any:
    """What a swapped block's forward calls: the block as one, or its own forward."""
    base: Any = plan_of(module)[0]  # type: ignore[index]
    counter = runtime.calls(module)
    parts = layer.parts_of(module, _is_module)
    reason = parts if isinstance(parts, str) else _why_not(parts, x)
    if reason is not None or isinstance(parts, str):
        runtime.missed(module, counter, 1, lambda: str(reason))
        return base.forward(module, x)
    y = layer.apply(parts, x)
    if counter is not None:
        counter.fused += 1
    return y


def _why_not(parts: layer.Parts, x: Any) -> str | None:
    """Why the block runs its children one by one; PyTorch then refuses in its own words what cannot run at all."""
    if type(x) is not Tensor or x.dtype not in DTYPES or x.dim() != 4:
        return "its input is not a batch of images"
    if runtime.watched(x):
        return "a torch.func transform, torch.jit.trace or a lazy negation is active"
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "a global hook is set"
    autocast = library.autocasts(x.device.type)
    n, channels, height, width = x.shape
    single = False
    for part in (*parts.branches, parts.pooled):
        first = part.conv if part.depthwise is None else part.depthwise
        if first.in_channels != channels:
            return "its input does not have the channels of its convolutions"
        batch = part.norm.training or part.norm.running_mean is None
        single = single or (batch and n * (1 if part is parts.pooled else height * width) == 1)
    if single:
        return "a batch norm in training would see one value a channel"
    for part in (*parts.branches, parts.pooled, parts.projection):
        gamma = own(part.norm, part.norm._parameters, "weight")
        mean = own(part.norm, part.norm._buffers, "running_mean")
        weight = own(part.conv, part.conv._parameters, "weight")
        if type(weight) not in (Tensor, nn.Parameter) or weight.device != x.device:
            return "a weight of it is on another device"
        if (weight.dtype != x.dtype and not autocast) or (autocast and torch.float64 in (weight.dtype, x.dtype)):
            return "its weights and its input have different dtypes"
        if part.norm.num_features != part.conv.out_channels or not runtime.agree(x, mean if gamma is None else gamma):
            return "a batch norm of it does not fit its convolution"
    return None


def add(model: nn.Module, filter_fn: Filter | None, plans: dict[str, Plan], reasons: dict[str, str]) -> None:
    """Plan every block of a model; one that is left has the reason beside its sites."""
    for path, module in model.named_modules():
        if not is_block(module):
            continue
        reason = _refusal(module, path, filter_fn)
        if reason is None and path in plans:
            reason = "has sites of its own"
        if reason is None:
            plans[path] = Plan(Source(_TEXT, (("_run", __name__, "run"),)), (SwappedSite("", KIND, LABEL),))
        else:
            reasons[path] = reason


def _refusal(module: nn.Module, path: str, filter_fn: Filter | None) -> str | None:
    if "forward" in module.__dict__:
        return "its forward is an instance attribute"
    parts = layer.parts_of(module, _is_module)
    if isinstance(parts, str):
        return parts
    if filter_fn is not None:
        inside = [(f"{path}.{name}" if path else name, m) for name, m in module.named_modules()]
        norms = [(p, m) for p, m in inside if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not filter_fn(module, path) or not all(filter_fn(m, p) for p, m in norms):
            return "left out by filter_fn"
    return None


def row(model: nn.Module, path: str, site: SwappedSite) -> Row:
    """A swapped block, with the backend that it gets by default for contiguous images."""
    module = model.get_submodule(path)
    norm = next(m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    like = next((t for t in (norm.weight, norm.running_mean) if t is not None), torch.empty(0))
    request = Request(like.device.type, like.dtype, like.dtype, False, norm.training, False, "relu")
    try:
        choice = dispatch.choose(op.NAME, request)
    except RuntimeError as error:  # a forced backend that cannot run it
        return Row(path, site.kind, "", str(error), path, site.label)
    return Row(path, site.kind, choice.backend, choice.reason, path, site.label)
