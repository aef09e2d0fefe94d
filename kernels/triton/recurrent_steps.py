"""One step of a recurrent layer on the device: the product with the recurrent weight and the gates in one kernel.

A program owns a tile of batch elements and units, and makes the product for every gate of its units. Names and shapes
are those of recurrent_cells.py; weights are PyTorch's (G H, H).
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import activation as act
from . import recurrent_cells as cell
from .implicit_gemm import product
from .recurrent_cells import GRU, RNN, STEP_SIZES


@triton.jit
def _before(kept, first, before, m, before_batch, batch, columns, known, width, dtype: tl.constexpr):
    """[rows, columns] of what the step before left in ``kept``, of the initial state (None: 0) where it left none."""
    there = (m < before_batch)[:, None] & known[None, :]
    v = tl.load(kept + ((before.to(tl.int64) + m) * width)[:, None] + columns[None, :], mask=there, other=0.0)
    v = v.to(dtype)
    if first is not None:
        joins = ((m >= before_batch) & (m < batch))[:, None] & known[None, :]
        v += tl.load(first + (m.to(tl.int64) * width)[:, None] + columns[None, :], mask=joins, other=0.0).to(dtype)
    return v


@triton.jit
def _columns(pointer, n, known, dtype: tl.constexpr):
    if pointer is None:
        v = tl.zeros([1, n.shape[0]], dtype)
    else:
        v = tl.load(pointer + n, mask=known, other=0.0).to(dtype)[None, :]
    return v


@triton.jit(do_not_specialize=STEP_SIZES)
def step_forward_kernel(
    gates, weight, bias_hh, h0, output, state, cells, extra, offset, before, batch, before_batch, hidden,
    FAMILY: tl.constexpr, GATES: tl.constexpr, CODE: tl.constexpr, SAVES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of a step; see recurrent_cells.cell_forward_kernel."""
    dtype: tl.constexpr = gates.dtype.element_ty
    narrow: tl.constexpr = output.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = n < hidden
    exists = (m < batch)[:, None] & known[None, :]
    a0 = tl.zeros([BLOCK_M, BLOCK_N], dtype)
    a1 = tl.zeros([BLOCK_M, BLOCK_N], dtype)
    a2 = tl.zeros([BLOCK_M, BLOCK_N], dtype)
    a3 = tl.zeros([BLOCK_M, BLOCK_N], dtype)
    step = (tl.zeros([], tl.int64) + hidden) * hidden
    for i in range((hidden + BLOCK_K - 1) // BLOCK_K):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        h = _before(output, h0, before, m, before_batch, batch, k, k < hidden, hidden, narrow)
        w = weight + (n.to(tl.int64) * hidden)[None, :] + k[:, None]
        inside = (k < hidden)[:, None] & known[None, :]
        a0 = product(h, tl.load(w, mask=inside, other=0.0), a0, PRECISION)
        if GATES > 1:
            a1 = product(h, tl.load(w + step, mask=inside, other=0.0), a1, PRECISION)
            a2 = product(h, tl.load(w + 2 * step, mask=inside, other=0.0), a2, PRECISION)
        if GATES > 3:
            a3 = product(h, tl.load(w + 3 * step, mask=inside, other=0.0), a3, PRECISION)
    row = offset.to(tl.int64) + m
    at = (row * hidden)[:, None] + n[None, :]
    x = gates + (row * GATES * hidden)[:, None] + n[None, :]
    a0 += _columns(bias_hh, n, known, dtype)
    x0 = tl.load(x, mask=exists, other=0.0)
    if FAMILY == RNN:
        h = act.forward(x0 + a0, CODE, 0.0)
    else:
        a1 += _columns(bias_hh, hidden + n, known, dtype)
        a2 += _columns(bias_hh, 2 * hidden + n, known, dtype)
        x1 = tl.load(x + hidden, mask=exists, other=0.0)
        x2 = tl.load(x + 2 * hidden, mask=exists, other=0.0)
        if FAMILY == GRU:
            h = _before(output, h0, before, m, before_batch, batch, n, known, hidden, dtype)
            x0, x1, x2, h = cell.gru_forward(x0, x1, x2, a0, a1, a2, h, CODE)
            if SAVES:
                tl.store(extra + at, a2, mask=exists)
        else:
            a3 += _columns(bias_hh, 3 * hidden + n, known, dtype)
            x3 = tl.load(x + 3 * hidden, mask=exists, other=0.0)
            states = state + (m.to(tl.int64) * hidden)[:, None] + n[None, :]
            c = tl.load(states, mask=exists, other=0.0)
            x0, x1, x2, x3, c = cell.lstm_forward(x0 + a0, x1 + a1, x2 + a2, x3 + a3, c, CODE)
            tl.store(states, c, mask=exists)
            h = x3 * act.forward(c, CODE, 0.0)
            if SAVES:
                tl.store(cells + at, c, mask=exists)
                tl.store(x + 3 * hidden, x3, mask=exists)
        if SAVES:
            tl.store(x, x0, mask=exists)
            tl.store(x + hidden, x1, mask=exists)
            tl.store(x + 2 * hidden, x2, mask=exists)
    tl.store(output + at, h.to(narrow), mask=exists)


@triton.jit(do_not_specialize=[*STEP_SIZES, "after", "after_batch"])
def step_backward_kernel(
    weight, grad_output, grad_h, grad_c, grad_cells, gates, cells, extra, output, h0, c0, grad_gates, grad_recurrent,
    offset, before, batch, before_batch, after, after_batch, hidden,
    FAMILY: tl.constexpr, GATES: tl.constexpr, CODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of a step; see recurrent_cells.cell_backward_kernel.

    The gradient of h also has the product of the step after, whose ``after_batch`` rows begin at ``after`` in
    ``grad_recurrent`` (an LSTM's and an RNN's is ``grad_gates``).
    """
    dtype: tl.constexpr = grad_gates.dtype.element_ty
    narrow: tl.constexpr = weight.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = n < hidden
    exists = (m < batch)[:, None] & known[None, :]
    width = GATES * hidden
    dh = tl.zeros([BLOCK_M, BLOCK_N], dtype)
    if after_batch > 0:
        source = grad_recurrent + ((after.to(tl.int64) + m) * width)[:, None]
        for i in range((width + BLOCK_K - 1) // BLOCK_K):
            k = i * BLOCK_K + tl.arange(0, BLOCK_K)
            a = tl.load(source + k[None, :], mask=(m < after_batch)[:, None] & (k < width)[None, :], other=0.0)
            w = weight + (k.to(tl.int64) * hidden)[:, None] + n[None, :]
            w = tl.load(w, mask=(k < width)[:, None] & known[None, :], other=0.0)
            dh = product(a.to(narrow), w, dh, PRECISION)
    row = offset.to(tl.int64) + m
    at = (row * hidden)[:, None] + n[None, :]
    here = (m.to(tl.int64) * hidden)[:, None] + n[None, :]
    dh += tl.load(grad_h + here, mask=exists, other=0.0)
    if grad_output is not None:
        dh += tl.load(grad_output + at, mask=exists, other=0.0).to(dtype)
    passing = tl.zeros([BLOCK_M, BLOCK_N], dtype)
    to = (row * width)[:, None] + n[None, :]
    if FAMILY == RNN:
        y = tl.load(output + at, mask=exists, other=0.0).to(dtype)
        tl.store(grad_gates + to, act.gradient_from_output(dh, y, CODE, 0.0), mask=exists)
    else:
        g0 = tl.load(gates + to, mask=exists, other=0.0)
        g1 = tl.load(gates + to + hidden, mask=exists, other=0.0)
        g2 = tl.load(gates + to + 2 * hidden, mask=exists, other=0.0)
        if FAMILY == GRU:
            h = _before(output, h0, before, m, before_batch, batch, n, known, hidden, dtype)
            part = tl.load(extra + at, mask=exists, other=0.0)
            d0, d1, d2 = cell.gru_backward(dh, g0, g1, g2, part, h, CODE)
            passing = dh * g1
            tl.store(grad_recurrent + to, d0, mask=exists)
            tl.store(grad_recurrent + to + hidden, d1, mask=exists)
            tl.store(grad_recurrent + to + 2 * hidden, d2 * g0, mask=exists)
        else:
            g3 = tl.load(gates + to + 3 * hidden, mask=exists, other=0.0)
            bent = act.forward(tl.load(cells + at, mask=exists, other=0.0), CODE, 0.0)
            c_before = _before(cells, c0, before, m, before_batch, batch, n, known, hidden, dtype)
            dc = tl.load(grad_c + here, mask=exists, other=0.0) + act.gradient_from_output(dh * g3, bent, CODE, 0.0)
            if grad_cells is not None:
                dc += tl.load(grad_cells + at, mask=exists, other=0.0)
            d0, d1, d2, dc = cell.lstm_backward(dc, g0, g1, g2, c_before, CODE)
            tl.store(grad_c + here, dc, mask=exists)
            tl.store(grad_gates + to + 3 * hidden, cell.gate_slope(dh * bent, g3), mask=exists)
        tl.store(grad_gates + to, d0, mask=exists)
        tl.store(grad_gates + to + hidden, d1, mask=exists)
        tl.store(grad_gates + to + 2 * hidden, d2, mask=exists)
    tl.store(grad_h + here, passing, mask=exists)
