"""attention: numbers, semantics, errors, compile; the Triton kernels have a file of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import SEED, Case, check, data, differentiable, pairwise
from batch_norm_act_cases import spied
from conftest import HAS_CUDA
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dlkern
from dlkern import dispatch
from dlkern.functional import RelativePositionBias, T5Bias, attention
from dlkern.kernels.reference import attention as reference
from dlkern.ops.attention import AttentionFunction

DEVICE = "cuda" if HAS_CUDA else "cpu"
INF = math.inf


@pytest.mark.parametrize("case", pairwise(), ids=str)
def test_reference(case: Case) -> None:
    check(case, (DEVICE, "reference"))


@pytest.mark.parametrize("case", [case for case in pairwise() if not case.dropout], ids=str)
def test_pytorch(case: Case) -> None:
    check(case, (DEVICE, "torch"))


def _qkv(*shape: int, keys: int | None = None, heads: int | None = None, **options: Any) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    b, h, length, dim = shape or (2, 4, 6, 8)
    sizes = ((b, h, length, dim), *((b, heads or h, keys or length, dim),) * 2)
    return tuple(torch.randn(s, generator=generator).to(device=DEVICE, **options) for s in sizes)


# ------------------------------------------------------------------------------------------ dispatch
def test_the_default_is_sdpa_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain arguments go to PyTorch as they are: no Function, no mask."""
    calls = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append((a, k)) or original(*a, **k))
    q, k, v = (t.requires_grad_() for t in _qkv())
    with spied() as ran, dlkern.backend(attention="torch") if DEVICE == "cpu" else contextlib.nullcontext():
        out = attention(q, k, v, is_causal=True)
    assert not ran
    (((q_, k_, v_, mask, dropout, causal), options),) = calls
    assert q_ is q
    assert k_ is k
    assert v_ is v
    assert mask is None
    assert (dropout, causal, options) == (0.0, True, {"scale": 8**-0.5, "enable_gqa": False})
    assert not isinstance(out.grad_fn, torch.autograd.function.BackwardCFunction)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"is_causal": True, "causal_alignment": "bottom_right"}, 9),
        ({"window": 20}, 6),
        ({"window": (None, 20), "causal_alignment": "bottom_right"}, 9),
    ],
    ids=str,
)
def test_a_band_that_hides_nothing_is_none(options: dict[str, Any], keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: masks.append(a[3:6]) or original(*a, **k))
    queries = 1 if options.get("is_causal") else 6
    q, k, v = _qkv(2, 4, queries, 8, keys=keys)
    attention(q, k, v, **options)  # plain attention, which is PyTorch's by default
    assert masks == [(None, 0.0, False)]


def test_default_order() -> None:
    plain = reference.Request(
        "cpu", torch.float32, 64, 64, 1, "none", "none", "none", False, False, False, False, False, False
    )

    def chosen(**options: Any) -> str:
        return dispatch.choose("attention", plain._replace(**options)).backend

    ours = "torch" if dispatch.unavailable("cpu") else "cpu"
    assert chosen() == chosen(device="cuda") == chosen(device="cuda", padding=True) == "torch"
    assert chosen(mask="bool", short=True) == chosen(dtype=torch.float64, padding=True) == "torch"
    for option in ("padding", "lengths", "slopes", "dropout", "banded", "softcap", "sequences"):
        assert chosen(**{option: True}) == chosen(**{option: True}, short=True) == ours, option
    for option in ({"mask": "bool"}, {"mask": "float"}, {"bias": "dense"}, {"table": "positions"}):
        assert chosen(**option) == ours, option


def test_function_is_what_runs() -> None:
    q, k, v = _qkv()
    with dlkern.backend(attention="reference"):
        out = attention(q.requires_grad_(), k, v)
        with torch.no_grad():
            alone = attention(q, k, v)
    assert type(out.grad_fn).__name__ == AttentionFunction.__name__ + "Backward"
    assert torch.equal(out, alone)


# ----------------------------------------------------------------------------------------- semantics
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("shape", [(4, 6, 8), (3, 5, 4, 6, 8), (2, 3, 2, 4, 6, 8)], ids=str)
def test_other_dimensions(shape: tuple[int, ...], backend: str) -> None:
    """Heads alone, and several leading dimensions; a mask for each of the last of them, as Swin's windows have."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(3))
    patterns = [shape[:-3], shape[-4:-3], tuple(1 for _ in shape[:-3]), (*shape[:-4], 1) if len(shape) > 3 else ()]
    for lead in patterns:
        mask = torch.randn(*lead, 1, 6, 6, device=DEVICE, requires_grad=True)
        inputs = (q, k, v, mask)
        with dlkern.backend(attention=backend):
            out, lse = attention(q, k, v, attn_mask=mask, return_lse=True)
        s = q @ k.mT * 8**-0.5 + mask
        torch.testing.assert_close(out, s.softmax(-1) @ v)
        torch.testing.assert_close(lse, s.logsumexp(-1))
        grads = torch.autograd.grad(out.square().sum(), inputs)
        like = torch.autograd.grad((s.softmax(-1) @ v).square().sum(), inputs)
        for mine, theirs in zip(grads, like, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_padding_and_lengths_agree(backend: str) -> None:
    q, k, v = _qkv()
    lengths = torch.tensor([6, 2], device=DEVICE)
    padding = torch.arange(6, device=DEVICE) >= lengths[:, None]
    with dlkern.backend(attention=backend):
        one = attention(q, k, v, key_lengths=lengths)
        two = attention(q, k, v, key_padding_mask=padding)
        three = attention(q, k, v, attn_mask=~padding[:, None, None, :])
    assert torch.equal(one, two)
    torch.testing.assert_close(one, three)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_query_that_sees_nothing(backend: str) -> None:
    check_nothing_seen(backend)


def check_nothing_seen(backend: str) -> None:
    """Output, gradients and exponentials are 0, for each way to hide."""
    q, k, v = (t.requires_grad_() for t in _qkv())
    nothing = torch.zeros(6, 6, dtype=torch.bool, device=DEVICE)
    ways: list[dict[str, Any]] = [
        {"attn_mask": nothing},
        {"attn_mask": torch.full((6, 6), -INF, device=DEVICE)},
        {"key_padding_mask": torch.ones(2, 6, dtype=torch.bool, device=DEVICE)},
        {"key_lengths": torch.zeros(2, dtype=torch.int32, device=DEVICE)},
    ]
    for way in ways:
        with dlkern.backend(attention=backend):
            out = attention(q, k, v, **way)
            _, lse = attention(q, k, v, return_lse=True, **way)
        assert torch.equal(out, torch.zeros_like(out)), way
        assert torch.equal(lse, torch.full_like(lse, -INF)), way
        for g in torch.autograd.grad(out.sum(), (q, k, v)):
            assert torch.equal(g, torch.zeros_like(g)), way


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("queries", "keys"), [(7, 3), (3, 7)])
def test_causal_alignments(queries: int, keys: int, backend: str) -> None:
    q, k, v = _qkv(1, 2, queries, 8, keys=keys)
    for alignment, offset in (("top_left", 0), ("bottom_right", keys - queries)):
        seen = torch.ones(queries, keys, dtype=torch.bool, device=DEVICE).tril(offset)
        with dlkern.backend(attention=backend):
            out = attention(q, k, v, is_causal=True, causal_alignment=alignment)
        s = (q @ k.mT * 8**-0.5).masked_fill(~seen, -INF)
        like = torch.where(seen.any(-1, keepdim=True), s.softmax(-1).nan_to_num(), 0.0) @ v
        torch.testing.assert_close(out, like)


def test_nan_and_inf() -> None:
    check_nan_and_inf("reference")


def check_nan_and_inf(backend: str) -> None:
    """As in PyTorch's plain composition: a query's NaN stays its own; infinity in a value reaches who sees it."""
    q, k, v = _qkv(1, 2, 6, 8)
    q[0, 0, 1, 0], v[0, 1, 2, 0] = math.nan, INF
    with sdpa_kernel(SDPBackend.MATH):
        like = F.scaled_dot_product_attention(q, k, v)
    with dlkern.backend(attention=backend):
        torch.testing.assert_close(attention(q, k, v), like, equal_nan=True)


EMPTY = [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)]


@pytest.mark.parametrize(("batch", "heads", "queries", "keys"), EMPTY)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty(batch: int, heads: int, queries: int, keys: int, backend: str) -> None:
    q, k, v = (torch.randn(batch, heads, n, 5, device=DEVICE, requires_grad=True) for n in (queries, keys, keys))
    with dlkern.backend(attention=backend):
        out, lse = attention(q, k, v, return_lse=True)
    assert torch.equal(out, torch.zeros(batch, heads, queries, 5, device=DEVICE))
    assert torch.equal(lse, torch.full((batch, heads, queries), -INF, device=DEVICE))
    for t, g in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert torch.equal(g, torch.zeros_like(t))


# ------------------------------------------------------------------------------------------- dropout
def test_philox_known_answers() -> None:
    """The vectors of Random123's own test."""
    pi = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    answers = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, (k0, k1), expected in answers:
        seed = k0 | (k1 << 32)
        seed -= 2**64 if seed >= 2**63 else 0
        words = reference.philox(torch.tensor(seed), tuple(torch.tensor(c) for c in counter))  # type: ignore[arg-type]
        assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_keep_rate(p: float) -> None:
    kept = reference.keep(torch.tensor([SEED]), 2, 3, 64, 65, p)
    assert abs(float(kept.double().mean()) - (1 - p)) < 0.01
    assert len({tuple(row) for row in kept.flatten(0, 2).tolist()}) == (1 if p == 0 else 2 * 3 * 64)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dropout_follows_manual_seed(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in _qkv())

    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        with dlkern.backend(attention=backend):
            out = attention(q, k, v, dropout_p=0.5)
        return [out, *torch.autograd.grad(out.sum(), (q, k, v))]

    first, again, other = run(1), run(1), run(2)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_dropout_is_the_same_in_backward() -> None:
    """value's gradient shows what was kept: with softmax 1 / Lk and unit gradients it is the sum of the kept."""
    q, k, v = torch.zeros(1, 1, 32, 8, device=DEVICE), *(torch.zeros(1, 1, 64, 8, device=DEVICE) for _ in range(2))
    v = torch.eye(64, device=DEVICE)[None, None, :, :].requires_grad_()
    with dlkern.backend(attention="reference"):
        out = attention(q, k, v, dropout_p=0.25)
    (dv,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(dv[0, 0, :, 0], out[0, 0].sum(0).detach())


# --------------------------------------------------------------------------------------- higher order
GRADCHECKED = [
    Case(1, 2, 3, 4, 5, causal=True, alignment="bottom_right", mask="float", bias="dense", lse=True),
    Case(2, 2, 3, 4, 5, key_heads=1, bias="t5", alibi=True, softcap=2.0, padding=True, window=3),
    Case(1, 2, 3, 4, 5, bias="relative", lengths=True, dropout=0.3),
]


@pytest.mark.parametrize("case", GRADCHECKED, ids=str)
def test_gradcheck(case: Case) -> None:
    check_gradients(case, "reference", twice=True)


def check_gradients(case: Case, backend: str, *, twice: bool, fast: bool = False) -> None:
    """gradcheck in float64 of the Function itself; dropout is held by seeding before each call."""
    from attention_cases import call

    d = data(case._replace(dtype=torch.float64), DEVICE)
    inputs = differentiable(d)
    names = [name.removeprefix("d") for name in inputs]

    def run(*values: Tensor) -> Any:
        torch.manual_seed(0)
        with dlkern.backend(attention=backend):
            out, lse = call(case, d._replace(**dict(zip(names, values, strict=True))))
        return out if lse is None else (out, lse)

    values = [t.clone().masked_fill(t == -INF, -3.0).requires_grad_() for t in inputs.values()]
    with spied() as calls:
        assert torch.autograd.gradcheck(run, values, fast_mode=fast)
        if twice:
            assert torch.autograd.gradgradcheck(run, values, fast_mode=True)
    assert {(backend, "forward"), (backend, "backward")} <= set(calls)


def test_torch_func() -> None:
    """grad over the Function; what it has no rule for raises, and PyTorch's own path has them all."""
    q, k, v = _qkv()

    def loss(q: Tensor) -> Tensor:
        return attention(q, k, v).square().sum()

    with dlkern.backend(attention="reference"):
        mine = torch.func.grad(loss)(q)
        with pytest.raises(RuntimeError):
            torch.func.vmap(loss)(q[None])
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.jvp(loss, (q,), (q,))
    torch.testing.assert_close(mine, torch.func.grad(loss)(q))
    torch.testing.assert_close(torch.func.vmap(loss)(q[None]), loss(q)[None])


# ------------------------------------------------------------------------------------ compile, opcheck
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_compile_fullgraph(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in _qkv())
    table = torch.randn(8, 4, device=DEVICE, requires_grad=True)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = T5Bias(table, True, 8, 16)
        return attention(q, k, v, bias=bias, is_causal=True, key_padding_mask=q.new_zeros(2, 6, dtype=torch.bool))

    with dlkern.backend(attention=backend):
        mine = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v, table)
        like = run(q, k, v, table)
    torch.testing.assert_close(mine, like)
    grads, of_like = (torch.autograd.grad(t.square().sum(), (q, k, v, table)) for t in (mine, like))
    for a, b in zip(grads, of_like, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "options", [{}, {"window": 1, "causal_alignment": "bottom_right"}, {"is_causal": True}], ids=str
)
def test_compile_with_lengths_that_change(options: dict[str, Any], dynamic: bool | None) -> None:
    """From the second length on torch.compile makes it a symbol, or with ``dynamic`` from the first."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: attention(*t, **options), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for queries, keys in ((5, 5), (7, 6), (9, 12)):
        q, k, v = (t.requires_grad_() for t in _qkv(2, 4, queries, 8, keys=keys))
        mine, like = compiled(q, k, v), attention(q, k, v, **options)
        torch.testing.assert_close(mine, like)
        for a, b in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (mine, like)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "blhd"])
def test_opcheck(layout: str) -> None:
    check_op("reference", layout, autograd=True)


def check_op(backend: str, layout: str, *, autograd: bool) -> None:
    """Shapes, strides and what is written, against what torch.compile is told."""
    q, k, v = _qkv(2, 4, 5, 8, keys=7, heads=2)
    if layout == "blhd":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    mask = torch.randn(2, 1, 5, 7, device=DEVICE).transpose(2, 3).contiguous().transpose(2, 3)
    bias, table = torch.randn(1, 4, 1, 7, device=DEVICE), torch.randn(4, 3, device=DEVICE).T
    index = torch.randint(0, 3, (5, 7), device=DEVICE)
    padding = torch.zeros(2, 7, dtype=torch.bool, device=DEVICE)
    extras = (
        mask, bias, table, index, padding, torch.tensor([7, 3], device=DEVICE), torch.rand(1, 4, device=DEVICE),
        torch.tensor([SEED], device=DEVICE), None, None,
    )  # fmt: skip
    options = (0.3, -5, 2, 1, 2.0, 0.25, False)
    tests: tuple[str, ...] = ("test_schema", "test_faketensor")
    if autograd:
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    args = (q, k, v, *extras, *options, backend)
    torch.library.opcheck(torch.ops.dlkern.attention.default, args, test_utils=tests)
    out, lse = torch.ops.dlkern.attention(*args)
    for needs in ([True] * 5, [True, False, False, False, False], [False, True, False, True, False]):
        grads = (torch.randn_like(out), torch.randn_like(lse))
        args = (*grads, q, k, v, *extras, out, lse, *options, needs, backend)
        torch.library.opcheck(torch.ops.dlkern.attention_backward.default, args, test_utils=tests)


# -------------------------------------------------------------------------------------------- autocast
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast(backend: str) -> None:
    q, k, v = _qkv()
    with torch.autocast(DEVICE, dtype=torch.bfloat16), dlkern.backend(attention=backend):
        out = attention(q, k.bfloat16(), v, attn_mask=torch.zeros(6, 6, device=DEVICE))
        like = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == like.dtype == torch.bfloat16
    torch.testing.assert_close(out, like, rtol=2e-2, atol=2e-2)


# ------------------------------------------------------------------------------------------ bad calls
def _bool(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


_INDEX = torch.zeros(6, 6, dtype=torch.int64)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, "query: expected a Tensor, got list"),
    ({"query": torch.randn(6, 8)}, ValueError, r"query: expected \(..., heads, length, dim\), got shape \(6, 8\)"),
    ({"query": torch.zeros(2, 4, 6, 8, dtype=torch.int32)}, TypeError, "query: expected float32.*torch.int32"),
    ({"key": torch.randn(2, 4, 6, 8).half()}, TypeError, "key: expected torch.float32 like query, got torch.float16"),
    ({"value": torch.randn(2, 4, 6, 8, device="meta")}, RuntimeError, "value: expected device .* got meta"),
    ({"key": torch.randn(3, 4, 6, 8)}, ValueError, r"key: expected leading dimensions \(2,\)"),
    ({"key": torch.randn(2, 4, 6, 7)}, ValueError, "key: expected head dimension 8 like query, got 7"),
    ({"value": torch.randn(2, 4, 5, 8)}, ValueError, "value: expected length 6 like key, got 5"),
    ({"value": torch.randn(2, 2, 6, 8)}, ValueError, "value: expected 4 heads like key, got 2"),
    ({"value": torch.randn(2, 4, 6, 257)}, ValueError, "value: expected a head dimension from 1 to 256, got 257"),
    ({"query": torch.randn(2, 8, 6, 8)}, ValueError, "key: expected 8 heads like query .enable_gqa is False., got 4"),
    ({"query": torch.randn(2, 6, 6, 8), "enable_gqa": True}, ValueError, "4 heads of key do not divide 6"),
    ({"attn_mask": torch.randn(3, 6)}, ValueError, r"attn_mask: shape \(3, 6\) does not broadcast to \(2, 4, 6, 6\)"),
    ({"attn_mask": torch.randn(1, 2, 4, 6, 6)}, ValueError, r"attn_mask: shape \(1, 2, 4, 6, 6\) does not broadcast"),
    ({"attn_mask": torch.zeros(6, 6, dtype=torch.int64)}, TypeError, "attn_mask: expected torch.float32.*torch.int64"),
    ({"attn_mask": torch.zeros(6, 6).double()}, TypeError, "attn_mask: expected torch.float32.*torch.float64"),
    ({"bias": _bool(6, 6)}, TypeError, "bias: expected torch.float32 with a query of torch.float32, got torch.bool"),
    ({"bias": torch.zeros(2, 6, 6)}, ValueError, r"bias: shape \(2, 6, 6\) does not broadcast to \(2, 4, 6, 6\)"),
    ({"bias": "t5"}, TypeError, "bias: expected a Tensor, got str"),
    ({"bias": RelativePositionBias(torch.zeros(3, 2), _INDEX)}, ValueError, r"bias.table: expected \(rows, 4\)"),
    ({"bias": RelativePositionBias(torch.zeros(3, 4), _INDEX[:5])}, ValueError, r"bias.index: expected shape \(6, 6\)"),
    ({"bias": RelativePositionBias(torch.zeros(3, 4), _INDEX.float())}, TypeError, "bias.index: expected an int32"),
    ({"bias": T5Bias(torch.zeros(31, 4))}, ValueError, "bias.table: expected 32 rows, one a bucket, got 31"),
    ({"bias": T5Bias(torch.zeros(7, 4), True, 7)}, ValueError, "bias.num_buckets: expected an even number"),
    ({"bias": T5Bias(torch.zeros(32, 4), True, 32, 8)}, ValueError, "bias.max_distance: expected more than 8, got 8"),
    ({"bias": T5Bias(torch.zeros(32, 4), True, 32, 90.5)}, TypeError, "bias.max_distance: expected an int, got 90.5"),
    ({"bias": T5Bias(torch.zeros(32, 4), True, 32.0)}, TypeError, "bias.num_buckets: expected an int, got 32.0"),
    ({"bias": T5Bias(torch.zeros(32, 4).double())}, TypeError, "bias.table: expected torch.float32.*torch.float64"),
    ({"key_padding_mask": _bool(2, 5)}, ValueError, r"key_padding_mask: expected shape \(2, 6\) .* got \(2, 5\)"),
    ({"key_padding_mask": torch.zeros(2, 6)}, TypeError, "key_padding_mask: expected torch.bool, got torch.float32"),
    ({"key_lengths": torch.zeros(3, dtype=torch.int32)}, ValueError, r"key_lengths: expected shape \(2,\)"),
    ({"key_lengths": torch.zeros(2)}, TypeError, "key_lengths: expected torch.int32 or torch.int64, got torch.float32"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a probability from 0 up to, not including, 1, got 1.0"),
    ({"dropout_p": None}, TypeError, "dropout_p: expected a number, got None"),
    ({"scale": "0.5"}, TypeError, "scale: expected a number, got '0.5'"),
    ({"softcap": "2"}, TypeError, "softcap: expected a number, got '2'"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p: .* got -0.1"),
    ({"causal_alignment": "centre"}, ValueError, "causal_alignment: expected one of top_left, bottom_right, got"),
    ({"scale": INF}, ValueError, "scale: expected a finite number or None, got inf"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a positive number or None, got 0.0"),
    ({"window": -1}, ValueError, "window: expected an int of at least 0, or a pair of those or None, got -1"),
    ({"window": (1, 2, 3)}, ValueError, r"window: .* got \(1, 2, 3\)"),
    ({"window": 1.5}, ValueError, "window: .* got 1.5"),
    ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes: expected shape \(4,\) or \(2, 4\), got \(3,\)"),
    ({"alibi_slopes": torch.ones(4, requires_grad=True)}, ValueError, "alibi_slopes: expected a tensor without"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=lambda v: str(v)[:40].replace("\n", " "))
def test_errors_come_before_anything_runs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = _qkv()
    moved = {
        name: t.to(DEVICE) if isinstance(t, Tensor) and t.device.type != "meta" else t for name, t in change.items()
    }
    if isinstance(moved.get("bias"), (RelativePositionBias, T5Bias)):
        on_device = {n: t.to(DEVICE) for n, t in vars(moved["bias"]).items() if isinstance(t, Tensor)}
        moved["bias"] = dataclasses.replace(moved["bias"], **on_device)
    arguments: dict[str, Any] = {"query": q, "key": k, "value": v, **moved}
    with dlkern.backend("reference"), spied() as calls, pytest.raises(error, match=message):
        attention(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)
    assert not calls


@pytest.mark.skipif(HAS_CUDA, reason="values are looked at on the CPU only")
def test_values_are_checked_on_the_cpu() -> None:
    q, k, v = _qkv()
    for lengths in ([7, 1], [1, -1]):
        with pytest.raises(ValueError, match="key_lengths: expected 0 to 6, got"):
            attention(q, k, v, key_lengths=torch.tensor(lengths))
    with pytest.raises(ValueError, match=r"bias\.index: expected 0 to 2 for 3 rows, got 0 to 3"):
        attention(q, k, v, bias=RelativePositionBias(torch.zeros(3, 4), torch.eye(6).long() * 3))


def test_a_table_first_seen_in_inference_mode() -> None:
    """What is kept of it between calls serves a call that wants a gradient."""
    q, k, v = _qkv()
    table = torch.randn(10, 4, device=DEVICE, requires_grad=True)
    bias = T5Bias(table, True, 10, 77)
    with dlkern.backend(attention="reference"):
        with torch.inference_mode():
            like = attention(q, k, v, bias=bias)
        out = attention(q, k, v, bias=bias)
    assert torch.equal(out, like)
    (grad,) = torch.autograd.grad(out.sum(), table)
    assert grad.shape == table.shape


def test_a_float32_mask_beside_half_data() -> None:
    """cuDNN's attention was seen to misread one; here it is cast or read as what it is."""
    q, k, v = _qkv(dtype=torch.bfloat16)
    mask = torch.randn(2, 1, 6, 6, device=DEVICE)
    like = F.scaled_dot_product_attention(*(t.float() for t in (q, k, v)), attn_mask=mask)
    for backend in ("torch", "reference"):
        with dlkern.backend(attention=backend):
            torch.testing.assert_close(attention(q, k, v, attn_mask=mask).float(), like, rtol=2e-2, atol=2e-2)
