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
from dlkern.kernels.reference import recurrent_recompute
from dlkern.kernels.reference.batch_norm_act import accumulate_dtype
from dlkern.kernels.reference.recurrent import Forward, Gradients, Kept, Needs, Request
from dlkern.kernels.reference.recurrent_variants import PLAIN, Extras

from . import library


class Weights(NamedTuple):
    """One direction of one layer; both biases are None or neither, weight_hr is None but for an LSTM's projection.

    The rest are a variant's: with layer norm norm_ih and norm_hh, for an LSTM norm_c and norm_c_bias as well; an LSTM's
    peephole. Shapes are those of kernels/reference/recurrent_variants.py, norm_ih's that of norm_hh.
    """

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    hr: Tensor | None = None
    peephole: Tensor | None = None
    norm_hh: Tensor | None = None
    norm_c: Tensor | None = None
    norm_c_bias: Tensor | None = None
    norm_ih: Tensor | None = None


class Family(NamedTuple):
    """One of the three ops: its name, its gates, and whether it has a cell state."""

    name: str
    gates: int
    has_cell: bool
    forward_op: Any
    backward_op: Any
    function: type[torch.autograd.Function]
    transformed: type[torch.autograd.Function]
    reference: Any


def _default_order(name: str, request: Request) -> Sequence[str]:
    """By what benchmarks/bench_recurrent.py measures: float32, one thread, as many inputs as hidden units.

    PyTorch hands an LSTM's whole sequences to oneDNN, which wins from three of them on; packed and projected ones it
    does not. A cell is a call of two products, in which there is something to win only in inference on a few rows, and
    in an RNN, which has a fourth of the products, nothing.
    """
    if request.variant:  # "torch" is then a loop of PyTorch's ops
        return ("cpu", "torch")
    if request.device != "cpu":
        return ("torch",)  # until a committed results file shows ours right and not slower
    if request.cell and (name == "rnn" or request.training or request.tiny or not request.few):
        return ("torch",)
    if name == "lstm" and not (request.few or request.one_step or request.packed or request.projected):
        return ("torch",)
    return ("cpu", "torch")


# ------------------------------------------------------------------------------------- one op
_EXTRAS = ", ".join(f"Tensor? {name}=None" for name in Extras._fields)
_INPUTS = (
    "str activation, str recurrent_activation, bool reverse, bool saves, bool recompute, str implementation, "
    "Tensor x, Tensor? h0, Tensor? c0, Tensor? weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
    f"Tensor? weight_hr, Tensor? batch_sizes, {_EXTRAS}"
)
_BACKWARD_INPUTS = (
    "str activation, str recurrent_activation, bool reverse, bool[] needs, str implementation, "
    "Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells, Tensor x, Tensor? h0, Tensor? c0, "
    "Tensor? weight_ih, Tensor weight_hh, Tensor? weight_hr, Tensor? batch_sizes, "
    f"{', '.join(('Tensor output', *(f'Tensor? {name}' for name in Kept._fields[1:])))}, {_EXTRAS}"
)
_OPTIONS, _BACKWARD_OPTIONS = 6, 5  # arguments before the tensors
_SAVED = 9  # tensors of a call before those of its variant


def without_autocast(run: Callable[..., Any], device: str, *args: Any, **options: Any) -> Any:
    """Products inside of an implementation are in the dtype it was given."""
    if not library.autocasts(device):
        return run(*args, **options)
    with torch.autocast(device, enabled=False):
        return run(*args, **options)


def _extras(tensors: tuple[Tensor | None, ...]) -> Extras:
    """The extras of a call; PLAIN itself where there are none, by which implementations know PyTorch's own layer."""
    return Extras(*tensors) if any(t is not None for t in tensors) else PLAIN


def _runners(name: str) -> tuple[Callable[..., Forward], Callable[..., Any]]:
    def run_forward(
        activation: str,
        recurrent_activation: str,
        reverse: bool,
        saves: bool,
        recompute: bool,
        implementation: str,
        *tensors: Any,
    ) -> Forward:
        found = without_autocast(
            dispatch.implementation(name, implementation).forward,
            tensors[0].device.type,
            *tensors[:_SAVED],
            _extras(tensors[_SAVED:]),
            activation=activation,
            recurrent_activation=recurrent_activation,
            reverse=reverse,
            saves=saves,
        )
        return found._replace(gates=None, extra=None, normal=None, inverse=None) if recompute else found

    def run_backward(
        activation: str,
        recurrent_activation: str,
        reverse: bool,
        needs: Sequence[bool],
        implementation: str,
        *tensors: Any,
    ) -> Gradients:
        return without_autocast(
            dispatch.implementation(name, implementation).backward,
            tensors[4].device.type,
            *tensors[:11],
            Kept(*tensors[11 : 11 + len(Kept._fields)]),
            _extras(tensors[11 + len(Kept._fields) :]),
            activation=activation,
            recurrent_activation=recurrent_activation,
            reverse=reverse,
            needs=Needs(*needs),
        )

    return run_forward, run_backward


def present(gates: int, has_cell: bool, projected: bool, recompute: bool, extras: Extras) -> tuple[bool, ...]:
    """Which of gates, cells, extra, normal and inverse forward keeps."""
    normal = extras.norm_hh is not None
    found = (gates > 1 or extras.zoneout is not None, has_cell, gates == 3 or projected, normal, normal)
    return (False, has_cell, False, False, False) if recompute else found


def _fakes(gates: int, has_cell: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward_fake(*inputs: Any) -> tuple[Tensor, ...]:
        _, _, _, saves, recompute, _, x, h0, _, _, weight_hh, _, _, weight_hr, batch_sizes, *extras = inputs
        hidden, outputs = weight_hh.size(0) // gates, weight_hh.size(1)
        rows = x.size(0) * x.size(1) if batch_sizes is None else x.size(0)
        batch = x.size(1) if batch_sizes is None else h0.size(0)  # given with packed ones
        wide = accumulate_dtype(x.dtype)
        keeps = present(gates, has_cell, weight_hr is not None, recompute, Extras(*extras))
        widths = (gates * hidden, hidden, hidden, gates * hidden, 1)
        return (
            x.new_empty((*x.shape[:-1], outputs)),
            x.new_empty((batch, outputs)),
            x.new_empty((batch, hidden)) if has_cell else x.new_empty(0),
            *(
                x.new_empty((rows, width), dtype=wide) if saves and keep else x.new_empty(0)
                for keep, width in zip(keeps, widths, strict=True)
            ),
        )

    def backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
        needs = Needs(*inputs[3])
        x, h0, c0, weight_ih, weight_hh, weight_hr = inputs[_BACKWARD_OPTIONS + 4 : _BACKWARD_OPTIONS + 10]
        extras = Extras(*inputs[_BACKWARD_OPTIONS + 11 + len(Kept._fields) :])
        bias = x.new_empty(weight_hh.size(0))
        made = (x, h0, c0, weight_ih, weight_hh, bias, bias, weight_hr, *extras[:4])
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
    # the results of forward that are differentiable: output, h_n, and of an LSTM c_n and the cells of all steps
    results = (0, 1, 2, 4) if has_cell else (0, 1)
    forward_op = library.define(
        f"{name}({_INPUTS}) -> ({', '.join(['Tensor'] * len(Forward._fields))})",
        lambda *inputs: _filled(inputs[_OPTIONS], run_forward(*inputs)),
        forward_fake,
    )
    backward_op = library.define(
        f"{name}_backward({_BACKWARD_INPUTS}) -> ({', '.join(['Tensor'] * len(Needs._fields))})",
        lambda *inputs: _filled(inputs[_BACKWARD_OPTIONS + 4], run_backward(*inputs)),
        backward_fake,
    )

    def save(ctx: Any, inputs: tuple[Any, ...], found: Sequence[Tensor | None]) -> None:
        activation, recurrent_activation, reverse, _, recompute, implementation, *tensors = inputs
        extras = Extras(*tensors[_SAVED:]) if len(tensors) > _SAVED else PLAIN
        keeps = present(gates, has_cell, tensors[7] is not None, recompute, extras)
        kept = (t if is_there else None for t, is_there in zip(found[3:], keeps, strict=True))
        ctx.save_for_backward(found[0], *kept, *tensors)
        ctx.options = (activation, recurrent_activation, reverse)
        ctx.recompute = recompute
        ctx.implementation = implementation
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, incoming: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """From the gradients of output, h_n, c_n and cells."""
        needed = ctx.needs_input_grad[_OPTIONS:]
        like = next((g for g in incoming if g is not None), None)
        if like is None:
            return (None,) * (_OPTIONS + len(needed))
        kept = Kept(*ctx.saved_tensors[: len(Kept._fields)])
        tensors = ctx.saved_tensors[len(Kept._fields) :]
        x, h0, c0, weight_ih, weight_hh, _, _, weight_hr, batch_sizes, *rest = tensors
        extras = Extras(*rest) if rest else PLAIN
        activation, recurrent_activation, reverse = ctx.options
        options = {"activation": activation, "recurrent_activation": recurrent_activation, "reverse": reverse}
        needs = Needs(*needed[:8], *needed[_SAVED : _SAVED + 4]) if rest else Needs(*needed[:8])
        device = x.device.type
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph=True: the gradient itself is differentiated, so it is composed of PyTorch's own ops
            again = without_autocast(double.forward, device, *tensors[:_SAVED], extras, saves=True, **options)
            found = without_autocast(
                double.backward, device, *incoming, x, h0, c0, weight_ih, weight_hh, weight_hr, batch_sizes,
                Kept(again.output, *again[3:]), extras, needs=needs, **options,
            )  # fmt: skip
        else:
            if ctx.recompute:
                kept = without_autocast(
                    recurrent_recompute.kept, device, name, *tensors[:_SAVED], kept, extras, **options
                )
            found = (run_backward if library.unwatched(like) else backward_op)(
                activation, recurrent_activation, reverse, list(needs), ctx.implementation,
                *incoming, x, h0, c0, weight_ih, weight_hh, weight_hr, batch_sizes, *kept, *rest,
            )  # fmt: skip
        found = tuple(g if need else None for g, need in zip(found, needs, strict=True))
        return (*(None,) * _OPTIONS, *found[:8], None, *((*found[8:], None, None) if rest else ()))

    class Function(torch.autograd.Function):
        """(activation, recurrent_activation, reverse, True, recompute, implementation, x, h0, c0, weight_ih, weight_hh,
        bias_ih, bias_hh, weight_hr, batch_sizes[, peephole, norm_hh, norm_c, norm_c_bias, zoneout, dropout]) ->
        output, h_n and, for an LSTM, c_n and the cells of all steps, (N, H) in the dtype that is computed in.

        See kernels/reference/recurrent.py for the shapes. With ``recompute`` nothing but h, and of an LSTM c, is kept
        for backward, which makes the gates again. Differentiable in all tensors but batch_sizes, zoneout and dropout.
        Double backward works (composed of PyTorch's own ops).
        """

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            found = (run_forward if library.unwatched(inputs[_OPTIONS]) else forward_op)(*inputs)
            save(ctx, inputs, found)
            return tuple(found[i] for i in results)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            return gradients(ctx, grads if has_cell else (*grads, None, None))

    class Transformed(Function):
        """The same for torch.func transforms, which need ``setup_context`` (and its cost per call)."""

        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
            return forward_op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            save(ctx, inputs, output)
            ctx.mark_non_differentiable(*(t for i, t in enumerate(output) if i not in results))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            return gradients(ctx, (grads[0], grads[1], *((grads[2], grads[4]) if has_cell else (None, None))))

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
                "triton": f"dlkern.kernels.triton.{name}",
            },
            lambda request: _default_order(name, request),
        )
    )
    return Family(name, gates, has_cell, forward_op, backward_op, Function, Transformed, double)
