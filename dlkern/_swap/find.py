"""From a model to the owners that are rewritten: whole traces find sites, local traces prove them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from . import atrous, attention, conv_bn_act, depthwise, recurrent, transposed
from . import batch_norm_act as rule
from .batch_norm_act import Site
from .classes import Plan, SwappedSite
from .codegen import forward_source
from .trace import UNKNOWN, Call, Trace, Tracer
from .witness import Refused, mode

Filter = Callable[[nn.Module, str], bool]


@dataclass
class Owner:
    """The smallest module whose forward holds a site, and what whole traces said of it, per mode."""

    path: str
    module: nn.Module
    calls: dict[bool, Call | None] = field(default_factory=dict)
    inline: dict[bool, set[str]] = field(default_factory=dict)  # relative to the owner
    inner: dict[bool, dict[str, Call]] = field(default_factory=dict)  # calls of modules in it, likewise
    sites: dict[bool, set[str]] = field(default_factory=dict)  # likewise
    convs: dict[bool, set[str]] = field(default_factory=dict)  # those of them that have a convolution
    conv_only: dict[bool, set[str]] = field(default_factory=dict)  # those without norm or without activation


@dataclass
class Accepted:
    """The sites of all owners, by mode; paths are relative to the model. See conv_bn_act.match for the kinds."""

    sites: dict[bool, set[str]] = field(default_factory=lambda: {True: set(), False: set()})
    convs: dict[bool, set[str]] = field(default_factory=lambda: {True: set(), False: set()})
    conv_only: dict[bool, set[str]] = field(default_factory=lambda: {True: set(), False: set()})


@dataclass
class Findings:
    """What is to be rewritten, and why the rest is not. Paths are relative to the model."""

    plans: dict[str, Plan] = field(default_factory=dict)  # owner path -> plan
    reasons: dict[str, str] = field(default_factory=dict)  # path of a norm or depthwise convolution -> why it stays
    separable: set[str] = field(default_factory=set)  # depthwise convolutions that a pointwise one follows


def find(model: nn.Module, filter_fn: Filter | None) -> Findings:
    """Plan the rewrite of a model whose classes are its own (see ``trace.LOCK``)."""
    findings = Findings()
    owners: dict[str, Owner] = {}
    for training in (True, False):
        with mode(model, training):
            _search(model, "", training, filter_fn, owners, findings)
    accepted = Accepted()
    for owner in owners.values():
        for training in owner.sites:
            for kept, found in ((accepted.sites, owner.sites), (accepted.convs, owner.convs),
                                (accepted.conv_only, owner.conv_only)):  # fmt: skip
                kept[training] |= {join(owner.path, site) for site in found.get(training, ())}
    for owner in owners.values():
        _plan(owner, accepted, findings)
    _plan_depthwise(model, filter_fn, findings)
    recurrent.add(model, filter_fn, findings.plans, findings.reasons)
    atrous.add(model, filter_fn, findings.plans, findings.reasons)
    attention.add(model, filter_fn, findings.plans, findings.reasons)
    swapped = {join(path, site.path) for path, plan in findings.plans.items() for site in plan.sites}
    for path, module in model.named_modules():
        if rule.is_candidate(module) and path not in swapped:
            findings.reasons.setdefault(path, _general_reason(module))
    for path in swapped:
        findings.reasons.pop(path, None)
    return findings


def join(prefix: str, path: str) -> str:
    """Two dotted paths in one."""
    return f"{prefix}.{path}" if prefix and path else prefix or path


def _relative(path: str, owner: str) -> str:
    return path[len(owner) + 1 :] if owner else path


def _is_inside(path: str, owner: str) -> bool:
    return not owner or path.startswith(f"{owner}.")


def _general_reason(module: nn.Module) -> str:
    if not rule.is_norm(module):
        return f"a {type(module).__name__} is not rewritten"
    return "no trace reached it"


def _search(
    root: nn.Module, prefix: str, training: bool, filter_fn: Filter | None, owners: dict[str, Owner], findings: Findings
) -> None:
    """Trace root with everything inlined; where a module refuses, trace its children on their own."""
    if rule.is_timm_norm(root):  # reached without a trace round it: at most a site of its own
        try:
            rule.leaf_trace(root)
        except rule.NotASite as refusal:
            findings.reasons[prefix] = str(refusal)
        else:
            if filter_fn is None or filter_fn(root, prefix):
                _add_leaf(root, prefix, training, owners)
            else:
                findings.reasons[prefix] = "left out by filter_fn"
    if rule.is_leaf(root):
        return
    try:
        if isinstance(root, (fx.GraphModule, torch.jit.ScriptModule)):
            raise Refused("is a GraphModule" if isinstance(root, fx.GraphModule) else "is a ScriptModule")
        trace = Tracer(rule.is_leaf).run(root)
    except Refused as refusal:
        for name, child in root.named_children():
            _note(child, join(prefix, name), f"{prefix or 'the model'}: {refusal}", findings)
            _search(child, join(prefix, name), training, filter_fn, owners, findings)
        return
    _collect(trace, prefix, training, filter_fn, owners, findings)
    modules = dict(root.named_modules())
    for path, reason in trace.opaque.items():
        _note(modules[path], join(prefix, path), f"{join(prefix, path)}: {reason}", findings)
        _search(modules[path], join(prefix, path), training, filter_fn, owners, findings)


def _note(module: nn.Module, prefix: str, reason: str, findings: Findings) -> None:
    for path, m in module.named_modules():
        if rule.is_candidate(m):
            findings.reasons[join(prefix, path)] = reason


def _collect(
    trace: Trace, prefix: str, training: bool, filter_fn: Filter | None, owners: dict[str, Owner], findings: Findings
) -> None:
    sites, reasons = conv_bn_act.match(trace, prefix)
    modules = dict(trace.root.named_modules())
    findings.separable |= {join(prefix, path) for path in depthwise.separable(trace, sites)}
    findings.reasons.update({join(prefix, path): reason for path, reason in reasons.items()})
    for site in sites:
        path = join(prefix, site.path)
        if filter_fn is not None and not filter_fn(modules[site.path], path):
            findings.reasons[path] = "left out by filter_fn"
            continue
        if site.conv is None and rule.is_timm_norm(modules[site.path]) and len(site.span) == 1:
            _add_leaf(modules[site.path], path, training, owners)
            continue
        whole = site.span if site.is_norm_and_activation else [site.source, *site.span]
        stacks = [node.meta["stack"] for node in whole]
        common = [level[0] for level in itertools.takewhile(lambda s: len(set(s)) == 1, zip(*stacks, strict=False))]
        owner_path = common[-1]
        inside = [site.path, *(entry for stack in stacks for entry in stack[len(common) :])]
        if not all(_is_inside(entry, owner_path) for entry in inside):
            findings.reasons[path] = "is registered outside of the module that calls it, too"
            continue
        owner = owners.setdefault(join(prefix, owner_path), Owner(join(prefix, owner_path), modules[owner_path]))
        owner.calls[training] = trace.calls.get(owner_path)
        inner = {entry for stack in stacks for entry in stack[len(common) :]}
        owner.inline.setdefault(training, set()).update(_relative(entry, owner_path) for entry in inner)
        start = f"{owner_path}." if owner_path else ""
        owner.inner[training] = {_relative(p, owner_path): c for p, c in trace.calls.items() if p.startswith(start)}
        relative = _relative(site.path, owner_path)
        owner.sites.setdefault(training, set()).add(relative)
        if site.conv is not None:
            owner.convs.setdefault(training, set()).add(relative)
        if not site.is_norm_and_activation:
            owner.conv_only.setdefault(training, set()).add(relative)


def _add_leaf(norm: nn.Module, path: str, training: bool, owners: dict[str, Owner]) -> None:
    owner = owners.setdefault(path, Owner(path, norm))
    owner.sites.setdefault(training, set()).add("")


def _plan(owner: Owner, accepted: Accepted, findings: Findings) -> None:
    """Trace the owner locally in each mode in which it was reached, and write its forward."""
    expected = set().union(*owner.sites.values())
    try:
        if "forward" in owner.module.__dict__:
            raise Refused("its forward is an instance attribute")
        _check_class(type(owner.module))
        modes: dict[bool, tuple[Trace, list[Site]]] = {}
        for training, paths in owner.sites.items():
            with mode(owner.module, training):
                modes[training] = _local(owner, training, paths, accepted)
        source = forward_source(type(owner.module), modes)
    except Refused as refusal:
        reason = f"{owner.path or 'the model'}: {refusal}"
        findings.reasons.update({join(owner.path, path): reason for path in expected})
        return
    sites = {s.path: _summary(s, owner, findings) for _, found in modes.values() for s in found}
    findings.plans[owner.path] = Plan(source, tuple(sites.values()))


def _summary(site: Site, owner: Owner, findings: Findings) -> SwappedSite:
    conv = None if site.conv is None else str(site.conv.target)
    kind, label = site.kind, site.label
    if conv is not None and depthwise.is_depthwise(owner.module.get_submodule(conv)):
        kind = depthwise.SEPARABLE if join(owner.path, conv) in findings.separable else depthwise.KIND
        label = label.replace("conv", "depthwise", 1)
    elif conv is not None and isinstance(owner.module.get_submodule(conv), nn.ConvTranspose2d):
        kind, label = transposed.KIND, label.replace("conv", "transposed", 1)
    return SwappedSite(site.path, kind, label, None if site.norm is None else conv)


def _plan_depthwise(model: nn.Module, filter_fn: Filter | None, findings: Findings) -> None:
    """Depthwise convolutions that no planned site has: each becomes the owner of itself."""
    modules = dict(model.named_modules())
    taken = set()
    for owner, plan in findings.plans.items():
        taken |= {id(modules[join(owner, site.path if site.conv is None else site.conv)]) for site in plan.sites}
    for path, conv in depthwise.candidates(model):
        if id(conv) in taken:
            continue
        reason = depthwise.refusal(conv)
        if reason is None and filter_fn is not None and not filter_fn(conv, path):
            reason = "left out by filter_fn"
        if reason is None:
            kind = depthwise.SEPARABLE if path in findings.separable else depthwise.KIND
            source = forward_source(type(conv), {True: depthwise.leaf_trace(conv), False: depthwise.leaf_trace(conv)})
            findings.plans[path] = Plan(source, (SwappedSite("", kind, "depthwise"),))
        else:
            findings.reasons[path] = reason


def _check_class(cls: type) -> None:
    """Refuse classes that would notice, or do not survive, a generated subclass."""
    for name in ("__reduce_ex__", "__reduce__", "__new__", "__init_subclass__", "__getnewargs__", "__getnewargs_ex__"):
        if any(name in base.__dict__ for base in cls.__mro__ if base is not object):
            raise Refused(f"its class has a {name} of its own")


def _local(owner: Owner, training: bool, paths: set[str], accepted: Accepted) -> tuple[Trace, list[Site]]:
    if paths == {""}:
        return rule.leaf_trace(owner.module)
    call = owner.calls[training]
    kinds = None if call is None or UNKNOWN in call.arguments.values() else call.arguments
    trace = Tracer(rule.is_leaf, owner.inline[training], owner.inner[training], kinds).run(owner.module)
    # An inlined container may own sites too: they run here now. Those left out by filter_fn do not.
    convs, conv_only = (
        frozenset(_relative(p, owner.path) for p in found[training] if _is_inside(p, owner.path))
        for found in (accepted.convs, accepted.conv_only)
    )
    sites, reasons = conv_bn_act.match(trace, owner.path, frozenset(paths) - conv_only, convs, conv_only)
    everywhere = accepted.sites[True] | accepted.sites[False]
    sites = [site for site in sites if join(owner.path, site.path) in everywhere]
    lost = paths - conv_only - {site.path for site in sites}
    if lost:
        path = min(lost)
        raise Refused(f"{path} is not found again in its own forward ({reasons.get(path, 'not called')})")
    if not sites:
        raise Refused("none of its sites is found again in its own forward")
    return trace, sites
