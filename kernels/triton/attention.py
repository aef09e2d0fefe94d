"""Attention in Triton; the contract is kernels/reference/attention.py.

Forward is one kernel, with a second where few queries made it worth to split the keys. Backward is delta, the queries'
side, the keys' side and, for a mask, bias or table that needs it, its own. Up to 256 queries and keys the first three
are one where registers allow (see attention_plan.one_pass), with a table's gradient where one tile is all. Partial
sums are added in a fixed order: results are bit for bit repeatable. A kernel is compiled for each scale, softcap and
dropout probability.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.attention import Extras, Needs, Options, Request, accumulate_dtype, empty_output, threshold
from . import attention_gradients as gradients
from . import attention_kernels as kernels
from . import attention_plan as plan
from . import implicit_gemm as gemm
from . import interpreted, tiles
from .target import ALL_REGISTERS, device_of, runs_on

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LOG2E = math.log2(math.e)
#: Rows of queries that are put together from the heads of one key head.
_MAX_PACKED = 64
SUM_BLOCK = 1024


def supports(request: Request) -> str | None:
    """None where this backend runs the request, else the reason."""
    reason = runs_on(request.device)
    if reason is not None:
        return reason
    if request.dtype not in _DTYPES:
        return f"the triton backend computes float16, bfloat16, float32 and float64, not {request.dtype}"
    if interpreted() and request.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly"
    if request.sequences:
        return "the triton backend does not take sequences laid end to end (cu_seqlens)"
    largest, most = max(request.head_dim, request.value_dim), max_head_dim(request.dtype)
    if largest > most:
        return f"the triton backend takes head dimensions of {request.dtype} up to {most}, not {largest}"
    return None


def max_head_dim(dtype: torch.dtype) -> int:
    """The largest head dimension: products of float64 are sums, which registers do not hold for more."""
    return max(plan.TABLES["double"]) if dtype == torch.float64 else 256


# ------------------------------------------------------------------------------------------ arguments
def _rows(t: Tensor) -> Tensor:
    """t, or a copy of it, with rows that kernels can read: unit stride, nothing left to negate."""
    if t.is_neg():  # a view that PyTorch negates when it is read
        t = t.resolve_neg()
    return t if t.stride(-1) == 1 or t.size(-1) == 1 else t.contiguous()


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.resolve_neg().contiguous()


def _bytes(t: Tensor | None) -> Tensor | None:
    """A boolean tensor as the bytes that it is stored in."""
    return t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t


def _strides(prefix: str, letters: str, t: Tensor | None) -> dict[str, int]:
    """Arguments prefix_b, ... : 0 where there is nothing to step over."""
    if t is None:
        return {f"{prefix}_{letter}": 0 for letter in letters}
    steps = zip(letters, t.shape, t.stride(), strict=False)
    return {f"{prefix}_{letter}": 0 if size == 1 else stride for letter, size, stride in steps}


def _extras(extras: Extras) -> dict[str, Any]:
    mask, bias = _bytes(extras.mask), extras.bias
    mask, bias = (None if t is None else t.resolve_neg() for t in (mask, bias))
    slopes = _flat(extras.slopes)
    return {
        "mask": mask,
        "bias": bias,
        "table": _flat(extras.table),
        "index": _flat(extras.index),
        "padding": _bytes(_flat(extras.padding)),
        "lengths": _flat(extras.lengths),
        "slopes": slopes,
        "seed": extras.seed,
        "mask_batches": 1 if mask is None else mask.size(0),
        "bias_batches": 1 if bias is None else bias.size(0),
        **_strides("mask", "bhmn", mask),
        **_strides("bias", "bhmn", bias),
        "slopes_b": 0 if slopes is None or slopes.size(0) == 1 else slopes.size(1),
    }


def _sizes(query: Tensor, key: Tensor, value: Tensor, extras: Extras, options: Options) -> dict[str, Any]:
    index = extras.index
    return {
        "heads": query.size(1),
        "group": query.size(1) // key.size(1),
        "queries": query.size(2),
        "keys": key.size(2),
        "left": options.left,
        "right": options.right,
        "offset": options.offset,
        "reach": index.size(0) // 2 if index is not None and index.dim() == 1 else None,
    }


def _numbers(query: Tensor, value: Tensor, options: Options) -> dict[str, Any]:
    """What is compiled in: constants and blocks."""
    capped = options.softcap != 0.0
    return {
        "FACTOR": options.scale / options.softcap if capped else options.scale * _LOG2E,
        "CAP": options.softcap * _LOG2E if capped else 0.0,
        "DROPOUT": threshold(options.dropout_p) if options.dropout_p else -1,
        "KEEP_SCALE": 1.0 / (1.0 - options.dropout_p),
        "PRECISION": "tf32" if plan.kind(query.dtype, max(query.size(3), value.size(3))) == "tf32" else "ieee",
        "DEPTH": query.size(3),
        "VALUE_DEPTH": value.size(3),
    }


def meta(launch: plan.Launch) -> dict[str, Any]:
    """The keyword arguments of a launch."""
    return {
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **ALL_REGISTERS,
    }


# -------------------------------------------------------------------------------------------- forward
def forward(query: Tensor, key: Tensor, value: Tensor, extras: Extras, *, options: Options) -> tuple[Tensor, Tensor]:
    """Output and LSE; see the reference's ``forward``."""
    out = empty_output(query, value.size(3))
    q, k, v = _rows(query), _rows(key), _rows(value)
    (batch, heads, queries, _), dtype = q.shape, accumulate_dtype(q.dtype)
    group = heads // k.size(1)
    lse = torch.empty(batch, heads, queries, dtype=dtype, device=q.device)
    packed = group > 1 and group * queries <= _MAX_PACKED
    rows, owners = (group * queries, batch * k.size(1)) if packed else (queries, batch * heads)
    numbers = _numbers(q, v, options)
    with device_of(q):
        cost = plan.cost(extras, options, q, k, v)
        launch = plan.forward(rows, owners, cost, q.dtype, max(q.size(3), v.size(3)), q.device)
        tiles_ = triton.cdiv(rows, launch.block_m)
        splits = plan.splits(owners * tiles_, k.size(2), launch, q.device)
        target, target_lse = out, lse
        if splits > 1:
            target = torch.empty(splits, batch, heads, queries, v.size(3), dtype=dtype, device=q.device)
            target_lse = torch.empty(splits, batch, heads, queries, dtype=dtype, device=q.device)
        kernels.forward_kernel[(owners * tiles_, splits)](
            q, k, v, target, target_lse,
            **_extras(extras), **_strides("q", "bhm", q), **_strides("k", "bhn", k), **_strides("v", "bhn", v),
            **_strides("out", "bhm", target[0] if splits > 1 else target), **_sizes(q, k, v, extras, options),
            tiles=tiles_, rows=batch * heads * queries, PACKED=packed, SPLIT=splits > 1,
            ACC=tl.float64 if dtype == torch.float64 else tl.float32, **numbers, **meta(launch),
        )  # fmt: skip
        if splits > 1:
            kernels.combine_kernel[(batch * heads * queries,)](
                target, target_lse, out, lse, **_strides("out", "bhm", out), heads=heads, queries=queries,
                splits=splits, rows=batch * heads * queries,
                BLOCK_S=triton.next_power_of_2(splits), VALUE_DEPTH=v.size(3), num_warps=4,
            )  # fmt: skip
    return out, lse


# ------------------------------------------------------------------------------------------- backward
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
    """Gradients of query, key, value, mask, bias and table; see the reference's ``backward``."""
    with device_of(query):
        return _Backward(grad_out, grad_lse, query, key, value, extras, out, lse, options, needs).run()


class _Backward:
    """The launches of one backward pass, which share most of their arguments."""

    def __init__(
        self,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        extras: Extras,
        out: Tensor,
        lse: Tensor,
        options: Options,
        needs: Needs,
    ) -> None:
        self.dq = empty_output(query, query.size(3)) if needs.query else None
        self.dk = empty_output(key, key.size(3)) if needs.key_value else None
        self.dv = empty_output(value, value.size(3)) if needs.key_value else None
        self.q, self.k, self.v = _rows(query), _rows(key), _rows(value)
        self.grad = torch.zeros_like(out) if grad_out is None else _rows(grad_out)
        self.grad_lse = None if grad_lse is None else grad_lse.resolve_neg()
        self.out, self.lse, self.extras, self.options, self.needs = _rows(out), lse, extras, options, needs
        self.delta = torch.empty_like(lse)
        self.numbers = _numbers(self.q, self.v, options)
        self.depth = max(self.q.size(3), self.v.size(3))
        self.cost = plan.cost(extras, options, self.q, self.k, self.v, self.grad)
        self.batch, self.heads, self.queries, _ = query.shape
        self.key_heads, self.keys = key.shape[1:3]
        self.arguments = {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            "grad_out": self.grad,
            "lse": lse,
            "delta": self.delta,
            **_extras(extras),
            **_strides("q", "bhm", self.q),
            **_strides("k", "bhn", self.k),
            **_strides("v", "bhn", self.v),
            **_strides("grad", "bhm", self.grad),
            **_sizes(query, key, value, extras, options),
        }

    def run(self) -> tuple[Tensor | None, ...]:
        sides = (self.needs.query, self.needs.key_value)
        made: dict[str, Tensor] = {}
        length = max(self.queries, self.keys)
        both = plan.one_pass(self.cost, self.extras.table is not None, length, self.q.dtype, self.depth)
        if both is not None and all(sides):
            made = self._both(both)
        else:
            self._delta()
            for side, wanted in zip(("query", "key"), sides, strict=True):
                if wanted:
                    launch = self._launch(side)
                    blocks = (self.queries, launch.block_m) if side == "query" else (self.keys, launch.block_n)
                    owners = self.batch * (self.heads if side == "query" else self.key_heads)
                    self._tiles(side, launch, owners * triton.cdiv(*blocks), tiles=triton.cdiv(*blocks))
        for name, wanted in zip(("mask", "bias", "table"), self.needs[2:], strict=True):
            if wanted and name not in made:
                made[name] = self._added(name)
        return self.dq, self.dk, self.dv, *(made.get(name) for name in ("mask", "bias", "table"))

    def _launch(self, name: str) -> plan.Launch:
        return plan.backward(name, self.cost, self.q.dtype, self.depth)

    def _delta(self) -> None:
        depth = self.v.size(3)
        block_m = 4096 // plan.padded(depth)
        tiles_ = triton.cdiv(self.queries, block_m)
        gradients.delta_kernel[(tiles_ * self.batch * self.heads,)](
            self.grad, self.out, self.grad_lse, self.delta, **_strides("grad", "bhm", self.grad),
            **_strides("out", "bhm", self.out), **_strides("lse", "bhm", self.grad_lse),
            heads=self.heads, queries=self.queries, tiles=tiles_,
            ACC=tl.float64 if self.lse.dtype == torch.float64 else tl.float32,
            BLOCK_M=block_m, VALUE_DEPTH=depth, num_warps=4,
        )  # fmt: skip

    def _tiles(
        self, side: str, launch: plan.Launch, programs: int, *, tiles: int = 1, shared: int = 1, partial: Any = None
    ) -> None:
        both = side == "both"
        table = self.extras.table
        gradients.tiles_kernel[(programs,)](
            **self.arguments, out=self.out if both else None, grad_lse=self.grad_lse if both else None,
            dq=self.dq, dk=self.dk, dv=self.dv, partial=partial,
            **_strides("dq", "bhm", self.dq), **_strides("dk", "bhn", self.dk), **_strides("dv", "bhn", self.dv),
            **_strides("out", "bhm", self.out), **_strides("lse", "bhm", self.grad_lse if both else None),
            tiles=tiles, batch=self.batch, batches_per_program=shared, table_rows=0 if table is None else table.size(0),
            SIDE=side, SCALE=self.options.scale, **self.numbers, **meta(launch),
        )  # fmt: skip

    def _both(self, launch: plan.Launch) -> dict[str, Tensor]:
        """The launch for short sequences, and where one tile is all the gradient of a table."""
        one_tile = self.queries <= launch.block_m and self.keys <= launch.block_n and self.heads == self.key_heads
        table = self.extras.table
        if not (one_tile and self.needs.table and table is not None):
            self._tiles("both", launch, self.batch * self.key_heads)
            return {}
        wanted = triton.cdiv(tiles._programs(self.q.device), self.heads)
        shared = triton.cdiv(self.batch, plan.shares(wanted, self.batch, table.numel()))
        shares = triton.cdiv(self.batch, shared)
        partial = self._partial(shares, table, True)
        self._tiles("both", launch, shares * self.heads, shared=shared, partial=partial)
        return {"table": self._summed(partial, shares, table)}

    def _partial(self, shares: int, like: Tensor, table: bool) -> Tensor:
        """Partial sums [shares, *like]; those of a table are added to."""
        make = torch.zeros if table else torch.empty
        return make((shares, *like.shape), dtype=self.lse.dtype, device=like.device)

    def _summed(self, partial: Tensor, shares: int, like: Tensor) -> Tensor:
        """The sum of the shares, in their order."""
        if shares == 1 and partial.dtype == like.dtype:
            return partial[0]
        total = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        gemm.sum_splits_kernel[(triton.cdiv(like.numel(), SUM_BLOCK),)](
            partial, total, like.numel(), shares, BLOCK=SUM_BLOCK
        )
        return total

    def _added(self, name: str) -> Tensor:
        """The gradient of "mask", "bias" or "table"."""
        like: Tensor = getattr(self.extras, name)
        launch = self._launch("bias")
        of_table = name == "table"
        shape = (1, self.heads, self.queries, self.keys) if of_table else tuple(like.shape)
        over_queries, over_keys = shape[2] < self.queries, shape[3] < self.keys
        tiles_q = 1 if over_queries else triton.cdiv(self.queries, launch.block_m)
        tiles_k = 1 if over_keys else triton.cdiv(self.keys, launch.block_n)
        items = self.batch // shape[0] * (self.heads // shape[1])
        items *= triton.cdiv(self.queries, launch.block_m) if over_queries else 1
        items *= triton.cdiv(self.keys, launch.block_n) if over_keys else 1
        owners, count = shape[0] * shape[1], tiles_q * tiles_k
        wanted = triton.cdiv(tiles._programs(self.q.device), owners)
        # A table's sums are as many as there are programs to a head, so these take several tiles each.
        per_program = triton.cdiv(count, wanted) if of_table else 1
        programs = triton.cdiv(count, per_program)
        per_share = triton.cdiv(items, plan.shares(triton.cdiv(wanted, programs), items, like.numel()))
        shares = triton.cdiv(items, per_share)
        partial = self._partial(shares * programs if of_table else shares, like, of_table)
        gradients.bias_kernel[(owners * programs, shares)](
            **self.arguments, partial=partial, out_batches=shape[0], out_heads=shape[1], tiles_q=tiles_q,
            tiles_k=tiles_k, tiles_per_program=per_program, programs=programs, items=items, items_per_share=per_share,
            table_rows=like.size(0) if of_table else 0, OVER_QUERIES=over_queries, OVER_KEYS=over_keys, TABLE=of_table,
            **self.numbers, **meta(launch),
        )  # fmt: skip
        return self._summed(partial, partial.size(0), like)
