"""Swapping: ``swap``, ``report``, ``unswap``, ``explain``, ``no_fallback``.

A site is found in a trace of the model, proved in a trace of the smallest module that owns it, and
rewritten by giving that module a generated subclass as its class. Nothing else of it is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from dlkern.tuning.policy import Verdict

__all__ = ["Calls", "Report", "Row", "explain", "no_fallback", "report", "swap", "unswap"]

#: Why layers of a swapped model were left, kept beside the model and not in it.
_reasons: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()
#: What a measured swap found, likewise.
_verdicts: weakref.WeakKeyDictionary[nn.Module, Verdict] = weakref.WeakKeyDictionary()
POLICIES = ("default", "measured")


def swap(
    model: nn.Module,
    *,
    filter_fn: Filter | None = None,
    memory_format: torch.memory_format | str | None = None,
    sample: Any = None,
    policy: str = "default",
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
    RNN and their cells are sites, too, by exact type, and so are MultiheadAttention, torchvision's
    ShiftedWindowAttention (both versions) and direct calls of F.scaled_dot_product_attention in a forward. Atrous
    spatial pyramid pooling as torchvision and segmentation_models_pytorch have it is one on top of the sites inside of
    it. A transformers model with attention "sdpa" is given "dlkern" (see dlkern.integrations.transformers), and "sdpa"
    again by ``unswap``.

    With ``policy="measured"`` every site is decided by measurement on ``sample``: one pass in the model's mode records
    what each site is asked for; every backend that can run it, PyTorch's own among them, is checked against PyTorch on
    that very shape, and then timed there, forward or forward + backward as the mode says. A site stays as it was where
    nothing beats PyTorch, and the whole swap is undone where the whole step is slower by a 95 % confidence bound.
    ``report(model)`` has the ratios. Answers are remembered (``dlkern cache show``), and hold for near shapes in this
    process. Buffers, gradients, modes and random state stay as they are; an error or Ctrl-C leaves the model as it was.
    Under torch.distributed every rank makes the call; rank 0 measures, and all choose alike.

    Args:
        model: any module; torch.fx GraphModules and ScriptModules inside it are left alone.
        filter_fn: ``filter_fn(module, path) -> bool`` is asked for each site's BatchNorm, its
            convolution where there is none, its recurrent layer, or the block; False leaves the site.
        memory_format: for example torch.channels_last: the model is converted after the swap. "auto", with
            policy="measured": channels_last is tried as well, and kept where the whole step is faster in it.
        sample: for policy="measured": the input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        policy: "default" (each op's default order) or "measured".

    Returns:
        The same object.

    Raises:
        TypeError: model is no torch.nn.Module, or memory_format is none.
        ValueError: an unknown policy, a sample without policy="measured" or the reverse, or a memory format that
            cannot hold the parameters.
        RuntimeError: somebody made a subclass of a swapped module's class (FSDP2, parametrizations), the
            model is frozen, or policy="measured" while a backend is forced.
        Whatever filter_fn raises. After an error the model is exactly as it was.
    """
    check(model)
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    if policy == "measured" and sample is None:
        raise ValueError('policy="measured" measures on a sample: pass sample=batch (a tensor, tuple or dict)')
    if policy == "default" and sample is not None:
        raise ValueError('sample: only policy="measured" takes one')
    tries = memory_format == "auto" and policy == "measured"
    if not tries:
        _check_memory_format(model, memory_format)
    if policy == "default":
        return _swap(model, filter_fn, memory_format)  # type: ignore[arg-type]
    from dlkern.tuning import policy as measured  # only where something is measured

    forced = {name: backend for name in dispatch.operations() if (backend := dispatch.forced(name)) is not None}
    if forced:
        name, backend = next(iter(forced.items()))
        raise RuntimeError(f'policy="measured" chooses by measurement, but {backend!r} is forced for {name}')
    with LOCK:
        _refuse_extended(model)
        _refuse_frozen(model)
    given = memory_format if isinstance(memory_format, torch.memory_format) else None
    kept = _kept(model)

    def default(chosen: Filter | None) -> None:
        _swap(model, chosen, given)

    try:
        found = measured.measured_swap(model, sample, filter_fn, tries, default)
    except BaseException:
        _keep(model, kept)
        raise
    _verdicts[model] = found
    return model


def _kept(model: nn.Module) -> tuple[dict[str, str] | None, Verdict | None]:
    """What is known of a model beside it."""
    return _reasons.get(model), _verdicts.get(model)


def _keep(model: nn.Module, kept: tuple[dict[str, str] | None, Verdict | None]) -> None:
    """Put ``_kept`` back."""
    reasons, verdict = kept
    _reasons.pop(model, None)
    _verdicts.pop(model, None)
    if reasons is not None:
        _reasons[model] = reasons
    if verdict is not None:
        _verdicts[model] = verdict


def _check_memory_format(model: nn.Module, memory_format: Any) -> None:
    if memory_format is not None and not isinstance(memory_format, torch.memory_format):
        raise TypeError(
            f"memory_format: expected a torch.memory_format, got {memory_format!r} "
            '("auto" needs policy="measured" and a sample)'
        )
    unfit = {torch.channels_last: 5, torch.channels_last_3d: 4}
    rank = None if memory_format is None else unfit.get(memory_format)
    if rank is not None and any(p.dim() == rank for p in model.parameters()):
        raise ValueError(f"memory_format: {memory_format} cannot hold the model's {rank}-D parameters")


def _swap(model: nn.Module, filter_fn: Filter | None, memory_format: torch.memory_format | None) -> nn.Module:
    """The swap by default order."""
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
        _verdicts.pop(model, None)
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
    _add_measured(made, _verdicts.get(model))
    return made


def _add_measured(made: Report, verdict: Verdict | None) -> None:
    """Put what was measured in the place of what would run by default."""
    made.measured = verdict
    if verdict is None:
        return
    rows = {row.path: row for row in made.swapped}
    left = {row.path: row for row in made.skipped}
    for path, site in verdict.sites.items():
        if path in rows:
            backend = site.backend or rows[path].backend
            rows[path] = dataclasses.replace(rows[path], backend=backend, reason=site.reason, ratio=site.ratio)
            continue
        undone = site.kept and not verdict.kept
        reason = f"{site.reason}; {verdict.summary}" if undone else site.reason
        old = left.get(path, Row(path, site.kind, "", reason))
        left[path] = dataclasses.replace(old, kind=site.kind, reason=reason, ratio=site.ratio)
    made.swapped, made.skipped = list(rows.values()), [left[path] for path in sorted(left)]


def explain(model: nn.Module, *, sample: Any = None, policy: str = "default") -> Report:
    """What ``swap(model)`` would do, and why; changes nothing.

    Like ``swap`` it traces the model's forwards on proxies, in both modes: no other thread may run the model then.
    With a sample and ``policy="measured"`` it measures as ``swap`` does, and tells the ratio of each site.
    """
    check(model)
    if policy != "default" or sample is not None:
        return _explain_measured(model, sample, policy)
    with LOCK, _as_unswapped(model):
        findings: Findings = find(model, None)
    made = Report(planned=True)
    for path, plan in sorted(findings.plans.items(), key=lambda item: item[0].count(".")):
        known = {row.path for row in made.swapped}
        made.swapped += [_row(model, path, s) for s in plan.sites if join(path, s.path) not in known]
    made.swapped += transformers.rows(model, planned=True)
    made.skipped = _left(model, findings.reasons)
    return made


def _explain_measured(model: nn.Module, sample: Any, policy: str) -> Report:
    classes, kept = [(m, type(m)) for m in model.modules()], _kept(model)
    swap(model, sample=sample, policy=policy)
    made = report(model)
    for module, cls in classes:
        object.__setattr__(module, "__class__", cls)
    _keep(model, kept)
    made.planned = True
    return made


def _left(model: nn.Module, reasons: dict[str, str]) -> list[Row]:
    """A row for each layer that was left as it is."""
    modules = dict(model.named_modules())

    def kind(module: nn.Module | None) -> str:
        if module is not None and atrous.is_block(module):
            return atrous.KIND
        if attention.is_attention(module):
            return attention.KIND
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
