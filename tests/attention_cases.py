"""Cases of attention: how inputs are made, run on a backend, and judged against PyTorch in float64.

What is expected is written here from functional.attention's description, with every tensor at its full size; of the
package only the choice of dropout is taken, which another test holds to Triton's.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from typing import Any, NamedTuple
from unittest import mock

import evidence
import parity
import torch
import torch.nn.functional as F
from batch_norm_act_cases import spied
from guard import Guards, guarded
from torch import Tensor

import dlkern
from dlkern.functional import RelativePositionBias, T5Bias, attention
from dlkern.kernels.reference import attention as reference

SEED = 2**40 + 2**31 + 977
_ROWS, _BUCKETS, _MAX_DISTANCE = 11, 8, 12


class Case(NamedTuple):
    """One configuration: query (B, H, Lq, D), key (B, Hk, Lk, D), value (B, Hk, Lk, Dv).

    ``mask`` is None, "bool", "float" or "float32"; ``bias`` None, "dense", "relative", "t5" or "t5_one_way". Their
    shapes are named by letters: "b", "h", "q", "k" for a full dimension, "1" for one that is broadcast.
    """

    batch: int = 2
    heads: int = 2
    queries: int = 19
    keys: int = 21
    dim: int = 16
    value_dim: int | None = None
    key_heads: int | None = None
    mask: str | None = None
    mask_shape: str = "b1qk"
    bias: str | None = None
    bias_shape: str = "1hqk"
    padding: bool = False
    lengths: bool = False
    causal: bool = False
    alignment: str = "top_left"
    window: Any = None
    alibi: bool = False
    softcap: float | None = None
    dropout: float = 0.0
    lse: bool = False
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.heads}x{self.queries}x{self.keys}x{self.dim}"
        changed = [
            f"{k}={str(v).removeprefix('torch.')}"
            for k, v in self._asdict().items()
            if k not in ("batch", "heads", "queries", "keys", "dim") and v != self._field_defaults[k]
        ]
        return "-".join([sizes, *changed]).replace(" ", "")

    @property
    def offset(self) -> int:
        return self.keys - self.queries if self.alignment == "bottom_right" else 0


class Data(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    table: Tensor | None
    index: Tensor | None
    padding: Tensor | None
    lengths: Tensor | None
    slopes: Tensor | None
    grad: Tensor
    grad_lse: Tensor


class Results(NamedTuple):
    """What a run gives; None where the case has no such tensor, or made no gradients."""

    out: Tensor
    lse: Tensor | None = None
    dquery: Tensor | None = None
    dkey: Tensor | None = None
    dvalue: Tensor | None = None
    dmask: Tensor | None = None
    dbias: Tensor | None = None
    dtable: Tensor | None = None


def _shape(case: Case, letters: str) -> tuple[int, ...]:
    sizes = {"b": case.batch, "h": case.heads, "q": case.queries, "k": case.keys, "1": 1}
    return tuple(sizes[c] for c in letters)


@functools.lru_cache(maxsize=128)
def data(case: Case, device: str) -> Data:
    """The case's values."""
    generator = torch.Generator().manual_seed(case.seed)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    rand = functools.partial(torch.rand, generator=generator, dtype=torch.float64)
    b, h, hk = case.batch, case.heads, case.key_heads or case.heads
    query, key = randn(b, h, case.queries, case.dim), randn(b, hk, case.keys, case.dim)
    value = randn(b, hk, case.keys, case.value_dim or case.dim)
    mask = bias = table = index = padding = lengths = None
    if case.mask is not None:
        shape = _shape(case, case.mask_shape)
        hidden = rand(shape) < 0.25
        mask = ~hidden if case.mask == "bool" else randn(shape).masked_fill(hidden, -math.inf)
        mask = mask.float() if case.mask == "float32" else mask
    if case.bias == "dense":
        bias = randn(_shape(case, case.bias_shape))
    elif case.bias is not None:
        table = randn(_ROWS if case.bias == "relative" else _BUCKETS, h)
        if case.bias == "relative":
            index = torch.randint(0, _ROWS, (case.queries, case.keys), generator=generator)
    if case.padding:
        padding = rand(b, case.keys) < 0.4
    if case.lengths:
        lengths = torch.randint(1, case.keys + 1, (b,), generator=generator, dtype=torch.int32)
    slopes = rand(h) if case.alibi else None
    made = [query, key, value, mask, bias, table, index, padding, lengths, slopes]
    made += [randn(b, h, case.queries, value.size(3)), randn(b, h, case.queries)]

    def typed(t: Tensor | None, i: int) -> Tensor | None:
        if t is None or not t.is_floating_point() or t.dtype == torch.float32:
            return None if t is None else t.to(device)
        return t.to(reference.accumulate_dtype(case.dtype) if i == len(made) - 1 else case.dtype).to(device)

    return Data(*(typed(t, i) for i, t in enumerate(made)))


# ------------------------------------------------------------------------------------------ expected
def _bucket(distance: Tensor, bidirectional: bool) -> Tensor:
    """T5's bucket of each distance (key minus query)."""
    buckets, first = _BUCKETS, torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first, distance = (distance > 0) * buckets, distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(_MAX_DISTANCE / exact) * (buckets - exact)
    return first + torch.where(distance < exact, distance, (exact + far.long()).clamp(max=buckets - 1))


def _plain(case: Case, d: Data) -> tuple[Tensor, Tensor]:
    """What is added to the scores (hidden ones not counted), and who is seen; both (B, H, Lq, Lk)."""
    device, full = d.query.device, (case.batch, case.heads, case.queries, case.keys)
    distance = torch.arange(case.keys, device=device)[None, :] - torch.arange(case.queries, device=device)[:, None]
    distance = distance - case.offset
    seen = torch.ones(full, dtype=torch.bool, device=device)
    total = d.query.new_zeros(full)
    if d.mask is not None:
        if d.mask.dtype == torch.bool:
            seen = seen & d.mask
        else:
            seen = seen & (d.mask != -math.inf)
            total = total + d.mask.masked_fill(d.mask == -math.inf, 0.0).to(total.dtype)
    if d.bias is not None:
        total = total + d.bias
    if d.table is not None:
        index = d.index if case.bias == "relative" else _bucket(distance, case.bias == "t5")
        total = total + d.table[index].permute(2, 0, 1)
    if d.slopes is not None:
        total = total - d.slopes[:, None, None] * distance.abs()
    if d.padding is not None:
        seen = seen & ~d.padding[:, None, None, :]
    if d.lengths is not None:
        seen = seen & (torch.arange(case.keys, device=device) < d.lengths[:, None, None, None])
    left, right = (case.window, case.window) if not isinstance(case.window, tuple) else case.window
    if left is not None:
        seen = seen & (distance >= -left)
    if right is not None:
        seen = seen & (distance <= right)
    if case.causal:
        seen = seen & (distance <= 0)
    return total, seen


def _kept(case: Case, device: torch.device) -> Tensor | None:
    if not case.dropout:
        return None
    seed = torch.tensor([SEED], device=device)
    kept = reference.keep(seed, case.batch, case.heads, case.queries, case.keys, case.dropout)
    return kept.double() / (1 - case.dropout)


def _softmax(case: Case, d: Data) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The softmax, LSE, what was added, and keys for each query head."""
    key = d.key.repeat_interleave(case.heads // d.key.size(1), 1)
    s = d.query @ key.mT * (case.dim**-0.5 if case.scale is None else case.scale)
    s = s if case.softcap is None else case.softcap * torch.tanh(s / case.softcap)
    total, seen = _plain(case, d)
    s = (s + total).masked_fill(~seen, -math.inf)
    dead = ~seen.any(-1, keepdim=True)
    p = s.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    lse = s.masked_fill(dead, 0.0).logsumexp(-1).masked_fill(dead.squeeze(-1), -math.inf)
    return p, lse, total, key


def differentiable(d: Data) -> dict[str, Tensor]:
    """The tensors that have a gradient, by the name of their gradient."""
    named = {f"d{name}": getattr(d, name) for name in ("query", "key", "value", "mask", "bias", "table")}
    return {name: t for name, t in named.items() if t is not None and t.dtype != torch.bool}


@functools.lru_cache(maxsize=128)
def expected(case: Case, device: str, dtype: torch.dtype | None) -> Results:
    """The case by PyTorch: in float64 (the truth), or in the case's dtype where ``dtype`` is None.

    In the case's dtype by scaled_dot_product_attention with a dense mask where that can do it.
    """
    copies = (
        None if t is None else t.to(dtype or t.dtype, copy=True) if t.is_floating_point() else t
        for t in data(case, device)
    )
    d = Data(*copies)
    inputs = differentiable(d)
    for t in inputs.values():
        t.requires_grad_()
    value = d.value.repeat_interleave(case.heads // d.value.size(1), 1)
    p, lse, total, key = _softmax(case, d)
    if dtype is None and case.softcap is None and not case.dropout:
        _, seen = _plain(case, d)
        out = F.scaled_dot_product_attention(
            d.query, key, value, total.masked_fill(~seen, -math.inf), scale=case.scale
        )  # fmt: skip
    else:
        kept = _kept(case, p.device)
        out = (p if kept is None else p * kept.to(p.dtype)) @ value
    wanted = [(out, d.grad)]
    if case.lse:
        wanted.append((lse, d.grad_lse.to(lse.dtype).masked_fill(lse == -math.inf, 0.0)))
    grads = torch.autograd.grad([t for t, _ in wanted], list(inputs.values()), [g for _, g in wanted])
    return Results(out.detach(), lse.detach(), **dict(zip(inputs, grads, strict=True)))


@functools.lru_cache(maxsize=128)
def terms(case: Case, device: str) -> Results:
    """The sums of absolute terms behind each result (see dlkern.bench.parity), of which scores are a part."""
    d = Data(*(None if t is None else t.double() if t.is_floating_point() else t for t in data(case, device)))
    p, lse, _, key = _softmax(case, d)
    magnitudes = d._replace(**{n: getattr(d, n).abs() for n in ("query", "key", "value")})
    scale = abs(case.dim**-0.5 if case.scale is None else case.scale)
    repeat = case.heads // d.key.size(1)
    added = sum(
        (_plain(case, Data(*(t if i == j or i > 5 or t is None else _neutral(t) for i, t in enumerate(d))))[0].abs()
         for j in (3, 4, 5)), torch.zeros(()),
    )  # fmt: skip
    size = magnitudes.query @ magnitudes.key.repeat_interleave(repeat, 1).mT * scale + added + 1.0
    size = size + (p * size).sum(-1, keepdim=True)  # an element's, and that of what it is divided by
    kept = _kept(case, p.device)
    kept = torch.ones(()) if kept is None else kept
    q = p * (1.0 + size)
    value = magnitudes.value.repeat_interleave(repeat, 1)
    dp = d.grad.abs() @ value.mT * kept
    ds = q * (dp + (p * dp).sum(-1, keepdim=True) + (d.grad_lse.abs()[..., None] if case.lse else 0.0))

    def of_heads(t: Tensor) -> Tensor:
        return t.unflatten(1, (-1, repeat)).sum(2)

    def to(t: Tensor | None) -> Tensor | None:
        return None if t is None or t.dtype == torch.bool else ds.sum_to_size(t.shape)

    dtable = None
    if d.table is not None:
        one = torch.ones_like(d.table).requires_grad_()
        total, _ = _plain(case, d._replace(table=one))
        (dtable,) = torch.autograd.grad(total, one, ds)
    return Results(
        (q * kept) @ value,
        torch.where(lse == -math.inf, 0.0, lse.abs() + (q).sum(-1)),
        ds @ key.abs() * scale,
        of_heads(ds.mT @ magnitudes.query) * scale,
        of_heads((q * kept).mT @ d.grad.abs()),
        to(d.mask),
        to(d.bias),
        dtable,
    )


def _neutral(t: Tensor) -> Tensor:
    return torch.ones_like(t) if t.dtype == torch.bool else torch.zeros_like(t)


# --------------------------------------------------------------------------------------------- running
def arrange(t: Tensor, layout: str, guards: Guards) -> Tensor:
    """A copy of (B, H, L, D), stored between guard zones as ``layout`` says."""
    _, h, length, dim = t.shape
    strides = {
        "contiguous": (h * length * dim, length * dim, dim, 1),
        "blhd": (length * h * dim, dim, h * dim, 1),
        "sliced": (h * (length + 1) * (dim + 3), (length + 1) * (dim + 3), dim + 3, 1),
        "transposed": (h * length * dim, length * dim, 1, length),
    }[layout]
    return guards.place(t, strides, offset=1 if layout == "sliced" else 0)


def bias_of(case: Case, d: Data) -> Any:
    if case.bias == "relative":
        return RelativePositionBias(d.table, d.index)
    if d.table is not None:
        return T5Bias(d.table, case.bias == "t5", _BUCKETS, _MAX_DISTANCE)
    return d.bias


def call(case: Case, d: Data) -> tuple[Tensor, Tensor | None]:
    """functional.attention with the case's arguments."""
    made = attention(
        d.query, d.key, d.value, attn_mask=d.mask, bias=bias_of(case, d), key_padding_mask=d.padding,
        key_lengths=d.lengths, dropout_p=case.dropout, is_causal=case.causal, causal_alignment=case.alignment,
        scale=case.scale, enable_gqa=case.key_heads is not None, window=case.window, alibi_slopes=d.slopes,
        softcap=case.softcap, return_lse=case.lse,
    )  # fmt: skip
    return made if case.lse else (made, None)  # type: ignore[return-value]


def run(case: Case, target: tuple[str, str], *, gradients: bool = True) -> Results:
    """The case through dlkern.functional under a forced backend, between guard zones.

    Asserts which implementation ran, and that inputs were not written. Dropout's seed is SEED.
    """
    device, backend = target
    values = data(case, device)

    def seeded(*_: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([SEED], device=kwargs["device"])

    with guarded() as guards:
        placed = [
            arrange(t, case.layout, guards) if i < 3 else None if t is None else guards.place(t.contiguous())
            for i, t in enumerate(values)
        ]
        d = Data(*placed)
        inputs = differentiable(d)
        for t in inputs.values():
            t.requires_grad_(gradients)
        before = [t.detach().clone() for t in inputs.values()]
        with spied() as calls, dlkern.backend(attention=backend), mock.patch.object(torch, "randint", seeded):
            out, lse = call(case, d)
        grads: tuple[Tensor, ...] = ()
        with spied() as later:
            if gradients:
                outputs, wanted = [out], [d.grad]
                if lse is not None:
                    outputs, wanted = [out, lse], [d.grad, d.grad_lse.masked_fill(lse == -math.inf, 0.0)]
                grads = torch.autograd.grad(outputs, list(inputs.values()), wanted)
        if backend != "torch":
            assert calls == [(backend, "forward")], calls
            assert later == ([(backend, "backward")] if gradients else []), later
        for t, copy in zip(inputs.values(), before, strict=True):
            assert torch.equal(t.detach(), copy), "an input was written"
    lse = None if lse is None else lse.detach()
    return Results(out.detach(), lse, **dict(zip(inputs, grads, strict=False)))


def check(case: Case, target: tuple[str, str], *, gradients: bool = True) -> None:
    """Run the case and hold every output and gradient to the parity rule."""
    results = run(case, target, gradients=gradients)
    device, backend = target
    truth, peer = expected(case, device, torch.float64), expected(case, device, None)
    floors = terms(case, device)
    for name, result in results._asdict().items():
        if result is None:
            continue
        right, like, floor = (getattr(r, name) for r in (truth, peer, floors))
        if name == "lse":  # -inf where nothing is seen
            assert torch.equal(result == -math.inf, right == -math.inf)
            result, right, like = (t.masked_fill(t == -math.inf, 0.0) for t in (result, right, like))
        else:
            assert result.dtype == like.dtype, f"{name}: {result.dtype}, PyTorch's {like.dtype}"
        parity.assert_parity(name, result, right, floor, peer=like, dtype=case.dtype)
    evidence.record("attention", backend, case.dtype)


# --------------------------------------------------------------------------------------- pairwise cover
FACTORS: dict[str, tuple[dict[str, Any], ...]] = {
    "mask": (
        {}, {"mask": "bool"}, {"mask": "float", "mask_shape": "1hqk"}, {"mask": "float", "mask_shape": "b11k"},
        {"mask": "bool", "mask_shape": "11q1"},
    ),
    "bias": ({}, {"bias": "dense"}, {"bias": "relative"}, {"bias": "t5"}),
    "hidden": ({}, {"batch": 2, "padding": True}, {"batch": 2, "lengths": True}),
    "band": ({}, {"causal": True}, {"causal": True, "alignment": "bottom_right"}, {"window": (7, 4)}),
    "alibi": ({}, {"alibi": True}),
    "softcap": ({}, {"softcap": 3.0}),
    "dropout": ({}, {"dropout": 0.3}),
    "lse": ({}, {"lse": True}),
    "heads": ({}, {"heads": 4, "key_heads": 2}),
    "dtype": ({}, {"dtype": torch.float16}, {"dtype": torch.float64}),
    "sizes": ({}, {"queries": 5, "keys": 37}, {"queries": 37, "keys": 18, "dim": 24, "value_dim": 40}),
    "layout": ({}, {"layout": "blhd"}, {"layout": "sliced"}),
}  # fmt: skip


def pairwise(seed: int = 0) -> list[Case]:
    """Cases in which every two values of two factors stand together at least once, greedily few."""
    rng, names = random.Random(seed), list(FACTORS)
    left = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(FACTORS[a]))
        for j in range(len(FACTORS[b]))
    }

    def pairs(row: dict[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}

    cases = []
    while left:
        a, i, b, j = min(left)
        tries = []
        for _ in range(50):
            row = {name: rng.randrange(len(FACTORS[name])) for name in names} | {a: i, b: j}
            tries.append((len(pairs(row) & left), row))
        row = max(tries, key=lambda t: t[0])[1]
        left -= pairs(row)
        options = {k: v for name in names for k, v in FACTORS[name][row[name]].items()}
        cases.append(Case(**{"batch": 1, **options}, seed=len(cases)))
    return cases
