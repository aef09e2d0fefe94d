"""Gates of the recurrent cells on the device, and the kernels that run one step of which the product is made already.

A row is one batch element. These kernels take whole rows, as layer norms need; those of recurrent_steps.py and
recurrent_sequence.py make the product themselves. Formulas and names are those of kernels/reference/{lstm,gru,rnn}.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..activation import CODES
from . import activation as act

LSTM = tl.constexpr(0)
GRU = tl.constexpr(1)
RNN = tl.constexpr(2)
SIGMOID = tl.constexpr(CODES["sigmoid"])

_EPS = tl.constexpr(1e-5)

#: Integers that change from step to step: for their values (1, multiples of 16) no kernel of its own.
STEP_SIZES = ["offset", "before", "batch", "before_batch"]


@triton.jit
def gate(z):
    return act.forward(z, SIGMOID, 0.0)


@triton.jit
def gate_slope(g, y):
    return g * (y * (1.0 - y))


@triton.jit
def lstm_forward(i, f, g, o, c, CODE: tl.constexpr):
    """Activated gates and the new c, from sums and the last c."""
    i, f, o = gate(i), gate(f), gate(o)
    g = act.forward(g, CODE, 0.0)
    return i, f, g, o, f * c + i * g


@triton.jit
def lstm_backward(grad_c, i, f, g, c_before, CODE: tl.constexpr):
    """Gradients of the sums of i, f and g, and of the last c, from the whole gradient of the new c."""
    di = gate_slope(grad_c * g, i)
    df = gate_slope(grad_c * c_before, f)
    dg = act.gradient_from_output(grad_c * i, g, CODE, 0.0)
    return di, df, dg, grad_c * f


@triton.jit
def gru_forward(x_r, x_z, x_n, h_r, h_z, part, h, CODE: tl.constexpr):
    """Activated gates and the new h."""
    r, z = gate(x_r + h_r), gate(x_z + h_z)
    n = act.forward(x_n + r * part, CODE, 0.0)
    return r, z, n, n + z * (h - n)


@triton.jit
def gru_backward(grad_h, r, z, n, part, h_before, CODE: tl.constexpr):
    """Gradients of the sums of r, z and n; that of n's recurrent part is r times its own."""
    dn = act.gradient_from_output(grad_h * (1.0 - z), n, CODE, 0.0)
    dz = gate_slope(grad_h * (h_before - n), z)
    return gate_slope(dn * part, r), dz, dn


@triton.jit
def _load(pointer, index, mask, dtype: tl.constexpr):
    """A row's elements, or zero where there is no row."""
    if pointer is None:  # noqa: SIM108
        v = tl.zeros(index.shape, dtype)
    else:
        v = tl.load(pointer + index, mask=mask, other=0.0).to(dtype)
    return v


@triton.jit
def _recurrent(product, norm, bias, mean, inverse, index, mask, dtype: tl.constexpr, NORM: tl.constexpr):
    """What a step adds to some of the projected input."""
    v = tl.load(product + index, mask=mask, other=0.0).to(dtype)
    if NORM:
        v = (v - mean) * inverse * tl.load(norm + index, mask=mask, other=0.0).to(dtype)
    return v + _load(bias, index, mask, dtype)


@triton.jit
def _normalised(v, mask, count):
    """v (a row) normalised, and 1 / spread."""
    centred = tl.where(mask, v - tl.sum(tl.where(mask, v, 0.0)) / count, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred) / count + _EPS)
    return centred * inverse, inverse


@triton.jit
def _norm_backward(grad, normal, inverse, mask, count):
    """The gradient of a norm's input from grad = that of its output times its weight."""
    mean = tl.sum(tl.where(mask, grad, 0.0)) / count
    along = tl.sum(tl.where(mask, grad * normal, 0.0)) / count
    return inverse * (grad - mean - normal * along)


@triton.jit(do_not_specialize=STEP_SIZES)
def cell_forward_kernel(
    product, gates, norm_hh, bias_hh, norm_c, norm_c_bias, h0, output, state, cells, extra, normal, inverses,
    offset, before, before_batch, hidden,
    FAMILY: tl.constexpr, GATES: tl.constexpr, CODE: tl.constexpr, NORM: tl.constexpr, SAVES: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One row of a step: gates (N, G H) hold the projected input and are left activated; h goes to output (N, H).

    ``product`` (B, G H) is h W_hh^T. ``state`` (B, H) is an LSTM's c, in and out; ``cells``, ``extra`` (N, H),
    ``normal`` (N, G H) and ``inverses`` (N,) are written with SAVES. The step's rows begin at ``offset``, those of the
    step before at ``before``; of rows from ``before_batch`` on the h before is h0's.
    """
    dtype = gates.dtype.element_ty
    b = tl.program_id(0)
    row = offset.to(tl.int64) + b
    width = GATES * hidden
    product += b.to(tl.int64) * width
    gates += row * width
    mean, inverse = tl.zeros([], dtype), tl.zeros([], dtype)
    if NORM:
        w = tl.arange(0, BLOCK_W)
        v = tl.load(product + w, mask=w < width, other=0.0).to(dtype)
        mean = tl.sum(v) / width
        v, inverse = _normalised(v, w < width, width)
        if SAVES:
            tl.store(normal + row * width + w, v, mask=w < width)
            tl.store(inverses + row, inverse)
    j = tl.arange(0, BLOCK_H)
    m = j < hidden
    s0 = _recurrent(product, norm_hh, bias_hh, mean, inverse, j, m, dtype, NORM)
    x0 = tl.load(gates + j, mask=m, other=0.0)
    if FAMILY == RNN:
        h = act.forward(x0 + s0, CODE, 0.0)
    else:
        s1 = _recurrent(product, norm_hh, bias_hh, mean, inverse, j + hidden, m, dtype, NORM)
        s2 = _recurrent(product, norm_hh, bias_hh, mean, inverse, j + 2 * hidden, m, dtype, NORM)
        x1 = tl.load(gates + hidden + j, mask=m, other=0.0)
        x2 = tl.load(gates + 2 * hidden + j, mask=m, other=0.0)
        if FAMILY == GRU:
            if b < before_batch:
                h = tl.load(output + (before.to(tl.int64) + b) * hidden + j, mask=m, other=0.0).to(dtype)
            else:
                h = _load(h0, b * hidden + j, m, dtype)
            x0, x1, x2, h = gru_forward(x0, x1, x2, s0, s1, s2, h, CODE)
            if SAVES:
                tl.store(extra + row * hidden + j, s2, mask=m)
        else:
            s3 = _recurrent(product, norm_hh, bias_hh, mean, inverse, j + 3 * hidden, m, dtype, NORM)
            x3 = tl.load(gates + 3 * hidden + j, mask=m, other=0.0)
            c = tl.load(state + b * hidden + j, mask=m, other=0.0)
            x0, x1, x2, x3, c = lstm_forward(x0 + s0, x1 + s1, x2 + s2, x3 + s3, c, CODE)
            tl.store(state + b * hidden + j, c, mask=m)
            if SAVES:
                tl.store(cells + row * hidden + j, c, mask=m)
                tl.store(gates + 3 * hidden + j, x3, mask=m)
            if NORM:
                c, _ = _normalised(c, m, hidden)
                c = c * _load(norm_c, j, m, dtype) + _load(norm_c_bias, j, m, dtype)
            h = x3 * act.forward(c, CODE, 0.0)
        if SAVES:
            tl.store(gates + j, x0, mask=m)
            tl.store(gates + hidden + j, x1, mask=m)
            tl.store(gates + 2 * hidden + j, x2, mask=m)
    tl.store(output + row * hidden + j, h.to(output.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=STEP_SIZES)
def cell_backward_kernel(
    grad_output, grad_h, grad_c, grad_cells, gates, cells, extra, output, h0, c0,
    norm_c, norm_c_bias, grad_gates, grad_recurrent, grad_normal,
    offset, before, before_batch, hidden,
    FAMILY: tl.constexpr, GATES: tl.constexpr, CODE: tl.constexpr, NORM: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One row of a step. ``grad_h`` (B, H), the gradient of its h so far, is left as what passes to the h before beside
    the product: z times it in a GRU, else 0. ``grad_c`` (B, H) is that of c, in and out. Written: ``grad_gates``
    (N, G H), a GRU's ``grad_recurrent`` (N, G H), and with NORM an LSTM's ``grad_normal`` (N, H).
    """
    dtype = grad_gates.dtype.element_ty
    b = tl.program_id(0)
    row = offset.to(tl.int64) + b
    width = GATES * hidden
    grad_gates += row * width
    j = tl.arange(0, BLOCK_H)
    m = j < hidden
    dh = tl.load(grad_h + b * hidden + j, mask=m, other=0.0) + _load(grad_output, row * hidden + j, m, dtype)
    passing = tl.zeros([BLOCK_H], dtype)
    if FAMILY == RNN:
        y = tl.load(output + row * hidden + j, mask=m, other=0.0).to(dtype)
        tl.store(grad_gates + j, act.gradient_from_output(dh, y, CODE, 0.0), mask=m)
    else:
        gates += row * width
        g0 = tl.load(gates + j, mask=m, other=0.0)
        g1 = tl.load(gates + hidden + j, mask=m, other=0.0)
        g2 = tl.load(gates + 2 * hidden + j, mask=m, other=0.0)
        earlier = (before.to(tl.int64) + b) * hidden + j
        if FAMILY == GRU:
            if b < before_batch:
                h = tl.load(output + earlier, mask=m, other=0.0).to(dtype)
            else:
                h = _load(h0, b * hidden + j, m, dtype)
            part = tl.load(extra + row * hidden + j, mask=m, other=0.0)
            dr, dz, dn = gru_backward(dh, g0, g1, g2, part, h, CODE)
            passing = dh * g1
            recurrent = grad_recurrent + row * width
            tl.store(recurrent + j, dr, mask=m)
            tl.store(recurrent + hidden + j, dz, mask=m)
            tl.store(recurrent + 2 * hidden + j, dn * g0, mask=m)
            tl.store(grad_gates + j, dr, mask=m)
            tl.store(grad_gates + hidden + j, dz, mask=m)
            tl.store(grad_gates + 2 * hidden + j, dn, mask=m)
        else:
            g3 = tl.load(gates + 3 * hidden + j, mask=m, other=0.0)
            c = tl.load(cells + row * hidden + j, mask=m, other=0.0)
            if b < before_batch:
                c_before = tl.load(cells + earlier, mask=m, other=0.0)
            else:
                c_before = _load(c0, b * hidden + j, m, dtype)
            seen, inverse = c, tl.zeros([], dtype)
            if NORM:
                c, inverse = _normalised(c, m, hidden)
                seen = c * _load(norm_c, j, m, dtype) + _load(norm_c_bias, j, m, dtype)
            bent = act.forward(seen, CODE, 0.0)
            dc = act.gradient_from_output(dh * g3, bent, CODE, 0.0)
            if NORM:
                tl.store(grad_normal + row * hidden + j, dc, mask=m)
                dc = _norm_backward(dc * _load(norm_c, j, m, dtype), c, inverse, m, hidden)
            dc += tl.load(grad_c + b * hidden + j, mask=m, other=0.0) + _load(grad_cells, row * hidden + j, m, dtype)
            di, df, dg, dc = lstm_backward(dc, g0, g1, g2, c_before, CODE)
            tl.store(grad_c + b * hidden + j, dc, mask=m)
            tl.store(grad_gates + j, di, mask=m)
            tl.store(grad_gates + hidden + j, df, mask=m)
            tl.store(grad_gates + 2 * hidden + j, dg, mask=m)
            tl.store(grad_gates + 3 * hidden + j, gate_slope(dh * bent, g3), mask=m)
    tl.store(grad_h + b * hidden + j, passing, mask=m)


@triton.jit(do_not_specialize=STEP_SIZES)
def norm_backward_kernel(grad, normal, inverses, norm, out, offset, width, BLOCK_W: tl.constexpr):
    """One row: the gradient of h W_hh^T from that of its norm, all (N, G H)."""
    row = offset.to(tl.int64) + tl.program_id(0)
    w = tl.arange(0, BLOCK_W)
    m = w < width
    v = tl.load(normal + row * width + w, mask=m, other=0.0)
    g = tl.load(grad + row * width + w, mask=m, other=0.0) * tl.load(norm + w, mask=m, other=0.0).to(v.dtype)
    tl.store(out + row * width + w, _norm_backward(g, v, tl.load(inverses + row), m, width), mask=m)
