"""A forward with its direct calls of ``F.scaled_dot_product_attention`` made to dlkern's attention.

The source of the base class's forward is compiled again with those calls renamed, in the globals and with the closure
that it has: control flow, hooks and everything else stay as they are written.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlkern import functional
from dlkern.functional import DTYPES
from dlkern.functional.attention import MAX_HEAD_DIM

from . import runtime

_NAME = "scaled_dot_product_attention"
_INNER = "_dlkern_sdpa"


def run(
    module: nn.Module,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """What a call in a rewritten forward goes to: dlkern's attention, or PyTorch's where that alone can run it."""
    counter = runtime.calls(module)
    reason = _why_not(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if reason is not None:
        if not isinstance(query, Tensor):  # a proxy: nothing runs
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        runtime.missed(module, counter, 1, lambda: reason)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    found = functional.attention(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
        enable_gqa=enable_gqa,
    )  # fmt: skip
    if counter is not None:
        counter.fused += 1
    return found


def _why_not(
    query: Any, key: Any, value: Any, mask: Any, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> str | None:
    for t in (query, key, value):
        if type(t) not in (Tensor, nn.Parameter) and not torch.compiler.is_compiling():
            return f"its argument is a {type(t).__name__}"
        if t.is_nested or t.dim() < 3 or t.dtype not in DTYPES or t.dtype != query.dtype or t.device != query.device:
            return "query, key and value are not dense tensors (..., heads, length, dim) of one float dtype and device"
        if t.shape[:-3] != query.shape[:-3] or not 1 <= t.shape[-1] <= MAX_HEAD_DIM:
            return f"shape {tuple(t.shape)} beside a query of {tuple(query.shape)}"
    if runtime.watched(query):
        return "a torch.func transform, torch.jit.trace or a lazy negation is active"
    heads, others = query.shape[-3], (key.shape[-3], value.shape[-3])
    if others[0] != others[1] or (others[0] != heads and (not enable_gqa or not others[0] or heads % others[0])):
        return f"{heads} heads of query, {others[0]} of key and {others[1]} of value"
    if key.shape[-1] != query.shape[-1] or value.shape[-2] != key.shape[-2] or not 0.0 <= dropout_p < 1.0:
        return "lengths, head dimensions or a dropout probability that do not fit"
    if mask is None:
        return None
    if is_causal or not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, query.dtype):
        return "its attn_mask is neither boolean nor of query's dtype, or comes with is_causal"
    full = (*query.shape[:-1], key.shape[-2])
    if mask.dim() > len(full) or any(
        n not in (1, m) for n, m in zip(reversed(mask.shape), reversed(full), strict=False)
    ):
        return f"an attn_mask of {tuple(mask.shape)} does not broadcast to {full}"
    return None


class _Rename(ast.NodeTransformer):
    """Sends calls of SDPA to ``_dlkern_sdpa(self, ...)``; counts them."""

    def __init__(self, function: types.FunctionType) -> None:
        self.globals = function.__globals__
        code = function.__code__
        self.local = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
        self.owner = code.co_varnames[0]
        self.count = 0

    def _value(self, node: ast.expr) -> Any:
        """The object that a dotted name stands for outside of the function; None for anything else."""
        if isinstance(node, ast.Name):
            return None if node.id in self.local else self.globals.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self._value(node.value)
            return None if base is None else getattr(base, node.attr, None)
        return None

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if self._value(node.func) is F.scaled_dot_product_attention:
            self.count += 1
            first = ast.Name(self.owner, ast.Load())
            node = ast.Call(ast.Name(_INNER, ast.Load()), [first, *node.args], node.keywords)
        return node


def _rewritten(base: type[nn.Module]) -> tuple[ast.Module, types.FunctionType, int]:
    """The syntax tree of a class's forward with its calls renamed, the forward, and their number.

    Raises:
        ValueError: with the reason why its source does not tell what runs.
    """
    function = base.__dict__.get("forward") or base.forward
    if not isinstance(function, types.FunctionType) or not function.__code__.co_varnames:
        raise ValueError("its forward is no plain function")
    if _NAME not in function.__code__.co_names:
        return ast.Module([], []), function, 0
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise ValueError(f"the source of its forward cannot be read ({error})") from None
    (definition,) = tree.body
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list or definition.name != "forward":
        raise ValueError("its forward has decorators, or is defined under another name")
    for node in ast.walk(definition):
        name = getattr(node, "attr", getattr(node, "id", ""))
        if isinstance(name, str) and name.startswith("__") and not name.endswith("__"):
            raise ValueError(f"its forward reads {name}, whose name belongs to its class")
    rename = _Rename(function)
    definition = rename.visit(definition)
    # nothing but the body is compiled again: defaults and annotations are the function's own
    for argument in (*definition.args.posonlyargs, *definition.args.args, *definition.args.kwonlyargs):
        argument.annotation = None
    for star in (definition.args.vararg, definition.args.kwarg):
        if star is not None:
            star.annotation = None
    definition.returns = None
    definition.args.defaults = [ast.Constant(None) for _ in definition.args.defaults]
    definition.args.kw_defaults = [d if d is None else ast.Constant(None) for d in definition.args.kw_defaults]
    names = [ast.arg(name) for name in (_INNER, *function.__code__.co_freevars)]
    outer = ast.FunctionDef(
        "make",
        ast.arguments([], names, None, [], [], None, []),
        [definition, ast.Return(ast.Name("forward", ast.Load()))],
        [],
    )
    if hasattr(outer, "type_params"):
        outer.type_params = []
    module = ast.fix_missing_locations(ast.Module([outer], []))
    ast.increment_lineno(module, function.__code__.co_firstlineno - 1)  # for tracebacks
    return module, function, rename.count


def count(base: type[nn.Module]) -> int:
    """How many direct calls of SDPA a class's forward has.

    Raises:
        ValueError: with the reason why its source does not tell what runs.
    """
    return _rewritten(base)[2]


def retargeted(base: type[nn.Module]) -> Callable[..., Any]:
    """A class's forward with those calls sent to ``run``."""
    tree, function, _ = _rewritten(base)
    scope: dict[str, Any] = {}
    exec(compile(tree, inspect.getsourcefile(function) or "<dlkern>", "exec"), scope)
    cells = function.__closure__ or ()
    made = scope["make"](run, *(None for _ in cells))
    given: dict[str, Any] = dict(zip(function.__code__.co_freevars, cells, strict=True))
    mine: dict[str, Any] = dict(zip(made.__code__.co_freevars, made.__closure__, strict=True))
    closure: Any = tuple(given.get(name, mine[name]) for name in made.__code__.co_freevars)
    forward = types.FunctionType(made.__code__, function.__globals__, "forward", function.__defaults__, closure)
    forward.__kwdefaults__ = function.__kwdefaults__
    return forward
