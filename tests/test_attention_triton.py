"""The Triton kernels of attention: right in every launch configuration, and compiled for GPUs without one.

Without a GPU they run in Triton's interpreter, which computes TF32 in float32 and bfloat16 wrongly: bfloat16 is only
compiled here, ahead of time, and everything else of it waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case, bias_of, call, check, data, differentiable, pairwise
from conftest import EXAMPLES_TIMES, HAS_CUDA
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import EMPTY, GRADCHECKED, _qkv, check_gradients, check_nan_and_inf, check_nothing_seen, check_op
from torch import Tensor

import dlkern
from dlkern.functional import RelativePositionBias, attention
from dlkern.kernels.reference.attention import Extras, Needs, Options, Request
from dlkern.kernels.triton import attention as triton_op
from dlkern.kernels.triton import attention_plan as plan
from dlkern.kernels.triton import tiles
from dlkern.kernels.triton.attention_plan import Launch, Launches

DEVICE = "cuda" if HAS_CUDA else "cpu"
TARGET = (DEVICE, "triton")


def _affordable(cases: list[Case]) -> list[Case]:
    """float64 runs on sums of products in small tiles: in the interpreter a few cases of it will do."""
    wide = [i for i, case in enumerate(cases) if case.dtype == torch.float64][3:]
    return [case._replace(dtype=torch.float32) if i in wide else case for i, case in enumerate(cases)]


@pytest.mark.parametrize("case", _affordable(pairwise()), ids=str)
def test_parity(case: Case) -> None:
    check(case, TARGET)


# ------------------------------------------------------------------------------------ configurations
def _tables() -> Iterator[tuple[str, int, int, Launches]]:
    """(kind, depth, tier, configurations) that the interpreter can tell from each other: by their blocks."""
    seen = set()
    for kind, by_depth in plan.TABLES.items():
        for depth, tables in by_depth.items():
            for tier, launches in enumerate(tables):
                blocks = [None if t is None else t[:2] for t in (*launches.forward, *launches[1:])]
                if kind == "double":
                    depth = 32  # (any depth will do, and the largest takes long)
                key = (depth, *blocks)
                if key not in seen:
                    seen.add(key)
                    yield kind, depth, tier, launches


def _name(value: Any) -> str:
    return str(value) if isinstance(value, (str, int)) else "blocks"


@pytest.mark.parametrize(("kind", "depth", "tier", "launches"), list(_tables()), ids=_name)
def test_every_configuration(
    kind: str, depth: int, tier: int, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward in each of its tiles, backward in several passes and in one; with tiles that are partial."""
    monkeypatch.setattr(plan, "allows_tf32", lambda: kind == "tf32")
    dtype = {"half": torch.float16, "double": torch.float64}.get(kind, torch.float32)
    assert plan.kind(dtype, depth) == kind
    backward = dict(zip(("query", "key", "both", "bias"), launches[1:], strict=True))
    m, n = max(t.block_m for t in launches[1:] if t), max(t.block_n for t in launches[1:] if t)
    case = Case(
        1, 1, m + 3, n + 5, depth, causal=True, alignment="bottom_right", dtype=dtype, value_dim=max(16, depth // 2),
        bias="relative" if tier else "dense", mask="bool" if tier == 1 else None, dropout=0.2 if tier == 2 else 0.0,
    )  # fmt: skip
    for forward in launches.forward:
        monkeypatch.setattr(plan, "forced", {**backward, "both": None, "forward": forward})
        last = forward == launches.forward[-1]
        check(case._replace(queries=forward.block_m + 3), TARGET, gradients=last)
    if launches.both is not None:
        monkeypatch.setattr(plan, "forced", backward)
        check(case, TARGET)
        one_tile = case._replace(batch=2, queries=launches.both.block_m - 3, keys=launches.both.block_n - 1)
        check(one_tile, TARGET)


def test_at_most_eight_configurations_for_a_kernel() -> None:
    for by_depth in plan.TABLES.values():
        for tables in by_depth.values():
            for name in Launches._fields:
                found = [getattr(launches, name) for launches in tables]
                flat = {t for f in found for t in (f if name == "forward" else (f,))}
                assert len(flat) <= 8, (name, flat)
                assert all(t is None or t.num_warps <= 8 for t in flat)  # 255 registers each


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [64, 128, 256])
@pytest.mark.parametrize("kind", ["plain", "rich", "crowded"])
def test_bfloat16(depth: int, kind: str) -> None:
    case = Case(2, 4, 197, 211, depth, dtype=torch.bfloat16, causal=True)
    rich: dict[str, Any] = {"bias": "t5", "padding": True}
    options = {"plain": {}, "rich": rich, "crowded": {**rich, "mask": "float", "alibi": True, "dropout": 0.1}}
    check(case._replace(**options[kind]), TARGET)


def _request(**changes: object) -> Request:
    request = Request(
        DEVICE, torch.float32, 64, 64, 1, "none", "none", "none", False, False, False, False, False, False
    )
    return request._replace(**changes)


def test_supports() -> None:
    assert triton_op.supports(_request()) is None
    assert "cuda" in triton_op.supports(_request(device="mps")).lower()
    assert "complex64" in triton_op.supports(_request(dtype=torch.complex64))
    assert "up to 256, not 257" in triton_op.supports(_request(value_dim=257))
    assert triton_op.supports(_request(head_dim=256, value_dim=256, dtype=torch.float16)) is None
    assert "float64 up to 64, not 65" in triton_op.supports(_request(head_dim=65, dtype=torch.float64))
    if not HAS_CUDA:
        assert "bfloat16" in triton_op.supports(_request(dtype=torch.bfloat16))


def test_tf32_as_pytorch_allows() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, wanted in (("tf32", "tf32"), ("ieee", "ieee")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert plan.kind(torch.float32, 128) == wanted
            assert plan.kind(torch.float32, 129) == "ieee"
            assert plan.kind(torch.float16, 64) == "half"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_the_heuristic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tiles where they fill the device and are filled, small ones for few queries."""
    monkeypatch.setattr(tiles, "_programs", lambda device: 528)
    monkeypatch.setattr(plan, "interpreted", lambda: False)
    cpu = torch.device("cpu")

    def forward(rows: int, owners: int, cost: int = 0) -> int:
        return plan.forward(rows, owners, cost, torch.float16, 64, cpu).block_m

    assert forward(4096, 64) == 128
    assert forward(49, 4096) == 64
    assert forward(1, 4096) == 16
    assert forward(197, 64, plan.PLAIN + 1) == 64
    assert forward(197, 64, plan.RICH + 1) == 16
    decode = plan.forward(1, 32, 0, torch.float16, 128, cpu)
    assert plan.splits(32, 8192, decode, cpu) == 8
    assert plan.splits(32, 100, decode, cpu) == 1
    assert plan.splits(4096, 8192, decode, cpu) == 1


def test_the_cost() -> None:
    q = torch.empty(2, 3, 8, 64)
    t, options = torch.empty(1), Options(1.0)
    assert plan.cost(Extras(), options._replace(right=0), q) == 0
    assert plan.cost(Extras(padding=t, lengths=t), options, q) == 0
    assert plan.cost(Extras(mask=t, bias=t, slopes=t), options._replace(left=0, softcap=1.0), q) == 5
    assert plan.cost(Extras(table=t), options._replace(dropout_p=0.1), q) == 3
    assert plan.cost(Extras(), options, q, torch.empty(2, 3, 8, 65)) == 1


# -------------------------------------------------------------------------------------------- decoding
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("queries", [1, 3])
def test_few_queries_split_the_keys(group: int, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads of a group are rows of one tile, and the keys are cut into shares, of which some see nothing."""
    splits = []
    original = plan.splits
    monkeypatch.setattr(tiles, "_programs", lambda device: 48)
    monkeypatch.setattr(plan, "splits", lambda *a: splits.append(original(*a)) or splits[-1])
    case = Case(2, 4, queries, 150, 16, key_heads=4 // group, lengths=True, lse=True, mask="float", alibi=True)
    check(case._replace(causal=True, alignment="bottom_right"), TARGET, gradients=False)
    assert splits[0] > 1


# ---------------------------------------------------------------------------------------------- edges
CASES = [
    # as small as can be
    Case(1, 1, 1, 1, 1),
    Case(1, 2, 1, 40, 8, lse=True, causal=True, alignment="bottom_right"),
    Case(2, 1, 40, 1, 8, causal=True),
    # more queries than keys, in both alignments: with the second the first queries see nothing
    Case(1, 2, 45, 20, causal=True),
    Case(1, 2, 45, 20, causal=True, alignment="bottom_right", lse=True),
    Case(1, 1, 100, 90, window=(20, 0), causal=True, alignment="bottom_right"),
    Case(1, 1, 70, 75, window=5, bias="t5"),
    # a length of 64 beyond a multiple of 128, with a mask; a float32 mask beside half data
    Case(1, 1, 192, 192, 16, mask="bool", mask_shape="11qk"),
    Case(1, 1, 192, 192, 16, mask="float", mask_shape="11qk", dtype=torch.float16),
    Case(mask="float32", dtype=torch.float16),
    # head dimensions that are no powers of two, and the largest
    Case(1, 1, 20, 20, 33, value_dim=7),
    Case(1, 1, 17, 18, 256, value_dim=255, dtype=torch.float16),
    # large scores: exponentials that would overflow
    Case(scale=25.0),
    Case(layout="transposed", bias="dense", bias_shape="bhqk"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_edges(case: Case) -> None:
    check(case, TARGET)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("bhqk", {}), ("1hqk", {}), ("b1qk", {}), ("11qk", {}), ("1h1k", {}), ("b11k", {"keys": 40}),
        ("bhq1", {"queries": 40}), ("1111", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("programs", [1, 64])
def test_the_gradient_of_what_is_broadcast(
    shape: str, sizes: dict[str, int], programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one share and in many."""
    monkeypatch.setattr(tiles, "_programs", lambda device: programs)
    check(Case(batch=3 if programs == 1 else 2, bias="dense", bias_shape=shape, **sizes), TARGET)


@pytest.mark.parametrize("programs", [1, 6, 64])
@pytest.mark.parametrize("sizes", [{}, {"queries": 20, "keys": 40}], ids=str)
def test_the_gradient_of_a_table(programs: int, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pass that does all, and in one of its own, whose programs own several tiles."""
    monkeypatch.setattr(tiles, "_programs", lambda device: programs)
    monkeypatch.setattr(plan, "forced", {} if sizes else {"both": Launch(32, 32, 4, 1)})
    check(Case(batch=3 if programs == 6 else 2, heads=1, bias="relative", **sizes), TARGET)


def test_a_mask_for_each_window() -> None:
    """(images, windows, heads, tokens, dim) with a mask (windows, 1, tokens, tokens), which is read in place."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 2, 9, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    mask = torch.randn(3, 1, 9, 9, device=DEVICE, requires_grad=True)
    with dlkern.backend(attention="triton"):
        out = attention(q, k, v, attn_mask=mask)
    like = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(2, 3, 2, 9, 9))
    torch.testing.assert_close(out, like)
    grads, of_like = (torch.autograd.grad(t.square().sum(), (q, k, v, mask)) for t in (out, like))
    for mine, theirs in zip(grads, of_like, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "heads", "queries", "keys"), EMPTY)
def test_empty(batch: int, heads: int, queries: int, keys: int) -> None:
    q, k, v = (torch.randn(batch, heads, n, 5, device=DEVICE, requires_grad=True) for n in (queries, keys, keys))
    with dlkern.backend(attention="triton"):
        out = attention(q, k, v)
    assert torch.equal(out, torch.zeros(batch, heads, queries, 5, device=DEVICE))
    for t, g in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert torch.equal(g, torch.zeros_like(t))


def test_rows_that_see_nothing() -> None:
    check_nothing_seen("triton")


def test_hidden_blocks_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in blocks of keys that are wholly hidden does not matter: here NaN."""
    monkeypatch.setattr(tiles, "_programs", lambda device: 1)
    ways: list[tuple[dict[str, Any], slice]] = [
        ({"key_lengths": torch.tensor([33, 20], device=DEVICE)}, slice(64, 130)),
        ({"is_causal": True}, slice(64, 130)),
        ({"window": 3, "causal_alignment": "bottom_right"}, slice(0, 64)),
    ]
    for options, hidden in ways:
        q, k, v = _qkv(2, 2, 33, 16, keys=130)
        like = attention(q, k, v, **options)
        k[:, :, hidden], v[:, :, hidden] = math.nan, math.nan
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        with dlkern.backend(attention="triton"):
            out = attention(q, k, v, **options)
        torch.testing.assert_close(out, like)
        dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
        assert not dq.isnan().any()
        assert torch.equal(dk[:, :, hidden], torch.zeros_like(dk[:, :, hidden]))
        assert torch.equal(dv[:, :, hidden], torch.zeros_like(dv[:, :, hidden]))


def test_nan_and_inf() -> None:
    check_nan_and_inf("triton")


def test_negated_views() -> None:
    z = [torch.view_as_complex(torch.randn(1, 2, 6, 8, 2)).to(DEVICE).conj() for _ in range(3)]
    q, k, v = (t.imag for t in z)
    assert q.is_neg()
    with dlkern.backend(attention="triton"):
        out = attention(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*(t.resolve_neg() for t in (q, k, v))))


def test_expanded_inputs_and_gradients() -> None:
    """Keys and values for all of the batch; a gradient of one element, one that is transposed, and one of zeros."""
    q, k, v = _qkv(2, 2, 6, 16)
    k, v = k[:1].requires_grad_(), v[:1].requires_grad_()
    q.requires_grad_()
    grads = [
        torch.ones(1, 1, 1, 1, device=DEVICE).expand(2, 2, 6, 16),
        torch.randn(2, 2, 16, 6, device=DEVICE).transpose(2, 3),
        torch.randn(2, 2, 6, 32, device=DEVICE)[..., ::2],
        torch.zeros(2, 2, 6, 16, device=DEVICE),
    ]
    with dlkern.backend(attention="triton"):
        out = attention(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1))
    like = F.scaled_dot_product_attention(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1))
    for grad in grads:
        mine, theirs = (torch.autograd.grad(t, (q, k, v), grad, retain_graph=True) for t in (out, like))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_lse_alone_has_a_gradient() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(1, 2, 6, 16))
    with dlkern.backend(attention="triton"):
        _, lse = attention(q, k, v, return_lse=True)
    (mine,) = torch.autograd.grad(lse.sum(), q)
    (like,) = torch.autograd.grad((q @ k.mT / 4).logsumexp(-1).sum(), q)
    torch.testing.assert_close(mine, like)


def test_memory_order_is_querys() -> None:
    """Heads beside each other, as a projection leaves them, stay so: they are put together without a copy."""
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in _qkv(2, 2, 6, 16))
    with dlkern.backend(attention="triton"):
        out = attention(q, k, v)
    assert out.stride() == q.stride()
    for g in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert g.stride() == q.stride()


def test_bit_for_bit_repeatable() -> None:
    times = 50 if HAS_CUDA else 2
    case = Case(2, 2, 40, 35, bias="relative", mask="float", mask_shape="1h1k", dropout=0.2, lse=True)
    d = data(case, DEVICE)
    inputs = differentiable(d)

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        values = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        given = d._replace(**{n.removeprefix("d"): t for n, t in values.items()})
        with dlkern.backend(attention="triton"):
            out, lse = call(case, given)
        return [out, lse, *torch.autograd.grad((out, lse), list(values.values()), (d.grad, d.grad_lse))]

    first = run()
    for _ in range(times - 1):
        for a, b in zip(first, run(), strict=True):
            assert torch.equal(a, b)


def test_no_tensor_of_queries_times_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table's bias, and its gradient, in memory that grows with the length."""
    sizes = []
    for name in ("empty", "zeros", "empty_like", "zeros_like", "full"):
        original = getattr(torch, name)

        def counted(*a: Any, original: Any = original, **k: Any) -> Tensor:
            made = original(*a, **k)
            sizes.append(made.numel())
            return made

        monkeypatch.setattr(torch, name, counted)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **k: sizes.append(new_empty(t, *a, **k).numel())
                        or new_empty(t, *a, **k))  # fmt: skip
    case = Case(1, 1, 97, 99, 16, bias="t5", causal=True)
    d = data(case, DEVICE)
    table = d.table.clone().requires_grad_()
    q = d.query.clone().requires_grad_()
    with dlkern.backend(attention="triton"):
        out = attention(q, d.key, d.value, bias=bias_of(case, d._replace(table=table)), is_causal=True)
    torch.autograd.grad(out, (q, table), d.grad)
    assert sizes
    assert max(sizes) < 97 * 99 / 4


def test_only_what_is_needed() -> None:
    """Each gradient alone is what it is among all of them, and the others are None."""
    case = Case(1, 2, 10, 12, mask="float", bias="relative")
    d = data(case, DEVICE)
    extras = Extras(mask=d.mask, bias=torch.randn(1, 2, 1, 12, device=DEVICE), table=d.table, index=d.index)
    options = Options(0.25)
    out, lse = triton_op.forward(d.query, d.key, d.value, extras, options=options)

    def run(*needs: bool) -> tuple[Tensor | None, ...]:
        return triton_op.backward(
            d.grad, None, d.query, d.key, d.value, extras, out, lse, options=options, needs=Needs(*needs)
        )

    everything = run(*[True] * 5)
    for i, fields in enumerate(((0,), (1, 2), (3,), (4,), (5,))):
        found = run(*(j == i for j in range(5)))
        for j, (one, of_all) in enumerate(zip(found, everything, strict=True)):
            assert (one is not None) == (j in fields)
            if one is not None:
                torch.testing.assert_close(one, of_all)


# ------------------------------------------------------------------------------ gradcheck, opcheck, random
@pytest.mark.parametrize("case", GRADCHECKED, ids=str)
def test_gradcheck(case: Case) -> None:
    check_gradients(case, "triton", twice=False, fast=True)


@pytest.mark.parametrize("layout", ["contiguous", "blhd"])
def test_opcheck(layout: str) -> None:
    check_op("triton", layout, autograd=False)


def test_compile_fullgraph() -> None:
    """The op is one opaque node; what it returns has the strides that the compiler was told."""
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in _qkv(1, 2, 6, 16))
    table = torch.randn(3, 2, device=DEVICE, requires_grad=True)
    index = torch.randint(0, 3, (6, 6), device=DEVICE)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attention(q, k, v, bias=RelativePositionBias(table, index)).transpose(1, 2).flatten(2)

    with dlkern.backend(attention="triton"):
        mine = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v, table)
        like = run(q, k, v, table)
        assert torch.equal(mine, like)
        grads, of_like = (torch.autograd.grad(t.square().sum(), (q, k, v, table)) for t in (mine, like))
    for a, b in zip(grads, of_like, strict=True):
        assert torch.equal(a, b)


_CASES = st.builds(
    Case,
    batch=st.integers(1, 2),
    heads=st.just(2),
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    dim=st.sampled_from((1, 8, 16, 20, 32)),
    value_dim=st.sampled_from((None, 7, 24)),
    key_heads=st.sampled_from((None, 1, 2)),
    scale=st.sampled_from((None, 0.5)),
    mask=st.sampled_from((None, "bool", "float", "float32")),
    mask_shape=st.sampled_from(("b1qk", "1hqk", "b11k", "11q1", "bhqk")),
    bias=st.sampled_from((None, "dense", "relative", "t5", "t5_one_way")),
    bias_shape=st.sampled_from(("1hqk", "11qk", "1h1k", "1hq1")),
    padding=st.booleans(),
    lengths=st.booleans(),
    causal=st.booleans(),
    alignment=st.sampled_from(("top_left", "bottom_right")),
    window=st.sampled_from((None, 0, 9, (None, 3), (5, None))),
    alibi=st.booleans(),
    softcap=st.sampled_from((None, None, 2.0)),
    dropout=st.sampled_from((0.0, 0.0, 0.25)),
    lse=st.booleans(),
    dtype=st.just(torch.float32),
    layout=st.sampled_from(("contiguous", "blhd", "sliced", "transposed")),
    seed=st.integers(0, 2**16),
)


@settings(max_examples=12 * EXAMPLES_TIMES)
@given(case=_CASES)
def test_random_cases(case: Case) -> None:
    check(case, TARGET)
