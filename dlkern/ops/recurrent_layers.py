"""Running recurrent layers: the choice of a backend, one layer, layers upon layers, one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import _VF, Tensor

from dlkern import dispatch
from dlkern.kernels.reference.recurrent import FEW_SEQUENCES, TINY_WEIGHT, Request
from dlkern.kernels.reference.recurrent_variants import EPS, PLAIN, Extras

from . import library
from .recurrent import Family, Weights, without_autocast


class Variant(NamedTuple):
    """What a layer does that torch.nn's does not, apart from its weights; an RNN's ``activation`` may be "relu".

    ``zoneout`` and ``recurrent_dropout`` are probabilities. ``all_cells``: the cells of all steps are wanted.
    """

    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"
    zoneout: float = 0.0
    recurrent_dropout: float = 0.0
    memory_efficient: bool = False
    all_cells: bool = False


#: torch.nn's own.
STOCK = Variant()


def _is_stock(op: Family, variant: Variant, weights: Weights) -> bool:
    if variant is not STOCK:
        stock = variant._replace(activation="tanh") if op.name == "rnn" and variant.activation == "relu" else variant
        if stock != STOCK:
            return False
    return weights.norm_hh is None and weights.peephole is None


def layer(
    op: Family,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Weights,
    batch_sizes: Tensor | None,
    variant: Variant,
    reverse: bool,
    backend: str,
    extras: Extras = PLAIN,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One direction of one layer by a backend that is not "torch", or a variant by any.

    Returns output, h_n and, of an LSTM, c_n and with ``all_cells`` the cells of all steps, (N, H).
    """
    tensors: tuple[Tensor | None, ...] = (x, h0, c0, *weights[:5], batch_sizes)
    activation, recurrent_activation, _, _, recompute, all_cells = variant
    if extras is not PLAIN:
        tensors = (*tensors, *extras)
    if backend == "torch":
        found = without_autocast(
            op.reference.forward, x.device.type, *tensors[:9], extras, activation=activation,
            recurrent_activation=recurrent_activation, reverse=reverse, saves=all_cells,
        )  # fmt: skip
        cells = found[4]
    elif library.transformed():
        # forward mode: a Function without a jvp raises, where an op without one would drop the tangent
        found = op.transformed.apply(activation, recurrent_activation, reverse, True, recompute, backend, *tensors)
        cells = found[4]
    elif library.wants_gradient(*tensors):
        found = op.function.apply(activation, recurrent_activation, reverse, True, recompute, backend, *tensors)
        cells = found[-1]
    elif library.unwatched(x):
        found = without_autocast(
            dispatch.implementation(op.name, backend).forward, x.device.type, *tensors[:9], extras,
            activation=activation, recurrent_activation=recurrent_activation, reverse=reverse, saves=all_cells,
        )  # fmt: skip
        cells = found[4]
    else:
        found = op.forward_op(activation, recurrent_activation, reverse, all_cells, False, backend, *tensors)
        cells = found[4]
    return found[0], found[1], found[2] if op.has_cell else None, cells if all_cells else None


def _varied(
    op: Family, x: Tensor, weights: Weights, variant: Variant, batch: int, training: bool
) -> tuple[Tensor, Weights, Extras]:
    """The input, the weights and the extras of one direction of a variant; random masks are drawn here."""
    outputs = weights.hh.size(1)
    zoneout = dropout = None
    if variant.zoneout:
        zoneout = x.new_full((x[..., 0].numel(), outputs), variant.zoneout)
        if training:
            zoneout = torch.bernoulli(zoneout)
    if variant.recurrent_dropout and training:
        keep = 1.0 - variant.recurrent_dropout
        dropout = torch.bernoulli(x.new_full((batch, outputs), keep))
        dropout = dropout / keep if keep else dropout
    if weights.norm_ih is not None:
        projected = F.linear(x, weights.ih)
        x = F.layer_norm(projected, projected.shape[-1:], weights.norm_ih, weights.bias_ih, EPS).to(x.dtype)
        weights = weights._replace(ih=None, bias_ih=None)  # type: ignore[arg-type]
    return x, weights, Extras(*weights[5:9], zoneout, dropout)


def _breaks_graphs(op: Family, request: Request) -> bool:
    """Whether PyTorch's own sequence has a backward that no compiled graph can hold, and nobody insists on it.

    oneDNN's LSTM on the CPU saves an undefined tensor, which AOTAutograd refuses to hand from forward to backward.
    """
    training = op.name == "lstm" and request.device == "cpu" and request.training and not request.cell
    return training and dispatch.forced(op.name) is None


def choose(
    op: Family,
    x: Tensor,
    batch: int,
    weights: Weights,
    variant: Variant,
    training: bool,
    *,
    one_step: bool,
    cell: bool,
    packed: bool,
    layers: int = 1,
) -> tuple[str, torch.dtype]:
    """The backend for a call, and the dtype in which it runs (autocast's, where that is on)."""
    device, dtype = x.device.type, x.dtype
    if library.autocasts(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    stock = _is_stock(op, variant, weights)
    request = Request(
        device,
        dtype,
        variant.activation,
        library.plainly(batch <= FEW_SEQUENCES),
        library.plainly(one_step),
        cell,
        library.plainly(weights.ih.numel() + weights.hh.numel() <= TINY_WEIGHT),
        packed,
        weights.hr is not None,
        training,
        *(() if stock else _asked(variant, weights)),
    )
    backend = dispatch.choose(op.name, request, x, batch, weights.ih, weights.hh, layers).backend
    if backend == "torch" and torch.compiler.is_compiling() and stock and _breaks_graphs(op, request):
        backend = dispatch.first_supporting(op.name, ("cpu", "reference"), request)
    return backend, dtype


def _asked(variant: Variant, weights: Weights) -> tuple[bool, str, bool, bool, bool, bool]:
    """The last fields of a request for a variant."""
    normed, peeps = weights.norm_hh is not None, weights.peephole is not None
    return True, variant.recurrent_activation, normed, peeps, bool(variant.zoneout), bool(variant.recurrent_dropout)


@dispatch.entry
def run(
    op: Family,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    layers: list[Weights],
    directions: int,
    batch_sizes: Tensor | None,
    variant: Variant,
    dropout: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """All layers and directions of a module.

    ``x`` is (T, B, I) or packed (N, I); h0 (layers * directions, B, P) and c0 (..., H) are given for packed sequences,
    otherwise None may stand for zero. ``layers`` has one entry per layer and direction, in PyTorch's order.
    Returns output, h_n, c_n, and with ``all_cells`` the cells of all steps of the last layer, in the form of output.
    """
    packed = batch_sizes is not None
    batch = h0.size(1) if h0 is not None else x.size(1)
    one_step = not packed and x.size(0) == 1
    wants = library.wants_gradient(x, h0, c0, *layers[0])
    backend, dtype = choose(
        op, x, batch, layers[0], variant, wants, one_step=one_step, cell=False, packed=packed, layers=len(layers)
    )
    stock = _is_stock(op, variant, layers[0])
    if stock and (backend == "torch" or x.numel() == 0):
        found = _torch(op, x, h0, c0, layers, directions, batch_sizes, variant.activation, dropout, training)
        return (*found, None)
    if x.numel() == 0:  # nothing to launch a kernel for
        backend = "torch"
    x, h0, c0, layers = _cast(x, h0, c0, layers, dtype)
    if stock and len(layers) == 1:
        h, c = h0 if h0 is None else h0.squeeze(0), c0 if c0 is None else c0.squeeze(0)
        output, h_n, c_n, _ = layer(op, x, h, c, layers[0], batch_sizes, variant, False, backend)
        return output, h_n.unsqueeze(0), None if c_n is None else c_n.unsqueeze(0), None
    h_ns, c_ns = [], []
    for index in range(0, len(layers), directions):
        outputs, every = [], []
        for direction in range(directions):
            at = index + direction
            given, weights, extras = x, layers[at], PLAIN
            if not stock:
                given, weights, extras = _varied(op, x, weights, variant, batch, training)
            h, c = h0 if h0 is None else h0[at], c0 if c0 is None else c0[at]
            output, h_n, c_n, cells = layer(
                op, given, h, c, weights, batch_sizes, variant, direction == 1, backend, extras
            )
            outputs.append(output)
            h_ns.append(h_n)
            c_ns.append(c_n)
            if cells is not None:
                every.append(cells.to(output.dtype).view(*output.shape[:-1], -1))
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and training and index + directions < len(layers):
            x = F.dropout(x, dropout, True)
    return (
        x,
        torch.stack(h_ns),
        torch.stack(c_ns) if op.has_cell else None,  # type: ignore[arg-type]
        torch.cat(every, -1) if every else None,
    )


def _cast(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, layers: list[Weights], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Weights]]:
    """Everything in the dtype that autocast asks for, once a call."""
    if dtype == x.dtype and not library.autocasts(x.device.type):
        return x, h0, c0, layers
    x, h0, c0 = (None if t is None else t.to(dtype) for t in (x, h0, c0))  # type: ignore[assignment]
    return x, h0, c0, [Weights(*(None if w is None else w.to(dtype) for w in weights)) for weights in layers]  # type: ignore[arg-type]


def _torch(
    op: Family,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    layers: list[Weights],
    directions: int,
    batch_sizes: Tensor | None,
    activation: str,
    dropout: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same by PyTorch."""
    first = layers[0]
    if h0 is None:
        h0 = x.new_zeros(len(layers), x.size(1), first.hh.size(1))
    if op.has_cell and c0 is None:
        c0 = x.new_zeros(len(layers), x.size(1), first.hh.size(0) // op.gates)
    hx = (h0, c0) if op.has_cell else h0
    call = getattr(_VF, f"rnn_{activation}" if op.name == "rnn" else op.name)
    weights = [w for each in layers for w in each[:5] if w is not None]
    options = (first.bias_ih is not None, len(layers) // directions, dropout, training, directions == 2)
    if batch_sizes is None:
        found = call(x, hx, weights, *options, False)
    else:
        found = call(x, batch_sizes, hx, weights, *options)
    return found[0], found[1], found[2] if op.has_cell else None


@dispatch.entry
def cell(
    op: Family,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Weights,
    variant: Variant,
    training: bool,
    check: Callable[[], None],
) -> tuple[Tensor, Tensor | None]:
    """One step of one layer: x (B, I), h (B, H), c (B, H); the new h and c.

    ``check`` raises where the tensors do not fit together. It is called before a kernel of dlkern's runs, but where
    PyTorch's own step runs only once that refused: both check as much, and a step has no time to do it twice.
    """
    wants = library.wants_gradient(x, h, c, *weights)
    backend, dtype = choose(op, x, x.size(0), weights, variant, wants, one_step=True, cell=True, packed=False)
    stock = _is_stock(op, variant, weights)
    if stock and (backend == "torch" or x.numel() == 0):
        if torch.compiler.is_compiling():
            check()
            return _torch_cell(op, x, h, c, weights, variant.activation)
        try:
            return _torch_cell(op, x, h, c, weights, variant.activation)
        except (RuntimeError, IndexError):
            check()
            raise
    check()
    if x.numel() == 0:
        backend = "torch"
    x, h, c, (weights,) = _cast(x, h, c, [weights], dtype)
    extras = PLAIN
    if not stock:
        x, weights, extras = _varied(op, x, weights, variant, x.size(0), training)
    _, h_n, c_n, _ = layer(op, x.unsqueeze(0), h, c, weights, None, variant, False, backend, extras)
    return h_n, c_n


def _torch_cell(
    op: Family, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Weights, activation: str
) -> tuple[Tensor, Tensor | None]:
    if h is None or (c is None and op.has_cell):
        zeros = x.new_zeros(x.size(0), weights.hh.size(1))
        h, c = zeros if h is None else h, zeros if c is None else c
    if op.has_cell:
        return _VF.lstm_cell(x, (h, c), *weights[:4])  # type: ignore[arg-type]
    if op.name == "gru":
        return _VF.gru_cell(x, h, *weights[:4]), None
    return (_VF.rnn_relu_cell if activation == "relu" else _VF.rnn_tanh_cell)(x, h, *weights[:4]), None
