"""The rewrite of bn -> act and bn -> add -> act: how sites are found, and what runs in their place."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from dlkern import activations
from dlkern.kernels.activation import Activation
from dlkern.nn import batch_norm_act as layer

from . import runtime
from .trace import INPLACE_OPERATORS, TENSOR, Trace
from .witness import has_hooks

KIND = "batch_norm_act"


# ------------------------------------------------------------------------------------ modules
def is_timm_norm(m: nn.Module) -> bool:
    """timm's BatchNorm2d with ``drop`` and ``act`` inside (recognised by name: timm is not imported)."""
    cls = type(m)
    return cls.__name__ == "BatchNormAct2d" and cls.__module__ == "timm.layers.norm_act"


def is_norm(m: nn.Module) -> bool:
    """A BatchNorm that this rule knows how to run: torch.nn's own forward (or SyncBatchNorm's), or timm's."""
    if isinstance(m, LazyModuleMixin):
        return False
    if isinstance(m, nn.SyncBatchNorm):
        return type(m).forward is nn.SyncBatchNorm.forward
    return is_timm_norm(m) or (isinstance(m, _BatchNorm) and type(m).forward is _BatchNorm.forward)


def is_leaf(m: nn.Module) -> bool:
    """Modules that a trace calls instead of tracing through them."""
    if isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    return type(m).__module__.startswith(("torch.nn.", "torch.ao.nn.", "dlkern.nn.")) or is_timm_norm(m)


def is_candidate(m: nn.Module) -> bool:
    """Modules that the report accounts for, swapped or not."""
    return isinstance(m, _BatchNorm)


# ---------------------------------------------------------------------------------- activations
def _plain(name: str) -> Callable[..., Activation]:
    return lambda input, inplace=False: Activation(name)


def _leaky_relu(x: Any, negative_slope: float = 0.01, inplace: bool = False) -> Activation:
    return Activation("leaky_relu", float(negative_slope))


def _elu(x: Any, alpha: float = 1.0, inplace: bool = False) -> Activation:
    return Activation("elu", float(alpha))


def _gelu(x: Any, approximate: str = "none") -> Activation:
    return Activation("gelu_tanh" if approximate == "tanh" else "gelu")


_FUNCTIONS: dict[Any, Callable[..., Activation]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_), _plain("relu")),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_), _plain("sigmoid")),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_), _plain("tanh")),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _leaky_relu),
    **dict.fromkeys((F.elu, F.elu_), _elu),
    F.relu6: _plain("relu6"),
    F.silu: _plain("silu"),
    F.gelu: _gelu,
    F.hardswish: _plain("hardswish"),
    F.hardsigmoid: _plain("hardsigmoid"),
}
_METHODS = {name + end: Activation(name) for name in ("relu", "sigmoid", "tanh") for end in ("", "_")}
#: Activations whose output PyTorch itself keeps for backward, as the fused op does.
_KEPT_BY_PYTORCH = ("relu", "sigmoid", "tanh")
_ADDITIONS = (operator.add, operator.iadd, torch.add)


#: What an activation module computes is fixed by these attributes besides its type.
_MODULE_PARAMETERS = {nn.LeakyReLU: "negative_slope", nn.ELU: "alpha", nn.GELU: "approximate"}


# ----------------------------------------------------------------------------------------- sites
@dataclass
class Site:
    """One rewrite: the nodes it replaces and what the guards must hold."""

    path: str  # of the norm, or of the convolution where there is none
    label: str
    span: list[fx.Node]  # norm, skipped identities, addition, activation, in execution order
    source: fx.Node  # the norm's input, or the activation's
    residual: fx.Node | None
    activation: Activation
    bypassed: list[str]  # modules whose own call no longer happens
    attributes: list[tuple[str, str, Any]]  # (module, attribute, value) that the activation rests on
    kind: str = KIND
    norm: str | None = None
    conv: fx.Node | None = None  # the call of a convolution that the site can take too (see conv_bn_act.py)

    @property
    def is_norm_and_activation(self) -> bool:
        """Whether the site is one without its convolution, too."""
        return self.norm is not None and self.label != "conv+bn"


class NotASite(Exception):
    """Why a norm is left as it is."""


_FRESH_MODULES = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
)
_FRESH_FUNCTIONS = {operator.add, operator.sub, operator.mul, torch.add, torch.mul, torch.cat, torch.matmul}


class Matcher:
    """Finds the sites in a trace's graph.

    Paths are relative to the traced module; ``prefix``, its own path, serves the reasons' wording.
    ``proven`` are sites that a trace through all modules has already shown to be safe from writes in
    place, which this trace, with its children closed, might not be able to show.
    """

    def __init__(self, trace: Trace, prefix: str, proven: frozenset[str]) -> None:
        self.trace = trace
        self.prefix = prefix
        self.proven = proven
        self.modules = dict(trace.root.named_modules())
        self.order = {node: i for i, node in enumerate(trace.graph.nodes)}

    def run(self) -> tuple[list[Site], dict[str, str]]:
        """Every site, in execution order, and the reason for each norm that is none."""
        calls: dict[str, list[fx.Node]] = {}
        for node in self.order:
            if node.op == "call_module" and is_norm(self.module(node)):
                calls.setdefault(str(node.target), []).append(node)
        found: dict[fx.Node, Site] = {}
        reasons: dict[str, str] = {}
        for path, nodes in calls.items():
            try:
                if len(nodes) > 1:
                    raise NotASite(f"called {len(nodes)} times in one forward")
                site = self._site(nodes[0])
            except NotASite as reason:
                reasons[path] = str(reason)
                continue
            other = found.get(site.span[-1])
            if other is not None:
                # Two norms can end in one addition; the other's output is then the residual.
                site, loser = sorted((site, other), key=self._preference)
                reasons[loser.path] = f"its output is the residual of {self.at(site.path)}"
            found[site.span[-1]] = site
        return sorted(found.values(), key=lambda s: self.order[s.span[0]]), reasons

    def at(self, path: Any) -> str:
        return f"{self.prefix}.{path}" if self.prefix else str(path)

    def module(self, node: fx.Node) -> Any:
        return self.modules[str(node.target)]

    def _preference(self, site: Site) -> tuple[int, int]:
        """The norm that fewer containers stand round comes first, then the later one."""
        node = site.span[0]
        return len(node.meta["stack"]), -self.order[node]

    def _site(self, norm_node: fx.Node) -> Site:
        path, norm = str(norm_node.target), self.module(norm_node)
        if has_hooks(norm):
            raise NotASite("has hooks")
        if len(norm_node.args) != 1 or norm_node.kwargs or not isinstance(norm_node.args[0], fx.Node):
            raise NotASite("is not called with one tensor")
        source, bypassed = norm_node.args[0], [path]
        if is_timm_norm(norm):
            own = timm_activation(norm)
            bypassed += [f"{path}.drop", f"{path}.act"]
            if own.name != "identity":
                attributes = attributes_of(f"{path}.act", norm.act)
                return Site(path, f"bn+{own.name}", [norm_node], source, None, own, bypassed, attributes, norm=path)
        span, residual, label = [norm_node], None, "bn"
        node = self.next(norm_node, span, bypassed)
        if _is_addition(node):
            residual, label = self._residual(path, span[-1], node), "bn+add"
            span.append(node)
            node = self.next(node, span, bypassed)
        activation = self.activation(node)
        if activation is None:
            raise NotASite(f"no activation follows but {self.describe(node)}")
        span.append(node)
        attributes = []
        if node.op == "call_module":
            if has_hooks(self.module(node)):
                raise NotASite(f"its activation {self.at(node.target)} has hooks")
            bypassed.append(str(node.target))
            attributes = attributes_of(str(node.target), self.module(node))
        if path not in self.proven:
            self.refuse_mutations(source, residual, span)
            if residual is not None and activation.name not in _KEPT_BY_PYTORCH:
                self._refuse_later_mutations(span)
        label = f"{label}+{activation.name}"
        return Site(path, label, span, source, residual, activation, bypassed, attributes, norm=path)

    def activation(self, node: fx.Node) -> Activation | None:
        """The activation that a node computes of its one tensor argument, if it is one that kernels fuse."""
        if node.op == "call_module":
            module = self.module(node)
            return None if isinstance(module, nn.Identity) else activations.from_module(module)
        if node.op == "call_method":
            return _METHODS.get(str(node.target)) if len(node.args) == 1 and not node.kwargs else None
        if node.op == "call_function" and node.target in _FUNCTIONS:
            try:
                return _FUNCTIONS[node.target](*node.args, **node.kwargs)
            except (TypeError, ValueError):  # out=, or a slope that is computed
                return None
        return None

    def _is_identity(self, node: fx.Node) -> bool:
        return node.op == "call_module" and type(self.module(node)) is nn.Identity and not has_hooks(self.module(node))

    def next(self, node: fx.Node, span: list[fx.Node], bypassed: list[str]) -> fx.Node:
        """The one user of a node, past hook-free identities."""
        while True:
            users = list(node.users)
            if len(users) != 1:
                raise NotASite(f"its output has {len(users)} users" if users else "its output is not used")
            user = users[0]
            if list(user.args).count(node) > 1:
                raise NotASite("its output is used twice by one operation")
            if not self._is_identity(user):
                return user
            span.append(user)
            bypassed.append(str(user.target))
            node = user

    def _residual(self, path: str, node: fx.Node, addition: fx.Node) -> fx.Node:
        left, right = addition.args
        residual = right if left is node else left
        if not isinstance(residual, fx.Node):
            raise NotASite("adds a constant before the activation")
        in_place = addition.target in (operator.iadd, "add_") and residual is left
        if in_place and path not in self.proven and not self._is_private(residual):
            # the original writes the sum into the residual, where somebody else might look for it
            raise NotASite("is added in place to a residual that others may see")
        return residual

    def _is_private(self, node: fx.Node) -> bool:
        """Whether nobody but its one user can see this node's output."""
        while len(node.users) == 1 and self._is_identity(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return len(node.users) == 1 and self._is_fresh(node)

    def describe(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{type(self.module(node)).__name__} {self.at(node.target)}"
        if node.op == "output":
            return "the end of the forward"
        return getattr(node.target, "__name__", str(node.target))

    def _origin(self, node: Any) -> Any:
        """The node whose output this one passes on: past identities."""
        while isinstance(node, fx.Node) and self._is_identity(node):
            node = node.args[0]
        return node

    def refuse_mutations(self, source: fx.Node, residual: fx.Node | None, span: list[fx.Node]) -> None:
        """A fused op reads the norm's input where the activation stood: nothing may write to it in between."""
        for node, position in self.order.items():
            if not self.order[span[0]] < position < self.order[span[-1]] or node in span:
                continue
            kept = [self._origin(n) for n in (source, residual) if n is not None]
            if node.op == "get_attr" and str(node.target).startswith(f"{span[0].target}."):
                raise NotASite("its statistics are read before the activation")
            if self._writes(node):
                target = node.args[0] if node.args and "out" not in node.kwargs else None
                if not self._is_fresh(target) or self._origin(target) in kept:
                    raise NotASite(f"{self.describe(node)} may write to its input before the activation")
            if node.meta.get("untraced") and any(self._origin(n) in kept for n in node.all_input_nodes):
                raise NotASite(f"{self.at(node.target)} takes its input before the activation and could not be traced")

    def _refuse_later_mutations(self, span: list[fx.Node]) -> None:
        """Backward keeps the output or the residual, which PyTorch's own does not: nobody may write to them."""
        for node, position in self.order.items():
            if position > self.order[span[-1]] and self._writes(node) and not self._is_fresh(node.args[0]):
                raise NotASite(f"{self.describe(node)} may write to what its backward keeps")

    def _writes(self, node: fx.Node) -> bool:
        """Whether a node writes into a tensor that it takes: its first argument, or out=."""
        if node.op == "call_module":
            return bool(getattr(self.module(node), "inplace", False))
        if node.kwargs.get("inplace") is True or "out" in node.kwargs:
            return True
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.target in INPLACE_OPERATORS or node.target is operator.setitem:
            return True
        return name.endswith("_") and not name.endswith("__")

    def _is_fresh(self, node: Any) -> bool:
        """Whether a node's output is surely a tensor of its own, no view of an earlier one."""
        if not isinstance(node, fx.Node):
            return False
        if node.op == "call_module":
            return isinstance(self.module(node), _FRESH_MODULES)
        return node.op == "call_function" and node.target in _FRESH_FUNCTIONS


def _is_addition(node: fx.Node) -> bool:
    if node.kwargs or len(node.args) != 2:
        return False
    if node.op == "call_function":
        return node.target in _ADDITIONS
    return node.op == "call_method" and node.target in ("add", "add_")


def timm_activation(norm: Any) -> Activation:
    """The activation inside timm's BatchNormAct2d; NotASite with the reason where it cannot be fused."""
    for name in ("drop", "act"):
        if has_hooks(getattr(norm, name)):
            raise NotASite(f"its {name} has hooks")
    if type(norm.drop) is not nn.Identity:
        raise NotASite(f"has a {type(norm.drop).__name__} inside")
    own = activations.from_module(norm.act)
    if own is None:
        raise NotASite(f"its activation {type(norm.act).__name__} is not fused")
    return own


def attributes_of(path: str, module: Any) -> list[tuple[str, str, Any]]:
    name = _MODULE_PARAMETERS.get(type(module))
    return [] if name is None else [(path, name, getattr(module, name))]


def leaf_trace(norm: nn.Module) -> tuple[Trace, list[Site]]:
    """timm's BatchNormAct2d as the owner of itself: one site, whose stock form is its own forward."""
    activation = timm_activation(norm)
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.create_node("call_module", "", (x,))  # the module itself
    graph.output(call)
    trace = Trace(graph, norm, arguments={x: "x"}, parameters={"x": TENSOR})
    attributes = attributes_of("act", norm.act)
    bypassed = ["drop", "act"]
    return trace, [Site("", f"bn+{activation.name}", [call], x, None, activation, bypassed, attributes, norm="")]


# --------------------------------------------------------------------------------------- runtime
def fits(norm: Any, x: Any, residual: Any) -> bool:
    """Whether the fused op takes this call; where not, the stock modules run (and raise as they do)."""
    if not isinstance(x, Tensor) or runtime.watched(x):
        return False
    shape, dtype = x.shape, x.dtype
    ndim = len(shape)
    if residual is not None and not (
        isinstance(residual, Tensor)
        and type(residual) is type(x)
        and residual.shape == shape
        and residual.dtype == dtype
        and residual.device == x.device
    ):
        return False
    synchronised = False
    # what the norm itself refuses, it shall refuse in its own words
    if isinstance(norm, nn.BatchNorm2d):
        right_rank = ndim == 4
    elif isinstance(norm, nn.BatchNorm1d):
        right_rank = ndim == 2 or ndim == 3
    elif isinstance(norm, nn.SyncBatchNorm):
        right_rank = ndim >= 2 and shape[1] > 0
        synchronised = layer.sync_group(norm) is not None
    else:
        right_rank = isinstance(norm, nn.BatchNorm3d) and ndim == 5
    if not right_rank or shape[1] != norm.num_features:
        return False
    if synchronised:
        # A graph cannot hold the collectives of an autograd function; any batch will do, an empty one, too, since
        # the other ranks wait for this one.
        if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
            return False
    elif norm.training and x.numel() <= shape[1]:
        return False
    like = layer.own(norm, norm._parameters, "weight")
    if like is None:
        like = layer.own(norm, norm._buffers, "running_mean")
    return runtime.agree(x, like)


def fused(norm: Any, x: Tensor, residual: Tensor | None, activation: Activation, conv: Any = None) -> Tensor:
    """The rewritten site; ``conv`` is the convolution that made x, and made it for this site alone."""
    return layer.apply(norm, x, activation, residual, type(conv) is nn.Conv2d and runtime.unhooked(conv))
