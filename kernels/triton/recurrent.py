"""Launchers of recurrent layers in Triton for lstm, gru and rnn; the contract is kernels/reference/recurrent.py's.

The projections of all steps and the gradients of the weights are single products by torch.mm. Between them small layers
run as one kernel for the whole sequence, larger ones as one a step (product and gates), and with a layer norm as a
product by torch.mm and a kernel a step. No atomics: results are bit for bit repeatable.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..activation import CODES
from ..reference import recurrent as reference
from ..reference import recurrent_variants as variants
from ..reference.batch_norm_act import accumulate_dtype
from ..reference.recurrent import Forward, Gradients, Kept, Needs, Request
from ..reference.recurrent_variants import PLAIN, Extras
from . import interpreted
from . import recurrent_cells as cells_
from . import recurrent_plan as planning
from . import recurrent_sequence as sequence
from . import recurrent_steps as steps_
from .recurrent_plan import CELL, SEQUENCE, Launch
from .target import ALL_REGISTERS, device_of, runs_on

_FAMILIES = {"lstm": (cells_.LSTM.value, 4), "gru": (cells_.GRU.value, 3), "rnn": (cells_.RNN.value, 1)}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def supports(request: Request) -> str | None:
    """None where this backend runs the request, else the reason."""
    reason = runs_on(request.device)
    if reason is not None:
        return reason
    if request.dtype not in _DTYPES:
        return f"the triton backend runs float16, bfloat16, float32 and float64, not {request.dtype}"
    if request.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if request.activation not in ("tanh", "relu"):
        return f"the triton backend has recurrent layers with tanh and relu, not with {request.activation!r}"
    if request.recurrent_activation != "sigmoid":
        return f"the triton backend has gates with a sigmoid, not with {request.recurrent_activation!r}"
    absent = (
        (request.projected, "a projection of h", "PyTorch's own layer has it"),
        (request.peephole, "peepholes", "rarely used, and a step of PyTorch's operations runs them"),
        (request.zoneout, "zoneout", "its masks would be read at each step"),
        (request.recurrent_dropout, "recurrent dropout", "its masks would be read at each step"),
    )
    for wanted, what, why in absent:
        if wanted:
            return f"the triton backend runs no recurrent layer with {what} ({why}); the reference backend does"
    return None


def _plain(tensor: Tensor | None) -> Any:
    """Contiguous, no lazy negation."""
    return None if tensor is None else tensor.resolve_neg().contiguous()


def _meta(family: str, activation: str) -> dict[str, Any]:
    code, gates = _FAMILIES[family]
    return {"FAMILY": code, "GATES": gates, "CODE": CODES[activation]}


def _tiles(launch: Launch, weight: Tensor) -> dict[str, Any]:
    """The keyword arguments of a kernel with a product."""
    meta = {"PRECISION": planning.precision(weight.dtype), "BLOCK_M": launch.block_m}
    if launch.kind == SEQUENCE:
        meta |= {"BLOCK_H": launch.block_n, **ALL_REGISTERS}
    else:  # (with ALL_REGISTERS Triton 3.6 spills 16 bytes of a GRU's step on sm_90)
        meta |= {"BLOCK_N": launch.block_n, "BLOCK_K": planning.depth(launch, weight.dtype)}
    return {**meta, "num_warps": launch.num_warps, "num_stages": launch.num_stages}


def _order(count: int, reverse: bool) -> list[int]:
    return list(range(count - 1, -1, -1) if reverse else range(count))


def _lists(steps: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Offsets and sizes of the steps on the device."""
    return (
        torch.tensor([offset for offset, _ in steps], device=device),
        torch.tensor([size for _, size in steps], dtype=torch.int32, device=device),
    )


def _ends(steps: list[tuple[int, int]], first: bool, device: torch.device) -> Tensor:
    """The row of each sequence's first or last element."""
    batch = steps[0][1]
    if first or len(steps) * batch == sum(size for _, size in steps):
        offset = 0 if first else steps[-1][0]
        return torch.arange(offset, offset + batch, device=device)
    lengths = [sum(size > b for _, size in steps) for b in range(batch)]
    return torch.tensor([steps[length - 1][0] + b for b, length in enumerate(lengths)], device=device)


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
    del weight_hr, recurrent_activation
    x, h0, weight_hh, bias_hh = _plain(x), _plain(h0), _plain(weight_hh), _plain(bias_hh)
    extras = Extras(*map(_plain, extras))
    norm, dtype = extras.norm_hh is not None, accumulate_dtype(x.dtype)
    width, hidden = weight_hh.shape
    steps = planning.steps_of(x, batch_sizes)
    batch, rows = steps[0][1], x[..., 0].numel()

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device=x.device)

    gates = reference.rows_of(x) if weight_ih is None else torch.mm(reference.rows_of(x), weight_ih.t())
    gates = gates.to(dtype) if bias_ih is None else gates.to(dtype) + bias_ih.to(dtype)
    if gates.data_ptr() == x.data_ptr():
        gates = gates.clone()
    output = empty(*x.shape[:-1], hidden, kind=x.dtype)
    state = cells = extra = normal = inverse = None
    if family == "lstm":
        state = torch.zeros(batch, hidden, dtype=dtype, device=x.device) if c0 is None else c0.to(dtype, copy=True)
        state = state.contiguous()
        cells = empty(rows, hidden) if saves else None
    elif family == "gru":
        extra = empty(rows, hidden) if saves else None
    if norm and saves:
        normal, inverse = empty(rows, width), empty(rows, 1)
    launch = planning.choose(x.dtype, len(steps), batch, hidden, norm=norm)
    meta = {**_meta(family, activation), "SAVES": saves}
    with device_of(x):
        if launch.kind == SEQUENCE:
            sequence.sequence_forward_kernel[(triton.cdiv(batch, launch.block_m),)](
                gates, weight_hh, bias_hh, h0, output, state, cells, extra, *_lists(steps, x.device), len(steps), batch,
                hidden, REVERSE=reverse, **meta, **_tiles(launch, weight_hh),
            )  # fmt: skip
        else:
            work = empty(batch, width, kind=x.dtype) if launch.kind == CELL else None
            before = before_batch = 0
            for t in _order(len(steps), reverse):
                offset, size = steps[t]
                running = min(before_batch, size)
                if work is None:
                    grid = (triton.cdiv(size, launch.block_m), triton.cdiv(hidden, launch.block_n))
                    steps_.step_forward_kernel[grid](
                        gates, weight_hh, bias_hh, h0, output, state, cells, extra, offset, before, size, running,
                        hidden, **meta, **_tiles(launch, weight_hh),
                    )  # fmt: skip
                else:
                    flat = reference.rows_of(output)
                    _product(work, flat[before : before + running], h0, weight_hh.t(), size)
                    cells_.cell_forward_kernel[(size,)](
                        work, gates, extras.norm_hh, bias_hh, extras.norm_c, extras.norm_c_bias, h0, output, state,
                        cells, extra, normal, inverse, offset, before, running, hidden, NORM=norm,
                        **_rows(width, hidden, launch), **meta,
                    )  # fmt: skip
                before, before_batch = offset, size
    h_n = reference.rows_of(output).index_select(0, _ends(steps, reverse, x.device))
    c_n = None if state is None else state.to(x.dtype)
    if not saves:
        return Forward(output, h_n, c_n)
    return Forward(output, h_n, c_n, gates if family != "rnn" else None, cells, extra, normal, inverse)


def _rows(width: int, hidden: int, launch: Launch) -> dict[str, int]:
    return {
        "BLOCK_W": triton.next_power_of_2(width),
        "BLOCK_H": triton.next_power_of_2(hidden),
        "num_warps": launch.num_warps,
    }


def _product(out: Tensor, running: Tensor, h0: Tensor | None, weight: Tensor, size: int) -> None:
    """The product of the h before: of the rows that run on, and of those that join with their initial state."""
    count = running.size(0)
    if count:
        torch.mm(running, weight, out=out[:count])
    if count < size:
        if h0 is None:
            out[count:size].zero_()
        else:
            torch.mm(h0[count:size], weight, out=out[count:size])


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
    """Gradients in the order of ``Needs`` (None where not needed)."""
    del weight_hr, recurrent_activation
    given, extras = weight_ih, Extras(*map(_plain, extras))
    grad_output, grad_cells, h0, c0, weight_hh = map(_plain, (grad_output, grad_cells, h0, c0, weight_hh))
    output, gates, cells, extra, normal, inverse = kept
    norm, dtype = extras.norm_hh is not None, accumulate_dtype(x.dtype)
    width, hidden = weight_hh.shape
    steps = planning.steps_of(x, batch_sizes)
    batch, rows = steps[0][1], x[..., 0].numel()

    def state(grad: Tensor | None) -> Tensor:
        zeros = torch.zeros(batch, hidden, dtype=dtype, device=x.device)
        return zeros if grad is None else zeros.copy_(grad)

    def empty(columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=x.device)

    grad_h, grad_c = state(grad_h_n), state(grad_c_n) if family == "lstm" else None
    grad_gates = empty(width)
    grad_recurrent = empty(width) if family == "gru" else grad_gates
    grad_product = empty(width) if norm else grad_recurrent
    grad_normal = empty(hidden) if extras.norm_c is not None else None
    launch = planning.choose(x.dtype, len(steps), batch, hidden, norm=norm)
    meta = _meta(family, activation)
    narrow = weight_hh.dtype
    with device_of(x):
        if launch.kind == SEQUENCE:
            sequence.sequence_backward_kernel[(triton.cdiv(batch, launch.block_m),)](
                weight_hh, grad_output, grad_h, grad_c, grad_cells, gates, cells, extra, output, h0, c0, grad_gates,
                grad_recurrent, *_lists(steps, x.device), len(steps), batch, hidden, REVERSE=reverse, **meta,
                **_tiles(launch, weight_hh),
            )  # fmt: skip
        else:
            after = after_batch = 0
            order = _order(len(steps), not reverse)
            for place, t in enumerate(order):
                offset, size = steps[t]
                before, before_batch = steps[order[place + 1]] if place + 1 < len(order) else (0, 0)
                before_batch = min(before_batch, size)
                if launch.kind == CELL:
                    running = min(after_batch, size)
                    if running:
                        moved = torch.mm(grad_product[after : after + running].to(narrow), weight_hh)
                        grad_h[:running] += moved
                    cells_.cell_backward_kernel[(size,)](
                        grad_output, grad_h, grad_c, grad_cells, gates, cells, extra, output, h0, c0, extras.norm_c,
                        extras.norm_c_bias, grad_gates, grad_recurrent, grad_normal, offset, before, before_batch,
                        hidden, NORM=norm, BLOCK_H=triton.next_power_of_2(hidden), num_warps=launch.num_warps, **meta,
                    )  # fmt: skip
                    if norm:
                        cells_.norm_backward_kernel[(size,)](
                            grad_recurrent, normal, inverse, extras.norm_hh, grad_product, offset, width,
                            BLOCK_W=triton.next_power_of_2(width), num_warps=planning.norm_warps(width),
                        )  # fmt: skip
                else:
                    grid = (triton.cdiv(size, launch.block_m), triton.cdiv(hidden, launch.block_n))
                    steps_.step_backward_kernel[grid](
                        weight_hh, grad_output, grad_h, grad_c, grad_cells, gates, cells, extra, output, h0, c0,
                        grad_gates, grad_recurrent, offset, before, size, before_batch, after, min(after_batch, size),
                        hidden, **meta, **_tiles(launch, weight_hh),
                    )  # fmt: skip
                after, after_batch = offset, size
            if needs.h0:
                first = grad_product.index_select(0, _ends(steps, not reverse, x.device))
                grad_h += torch.mm(first.to(narrow), weight_hh)
    sizes = [size for _, size in steps]

    def h_before() -> Tensor:
        return reference.before(reference.rows_of(output).to(dtype), h0, sizes, reverse)

    found = reference.finish(x, h_before, grad_gates, grad_recurrent, grad_product, given, needs)
    before_c = reference.before(cells, c0, sizes, reverse) if needs.peephole and cells is not None else None
    of_variant = variants.gradients(grad_recurrent, before_c, cells, normal, grad_normal, needs)
    dx, *of_weights = found
    return reference.narrowed((dx, grad_h, grad_c, *of_weights, None, *of_variant), needs, x.dtype)
