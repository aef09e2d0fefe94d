"""attention in the extension: parity for a pairwise cover of the options, determinism, memory, semantics."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import test_attention as semantics
import torch
import torch.nn.functional as F
from attention_cases import Case, arrange, call, check, data, differentiable, pairwise, run
from batch_norm_act_cases import spied
from conftest import HAS_CUDA
from guard import guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dlkern
from dlkern import dispatch
from dlkern.functional import RelativePositionBias, T5Bias, attention

REASON = "the values are made on the CUDA device" if HAS_CUDA else dispatch.unavailable("cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
TARGET = ("cpu", "cpu")


@pytest.fixture
def portable() -> Iterator[None]:
    """The kernels without AVX2."""
    from dlkern import _C

    _C.set_isa("portable")
    yield
    _C.set_isa("best")


# --------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("case", pairwise(), ids=str)
def test_pairwise(case: Case) -> None:
    check(case, TARGET)


@pytest.mark.parametrize("case", [case._replace(dtype=torch.bfloat16) for case in pairwise(1)[:12]], ids=str)
def test_bfloat16(case: Case) -> None:
    check(case, TARGET)


@pytest.mark.parametrize("case", pairwise(2)[::3], ids=str)
@pytest.mark.usefixtures("portable")
def test_portable(case: Case) -> None:
    check(case, TARGET)


#: Several blocks of queries and of keys, sizes that leave one row or column over, and few of either.
SIZES = [
    Case(1, 2, 200, 300, 32, causal=True, alignment="bottom_right", bias="t5", lse=True),
    Case(2, 1, 67, 257, 40, value_dim=24, padding=True, window=(40, 9), softcap=5.0),
    Case(1, 2, 133, 129, 17, bias="relative", mask="float", mask_shape="1hqk", dropout=0.2),
    Case(1, 4, 70, 131, 64, key_heads=2, mask="float", mask_shape="b1q1", bias="dense", bias_shape="11qk"),
    Case(3, 2, 49, 49, 32, bias="relative"),
    Case(9, 2, 49, 49, 32, bias="relative", padding=True),  # windows whose last keys differ
    Case(1, 1, 1, 70, 16, lengths=True, lse=True),
    Case(2, 2, 70, 1, 16, bias="t5"),
    Case(1, 2, 37, 18, 16, causal=True),  # more queries than keys
    Case(1, 2, 37, 18, 16, causal=True, alignment="bottom_right", alibi=True),  # the first see nothing
    Case(1, 1, 1, 1, 1, bias="relative"),
    Case(2, 2, 20, 20, 256, value_dim=256, window=3, dtype=torch.bfloat16),
    Case(1, 2, 30, 30, 64, causal=True, layout="transposed"),
    Case(1, 2, 19, 21, 16, scale=-1.5, padding=True),
    Case(1, 1, 40, 40, 8, scale=0.0, causal=True),
]


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes(case: Case) -> None:
    check(case, TARGET)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 3, 150, 280, 70, 70))),
    options=st.fixed_dictionaries(
        {
            "bias": st.sampled_from([None, "t5", "t5_one_way", "relative", "dense"]),
            "padding": st.booleans(),
            "causal": st.booleans(),
            "window": st.sampled_from([None, 0, 5, (70, None), (None, 3)]),
            "softcap": st.sampled_from([None, 4.0]),
            "layout": st.sampled_from(["contiguous", "blhd", "sliced"]),
        }
    ),
    seed=st.integers(0, 99),
)
def test_any_size(sizes: tuple[int, ...], options: dict[str, Any], seed: int) -> None:
    batch, heads, queries, keys, dim, value_dim = sizes
    check(Case(batch, heads, queries, keys, dim, value_dim, seed=seed, **options), TARGET)


GRADCHECKED = [
    *semantics.GRADCHECKED,
    Case(1, 2, 3, 4, 5, value_dim=3, window=(1, 2), bias="t5_one_way", mask="float", mask_shape="11q1", lse=True),
    Case(2, 4, 3, 4, 5, key_heads=2, bias="dense", bias_shape="b11k", alibi=True, softcap=1.5),
]


@pytest.mark.parametrize("case", GRADCHECKED, ids=str)
def test_gradcheck(case: Case) -> None:
    semantics.check_gradients(case, "cpu", twice=True)


# ----------------------------------------------------------------------------------------- determinism
REPEATED = [
    Case(2, 2, 150, 200, 16, bias="t5", causal=True, lse=True),
    Case(20, 3, 49, 49, 16, bias="relative"),
    Case(1, 2, 150, 140, 16, mask="float", mask_shape="1111", bias="dense", bias_shape="11q1", dropout=0.2),
]


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_fifty_backwards_are_the_same(case: Case) -> None:
    """Bit for bit, on one thread and on several."""
    d = data(case, "cpu")
    inputs = [t.detach().clone().requires_grad_() for t in differentiable(d).values()]
    named = dict(zip((n.removeprefix("d") for n in differentiable(d)), inputs, strict=True))
    threads = torch.get_num_threads()
    first: list[Tensor] = []
    try:
        for i in range(50):
            torch.set_num_threads(1 + i % 3)
            torch.manual_seed(0)
            with dlkern.backend(attention="cpu"):
                out, lse = call(case, d._replace(**named))
            loss = out.sum() if lse is None else out.sum() + lse.masked_fill(lse.isinf(), 0).sum()
            found = [out.detach(), *torch.autograd.grad(loss, inputs)]
            first = first or found
            assert all(map(torch.equal, first, found)), i
    finally:
        torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------- memory
_SCRIPT = """
import resource, sys, torch, dlkern
from dlkern.functional import T5Bias, attention, attention_varlen
torch.set_num_threads(1)
length, kind = 6144, sys.argv[1]
def run(length):
    q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    table = torch.randn(8, 1, requires_grad=True)
    padding = torch.arange(length)[None] % 3 == 0
    cu = torch.tensor([0, length // 3, length])
    inputs = [q, k, v]
    if kind == "varlen":
        out = attention_varlen(*(t[0].transpose(0, 1) for t in (q, k, v)), cu, cu, is_causal=True)
    elif kind == "t5":
        inputs.append(table)
        out = attention(q, k, v, bias=T5Bias(table, True, 8, 20))
    else:
        options = {
            "padding": {"key_padding_mask": padding}, "lengths": {"key_lengths": torch.tensor([length - 9])},
            "window": {"window": 100}, "alibi": {"alibi_slopes": torch.ones(1)}, "softcap": {"softcap": 3.0},
            "causal": {"is_causal": True}, "dropout": {"dropout_p": 0.1},
        }[kind]
        out = attention(q, k, v, **options)
    torch.autograd.grad(out.sum(), inputs)
with dlkern.backend(attention="cpu"):
    run(256)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(length)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, length * length // 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.parametrize(
    "kind", ["padding", "lengths", "window", "alibi", "softcap", "causal", "t5", "dropout", "varlen"]
)
def test_no_tensor_of_queries_by_keys(kind: str) -> None:
    """Forward and backward grow the process by less than a third of one byte for each query and key."""
    ran = subprocess.run([sys.executable, "-c", _SCRIPT, kind], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    grown, square = map(int, ran.stdout.split())
    assert grown < square / 3, f"{grown} KiB, where queries x keys of one byte are {square} KiB"


def test_windows_allocate_what_their_results_need() -> None:
    """A table by position: torch allocates nothing that is as large as the scores of one window."""
    q, k, v = (torch.randn(4, 2, 49, 4, requires_grad=True) for _ in range(3))
    table, index = torch.randn(11, 2, requires_grad=True), torch.randint(0, 11, (49, 49))
    with dlkern.backend(attention="cpu"), torch.profiler.profile(profile_memory=True, record_shapes=True) as seen:
        out = attention(q, k, v, bias=RelativePositionBias(table, index))
        torch.autograd.grad(out.sum(), (q, k, v, table))
    largest = max(e.self_cpu_memory_usage for e in seen.events())
    assert 0 < largest < 4 * 2 * 49 * 49  # bytes: less than one for each score


# ------------------------------------------------------------------------------------------- semantics
def test_nothing_seen() -> None:
    semantics.check_nothing_seen("cpu")


def test_nan_and_inf() -> None:
    semantics.check_nan_and_inf("cpu")


def test_what_is_hidden_does_not_matter() -> None:
    """Keys behind the padding are not read: NaN there stays there."""
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    lengths = torch.tensor([9, 4])
    right = attention(q, k, v, key_lengths=lengths)
    for t in (k, v):
        t[1, :, 4:] = torch.nan
    with dlkern.backend(attention="cpu"):
        torch.testing.assert_close(attention(q, k, v, key_lengths=lengths), right)
        padding = torch.arange(9) >= lengths[:, None]
        torch.testing.assert_close(attention(q, k, v, key_padding_mask=padding), right)


@pytest.mark.parametrize("shape", [(4, 6, 8), (3, 5, 4, 6, 8)], ids=str)
def test_other_dimensions(shape: tuple[int, ...]) -> None:
    semantics.test_other_dimensions(shape, "cpu")


@pytest.mark.parametrize(("batch", "heads", "queries", "keys"), semantics.EMPTY)
def test_empty(batch: int, heads: int, queries: int, keys: int) -> None:
    semantics.test_empty(batch, heads, queries, keys, "cpu")


@pytest.mark.parametrize("layout", ["contiguous", "blhd"])
def test_opcheck(layout: str) -> None:
    semantics.check_op("cpu", layout, autograd=True)


def test_dropout_follows_manual_seed() -> None:
    semantics.test_dropout_follows_manual_seed("cpu")


def test_compile_fullgraph() -> None:
    semantics.test_compile_fullgraph("cpu")


def test_autocast() -> None:
    semantics.test_autocast("cpu")


@pytest.mark.parametrize("how", ["expanded", "scalar", "transposed", "sliced", "negated"])
def test_gradients_of_any_strides(how: str) -> None:
    case = Case(2, 2, 19, 21, 16, padding=True)
    d = data(case, "cpu")
    grad = {
        "expanded": lambda g: g[:, :, :1].expand_as(g),
        "scalar": lambda g: g[:1, :1, :1, :1].expand_as(g),
        "transposed": lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": lambda g: F.pad(g, (1, 2, 3, 0))[:, :, 3:, 1:-2],
        "negated": lambda g: torch.complex(g, g).conj().imag,
    }[how](d.grad)
    found = []
    for g in (grad, grad.clone().resolve_neg().contiguous()):
        inputs = [t.clone().requires_grad_() for t in (d.query, d.key, d.value)]
        with dlkern.backend(attention="cpu"), guarded() as guards:
            placed = [arrange(t.detach(), "blhd", guards).requires_grad_() for t in inputs]
            out = attention(*placed, key_padding_mask=d.padding)
            found.append(torch.autograd.grad(out, placed, g))
    for mine, right in zip(*found, strict=True):
        assert torch.equal(mine, right)


def test_expanded_inputs() -> None:
    q, k, v = torch.randn(1, 1, 9, 8), torch.randn(2, 1, 9, 8), torch.randn(1, 2, 1, 8)
    views = (q.expand(2, 2, 9, 8), k.expand(2, 2, 9, 8), v.expand(2, 2, 9, 8))
    with dlkern.backend(attention="cpu"):
        found = attention(*views, window=3)
        right = attention(*(t.contiguous() for t in views), window=3)
    assert torch.equal(found, right)


def test_only_what_is_needed() -> None:
    """Each gradient alone is the one that comes with the others."""
    q, k, v = (torch.randn(2, 2, 70, 8) for _ in range(3))
    table = torch.randn(8, 2)
    everything = [t.requires_grad_() for t in (q, k, v, table)]

    def grads(wanted: list[Tensor]) -> tuple[Tensor, ...]:
        given = [t if any(t is w for w in wanted) else t.detach() for t in everything]
        with dlkern.backend(attention="cpu"), spied() as calls:
            out = attention(*given[:3], bias=T5Bias(given[3], True, 8, 20))
            found = torch.autograd.grad(out.square().sum(), wanted)
        assert calls == [("cpu", "forward"), ("cpu", "backward")]
        return found

    together = grads(everything)
    for t, right in zip(everything, together, strict=True):
        assert torch.equal(grads([t])[0], right)


def test_results_have_the_layout_of_query() -> None:
    result = run(Case(2, 4, 9, 9, 8, padding=True, layout="blhd"), TARGET)
    assert result.out.transpose(1, 2).is_contiguous()
    assert result.dquery is not None
    assert result.dquery.transpose(1, 2).is_contiguous()
