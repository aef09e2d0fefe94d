"""Running recurrent layers: the choice of a backend, one layer, layers upon layers, one step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import _VF, Tensor
from torch.autograd import forward_ad

from dlkern import dispatch
from dlkern.kernels.reference.recurrent import FEW_SEQUENCES, TINY_WEIGHT, Request

from . import library
from .recurrent import Family, Weights, without_autocast


def layer(
    op: Family,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Weights,
    batch_sizes: Tensor | None,
    activation: str,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One direction of one layer by a backend that is not "torch": output, h_n, c_n (None but for an LSTM)."""
    tensors = (x, h0, c0, *weights, batch_sizes)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        # forward mode: a Function without a jvp raises, where an op without one would drop the tangent
        found = op.transformed.apply(*tensors, activation, reverse, True, backend)
    elif library.wants_gradient(x, h0, c0, *weights):
        found = op.function.apply(*tensors, activation, reverse, True, backend)
    elif library.unwatched(x):
        forward = dispatch.implementation(op.name, backend).forward
        found = without_autocast(forward, x.device.type, *tensors, activation=activation, reverse=reverse, saves=False)
    else:
        found = op.forward_op(*tensors, activation, reverse, False, backend)
    return found[0], found[1], found[2] if op.has_cell else None


def _plainly(condition: bool) -> bool:
    """A bool of which the compiler has made up its mind: of symbolic sizes a guard, not a value."""
    found = False
    if condition:
        found = True
    return found


def choose(
    op: Family,
    x: Tensor,
    batch: int,
    weights: Weights,
    activation: str,
    training: bool,
    *,
    one_step: bool,
    cell: bool,
    packed: bool,
    layers: int = 1,
) -> tuple[str, torch.dtype]:
    """The backend for a call, and the dtype in which it runs (autocast's, where that is on)."""
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    request = Request(
        device,
        dtype,
        activation,
        _plainly(batch <= FEW_SEQUENCES),
        _plainly(one_step),
        cell,
        _plainly(weights.ih.numel() + weights.hh.numel() <= TINY_WEIGHT),
        packed,
        weights.hr is not None,
        training,
    )
    return dispatch.choose(op.name, request, x, batch, weights.ih, weights.hh, layers).backend, dtype


@dispatch.entry
def run(
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
    """All layers and directions of a module.

    ``x`` is (T, B, I) or packed (N, I); h0 (layers * directions, B, P) and c0 (..., H) are given for packed sequences,
    otherwise None may stand for zero. ``layers`` has one entry per layer and direction, in PyTorch's order.
    Returns output, h_n and c_n.
    """
    packed = batch_sizes is not None
    batch = h0.size(1) if h0 is not None else x.size(1)
    one_step = not packed and x.size(0) == 1
    wants = library.wants_gradient(x, h0, c0, *layers[0])
    backend, dtype = choose(
        op, x, batch, layers[0], activation, wants, one_step=one_step, cell=False, packed=packed, layers=len(layers)
    )
    if backend == "torch" or x.numel() == 0:
        return _torch(op, x, h0, c0, layers, directions, batch_sizes, activation, dropout, training)
    if dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
        x, h0, c0 = (None if t is None else t.to(dtype) for t in (x, h0, c0))  # type: ignore[assignment]
        layers = [Weights(*(None if w is None else w.to(dtype) for w in weights)) for weights in layers]  # type: ignore[arg-type]
    if len(layers) == 1:
        h, c = h0 if h0 is None else h0.squeeze(0), c0 if c0 is None else c0.squeeze(0)
        output, h_n, c_n = layer(op, x, h, c, layers[0], batch_sizes, activation, False, backend)
        return output, h_n.unsqueeze(0), None if c_n is None else c_n.unsqueeze(0)
    h_ns, c_ns = [], []
    for index in range(0, len(layers), directions):
        outputs = []
        for direction in range(directions):
            at = index + direction
            h, c = h0 if h0 is None else h0[at], c0 if c0 is None else c0[at]
            output, h_n, c_n = layer(op, x, h, c, layers[at], batch_sizes, activation, direction == 1, backend)
            outputs.append(output)
            h_ns.append(h_n)
            c_ns.append(c_n)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and training and index + directions < len(layers):
            x = F.dropout(x, dropout, True)
    return x, torch.stack(h_ns), torch.stack(c_ns) if op.has_cell else None  # type: ignore[arg-type]


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
    weights = [w for each in layers for w in each if w is not None]
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
    activation: str,
    check: Callable[[], None],
) -> tuple[Tensor, Tensor | None]:
    """One step of one layer: x (B, I), h (B, H), c (B, H); the new h and c.

    ``check`` raises where the tensors do not fit together. It is called before a kernel of dlkern's runs, but where
    PyTorch's own step runs only once that refused: both check as much, and a step has no time to do it twice.
    """
    wants = library.wants_gradient(x, h, c, *weights)
    backend, dtype = choose(op, x, x.size(0), weights, activation, wants, one_step=True, cell=True, packed=False)
    if backend == "torch" or x.numel() == 0:
        if torch.compiler.is_compiling():
            check()
            return _torch_cell(op, x, h, c, weights, activation)
        try:
            return _torch_cell(op, x, h, c, weights, activation)
        except (RuntimeError, IndexError):
            check()
            raise
    check()
    if dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
        x, h, c = (None if t is None else t.to(dtype) for t in (x, h, c))  # type: ignore[assignment]
        weights = Weights(*(None if w is None else w.to(dtype) for w in weights))  # type: ignore[arg-type]
    _, h_n, c_n = layer(op, x.unsqueeze(0), h, c, weights, None, activation, False, backend)
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
