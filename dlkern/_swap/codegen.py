"""From a traced forward with its sites to the source of a guarded forward.

The source reads everything at the call (modules, parameters, modes), so it stays true when they
change; whatever the trace took for granted is a guard.
"""

from __future__ import annotations

import inspect
import operator
import sys
from typing import Any

import torch
from torch import fx, nn

from dlkern import activations

from . import batch_norm_act as rule
from . import conv_bn_act, depthwise, runtime
from .batch_norm_act import Site
from .source import Names, Source
from .trace import TENSOR, UNKNOWN, VALUE, Kind, Trace, is_plain
from .witness import Refused, plain_globals


# ----------------------------------------------------------------------------------------- a body
class _Body:
    """One mode's statements and guards."""

    def __init__(self, trace: Trace, sites: list[Site], names: Names) -> None:
        self.trace, self.sites, self.names = trace, sites, names
        self.modules = dict(trace.root.named_modules())
        self.locals: dict[str, str] = {}  # module path -> local variable
        self.guards: list[tuple[str, str]] = []  # (expression, description)
        self.lines: list[str] = []
        self._values: dict[fx.Node, str] = {}
        self._with_globals: set[str] = set()
        self._refuse_aliases()
        self._guard_all()
        self._emit_all()

    def _refuse_aliases(self) -> None:
        """A module that is registered under two names is called by the first, whichever the forward used."""
        names: dict[int, list[str]] = {}
        for path, module in self.trace.root.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(path)
        for node in self.trace.graph.nodes:
            if node.op == "call_module" and node.target:
                module = self.modules[str(node.target)]
                if len(names[id(module)]) > 1 and activations.from_module(module) is None:
                    raise Refused(f"calls a module that is registered as {' and as '.join(names[id(module)])}")

    # -------------------------------------------------------------------------------- guards
    def _guard_all(self) -> None:
        trace = self.trace
        if trace.dirty:
            raise Refused(f"writes attributes of {', '.join(sorted(p or 'itself' for p in trace.dirty))}")
        for name, kind in trace.parameters.items():
            self._guard(_argument_guard(name, kind, self.names), f"argument {name} is not as it was when traced")
        self._guard(f"not {self.names.imported(nn.modules.module._has_any_global_hook)}()", "a global hook is set")
        self._guard("_base.forward is _forward", "the forward of its class was replaced")
        for path in sorted(trace.inlined, key=_depth):
            self._guard_module(path, f"inlined module {path}", bypassed=True)
            self._guard_globals(path)
            if path:
                self._guard(
                    f"{self.local(path)}.training is self.training", f"{path}.training differs from its owner's"
                )
        self._guard_globals("")
        for site in self.sites:
            for path in site.bypassed:
                self._guard_module(path, f"module {path}", bypassed=True)
            for path, attribute, value in site.attributes:
                expression = f"{self.local(path)}.{attribute} == {self.names.literal(value)}"
                self._guard(expression, f"{path}.{attribute} is no longer {value!r}")
        for (path, attribute), value in trace.reads.values.items():
            self._guard_read(path, attribute, value)
        for path, names in trace.reads.of_class.items():
            own = f"{self._guarded(path)}.__dict__"  # one by one: torch.compile follows no isdisjoint() of its keys
            absent = " and ".join(f"{name!r} not in {own}" for name in sorted(names))
            self._guard(f"({absent})", f"{path or 'self'} overrides a name")
        for path, attribute in sorted(trace.reads.absent):
            present = f"{self.names.builtin('hasattr')}({self._guarded(path)}, {attribute!r})"
            self._guard(f"not {present}", f"attribute {path + '.' if path else ''}{attribute} is there now")
        for (path, name), (table, is_none) in trace.reads.registered.items():
            if (f"{path}.{name}" if path else name) not in self.locals:
                entry = f"{self._guarded(path)}.{table}.get({name!r})"
                self._guard(
                    f"{entry} is {'' if is_none else 'not '}None", f"{path + '.' if path else ''}{name} changed"
                )

    def _guarded(self, path: str) -> str:
        """The local variable of a module whose class is guarded."""
        if path:
            self._guard_module(path, f"module {path}")
        return self.local(path)

    def _guard_globals(self, path: str) -> None:
        """Constants of its module that a traced forward reads."""
        function = inspect.unwrap(type(self.modules[path]).forward)
        if not inspect.isfunction(function) or path in self._with_globals:
            return
        self._with_globals.add(path)
        module = str(function.__globals__.get("__name__"))
        if "type" in function.__code__.co_names and "type" not in function.__globals__:
            raise Refused("asks for a type()")
        constants = plain_globals(function)
        if constants and getattr(sys.modules.get(module), "__dict__", None) is not function.__globals__:
            raise Refused(f"reads globals of {module}, which cannot be imported")
        for name, value in constants.items():
            same = "is" if value is None or isinstance(value, bool) else "=="
            now = f"{self.names.builtin('getattr')}({self.names.module(module)}, {name!r}, ...)"
            self._guard(f"{now} {same} {self.names.literal(value)}", f"the global {module}.{name} changed")

    def _guard(self, expression: str, description: str) -> None:
        if (expression, description) not in self.guards:
            self.guards.append((expression, description))

    def _guard_module(self, path: str, label: str, *, bypassed: bool = False) -> None:
        """The module at path is of the recorded type (and, where its call is bypassed, has no hooks)."""
        if not path:
            return
        if path not in self.locals:
            parent, _, name = path.rpartition(".")
            if parent and parent not in self.locals:
                self._guard_module(parent, f"module {parent}")
            container = f"{self.locals[parent]}._modules" if parent else "_m"
            local = self.locals[path] = f"_n{len(self.locals)}"
            kind = self.names.imported(type(self.modules[path]))
            is_class = f"{self.names.builtin('type')}({local} := {container}.get({name!r})) is {kind}"
            module = self.modules[path]
            swappable = rule.is_timm_norm(module) or depthwise.is_depthwise(module)
            if not rule.is_leaf(module) or swappable:  # it may itself have been swapped
                is_class = f"({is_class} or {self.names.imported(runtime.swapped_from)}({local}, {kind}))"
            self._guard(is_class, f"{label} is no longer of its class")
        if bypassed:
            self._guard(f"{self.names.imported(runtime.unhooked)}({self.locals[path]})", f"{label} has hooks")

    def _guard_read(self, path: str, attribute: str, value: Any) -> None:
        if path:
            self._guard_module(path, f"module {path}")
        owner = self.local(path)
        label = f"{path + '.' if path else ''}{attribute}"
        if attribute == "_modules":
            self._guard(
                f"tuple({owner}._modules) == {self.names.literal(value)}", f"children of {path or 'self'} changed"
            )
        elif is_plain(value):
            same = "is" if value is None or isinstance(value, bool) else "=="
            text = self.names.literal(value)
            self._guard(f"{owner}.__dict__.get({attribute!r}, ...) {same} {text}", f"attribute {label} changed")
        elif inspect.isroutine(value) or inspect.isclass(value):
            text = self.names.imported(value)
            self._guard(f"{owner}.__dict__.get({attribute!r}) is {text}", f"attribute {label} changed")
        else:
            raise Refused(f"reads its attribute {label}, a {type(value).__name__}")

    def local(self, path: str) -> str:
        return self.locals[path] if path else "self"

    # ---------------------------------------------------------------------------- statements
    def _emit_all(self) -> None:
        """Statements in execution order; each site stands where its activation stood."""
        ends = {site.span[-1]: site for site in self.sites}
        inside = {node for site in self.sites for node in site.span}
        convs = {site.conv: site for site in self.sites if site.conv is not None}
        statements: list[tuple[fx.Node, list[str], list[fx.Node]]] = []
        for node in self.trace.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self.trace.arguments[node]
            elif node.op == "output":
                written = [n for _, _, n in self.trace.list_writes]
                statements.append((node, self._output(node), [*node.all_input_nodes, *written]))
            elif node in ends:
                site = ends[node]
                used = [site.source] if site.residual is None else [site.source, site.residual]
                if site.conv is not None:
                    used += site.conv.all_input_nodes
                statements.append((node, self._site(site), used))
            elif node in convs:
                statements.append((node, [self._convolution(convs[node])], node.all_input_nodes))
            elif node not in inside and not _is_dead(node):
                statements.append((node, [self._assign(node)], node.all_input_nodes))
        last_use = {used: i for i, (_, _, inputs) in enumerate(statements) for used in inputs}
        for i, (node, lines, inputs) in enumerate(statements):
            self.lines += lines
            done = dict.fromkeys(n for n in inputs if last_use[n] == i and n.op != "placeholder")
            if node not in last_use and node.op != "output":
                done[node] = None  # called for its effect
            if done and node.op != "output":  # keep no intermediate longer than the original does
                self.lines.append("del " + ", ".join(self._value(n) for n in done))

    def _value(self, node: fx.Node) -> str:
        return self._values.setdefault(node, f"_v{len(self._values)}")

    def _assign(self, node: fx.Node) -> str:
        expression = self._expression(node)
        return f"{self._value(node)} = {expression}"

    def _expression(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            parent, _, name = str(node.target).rpartition(".")
            owner = self._module(parent) if parent else "self"
            return f"{self.names.builtin('getattr')}({owner}, {name!r})"
        arguments = [self._argument(a) for a in node.args]
        arguments += [f"{k}={self._argument(v)}" for k, v in node.kwargs.items()]
        if node.op == "call_method":
            return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
        if node.op == "call_module":
            path = str(node.target)
            if not path:  # a leaf that owns itself
                return f"_base.forward(self, {', '.join(arguments)})"
            call = f"{self._module(path)}({', '.join(arguments)})"
            structure = node.meta.get("structure")
            if structure is not None and structure != UNKNOWN:
                if not rule.is_leaf(self.modules[path]):
                    same_mode = f"{self._guarded(path)}.training is self.training"
                    self._guard(same_mode, f"{path}.training differs from its owner's")
                check = self.names.imported(runtime.structured)
                return f"{check}({call}, {self.names.literal(structure)}, {path!r})"
            if not node.meta.get("untraced"):
                return call
            if any(user.target is operator.getitem for user in node.users):
                raise Refused(f"unpacks the result of {path}, which could not be traced")
            return f"{self.names.imported(runtime.tensor)}({call}, {path!r})"
        if node.target is getattr and isinstance(node.args[1], str):
            return f"{arguments[0]}.{node.args[1]}"
        return f"{self.names.imported(node.target)}({', '.join(arguments)})"

    def _module(self, path: str) -> str:
        if path in self.locals:
            return self.locals[path]
        parent, _, name = path.rpartition(".")
        if not parent:
            return f"_m[{name!r}]"
        self._guard_module(parent, f"module {parent}")
        return f"{self.locals[parent]}._modules[{name!r}]"

    def _argument(self, a: Any) -> str:
        if isinstance(a, fx.Node):
            return self._value(a)
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            return f"{self.names.imported(type(a))}({', '.join(map(self._argument, a))})"
        if isinstance(a, tuple):
            return f"({''.join(self._argument(v) + ', ' for v in a)})"
        if isinstance(a, list):
            return f"[{', '.join(map(self._argument, a))}]"
        if isinstance(a, dict):
            return "{" + ", ".join(f"{self.names.literal(k)}: {self._argument(v)}" for k, v in a.items()) + "}"
        if isinstance(a, slice):
            return f"{self.names.builtin('slice')}({', '.join(self._argument(v) for v in (a.start, a.stop, a.step))})"
        if inspect.isroutine(a) or inspect.isclass(a):
            return self.names.imported(a)
        return self.names.literal(a)

    def _convolution(self, site: Site) -> str:
        """The convolution's output, or None where the site is going to take the convolution, too."""
        assert site.conv is not None
        conv, x = self._module(str(site.conv.target)), self._argument(site.conv.args[0])
        norm = "None" if site.norm is None else self.local(site.norm)
        takes = f"{self.names.imported(conv_bn_act.takes)}({conv}, {norm}, {x}, {self._activation(site)}, "
        takes += f"{site.residual is not None})"
        stock = self._expression(site.conv)
        if depthwise.is_depthwise(self.modules[str(site.conv.target)]):
            stock = f"{self.names.imported(depthwise.call)}({conv}, {x})"
        return f"{self._value(site.conv)} = None if {takes} else {stock}"

    def _activation(self, site: Site) -> str:
        return self.names.literal(site.activation)

    def _site(self, site: Site) -> list[str]:
        source = self._value(site.source)
        residual = "None" if site.residual is None else self._value(site.residual)
        result = self._value(site.span[-1])
        stock = [self._assign(node) for node in site.span]
        if len(site.span) > 1:
            stock.append("del " + ", ".join(self._value(n) for n in site.span[:-1]))
        lines: list[str] = []
        word = "if"
        if site.kind == depthwise.KIND:  # a convolution that owns itself
            return [
                f"if {self.names.imported(depthwise.takes_alone)}(self, {source}):",
                f"    {result} = {self.names.imported(depthwise.fused_alone)}(self, {source})",
                "    if _c is not None:",
                "        _c.fused += 1",
                "else:",  # PyTorch's own: nothing to count
                *(f"    {line}" for line in stock),
            ]
        count = ["    if _c is not None:", "        _c.fused += 1"]
        maker = ""
        norm = "None" if site.norm is None else self.local(site.norm)
        if site.conv is not None:
            conv, x = self._module(str(site.conv.target)), self._argument(site.conv.args[0])
            fused = self.names.imported(conv_bn_act.fused)
            if site.residual is not None:  # it is known only now
                alike = self.names.imported(conv_bn_act.alike)
                lines += [
                    f"if {source} is None and not {alike}({conv}, {x}, {residual}):",
                    f"    {source} = {self._expression(site.conv)}",
                ]
            lines += [
                f"if {source} is None:",
                f"    {result} = {fused}({conv}, {norm}, {x}, {residual}, {self._activation(site)})",
                *count,
            ]
            word = "elif"
            maker = f", {conv}"
        if site.norm is None:  # PyTorch's own convolution and activation: nothing to count
            return [*lines, "else:", *(f"    {line}" for line in stock)]
        why = f"{site.norm} cannot take this input"
        missed = self.names.imported(runtime.missed)
        return [
            *lines,
            f"{word} {self.names.imported(rule.fits)}({norm}, {source}, {residual}):",
            f"    {result} = {self.names.imported(rule.fused)}"
            f"({norm}, {source}, {residual}, {self._activation(site)}{maker})",
            *count,
            "else:",
            f"    {missed}(self, _c, 1, lambda: {why!r})",
            *(f"    {line}" for line in stock),
        ]

    def _output(self, node: fx.Node) -> list[str]:
        writes = [f"{name}[{index}] = {self._value(n)}" for name, index, n in self.trace.list_writes]
        return [*writes, f"return {self._argument(node.args[0])}"]


def _depth(path: str) -> tuple[int, str]:
    return path.count("."), path


def _is_dead(node: fx.Node) -> bool:
    """A read without an effect whose result nobody uses."""
    return not node.users and (node.op == "get_attr" or node.target in (getattr, operator.getitem))


def _argument_guard(expression: str, kind: Kind, names: Names) -> str:
    if kind in (TENSOR, VALUE):
        return f"{names.builtin('isinstance')}({expression}, {names.imported(torch.Tensor)})"
    tag, inner = kind
    if tag in ("const", "default"):
        if inner is None or isinstance(inner, bool):
            return f"{expression} is {inner}"
        if is_plain(inner):
            kind = names.imported(type(inner))
            return f"{names.builtin('type')}({expression}) is {kind} and {expression} == {names.literal(inner)}"
        if inspect.isroutine(inner) or inspect.isclass(inner):
            return f"{expression} is {names.imported(inner)}"
        raise Refused(f"has an argument {expression} whose value is a {type(inner).__name__}")
    items = [_argument_guard(f"{expression}[{i}]", k, names) for i, k in enumerate(inner)]
    is_kind = f"{names.builtin('type')}({expression}) is {names.builtin(tag)}"
    return " and ".join([is_kind, f"{names.builtin('len')}({expression}) == {len(inner)}", *items])


# ------------------------------------------------------------------------------------- a forward
def forward_source(base: type[nn.Module], modes: dict[bool, tuple[Trace, list[Site]]]) -> Source:
    """The source of a forward that runs the rewritten sites of each mode that was traced.

    ``modes`` maps ``training`` to a local trace and its sites; a mode that is absent runs the base's
    forward. Raises Refused where something in a trace cannot be written down.
    """
    names = Names()
    bodies = {training: _Body(trace, sites, names) for training, (trace, sites) in modes.items()}
    signature = inspect.signature(base.forward)
    parameters, arguments = [], []
    for i, p in enumerate(signature.parameters.values()):
        if i == 0:
            continue
        default = "" if p.default is p.empty else f"=_d_{p.name}"
        if p.kind is p.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        parameters.append(p.name + default)
        arguments.append(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name)
        if p.kind is p.POSITIONAL_ONLY:
            raise Refused(f"has a positional-only argument {p.name}")
    reserved = [name for name in signature.parameters if name.startswith("_")]
    if reserved:
        raise Refused(f"has an argument named {reserved[0]}")
    head = ", ".join(["self", *parameters])
    stock = f"return _base.forward({', '.join(['self', *arguments])})"
    both = len(bodies) == 2 and (bodies[True].guards, bodies[True].lines) == (bodies[False].guards, bodies[False].lines)
    lines, reasons = (
        [f"def forward({head}):", "    _m = self._modules"],
        [f"def why({head}):", "    _m = self._modules"],
    )
    lines.append(f"    _c = {names.imported(runtime.calls)}(self)")
    for training, body in bodies.items():
        if both and not training:
            continue
        lines += [] if both else [f"    if {'' if training else 'not '}self.training:"]
        reasons += [] if both else [f"    if {'' if training else 'not '}self.training:"]
        indent = "    " if both else "        "
        lines += _guarded(body, indent)
        reasons += [f"{indent}if not ({e}): return {d!r}" for e, d in body.guards]
        if not both:
            lines.append(f"{indent}{names.imported(runtime.missed)}({_miss(body, head, arguments)})")
            lines.append(indent + stock)
    if both:
        lines.append(f"    {names.imported(runtime.missed)}({_miss(bodies[True], head, arguments)})")
    lines.append("    " + stock)
    reasons.append("    return 'its mode was not traced'")
    return Source("\n".join([*lines, "", *reasons, ""]), names.table())


def _guarded(body: _Body, indent: str) -> list[str]:
    conditions = f"\n{indent}    and ".join(e for e, _ in body.guards)
    return [
        f"{indent}if (",
        f"{indent}    {conditions}",
        f"{indent}):",
        *(f"{indent}    {line}" for line in body.lines),
    ]


def _miss(body: _Body, head: str, arguments: list[str]) -> str:
    return f"self, _c, {len(body.sites)}, lambda: why({', '.join(['self', *arguments])})"
