"""Swapping: ``swap``, ``report``, ``unswap``, ``explain``, ``no_fallback``.

A site is found in a trace of the model, proved in a trace of the smallest module that owns it, and
rewritten by giving that module a generated subclass as its class. Nothing else of it is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator

import torch
from torch import nn

from dlkern import dispatch
from dlkern.kernels.reference.batch_norm_act import Request
from dlkern.nn.conv_bn_act import FOLDED_WEIGHT
from dlkern.ops import batch_norm_act as op

from . import atrous, attention, depthwise, recurrent, runtime, transformers
from .batch_norm_act import KIND, is_candidate
from .classes import SwappedSite, generated, is_extended, plan_of
from .find import Filter, Findings, find, join
from .results import Report, Row
from .runtime import Calls, no_fallback
from .trace import LOCK

__all__ = ["Calls", "Report", "Row", "explain", "no_fallback", "report", "swap", "unswap"]

#: Why layers of a swapped model were left, kept beside the model and not in it.
_reasons: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()


def swap(
    model: nn.Module, *, filter_fn: Filter | None = None, memory_format: torch.memory_format | None = None
) -> nn.Module:
    """Rewrite, in place, every site of a model that dlkern has a fused op for.

    Parameters, buffers, state_dict keys, hooks, modes, device, dtype and module paths stay as they
    are; ``unswap`` gives the exact original back. Each rewritten forward is guarded by what was true
    when it was traced (argument kinds, attributes, module classes, hooks); where a guard fails the
    stock forward runs and ``report(model).calls.fallback`` counts it. Swapping again starts afresh.

    Sites of this version, each as far as it is there: Conv2d or ConvTranspose2d, BatchNorm, an addition, an
    activation. In
    training the convolution is called as it stands and what follows is fused; in inference without
    gradients the batch norm is folded into the convolution where that is faster. Depthwise convolutions,
    of one or two dimensions, run their own kernels, in such a site or wherever else they stand. LSTM, GRU,
    RNN and their cells are sites, too, by exact type, and so is atrous spatial pyramid pooling as torchvision and
    segmentation_models_pytorch have it, on top of the sites inside of it. MultiheadAttention, torchvision's
    ShiftedWindowAttention (both versions) and direct calls of F.scaled_dot_product_attention in a forward are sites,
    and a transformers model with attention "sdpa" is given "dlkern" (see dlkern.integrations.transformers), and "sdpa"
    again by ``unswap``.

    Args:
        model: any module; torch.fx GraphModules and ScriptModules inside it are left alone.
        filter_fn: ``filter_fn(module, path) -> bool`` is asked for each site's BatchNorm, its
            convolution where there is none, its recurrent layer, or the block; False leaves the site.
        memory_format: for example torch.channels_last: the model is converted after the swap.

    Returns:
        The same object.

    Raises:
        TypeError: model is no torch.nn.Module.
        RuntimeError: somebody made a subclass of a swapped module's class (FSDP2, parametrizations), or the
            model is frozen.
        Whatever filter_fn raises. After an error the model is exactly as it was.
    """
    check(model)
    if memory_format is not None and not isinstance(memory_format, torch.memory_format):
        raise TypeError(f"memory_format: expected a torch.memory_format, got {memory_format!r}")
    unfit = {torch.channels_last: 5, torch.channels_last_3d: 4}
    rank = None if memory_format is None else unfit.get(memory_format)
    if rank is not None and any(p.dim() == rank for p in model.parameters()):
        raise ValueError(f"memory_format: {memory_format} cannot hold the model's {rank}-D parameters")
    with LOCK:
        _refuse_extended(model)
        _refuse_frozen(model)
        with _as_unswapped(model):
            findings = find(model, filter_fn)
            modules = dict(model.named_modules())
            changes = [(modules[path], generated(type(modules[path]), plan)) for path, plan in findings.plans.items()]
        if memory_format is not None:
            model.to(memory_format=memory_format)
        unswap(model)
        for module, cls in changes:
            object.__setattr__(module, "__class__", cls)
            runtime.reset(module)
        transformers.enter(model, filter_fn)
        _reasons[model] = findings.reasons
    return model


def unswap(model: nn.Module) -> nn.Module:
    """Give every swapped module its own class back; returns the model.

    Raises:
        TypeError: model is no torch.nn.Module.
        RuntimeError: somebody made a subclass of a swapped module's class; nothing is changed then.
    """
    check(model)
    with LOCK:
        _refuse_extended(model)
        _refuse_frozen(model)
        for module in model.modules():
            plan = plan_of(module)
            if plan is not None:
                object.__setattr__(module, "__class__", plan[0])
        transformers.leave(model)
        _reasons.pop(model, None)
    return model


def report(model: nn.Module) -> Report:
    """Per site what was done and by what; per other BatchNorm why nothing was; how often each path ran.

    Works on copies and unpickled models too: it reads the modules' classes. A model that was never
    swapped has no swapped rows; ``explain`` says what a swap would do.
    """
    check(model)
    made = Report()
    for path, module in model.named_modules():
        plan = plan_of(module)
        if plan is None:
            continue
        counter = runtime.calls(module)
        made.calls += counter if counter is not None else Calls()
        known = {row.path for row in made.swapped}  # a container's site can run in the owner that inlines it
        made.swapped += [_row(model, path, s) for s in plan[1].sites if join(path, s.path) not in known]
    made.swapped += transformers.rows(model, planned=False)
    reasons = _reasons.get(model)
    if reasons is None and made.swapped:  # a copy: nothing is traced here, the model may be running
        swapped = {row.path for row in made.swapped}
        left = [p for p, m in model.named_modules() if is_candidate(m) and p not in swapped]
        reasons = dict.fromkeys(left, "not swapped; dlkern.explain(model) says why")
    reasons = reasons or {}
    made.skipped = _left(model, reasons)
    return made


def explain(model: nn.Module) -> Report:
    """What ``swap(model)`` would do, and why; changes nothing.

    Like ``swap`` it traces the model's forwards on proxies, in both modes: no other thread may run the model then.
    """
    check(model)
    with LOCK, _as_unswapped(model):
        findings: Findings = find(model, None)
    made = Report(planned=True)
    for path, plan in sorted(findings.plans.items(), key=lambda item: item[0].count(".")):
        known = {row.path for row in made.swapped}
        made.swapped += [_row(model, path, s) for s in plan.sites if join(path, s.path) not in known]
    made.swapped += transformers.rows(model, planned=True)
    made.skipped = _left(model, findings.reasons)
    return made


def _left(model: nn.Module, reasons: dict[str, str]) -> list[Row]:
    """A row for each layer that was left as it is."""
    modules = dict(model.named_modules())

    def kind(module: nn.Module | None) -> str:
        if attention.is_attention(module):
            return attention.KIND
        if module is not None and atrous.is_block(module):
            return atrous.KIND
        return recurrent.kind_of(module) or (depthwise.KIND if depthwise.is_depthwise(module) else KIND)

    return [Row(path, kind(modules.get(path)), "", reason) for path, reason in sorted(reasons.items())]


def _row(model: nn.Module, owner: str, site: SwappedSite) -> Row:
    """A swapped site, with the backend that its device, dtype and mode get by default."""
    path = join(owner, site.path)
    if site.kind == attention.KIND:
        return attention.row(model, path, site)
    if site.kind in recurrent.KINDS:
        return recurrent.row(model, path, site)
    if site.kind == atrous.KIND:
        return atrous.row(model, path, site)
    modules = dict(model.named_modules())
    module = modules.get(path)
    parts = site.label.split("+")
    if parts[0] == "depthwise":
        conv = modules.get(path if site.conv is None else join(owner, site.conv))
        try:
            backend, reason = depthwise.described(conv)
        except RuntimeError as error:  # a forced backend that cannot run it
            return Row(path, site.kind, "", str(error), owner, site.label)
        if site.conv is None:
            return Row(path, site.kind, backend, reason, owner, site.label)
        norm = _norm_row(module, path, owner, site)
        return dataclasses.replace(norm, reason=f"{norm.reason}; the convolution: {backend}, {reason}")
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):  # without a norm
        fused = module.weight.device.type == "cpu" and not module.training
        return Row(path, site.kind, "cpu" if fused else "torch", "fused in inference on the CPU", owner, site.label)
    return _norm_row(module, path, owner, site)


def _norm_row(module: nn.Module | None, path: str, owner: str, site: SwappedSite) -> Row:
    parts = site.label.split("+")
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return Row(path, site.kind, "torch", f"replaced by a {type(module).__name__} after the swap", owner, site.label)
    like = next((t for t in (module.weight, module.running_mean) if t is not None), torch.empty(0))
    activation = "identity" if parts[-1] == "bn" else parts[-1]
    request = Request(like.device.type, like.dtype, like.dtype, False, module.training, "add" in parts, activation)
    try:
        choice = dispatch.choose(op.NAME, request)
    except RuntimeError as error:  # a forced backend that cannot run it
        return Row(path, site.kind, "", str(error), owner, site.label)
    return Row(path, site.kind, choice.backend, choice.reason, owner, site.label)


def check(model: nn.Module) -> None:
    """TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _refuse_extended(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if is_extended(module):
            raise RuntimeError(
                f"{path or 'the model'}: its class was extended after the swap (by FSDP2, a parametrization, ...), so "
                "it cannot be changed now; undo that first, or run PyTorch's own ops under dlkern.backend('torch')"
            )


def _refuse_frozen(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if FOLDED_WEIGHT in module._buffers:
            raise RuntimeError(f"{path or 'the model'} is frozen (dlkern.freeze); call dlkern.unfreeze(model) first")


@contextlib.contextmanager
def _as_unswapped(model: nn.Module) -> Iterator[None]:
    """The modules under their own classes while they are traced."""
    swapped = [(m, type(m)) for m in model.modules() if plan_of(m) is not None and not is_extended(m)]
    for module, _ in swapped:
        object.__setattr__(module, "__class__", plan_of(module)[0])  # type: ignore[index]
    try:
        yield
    finally:
        for module, cls in swapped:
            object.__setattr__(module, "__class__", cls)
