"""Strict symbolic traces of modules: proof of what a forward does, never the model that runs.

torch.fx runs a module's forward on proxies. This tracer refuses whatever a proxy cannot witness
(random numbers, attribute writes, a changed grad mode, ``isinstance`` on an intermediate, ...) and
records what the trace took for granted (kinds of arguments, attributes that were read), so that
the generated code can be guarded by it.
"""

from __future__ import annotations

import inspect
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.proxy import Attribute, TraceError

from .witness import (
    CHANGES_MODE,
    PLAIN,
    NoUnwitnessedCalls,
    Reads,
    Refused,
    Untouched,
    modes,
    overrides_call,
    recorded_reads,
    strict,
)

#: fx patches torch.nn.Module for the whole process while it traces: one trace at a time.
LOCK = threading.RLock()

#: The kind of an argument or result: "tensor", "value" (a proxy that may be anything), ("list" | "tuple", kinds),
#: ("const", value) or "unknown".
Kind = Any
TENSOR = "tensor"
VALUE = "value"
UNKNOWN = "unknown"

INPLACE_OPERATORS = tuple(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
)
#: Layers and functions that make a tensor of a tensor; convolutions and norms make one of whatever they take.
_ALWAYS_TENSOR = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)
_TENSOR_MODULES = (
    *_ALWAYS_TENSOR,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.dropout._DropoutNd,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Identity,
    nn.Linear,
    nn.Flatten,
)
_TENSOR_FUNCTIONS = {operator.add, operator.iadd, operator.mul, operator.imul, torch.add, torch.flatten, F.relu, F.silu}


def kind_of(value: Any) -> Kind:
    """The kind of a value that a traced module received or returned."""
    if isinstance(value, fx.Proxy):
        return TENSOR if value.node.meta.get("tensor") else VALUE
    if type(value) in (list, tuple):
        return (type(value).__name__, tuple(kind_of(v) for v in value))
    if type(value) in PLAIN:
        return ("const", value)
    return UNKNOWN


def is_plain(value: Any) -> bool:
    """Whether a value can stand in a guard: constants and small containers of them."""
    if type(value) in (list, tuple):
        return len(value) <= 64 and all(map(is_plain, value))
    if type(value) is dict:
        return len(value) <= 64 and all(is_plain(k) and is_plain(v) for k, v in value.items())
    return type(value) in PLAIN


class _Proxy(fx.Proxy):
    """A proxy that records in-place operators as what they are, and that is no number."""

    def __getattr__(self, name: str) -> Any:
        if self.node.meta.get("tensor") and not hasattr(torch.Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return _Attribute(self, name)

    def __len__(self) -> int:
        raise Refused(_VALUES)

    __float__ = __int__ = __index__ = __complex__ = __array__ = __len__  # type: ignore[assignment]


_VALUES = "its forward depends on values of its input"


def _inplace(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in INPLACE_OPERATORS:
    setattr(_Proxy, f"__{_function.__name__}__", _inplace(_function))


class _Attribute(Attribute, _Proxy):
    """``proxy.name``: a method call if it is called, else an attribute read."""

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)


class _Overwritten:
    """Stands in a list or dict for what a module that stays a call wrote, or may have written, into it."""

    def __init__(self, path: str) -> None:
        self.path = path


@dataclass
class Call:
    """How a module was called in a trace."""

    arguments: dict[str, Kind]
    result: Kind
    writes: tuple[tuple[int | str, int], ...] = ()  # (argument, index) of the lists that it wrote into


@dataclass
class Trace:
    """A traced forward and what it rests on. Paths are relative to the traced module."""

    graph: fx.Graph
    root: nn.Module
    calls: dict[str, Call] = field(default_factory=dict)  # inlined modules
    opaque: dict[str, str] = field(default_factory=dict)  # modules whose forward refused, with the reason
    dirty: set[str] = field(default_factory=set)  # modules that wrote their own attributes
    reads: Reads = field(default_factory=Reads)
    inlined: set[str] = field(default_factory=set)  # modules whose forward stands in the graph
    arguments: dict[fx.Node, str] = field(default_factory=dict)  # placeholder -> expression of the parameters
    parameters: dict[str, Kind] = field(default_factory=dict)  # the kind each parameter was traced with
    list_writes: list[tuple[str, int, fx.Node]] = field(default_factory=list)  # argument[index] = node


class Tracer(fx.Tracer):
    """fx's tracer made strict.

    Args:
        inline: paths of the children to trace through; None: all that are not leaves.
        calls: how modules that stay calls behaved when they were traced through, by path.
        kinds: the kinds of the root's arguments by name; absent: tensors where no default is given.
    """

    def __init__(
        self,
        is_leaf: Callable[[nn.Module], bool],
        inline: set[str] | None = None,
        calls: dict[str, Call] | None = None,
        kinds: dict[str, Kind] | None = None,
    ) -> None:
        super().__init__()
        self._is_leaf = is_leaf
        self._inline = inline
        self._calls = calls or {}
        self._kinds = kinds
        self._stack: list[str] = [""]
        self._modes_at_start = modes()
        self._lists: list[tuple[str, list[Any], list[Any]]] = []
        self._thread = threading.get_ident()  # fx patches modules for all threads; the others go on as ever

    # ------------------------------------------------------------------------------ running
    def run(self, root: nn.Module) -> Trace:
        """Trace root's forward. Raises Refused with the reason where that cannot be done."""
        self.result = Trace(fx.Graph(), root)
        paths = {id(m): path for path, m in root.named_modules()}
        reads, inlined = self.result.reads, self.result.inlined
        with Untouched(root) as state:
            try:
                with recorded_reads(paths, reads, inlined), strict((_Proxy, _Attribute)), NoUnwitnessedCalls():
                    self.result.graph = self.trace(root)
            except Exception as error:  # user code on proxies can raise anything
                raise Refused(_first_line(error)) from error
        if state.drew_random_numbers:
            raise Refused("draws random numbers outside of torch functions of its inputs")
        self.result.dirty = {paths[id(m)] for m in state.dirty}
        for name, now, then in self._lists:
            if len(now) != len(then):
                raise Refused(f"changes the length of its argument {name}")
            for index, (a, b) in enumerate(zip(now, then, strict=True)):
                if a is not b:
                    if not isinstance(a, fx.Proxy):
                        raise Refused(f"writes a value that is no tensor into its argument {name}")
                    self.result.list_writes.append((name, index, a.node))
        return self.result

    # --------------------------------------------------------------------- fx's own hooks
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if modes() != self._modes_at_start:
            raise Refused(CHANGES_MODE)
        node = super().create_node(*args, **kwargs)
        node.meta["stack"] = tuple(self._stack)
        node.meta["tensor"] = self._is_tensor(node)
        return node

    def _is_tensor(self, node: fx.Node) -> bool:
        """Whether a node's value is surely a tensor (an argument's kind is guarded, a layer's result known)."""
        if node.op == "placeholder":
            return True
        inputs = [a for a in node.args if isinstance(a, fx.Node)]
        if not inputs or not inputs[0].meta["tensor"]:
            return node.op == "call_module" and isinstance(self.root.get_submodule(str(node.target)), _ALWAYS_TENSOR)
        if node.op == "call_module":
            return isinstance(self.root.get_submodule(str(node.target)), _TENSOR_MODULES)
        return node.op == "call_function" and node.target in _TENSOR_FUNCTIONS

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise Refused(_VALUES)

    def iter(self, obj: fx.Proxy) -> Any:
        raise Refused(_VALUES)

    def keys(self, obj: fx.Proxy) -> Any:
        raise Refused(_VALUES)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, _Overwritten):
            raise Refused(f"uses what {a.path} may have written into a list or dict")
        if isinstance(a, torch.Tensor) and not self._is_parameter_or_buffer(a):
            raise Refused("uses a tensor that is neither an input, a parameter nor a buffer")
        if type(a) is OrderedDict:  # fx would turn it into a dict
            return self.create_node("call_function", OrderedDict, (self.create_arg(list(a.items())),), {})
        if isinstance(a, dict) and type(a) is not dict:
            raise Refused(f"builds a {type(a).__name__}")
        return super().create_arg(a)

    def _is_parameter_or_buffer(self, tensor: torch.Tensor) -> bool:
        return any(tensor is t for t in self.root.parameters()) or any(tensor is t for t in self.root.buffers())

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if overrides_call(m):
            raise Refused(f"calls {path}, whose class has a __call__ of its own")
        if self._is_leaf(m):
            return self._call_leaf(m, path, args, kwargs)
        if self._inline is not None and path not in self._inline:
            proxy = self.create_proxy("call_module", path, args, kwargs)
            call = self._calls.get(path)
            if call is None:
                return self._untraced(proxy, args, kwargs)
            for which, index in call.writes:
                (args[which] if isinstance(which, int) else kwargs[which])[index] = _Overwritten(path)
            if call.result not in (TENSOR, VALUE):
                proxy.node.meta["structure"] = call.result
            return self._answer(proxy, call.result)
        return self._call_inlined(m, path, args, kwargs)

    def _call_leaf(self, m: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        proxy = self.create_proxy("call_module", path, args, kwargs)
        if type(m).forward is nn.MultiheadAttention.forward:
            weights = kwargs.get("need_weights", args[4] if len(args) > 4 else True)
            if not isinstance(weights, bool):
                raise Refused("calls MultiheadAttention with a computed need_weights")
            structure = ("tuple", (TENSOR, TENSOR if weights else ("const", None)))
            proxy.node.meta["structure"] = structure
            return self._answer(proxy, structure)
        return proxy

    def _answer(self, proxy: Any, kind: Kind) -> Any:
        """The proxy dressed as what the module returned when it was traced through."""
        if kind in (TENSOR, VALUE, UNKNOWN):
            proxy.node.meta["tensor"] = kind == TENSOR
            return proxy
        name, inner = kind
        if name == "const":
            return inner
        items = [self._answer(proxy[i], k) for i, k in enumerate(inner)]
        return items if name == "list" else tuple(items)

    @staticmethod
    def _untraced(proxy: fx.Proxy, args: Any, kwargs: Any) -> fx.Proxy:
        """The result of a module that could not be traced: taken for a tensor, and checked at the call."""
        proxy.node.meta["untraced"] = True
        for value in [*args, *kwargs.values()]:  # it may have written into these
            if isinstance(value, list):
                value[:] = [_Overwritten(str(proxy.node.target))] * len(value)
            elif isinstance(value, dict):
                value.update(dict.fromkeys(value, _Overwritten(str(proxy.node.target))))
        return proxy

    def _call_inlined(self, m: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        if "forward" in m.__dict__ or isinstance(m, (fx.GraphModule, torch.jit.ScriptModule)):
            if "forward" in m.__dict__:
                reason = "its forward is an instance attribute"
            else:
                reason = f"is a {'GraphModule' if isinstance(m, fx.GraphModule) else 'ScriptModule'}"
            self.result.opaque[path] = reason
            return self._untraced(self.create_proxy("call_module", path, args, kwargs), args, kwargs)
        lists = [(k, v, list(v)) for k, v in [*enumerate(args), *kwargs.items()] if type(v) is list]
        last = next(iter(reversed(self.graph.nodes)), None)
        self._stack.append(path)
        try:
            arguments = _bind(m, args, kwargs)
            returned = type(m).forward(m, *args, **kwargs)
            writes = [(k, i) for k, now, then in lists for i, v in enumerate(then) if i >= len(now) or now[i] is not v]
            if any(len(now) != len(then) for _, now, then in lists):
                raise Refused("changes the length of a list that it is given")
            call = Call(arguments, kind_of(returned), tuple(writes))
        except (Exception, Refused) as error:  # user code on proxies can raise anything
            if self._inline is not None:
                raise
            self._forget_after(last)
            self.result.opaque[path] = _first_line(error)
            self._stack.pop()
            for _, now, then in lists:
                now[:] = then
            return self._untraced(self.create_proxy("call_module", path, args, kwargs), args, kwargs)
        self._stack.pop()
        known = self.result.calls.get(path)
        if known is not None and known != call:
            call = Call(dict.fromkeys(call.arguments, UNKNOWN), UNKNOWN, call.writes)
        self.result.calls[path] = call
        self.result.inlined.add(path)
        return returned

    def _forget_after(self, last: fx.Node | None) -> None:
        """Take back the nodes of a forward that refused halfway."""
        for node in reversed(list(self.graph.nodes)):
            if node is last:
                return
            self.graph.erase_node(node)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        positional, by_name = [], {}
        for p in list(inspect.signature(root_fn).parameters.values())[1:]:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                raise Refused(f"its forward takes {p}")
            default: Kind = TENSOR if p.default is p.empty else ("default", p.default)
            kind = default if self._kinds is None else self._kinds.get(p.name, default)
            self.result.parameters[p.name] = kind
            value = self._argument(p.name, p.name, kind)
            if p.kind is p.KEYWORD_ONLY:
                by_name[p.name] = value
            else:
                positional.append(value)
        return (lambda *args: root_fn(*args, **by_name)), [self.root, *positional]

    def _argument(self, name: str, expression: str, kind: Kind) -> Any:
        """A value of this kind: proxies where it holds tensors."""
        if kind in (TENSOR, VALUE):  # either way the guard asks for a tensor
            proxy = self.create_proxy("placeholder", name, (), {})
            self.result.arguments[proxy.node] = expression
            return proxy
        if kind == UNKNOWN:
            raise Refused(f"is called with an argument {name} of no known kind")
        tag, inner = kind
        if tag in ("const", "default"):
            return inner
        items = [self._argument(name, f"{expression}[{i}]", k) for i, k in enumerate(inner)]
        if tag == "tuple":
            return tuple(items)
        self._lists.append((expression, items, list(items)))
        return items


def _bind(m: nn.Module, args: Any, kwargs: Any) -> dict[str, Kind]:
    bound = inspect.signature(type(m).forward).bind(m, *args, **kwargs).arguments
    kinds = {}
    for i, (name, value) in enumerate(bound.items()):
        if i:  # the first is self
            kinds[name] = kind_of(value)
    return kinds


def _first_line(error: BaseException) -> str:
    if isinstance(error, Refused):
        return str(error)
    text = str(error).strip().splitlines()
    if isinstance(error, TraceError):
        return f"{_VALUES} ({text[0] if text else 'control flow'})"
    return f"its forward cannot be traced ({type(error).__name__}: {text[0][:120] if text else ''})"
