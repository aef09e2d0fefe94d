"""A whole sequence of a small recurrent layer on the device: a program walks all steps of a tile of batch elements.

Its h, and of an LSTM its c, stay in registers, and no program waits for another. The recurrent weight is read from the
cache at every step. Names and shapes are those of recurrent_cells.py; ``offsets`` (T,) int64 and ``sizes`` (T,) int32
are the steps' first rows and numbers of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import activation as act
from . import recurrent_cells as cell
from .implicit_gemm import product
from .recurrent_cells import GRU, LSTM, RNN
from .recurrent_steps import _columns


@triton.jit
def _state(pointer, at, mask, dtype: tl.constexpr):
    if pointer is None:  # noqa: SIM108
        v = tl.zeros(mask.shape, dtype)
    else:
        v = tl.load(pointer + at, mask=mask, other=0.0).to(dtype)
    return v


@triton.jit(do_not_specialize=["steps", "batch"])
def sequence_forward_kernel(
    gates, weight, bias_hh, h0, output, state, cells, extra, offsets, sizes, steps, batch, hidden,
    FAMILY: tl.constexpr, GATES: tl.constexpr, CODE: tl.constexpr, SAVES: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """All steps of BLOCK_M batch elements; BLOCK_H is at least ``hidden``. ``state`` is c, in and out."""
    dtype: tl.constexpr = gates.dtype.element_ty
    narrow: tl.constexpr = output.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_H)
    known = n < hidden
    here = m[:, None] * hidden + n[None, :]
    owned = (m < batch)[:, None] & known[None, :]
    h = _state(h0, here, owned, dtype)
    c = tl.zeros([BLOCK_M, BLOCK_H], dtype)
    if FAMILY == LSTM:
        c = tl.load(state + here, mask=owned, other=0.0)
    w = weight + n[None, :] * hidden + n[:, None]
    inside = known[:, None] & known[None, :]
    step = hidden * hidden
    b0 = _columns(bias_hh, n, known, dtype)
    for i in range(steps):
        t = steps - 1 - i if REVERSE else i
        row = tl.load(offsets + t) + m
        exists = (m < tl.load(sizes + t))[:, None] & known[None, :]
        x = gates + (row * GATES * hidden)[:, None] + n[None, :]
        at = (row * hidden)[:, None] + n[None, :]
        source = h.to(narrow)
        zero = tl.zeros([BLOCK_M, BLOCK_H], dtype)
        a0 = product(source, tl.load(w, mask=inside, other=0.0), zero, PRECISION) + b0
        x0 = tl.load(x, mask=exists, other=0.0)
        if FAMILY == RNN:
            new = act.forward(x0 + a0, CODE, 0.0)
        else:
            a1 = product(source, tl.load(w + step, mask=inside, other=0.0), zero, PRECISION)
            a2 = product(source, tl.load(w + 2 * step, mask=inside, other=0.0), zero, PRECISION)
            a1 += _columns(bias_hh, hidden + n, known, dtype)
            a2 += _columns(bias_hh, 2 * hidden + n, known, dtype)
            x1 = tl.load(x + hidden, mask=exists, other=0.0)
            x2 = tl.load(x + 2 * hidden, mask=exists, other=0.0)
            if FAMILY == GRU:
                x0, x1, x2, new = cell.gru_forward(x0, x1, x2, a0, a1, a2, h, CODE)
                if SAVES:
                    tl.store(extra + at, a2, mask=exists)
            else:
                a3 = product(source, tl.load(w + 3 * step, mask=inside, other=0.0), zero, PRECISION)
                a3 += _columns(bias_hh, 3 * hidden + n, known, dtype)
                x3 = tl.load(x + 3 * hidden, mask=exists, other=0.0)
                x0, x1, x2, x3, now = cell.lstm_forward(x0 + a0, x1 + a1, x2 + a2, x3 + a3, c, CODE)
                c = tl.where(exists, now, c)
                new = x3 * act.forward(now, CODE, 0.0)
                if SAVES:
                    tl.store(cells + at, now, mask=exists)
                    tl.store(x + 3 * hidden, x3, mask=exists)
            if SAVES:
                tl.store(x, x0, mask=exists)
                tl.store(x + hidden, x1, mask=exists)
                tl.store(x + 2 * hidden, x2, mask=exists)
        # as it is stored, so that every kernel goes on from the same h
        new = new.to(narrow)
        tl.store(output + at, new, mask=exists)
        h = tl.where(exists, new.to(dtype), h)
    if FAMILY == LSTM:
        tl.store(state + here, c, mask=owned)


@triton.jit(do_not_specialize=["steps", "batch"])
def sequence_backward_kernel(
    weight, grad_output, grad_h, grad_c, grad_cells, gates, cells, extra, output, h0, c0, grad_gates, grad_recurrent,
    offsets, sizes, steps, batch, hidden,
    FAMILY: tl.constexpr, GATES: tl.constexpr, CODE: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """All steps of BLOCK_M batch elements. ``grad_h`` and ``grad_c`` (B, H): those of the final states in, of the
    initial ones out.
    """
    dtype: tl.constexpr = grad_gates.dtype.element_ty
    narrow: tl.constexpr = weight.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_H)
    known = n < hidden
    here = m[:, None] * hidden + n[None, :]
    owned = (m < batch)[:, None] & known[None, :]
    carried = tl.load(grad_h + here, mask=owned, other=0.0)
    carried_c = tl.zeros([BLOCK_M, BLOCK_H], dtype)
    if FAMILY == LSTM:
        carried_c = tl.load(grad_c + here, mask=owned, other=0.0)
    w = weight + n[:, None] * hidden + n[None, :]
    inside = known[:, None] & known[None, :]
    step = hidden * hidden
    for i in range(steps):
        t = i if REVERSE else steps - 1 - i
        earlier = t + 1 if REVERSE else t - 1
        there = (earlier >= 0) & (earlier < steps)
        row = tl.load(offsets + t) + m
        exists = (m < tl.load(sizes + t))[:, None] & known[None, :]
        earlier_batch = tl.load(sizes + earlier, mask=there, other=0)
        before = ((tl.load(offsets + earlier, mask=there, other=0) + m) * hidden)[:, None] + n[None, :]
        runs = exists & (m < earlier_batch)[:, None]
        begins = exists & (m >= earlier_batch)[:, None]
        at = (row * hidden)[:, None] + n[None, :]
        to = (row * GATES * hidden)[:, None] + n[None, :]
        dh = carried
        if grad_output is not None:
            dh += tl.load(grad_output + at, mask=exists, other=0.0).to(dtype)
        zero = tl.zeros([BLOCK_M, BLOCK_H], dtype)
        if FAMILY == RNN:
            y = tl.load(output + at, mask=exists, other=0.0).to(dtype)
            d0 = tl.where(exists, act.gradient_from_output(dh, y, CODE, 0.0), 0.0)
            tl.store(grad_gates + to, d0, mask=exists)
            moved = product(d0.to(narrow), tl.load(w, mask=inside, other=0.0), zero, PRECISION)
        else:
            g0 = tl.load(gates + to, mask=exists, other=0.0)
            g1 = tl.load(gates + to + hidden, mask=exists, other=0.0)
            g2 = tl.load(gates + to + 2 * hidden, mask=exists, other=0.0)
            if FAMILY == GRU:
                h = tl.load(output + before, mask=runs, other=0.0).to(dtype) + _state(h0, here, begins, dtype)
                d0, d1, d2 = cell.gru_backward(dh, g0, g1, g2, tl.load(extra + at, mask=exists, other=0.0), h, CODE)
                tl.store(grad_gates + to + 2 * hidden, d2, mask=exists)
                d2 = d2 * g0
                tl.store(grad_recurrent + to, d0, mask=exists)
                tl.store(grad_recurrent + to + hidden, d1, mask=exists)
                tl.store(grad_recurrent + to + 2 * hidden, d2, mask=exists)
                zero = dh * g1
            else:
                g3 = tl.load(gates + to + 3 * hidden, mask=exists, other=0.0)
                bent = act.forward(tl.load(cells + at, mask=exists, other=0.0), CODE, 0.0)
                c = tl.load(cells + before, mask=runs, other=0.0) + _state(c0, here, begins, dtype)
                dc = carried_c + act.gradient_from_output(dh * g3, bent, CODE, 0.0)
                if grad_cells is not None:
                    dc += tl.load(grad_cells + at, mask=exists, other=0.0)
                d0, d1, d2, dc = cell.lstm_backward(dc, g0, g1, g2, c, CODE)
                carried_c = tl.where(exists, dc, carried_c)
                d3 = cell.gate_slope(dh * bent, g3)
                tl.store(grad_gates + to + 2 * hidden, d2, mask=exists)
                tl.store(grad_gates + to + 3 * hidden, d3, mask=exists)
                zero = product(d3.to(narrow), tl.load(w + 3 * step, mask=inside, other=0.0), zero, PRECISION)
            tl.store(grad_gates + to, d0, mask=exists)
            tl.store(grad_gates + to + hidden, d1, mask=exists)
            moved = product(d0.to(narrow), tl.load(w, mask=inside, other=0.0), zero, PRECISION)
            moved = product(d1.to(narrow), tl.load(w + step, mask=inside, other=0.0), moved, PRECISION)
            moved = product(d2.to(narrow), tl.load(w + 2 * step, mask=inside, other=0.0), moved, PRECISION)
        carried = tl.where(exists, moved, carried)
    tl.store(grad_h + here, carried, mask=owned)
    if FAMILY == LSTM:
        tl.store(grad_c + here, carried_c, mask=owned)
