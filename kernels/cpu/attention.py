"""Attention through csrc/cpu/attention.cpp; the contract is kernels/reference/attention.py.

What is added or hidden is read where it is given (a table, lengths, a band): no tensor of queries x keys is made.
Backward makes the scores again from LSE; sums are added in an order of their own, whatever the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.attention import Extras, Needs, Options, Request, accumulate_dtype, empty_output
from . import _C, DTYPES, address, refuses

#: The dtypes of what is added to scores: data's, and a boolean mask's.
_CODES = {**DTYPES, torch.bool: 4}
_NO_TENSOR = (0, 0, 0, 0)
_NOTHING_ADDED = (0, 0, 1, 0, 0, 0, 0)
_LEAST, _MOST = -(2**63), 2**63 - 1


def supports(request: Request) -> str | None:
    """None where the extension is there, and has kernels for the request, else the reason in words."""
    return refuses(request.device, (request.dtype,))


# ------------------------------------------------------------------------------------------ arguments
def _rows(t: Tensor) -> Tensor:
    """t, or a copy of it, with rows that kernels can read: unit stride, nothing left to negate."""
    if t.is_neg():  # a view that PyTorch negates when it is read
        t = t.resolve_neg()
    return t if t.stride(-1) == 1 or t.size(-1) == 1 else t.contiguous()


def _strided(t: Tensor | None, sequences: bool) -> tuple[int, int, int, int]:
    if t is None:
        return _NO_TENSOR
    batch, head, row, _ = t.stride()
    return t.data_ptr(), 0 if sequences else batch, head, row


def _added(t: Tensor | None) -> tuple[tuple[int, ...], Tensor | None]:
    """A mask or bias as the extension takes it, and the tensor that has to live until then."""
    if t is None:
        return _NOTHING_ADDED, None
    t = t.resolve_neg()
    if t.size(3) > 1 and t.stride(3) != 1:
        t = t.contiguous()
    strides = (0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True))
    return (t.data_ptr(), _CODES[t.dtype], t.size(0), *strides), t


def _flat(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if t is None else t.to(dtype or t.dtype).resolve_neg().contiguous()


def _problem(
    query: Tensor, key: Tensor, value: Tensor, extras: Extras, options: Options
) -> tuple[tuple[Any, ...], list[Tensor | None]]:
    """What both functions of the extension take last, and the tensors that have to live until then."""
    wide = accumulate_dtype(query.dtype)
    mask, kept_mask = _added(extras.mask)
    bias, kept_bias = _added(extras.bias)
    table = None if extras.table is None else _flat(extras.table.T, wide)
    index, padding, lengths = _flat(extras.index), _flat(extras.padding), _flat(extras.lengths, torch.int64)
    slopes = _flat(extras.slopes, wide)
    ends = _flat(extras.cu_queries, torch.int64), _flat(extras.cu_keys, torch.int64)
    sequences = ends[0] is not None
    batch = query.size(0) if ends[0] is None else ends[0].numel() - 1
    arguments = (
        _CODES[query.dtype],
        (batch, query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), value.size(3)),
        *(_strided(t, sequences) for t in (query, key, value)),
        mask,
        bias,
        (address(table), 0 if table is None else table.size(1)),
        (
            address(index),
            index is not None and index.dtype == torch.int64,
            -1 if index is None or index.dim() == 2 else index.size(0) // 2,
        ),
        address(padding),
        address(lengths),
        (address(slopes), 1 if slopes is None else slopes.size(0)),
        (*map(address, ends), options.bottom_right),
        (
            0 if extras.seed is None else int(extras.seed),
            options.scale,
            options.softcap,
            options.dropout_p,
        ),
        (
            _LEAST if options.left is None else options.left,
            _MOST if options.right is None else options.right,
            options.offset,
        ),
    )
    return arguments, [kept_mask, kept_bias, table, index, padding, lengths, slopes, *ends]


# ------------------------------------------------------------------------------------------- the pair
def forward(query: Tensor, key: Tensor, value: Tensor, extras: Extras, *, options: Options) -> tuple[Tensor, Tensor]:
    """Output (B, H, Lq, Dv) in query's dtype, with ``empty_output``'s strides, and LSE (B, H, Lq), contiguous."""
    out = empty_output(query, value.size(3))
    lse = query.new_empty(query.shape[:3], dtype=accumulate_dtype(query.dtype))
    query, key, value = _rows(query), _rows(key), _rows(value)
    problem, alive = _problem(query, key, value, extras, options)
    sequences = extras.cu_queries is not None
    _C.attention_forward(_strided(out, sequences), lse.data_ptr(), torch.get_num_threads(), *problem)
    del alive
    return out, lse


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: Extras,
    out: Tensor,
    lse: Tensor,
    *,
    options: Options,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, mask, bias and table, None where not needed."""
    wide, sequences = accumulate_dtype(query.dtype), extras.cu_queries is not None
    dquery = empty_output(query, query.size(3)) if needs.query else None
    dkey, dvalue = (empty_output(t, t.size(3)) if needs.key_value else None for t in (key, value))
    dmask, dbias = (
        torch.zeros(t.shape, dtype=wide) if needed and t is not None else None
        for t, needed in ((extras.mask, needs.mask), (extras.bias, needs.bias))
    )
    dtable = torch.empty(extras.table.shape, dtype=wide) if needs.table and extras.table is not None else None
    query, key, value, out = _rows(query), _rows(key), _rows(value), _rows(out)
    grad_out = None if grad_out is None else _rows(grad_out)
    grad_lse, lse = _flat(grad_lse, wide), lse.contiguous()
    problem, alive = _problem(query, key, value, extras, options)
    _C.attention_backward(
        _strided(grad_out, sequences),
        _strided(out, sequences),
        address(grad_lse),
        lse.data_ptr(),
        *(_strided(t, sequences) for t in (dquery, dkey, dvalue)),
        address(dtable),
        address(dmask),
        address(dbias),
        torch.get_num_threads(),
        *problem,
    )
    del alive
    typed = [
        None if g is None or like is None else g.to(like.dtype)
        for g, like in ((dmask, extras.mask), (dbias, extras.bias), (dtable, extras.table))
    ]
    return dquery, dkey, dvalue, typed[0], typed[1], typed[2]
