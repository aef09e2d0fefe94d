"""attention_varlen: sequences laid end to end, against attention of each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batch_norm_act_cases import spied
from conftest import HAS_CUDA
from torch import Tensor

import dlkern
from dlkern import dispatch
from dlkern.functional import RelativePositionBias, T5Bias, attention, attention_varlen

DEVICE = "cuda" if HAS_CUDA else "cpu"
BACKENDS = ["torch", "reference"]
if not HAS_CUDA and dispatch.unavailable("cpu") is None:
    BACKENDS.append("cpu")

QUERIES, KEYS = (5, 70, 0, 9), (7, 33, 4, 0)
OPTIONS: list[dict[str, Any]] = [
    {}, {"window": 3}, {"is_causal": True}, {"is_causal": True, "causal_alignment": "bottom_right"},
    {"window": (2, None), "causal_alignment": "bottom_right", "softcap": 2.0}, {"alibi": 1}, {"alibi": 4},
    {"t5": True}, {"t5": True, "causal_alignment": "bottom_right", "is_causal": True}, {"scale": 0.7},
]  # fmt: skip


def _ends(lengths: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(dtype)


def _data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(QUERIES), 4, 8), (sum(KEYS), 2, 8), (sum(KEYS), 2, 12))
    return tuple(torch.randn(s, generator=generator, dtype=dtype).to(DEVICE).requires_grad_() for s in shapes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_sequence(options: dict[str, Any], backend: str) -> None:
    options = dict(options)
    q, k, v = inputs = _data()
    more: dict[str, Any] = {}
    if "alibi" in options:
        slopes = torch.rand(4, 4, dtype=torch.float64, device=DEVICE)
        more["alibi_slopes"] = slopes if options.pop("alibi") == 4 else slopes[0]
    if options.pop("t5", False):
        table = torch.randn(8, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
        more["bias"] = T5Bias(table, True, 8, 12)
        inputs = (*inputs, table)
    with spied() as calls, dlkern.backend(attention=backend):
        out, lse = attention_varlen(
            q, k, v, _ends(QUERIES), _ends(KEYS, torch.int32), enable_gqa=True, return_lse=True, **options, **more
        )
        grads = torch.autograd.grad([out, lse.exp()], inputs, [out.detach().sin(), torch.ones_like(lse)])
    if backend != "torch":
        assert calls == [(backend, "forward"), (backend, "backward")]
    outs, lses, at = [], [], [0, 0]
    for i, (m, n) in enumerate(zip(QUERIES, KEYS, strict=True)):
        one = (q[at[0] : at[0] + m], *(t[at[1] : at[1] + n] for t in (k, v)))
        own = {name: t[i] if name == "alibi_slopes" and t.dim() == 2 else t for name, t in more.items()}
        with dlkern.backend(attention="torch"):
            a, b = attention(*(t.transpose(0, 1) for t in one), enable_gqa=True, return_lse=True, **options, **own)
        outs.append(a.transpose(0, 1))
        lses.append(b)
        at = [at[0] + m, at[1] + n]
    right, right_lse = torch.cat(outs), torch.cat(lses, 1)
    torch.testing.assert_close(out, right)
    torch.testing.assert_close(lse, right_lse)
    wanted = torch.autograd.grad([right, right_lse.exp()], inputs, [right.detach().sin(), torch.ones_like(right_lse)])
    for mine, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"])
def test_gradcheck(backend: str) -> None:
    q, k, v = (torch.randn(n, 2, 3, dtype=torch.float64, device=DEVICE, requires_grad=True) for n in (5, 6, 6))
    ends = _ends((2, 3)), _ends((4, 2))

    def run(*inputs: Tensor) -> Any:
        torch.manual_seed(0)
        with dlkern.backend(attention=backend):
            return attention_varlen(*inputs, *ends, window=2, causal_alignment="bottom_right", dropout_p=0.3)

    assert torch.autograd.gradcheck(run, (q, k, v))
    assert torch.autograd.gradgradcheck(run, (q, k, v), fast_mode=True)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension dlkern._C is not there")
def test_dropout_is_the_same_on_each_backend() -> None:
    q, k, v = _data()
    results = []
    for backend in ("reference", "cpu"):
        torch.manual_seed(0)
        with dlkern.backend(attention=backend):
            results.append(attention_varlen(q, k, v, _ends(QUERIES), _ends(KEYS), enable_gqa=True, dropout_p=0.4))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequences(backend: str) -> None:
    q, k, v = (torch.randn(0, 2, 3, device=DEVICE, requires_grad=True) for _ in range(3))
    with dlkern.backend(attention=backend):
        assert attention_varlen(q, k, v, _ends(()), _ends(())).shape == (0, 2, 3)
        assert attention_varlen(q, k, v, _ends((0, 0)), _ends((0, 0))).shape == (0, 2, 3)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension dlkern._C is not there")
def test_default_and_compile() -> None:
    q, k, v = _data(torch.float32)
    ends = _ends(QUERIES), _ends(KEYS)
    with spied() as calls:
        right = attention_varlen(q, k, v, *ends, enable_gqa=True)
    assert calls == [("cpu", "forward")]
    compiled = torch.compile(lambda *t: attention_varlen(*t, enable_gqa=True), fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v, *ends)
    torch.testing.assert_close(out, right)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (out, right)), strict=True):
        torch.testing.assert_close(a, b)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": torch.randn(1, 5, 2, 3)}, ValueError, r"query: expected \(total length, heads, dim\)"),
    ({"key": [1]}, TypeError, "key: expected a Tensor, got list"),
    ({"cu_seqlens_q": torch.tensor([0, 3, 2, 5])}, ValueError, "expected ends that never fall, got 3 and then 2"),
    ({"cu_seqlens_q": torch.tensor([0, 2, 6])}, ValueError, "cu_seqlens_q: .* end with 5, got 0 and 6"),
    ({"cu_seqlens_k": torch.tensor([1, 2, 6])}, ValueError, "cu_seqlens_k: expected to begin with 0 .* got 1"),
    ({"cu_seqlens_k": torch.tensor([0, 2, 4, 6])}, ValueError, "cu_seqlens_k: expected 3 elements .* got 4"),
    ({"cu_seqlens_k": torch.tensor([[0, 6]])}, ValueError, r"cu_seqlens_k: expected shape \(sequences \+ 1,\)"),
    ({"cu_seqlens_q": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens_q: expected an int32 or .* got torch.float32"),
    ({"bias": RelativePositionBias(torch.zeros(3, 2), torch.zeros(5, 6).long())}, TypeError, "bias: expected a T5Bias"),
    ({"alibi_slopes": torch.rand(3, 2)}, ValueError, r"alibi_slopes: expected shape \(2,\) or \(2, 2\), got \(3, 2\)"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p"),
]  # fmt: skip


@pytest.mark.skipif(HAS_CUDA, reason="ends are looked at on the CPU only")
@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=lambda v: str(v)[:40].replace("\n", " "))
def test_errors_come_before_anything_runs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "query": torch.randn(5, 2, 3), "key": torch.randn(6, 2, 3), "value": torch.randn(6, 2, 3),
        "cu_seqlens_q": torch.tensor([0, 2, 5]), "cu_seqlens_k": torch.tensor([0, 3, 6]), **change,
    }  # fmt: skip
    with spied() as calls, pytest.raises(error, match=message):
        attention_varlen(**arguments)
    assert not calls
