"""What the ops lstm, gru and rnn share: library ops, autograd Functions, the table of implementations.

Each op is one direction of one layer over a whole sequence, so that a compiled graph has one node for it whatever the
length. Arguments have been checked by :mod:`dlkern.functional` before anything here runs. Shapes are those of
kernels/reference/recurrent.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlkern import dispatch
from dlkern.kernels.reference.batch_norm_act import accumulate_dtype
from dlkern.kernels.reference.recurrent import Forward, Needs, Request

from . import library


class Weights(NamedTuple):
    """One direction of one layer; both biases are None or neither, weight_hr is None but for an LSTM's projection."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    hr: Tensor | None = None


class Family(NamedTuple):
    """One of the three ops: its name, its gates, and whether it has a cell state."""

    name: str
    gates: int
    has_cell: bool
    forward_op: Any
    backward_op: Any
    function: type[torch.autograd.Function]
    transformed: type[torch.autograd.Function]


def _default_order(name: str, request: Request) -> Sequence[str]:
    """By benchmarks/results/amd-epyc/recurrent.json: float32, one thread, as many inputs as hidden units.

    PyTorch hands an LSTM's whole sequences to oneDNN, which wins from three of them on; packed and projected ones it
    does not. A cell is a call of two products, in which there is something to win only in inference on a few rows.
    """
    if request.device != "cpu":
        return ("torch",)  # until a committed results file shows ours right and not slower
    if request.cell and (request.training or request.tiny or not request.few):
        return ("torch",)
    if name == "lstm" and not (request.few or request.one_step or request.packed or request.projected):
        return ("torch",)
    return ("cpu", "torch")


# ------------------------------------------------------------------------------------- one op
_INPUTS = (
    "Tensor x, Tensor? h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
    "Tensor? weight_hr, Tensor? batch_sizes, str activation, bool reverse, bool saves, str implementation"
)
_BACKWARD_INPUTS = (
    "Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor? h0, Tensor? c0, Tensor weight_ih, "
    "Tensor weight_hh, Tensor? weight_hr, Tensor? batch_sizes, Tensor output, Tensor? gates, Tensor? cells, "
    "Tensor? extra, str activation, bool reverse, bool[] needs, str implementation"
)
_SIX, _EIGHT = ", ".join(["Tensor"] * 6), ", ".join(["Tensor"] * 8)


def without_autocast(run: Callable[..., Any], device: str, *args: Any, **options: Any) -> Any:
    """Products inside of an implementation are in the dtype it was given."""
    if not torch.is_autocast_enabled(device):
        return run(*args, **options)
    with torch.autocast(device, enabled=False):
        return run(*args, **options)


def _runners(name: str) -> tuple[Callable[..., Forward], Callable[..., Any]]:
    def run_forward(*inputs: Any) -> Forward:
        *tensors, activation, reverse, saves, implementation = inputs
        return without_autocast(
            dispatch.implementation(name, implementation).forward,
            tensors[0].device.type,
            *tensors,
            activation=activation,
            reverse=reverse,
            saves=saves,
        )

    def run_backward(*inputs: Any) -> tuple[Tensor | None, ...]:
        *tensors, activation, reverse, needs, implementation = inputs
        return without_autocast(
            dispatch.implementation(name, implementation).backward,
            tensors[3].device.type,
            *tensors,
            activation=activation,
            reverse=reverse,
            needs=Needs(*needs),
        )

    return run_forward, run_backward


def _fakes(gates: int, has_cell: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward_fake(x: Tensor, h0: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
        weight_hh, weight_hr, batch_sizes, saves = inputs[2], inputs[5], inputs[6], inputs[9]
        hidden, outputs = weight_hh.size(0) // gates, weight_hh.size(1)
        rows = x.size(0) * x.size(1) if batch_sizes is None else x.size(0)
        batch = x.size(1) if batch_sizes is None else h0.size(0)  # type: ignore[union-attr]  # given with packed ones
        wide, none = accumulate_dtype(x.dtype), x.new_empty(0)

        def kept(width: int) -> Tensor:
            return x.new_empty((rows, width), dtype=wide)

        return (
            x.new_empty((*x.shape[:-1], outputs)),
            x.new_empty((batch, outputs)),
            x.new_empty((batch, hidden)) if has_cell else none,
            kept(gates * hidden) if saves and gates > 1 else x.new_empty(0),
            kept(hidden) if saves and has_cell else x.new_empty(0),
            kept(hidden) if saves and (weight_hr is not None or gates == 3) else x.new_empty(0),
        )

    def backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
        x, h0, c0, weight_ih, weight_hh, weight_hr = inputs[3:9]
        needs = Needs(*inputs[-2])
        bias = x.new_empty(weight_hh.size(0))
        made = (x, h0, c0, weight_ih, weight_hh, bias, bias, weight_hr)
        return tuple(
            torch.empty_like(t, memory_format=torch.contiguous_format) if need else x.new_empty(0)
            for t, need in zip(made, needs, strict=True)
        )

    return forward_fake, backward_fake


def _filled(x: Tensor, found: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """A library op returns tensors: an empty one stands for None."""
    return tuple(x.new_empty(0) if t is None else t for t in found)


def family(name: str, gates: int, has_cell: bool, double: Any) -> Family:
    """Define an op's library ops, Functions and table; of its reference, ``double``, double backward is made."""
    run_forward, run_backward = _runners(name)
    forward_fake, backward_fake = _fakes(gates, has_cell)
    outputs = 3 if has_cell else 2  # those that are differentiable
    forward_op = library.define(
        f"{name}({_INPUTS}) -> ({_SIX})", lambda *inputs: _filled(inputs[0], run_forward(*inputs)), forward_fake
    )
    backward_op = library.define(
        f"{name}_backward({_BACKWARD_INPUTS}) -> ({_EIGHT})",
        lambda *inputs: _filled(inputs[3], run_backward(*inputs)),
        backward_fake,
    )

    def save(ctx: Any, inputs: tuple[Any, ...], found: Sequence[Tensor | None]) -> None:
        *tensors, activation, reverse, _, implementation = inputs
        output, _, _, kept_gates, cells, extra = found
        present = (gates > 1, has_cell, gates == 3 or inputs[7] is not None)
        kept = (t if is_there else None for t, is_there in zip((kept_gates, cells, extra), present, strict=True))
        ctx.save_for_backward(*tensors, output, *kept)
        ctx.options = (activation, reverse)
        ctx.implementation = implementation
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5  # batch_sizes and what is no tensor
        incoming = (*grads[:outputs], *(None,) * (3 - outputs))
        like = next((g for g in incoming if g is not None), None)
        if like is None:
            return (*(None,) * 8, *nothing)
        *inputs, output, kept_gates, cells, extra = ctx.saved_tensors
        x, h0, c0, weight_ih, weight_hh, _, _, weight_hr, batch_sizes = inputs
        activation, reverse = ctx.options
        needs = Needs(*ctx.needs_input_grad[:8])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph=True: the gradient itself is differentiated, so it is composed of PyTorch's own ops
            again = without_autocast(
                double.forward, x.device.type, *inputs, activation=activation, reverse=reverse, saves=True
            )
            found = without_autocast(
                double.backward, x.device.type, *incoming, x, h0, c0, weight_ih, weight_hh, weight_hr, batch_sizes,
                again.output, *again[3:], activation=activation, reverse=reverse, needs=needs,
            )  # fmt: skip
        else:
            found = (run_backward if library.unwatched(like) else backward_op)(
                *incoming, x, h0, c0, weight_ih, weight_hh, weight_hr, batch_sizes, output, kept_gates, cells, extra,
                activation, reverse, list(needs), ctx.implementation,
            )  # fmt: skip
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *nothing)

    class Function(torch.autograd.Function):
        """(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, activation, reverse, True,
        implementation) -> output, h_n and, for an LSTM, c_n; see kernels/reference/recurrent.py for the shapes.

        Differentiable in the first eight. Double backward works (composed of PyTorch's own ops).
        """

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            found = (run_forward if library.unwatched(inputs[0]) else forward_op)(*inputs)
            save(ctx, inputs, found)
            return tuple(found[:outputs])

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            return gradients(ctx, *grads)

    class Transformed(Function):
        """The same for torch.func transforms, which need ``setup_context`` (and its cost per call)."""

        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
            return forward_op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            save(ctx, inputs, output)
            ctx.mark_non_differentiable(*output[outputs:])

        @staticmethod
        def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
            raise NotImplementedError(
                f"dlkern's {name} has no vmap: give the mapped dimension as the batch, or run PyTorch's own ops under "
                "dlkern.backend('torch') where they have one"
            )

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(
                f"dlkern's {name} has no forward-mode derivative: use reverse mode, or PyTorch's own ops under "
                "dlkern.backend('torch')"
            )

    Function.__name__ = Function.__qualname__ = f"{name.upper()}Function"
    Function.__module__ = f"dlkern.ops.{name}"
    dispatch.register(
        dispatch.Op(
            name,
            {
                "torch": "torch",
                "reference": f"dlkern.kernels.reference.{name}",
                "cpu": f"dlkern.kernels.cpu.{name}",
            },
            lambda request: _default_order(name, request),
        )
    )
    return Family(name, gates, has_cell, forward_op, backward_op, Function, Transformed)
