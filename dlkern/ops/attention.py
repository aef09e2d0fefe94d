"""softmax(scores + biases) @ value: library ops, autograd Functions, implementations.

Arguments have been checked, and brought to four dimensions, by :mod:`dlkern.functional` before anything here runs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlkern import dispatch
from dlkern.kernels.reference import attention as reference
from dlkern.kernels.reference.attention import Extras, Needs, Options, Request

from . import attention_torch, library

NAME = "attention"


def _default_order(request: Request) -> Sequence[str]:
    if request.device != "cpu" or request.dtype == torch.float64:
        return ("torch",)  # until a committed results file shows ours right and not slower
    # On the CPU PyTorch's kernel does nothing of this without a mask of queries x keys, and hides no work behind one;
    # benchmarks/bench_attention.py measures both. Plain attention is PyTorch's own, and so is what few queries hide
    # with a mask.
    asked = request._replace(mask="none") if request.short else request
    plain = (
        asked.mask == asked.bias == asked.table == "none"
        and not (asked.padding or asked.lengths or asked.slopes or asked.dropout or asked.banded or asked.softcap)
        and not asked.sequences
    )
    return ("torch",) if plain else ("cpu", "torch")


OP = dispatch.register(
    dispatch.Op(
        NAME,
        {
            "torch": "torch",
            "reference": "dlkern.kernels.reference.attention",
            "cpu": "dlkern.kernels.cpu.attention",
            "triton": "dlkern.kernels.triton.attention",
        },
        _default_order,
    )
)

_INPUTS = 3 + len(Extras._fields)
_OPTIONS = len(Options._fields)


# -------------------------------------------------------------------------------- library ops
def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """query, key, value, the fields of Extras and of Options, the implementation's name."""
    extras, options = Extras(*rest[: len(Extras._fields)]), Options(*rest[len(Extras._fields) : -1])
    return dispatch.implementation(NAME, rest[-1]).forward(query, key, value, extras, options=options)


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=reference.accumulate_dtype(query.dtype))
    return reference.empty_output(query, value.size(3)), lse


def _backward(grad_out: Tensor | None, grad_lse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """The gradients of out and LSE; query, key, value, Extras; out and LSE; Options, five Needs, the name."""
    query, key, value = rest[:3]
    gradients = dispatch.implementation(NAME, rest[-1]).backward(
        grad_out,
        grad_lse,
        query,
        key,
        value,
        Extras(*rest[3:_INPUTS]),
        *rest[_INPUTS : _INPUTS + 2],
        options=Options(*rest[_INPUTS + 2 : -2]),
        needs=Needs(*rest[-2]),
    )
    # a library op returns tensors: an empty one stands for None
    return tuple(query.new_empty(0) if g is None else g for g in gradients)


def _backward_fake(grad_out: Tensor | None, grad_lse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    query, key, value, mask, bias, table = rest[:6]
    needs = Needs(*rest[-2])
    absent = query.new_empty(0)
    return (
        reference.empty_output(query, query.size(3)) if needs.query else absent,
        *(reference.empty_output(t, t.size(3)) if needs.key_value else query.new_empty(0) for t in (key, value)),
        *(
            torch.empty_like(t, memory_format=torch.contiguous_format) if needed else query.new_empty(0)
            for t, needed in zip((mask, bias, table), needs[2:], strict=True)
        ),
    )


_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? table, Tensor? index, "
    "Tensor? padding, Tensor? lengths, Tensor? slopes, Tensor? seed, Tensor? cu_queries, Tensor? cu_keys"
)
_PLAIN = "float scale, SymInt? left, SymInt? right, SymInt offset, float softcap, float dropout_p, bool bottom_right"
forward_op = library.define(
    f"attention({_TENSORS}, {_PLAIN}, str implementation) -> (Tensor, Tensor)", _forward, _forward_fake
)
backward_op = library.define(
    f"attention_backward(Tensor? grad_out, Tensor? grad_lse, {_TENSORS}, Tensor out, Tensor lse, {_PLAIN}, "
    "bool[5] needs, str implementation) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


# ---------------------------------------------------------------------------------- autograd
class AttentionFunction(torch.autograd.Function):
    """softmax(scores + biases) @ value and LSE, by one implementation of the op.

    Arguments in order: query (B, H, Lq, D), key (B, Hk, Lk, D), value (B, Hk, Lk, Dv); mask, bias, table, index,
    padding, lengths, slopes, seed (each may be None) and scale, left, right, offset, softcap, dropout_p as in
    kernels/reference/attention.py; the implementation's name. Differentiable in query, key, value, a float mask, bias
    and table, from both outputs; double backward works (composed of PyTorch's own ops).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        outputs = (_forward if library.unwatched(inputs[0]) else forward_op)(*inputs)
        save(ctx, inputs, *outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients(ctx, grad_out, grad_lse, ctx.saved_tensors)


class _TransformedFunction(AttentionFunction):
    """The same for torch.func transforms, which need ``setup_context`` (and its cost per call)."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return forward_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        save(ctx, inputs, *output)


def save(ctx: Any, inputs: tuple[Any, ...], out: Tensor, lse: Tensor) -> None:
    """What backward needs: everything that forward was given, its output and LSE."""
    ctx.save_for_backward(*inputs[:_INPUTS], out, lse)
    ctx.options, ctx.implementation = inputs[_INPUTS:-1], inputs[-1]
    ctx.set_materialize_grads(False)


def gradients(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, saved: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    """What backward returns, from what ``save`` kept."""
    nothing = (None,) * (_INPUTS + _OPTIONS + 1)
    if grad_out is None and grad_lse is None:
        return nothing
    query, key, value, mask, bias, table = ctx.needs_input_grad[:6]
    needs = Needs(query, key or value, mask, bias, table)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # create_graph=True: the gradient itself is differentiated, so it is composed of PyTorch's own ops
        extras = Extras(*saved[3:_INPUTS])
        found: Any = reference.backward(
            grad_out, grad_lse, *saved[:3], extras, *saved[_INPUTS:], options=Options(*ctx.options), needs=needs
        )
    else:
        run: Any = _backward if library.unwatched(saved[0]) else backward_op
        found = run(grad_out, grad_lse, *saved, *ctx.options, list(needs), ctx.implementation)
    wanted = zip(found, ctx.needs_input_grad[:6], strict=True)
    return (*(g if needed else None for g, needed in wanted), *nothing[6:])


# --------------------------------------------------------------------------------- entry point
def request_of(query: Tensor, key: Tensor, value: Tensor, extras: Extras, options: Options) -> Request:
    """The request that a call makes."""
    mask, bias, table, index, padding, lengths, slopes, _, ends, _ = extras
    return Request(
        query.device.type,
        query.dtype,
        query.size(3),
        value.size(3),
        query.size(1) // key.size(1) if key.size(1) else 1,
        "none" if mask is None else "bool" if mask.dtype == torch.bool else "float",
        "none" if bias is None else "dense",
        "none" if table is None or index is None else "distances" if index.dim() == 1 else "positions",
        padding is not None,
        lengths is not None,
        slopes is not None,
        options.dropout_p > 0,
        options.left is not None or options.right is not None,
        options.softcap != 0,
        options.left is None and options.right == 0 and options.offset == 0 and not options.bottom_right,
        ends is not None,
        min(query.size(2), key.size(2)) < reference.SHORT,
    )


def _plain(value: Any) -> Any:
    """A field of a request of which the compiler has made up its mind: of symbolic sizes it guards on what it says."""
    if isinstance(value, bool):
        return library.plainly(value)
    return operator.index(value) if isinstance(value, int) else value


@dispatch.entry
def apply(
    query: Tensor, key: Tensor, value: Tensor, extras: Extras, options: Options, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Choose an implementation and run it, with autograd where a gradient is wanted; LSE where it is asked for."""
    request = request_of(query, key, value, extras, options)
    if torch.compiler.is_compiling():
        request = Request(*map(_plain, request))
    backend = dispatch.choose(NAME, request, query, key, value, extras.bias).backend
    if extras.cu_queries is not None and (backend == "torch" or query.numel() == 0 or key.numel() == 0):
        return attention_torch.sequences(query, key, value, extras, options, return_lse)
    if backend == "torch" or query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        if return_lse:
            return attention_torch.composed(query, key, value, extras, options)
        return attention_torch.run(query, key, value, extras, options), None
    if options.dropout_p:
        # drawn on the device: obeys torch.manual_seed, and is drawn anew when a CUDA graph is replayed
        extras = extras._replace(seed=torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=query.device))
    inputs = (query, key, value, *extras, *options, backend)
    # forward mode: a Function without a jvp raises, where an op without one would drop the tangent
    if library.transformed():
        out, lse = _TransformedFunction.apply(*inputs)
    elif library.wants_gradient(query, key, value, extras.mask, extras.bias, extras.table):
        out, lse = AttentionFunction.apply(*inputs)
    else:
        out, lse = (_forward if library.unwatched(query) else forward_op)(*inputs)
    return out, lse if return_lse else None
