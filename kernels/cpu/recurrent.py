"""Launchers of csrc/cpu/recurrent.cpp for lstm, gru and rnn; the contract is that of kernels/reference/recurrent.py.

The projections of all steps and the gradients of the weights are single products by torch.mm; the time loop between
them is one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import activation as activations
from ..reference import recurrent as reference
from ..reference import recurrent_variants as variants
from ..reference.recurrent import Forward, Gradients, Kept, Needs, Request
from ..reference.recurrent_variants import PLAIN, Extras
from . import _C, address, refuses

#: csrc's cell of a family and its activation (csrc/include/dlkern/recurrent.h).
_CELLS = {("lstm", "tanh"): 0, ("gru", "tanh"): 1, ("rnn", "tanh"): 2, ("rnn", "relu"): 3}
_GATES = {"lstm": 4, "gru": 3, "rnn": 1}
_DTYPES = {torch.float32: 0, torch.float64: 1}

#: Up to this many rows x W_ih^T is made in the loop's own call: no product of so few rows is worth one of its own.
_FEW_ROWS = 4

#: Batches and rows from which backward is faster with a transposed copy of the recurrent weight.
_TRANSPOSED_BATCH, _TRANSPOSED_ROWS = 4, 32


def supports(request: Request) -> str | None:
    """None for float32 and float64 on the CPU, else the reason in words."""
    reason = refuses(request.device, ())
    if reason is None and request.dtype not in _DTYPES:
        reason = f"the cpu backend computes recurrent layers in float32 and float64, not in {request.dtype}"
    return reason


def _plain(tensor: Tensor) -> Tensor:
    """A tensor as a kernel can read it: contiguous, no lazy negation."""
    return tensor if tensor.is_contiguous() and not tensor.is_neg() else tensor.resolve_neg().contiguous()


def _optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _plain(tensor)


def _function(name: str) -> tuple[int, float]:
    activation = activations.from_name(name)
    return activations.CODES[name], activation.param


def _variant(
    functions: tuple[str, str],
    extras: Extras,
    work: Tensor,
    normal: Tensor | None,
    inverse: Tensor | None,
    grad_cells: Tensor | None = None,
    grad_product: Tensor | None = None,
    grad_normal: Tensor | None = None,
) -> tuple[float, ...]:
    """csrc's RecurrentVariant; the tensors have to outlive the call."""
    (code, param), (recurrent_code, recurrent_param) = map(_function, functions)
    tensors = (*extras, normal, inverse, grad_cells, grad_product, grad_normal, work)
    return code, recurrent_code, param, recurrent_param, *map(address, tensors)


def _is_plain(family: str, activation: str, recurrent_activation: str, extras: Extras) -> bool:
    return extras is PLAIN and recurrent_activation == "sigmoid" and (family, activation) in _CELLS


def _work(batch: int, width: int, hidden: int, outputs: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(batch * (width + 2 * outputs + 2 * hidden), dtype=dtype)


def _sizes(x: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
    """Steps, batch and rows of a sequence."""
    if batch_sizes is None:
        return x.size(0), x.size(1), x.size(0) * x.size(1)
    return batch_sizes.numel(), int(batch_sizes[0]), x.size(0)


def forward(
    family: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    extras: Extras = PLAIN,
    *,
    activation: str,
    recurrent_activation: str = "sigmoid",
    reverse: bool,
    saves: bool,
) -> Forward:
    """One direction of one layer; see kernels/reference/recurrent.py."""
    x, weight_hh = _plain(x), _plain(weight_hh)
    h0, c0, bias_hh, weight_hr, batch_sizes = map(_optional, (h0, c0, bias_hh, weight_hr, batch_sizes))
    steps, batch, rows = _sizes(x, batch_sizes)
    width, outputs = weight_hh.shape
    hidden = width // _GATES[family]
    dtype, empty = x.dtype, torch.empty
    plain = _is_plain(family, activation, recurrent_activation, extras)
    in_loop = rows <= _FEW_ROWS and weight_ih is not None
    gates = normal = inverse = variant = None
    if weight_ih is None:
        gates = reference.project(x, None, bias_ih, dtype).contiguous()
        gates = gates.clone() if gates.data_ptr() == x.data_ptr() else gates
    elif in_loop:
        weight_ih, bias_ih = _plain(weight_ih), _optional(bias_ih)
        if saves:
            gates = empty((rows, width), dtype=dtype)
    elif bias_ih is None:
        gates = torch.mm(reference.rows_of(x), weight_ih.t())
    else:
        gates = torch.addmm(bias_ih, reference.rows_of(x), weight_ih.t())
    output = empty((*x.shape[:-1], outputs), dtype=dtype)
    h_n = empty((batch, outputs), dtype=dtype)
    c_n = empty((batch, hidden), dtype=dtype) if family == "lstm" else None
    cells = empty((rows, hidden), dtype=dtype) if family == "lstm" and saves else None
    extra = None
    if family == "gru" or weight_hr is not None:
        extra = empty((rows if saves else batch, hidden), dtype=dtype)
    if not plain:
        extras = Extras(*map(_optional, extras))
        if extras.norm_hh is not None and saves:
            normal, inverse = empty((rows, width), dtype=dtype), empty((rows, 1), dtype=dtype)
        work = _work(batch, width, hidden, outputs, dtype)
        variant = _variant((activation, recurrent_activation), extras, work, normal, inverse)
    _C.recurrent_forward(
        _DTYPES[dtype],
        _CELLS[family, activation if plain else "tanh"],
        steps,
        batch,
        rows,
        x.size(-1),
        hidden,
        outputs,
        address(batch_sizes),
        reverse,
        x.data_ptr() if in_loop else 0,
        address(weight_ih),
        address(bias_ih),
        weight_hh.data_ptr(),
        address(bias_hh),
        address(weight_hr),
        address(h0),
        address(c0),
        address(gates),
        address(cells),
        address(extra),
        output.data_ptr(),
        h_n.data_ptr(),
        address(c_n),
        saves,
        torch.get_num_threads(),
        variant,
    )
    if not saves:
        return Forward(output, h_n, c_n)
    keeps_gates = family != "rnn" or extras.zoneout is not None
    return Forward(output, h_n, c_n, gates if keeps_gates else None, cells, extra, normal, inverse)


def backward(
    family: str,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    kept: Kept,
    extras: Extras = PLAIN,
    *,
    activation: str,
    recurrent_activation: str = "sigmoid",
    reverse: bool,
    needs: Needs,
) -> Gradients:
    """Gradients of x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh and weight_hr (None where not needed)."""
    output, gates, cells, extra, normal, inverse = kept
    h0, c0, batch_sizes, grad_output = map(_optional, (h0, c0, batch_sizes, grad_output))
    steps, batch, rows = _sizes(x, batch_sizes)
    width, outputs = weight_hh.shape
    transposed = batch >= _TRANSPOSED_BATCH and rows >= _TRANSPOSED_ROWS
    if transposed:
        weight_hh, weight_hr = weight_hh.t(), None if weight_hr is None else weight_hr.t()
    weight_hh, weight_hr = _plain(weight_hh), _optional(weight_hr)
    hidden = width // _GATES[family]

    def empty(count: int, columns: int) -> Tensor:
        return torch.empty((count, columns), dtype=x.dtype)

    def state(grad: Tensor | None, columns: int) -> Tensor:
        return empty(batch, columns).zero_() if grad is None else empty(batch, columns).copy_(grad)

    grad_h = state(grad_h_n, outputs)
    grad_c = state(grad_c_n, hidden) if family == "lstm" else None
    grad_gates = empty(rows, width)
    grad_extra = scratch = None
    if family == "gru":
        grad_extra = empty(rows, width)
    elif weight_hr is not None:
        grad_extra, scratch = empty(rows, outputs), empty(batch, hidden)
    variant = grad_normal = None
    grad_product = grad_extra if family == "gru" and grad_extra is not None else grad_gates
    plain = grad_cells is None and _is_plain(family, activation, recurrent_activation, extras)
    if not plain:
        extras, grad_cells = Extras(*map(_optional, extras)), _optional(grad_cells)
        if extras.norm_hh is not None:
            grad_product = empty(rows, width)
        if extras.norm_c is not None:
            grad_normal = empty(rows, hidden)
        functions, work = (activation, recurrent_activation), _work(batch, width, hidden, outputs, x.dtype)
        variant = _variant(functions, extras, work, normal, inverse, grad_cells, grad_product, grad_normal)
    _C.recurrent_backward(
        _DTYPES[x.dtype],
        _CELLS[family, activation if plain else "tanh"],
        steps,
        batch,
        rows,
        x.size(-1),
        hidden,
        outputs,
        address(batch_sizes),
        reverse,
        address(grad_output),
        weight_hh.data_ptr(),
        address(weight_hr),
        transposed,
        address(h0),
        address(c0),
        output.data_ptr(),
        address(gates),
        address(cells),
        address(extra),
        grad_h.data_ptr(),
        address(grad_c),
        grad_gates.data_ptr(),
        address(grad_extra),
        address(scratch),
        torch.get_num_threads(),
        variant,
    )

    def h_before() -> Tensor:
        sizes = reference.step_sizes(x, batch_sizes)
        return variants.dropped(reference.before(reference.rows_of(output), h0, sizes, reverse), extras.dropout, sizes)

    recurrent = grad_extra if family == "gru" and grad_extra is not None else grad_gates
    dx, dw_ih, dw_hh, db_ih, db_hh = reference.finish(
        x, h_before, grad_gates, recurrent, grad_product, weight_ih, needs
    )
    dw_hr = None
    if needs.weight_hr and grad_extra is not None and extra is not None:
        dw_hr = torch.mm(grad_extra.t(), extra)
    of_variant: tuple[Tensor | None, ...] = (None,) * 4
    if extras is not PLAIN:
        before = None
        if needs.peephole and cells is not None:
            before = reference.before(cells, c0, reference.step_sizes(x, batch_sizes), reverse)
        of_variant = variants.gradients(recurrent, before, cells, normal, grad_normal, needs)
    states = (grad_h if needs.h0 else None, grad_c if needs.c0 else None)
    return dx, *states, dw_ih, dw_hh, db_ih, db_hh, dw_hr, *of_variant
