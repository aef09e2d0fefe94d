"""The Triton kernels of lstm, gru and rnn: right in every launch configuration.

Without a GPU they run in Triton's interpreter, which multiplies bfloat16 wrongly: that waits for a GPU, and is compiled
ahead of time (tests/aot/jobs/recurrent.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import recurrent_variant_cases as variant_cases
import torch
from conftest import HAS_CUDA
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_cases import GATES, Case, call, check
from torch import Tensor, nn

import dlkern
import dlkern.nn
from dlkern.kernels.reference.recurrent import Request
from dlkern.kernels.triton import recurrent as triton_op
from dlkern.kernels.triton import recurrent_plan as plan
from dlkern.kernels.triton.recurrent_plan import Launch

OPS = tuple(GATES)
every_op = pytest.mark.parametrize("op", OPS)
F64, F16 = torch.float64, torch.float16


def _cases() -> Iterator[Case]:
    for op in OPS:
        yield Case(op, 1, 1, 1, 1)
        yield Case(op, 3, 3, 5, 17, bias=False, hx=False)
        yield Case(op, 4, 3, 6, 9, layers=2, bidirectional=True)
        yield Case(op, 4, 5, 4, 10, packed="unsorted", bidirectional=True)
        yield Case(op, 4, 6, 4, 10, packed="sorted", hx=False, batch_first=True)
        yield Case(op, 2, 1, 3, 11, unbatched=True, only="h_n")
        yield Case(op, 3, 18, 4, 13, dtype=F16)
        yield Case(op, 3, 4, 4, 7, dtype=F64, packed="unsorted", bidirectional=True)
    yield Case("rnn", 4, 5, 6, 19, nonlinearity="relu", bidirectional=True)


@pytest.mark.parametrize("case", list(_cases()), ids=str)
def test_parity(case: Case) -> None:
    check(case, "triton")


# ------------------------------------------------------------------------------------ configurations
def _launches() -> Iterator[tuple[Launch, int, torch.dtype]]:
    """Every configuration that the interpreter can tell from the others, with a size that it runs."""
    for size, launch in plan.SEQUENCES.items():
        yield launch, size - 3, F16
    for size, launch in plan.SEQUENCES_EXACT.items():
        yield launch, size - 3, torch.float32
    for launch in plan.STEPS:
        yield launch, 39, F16
    for launch in plan.EXACT:
        yield launch, 39, torch.float32
    yield plan.DOUBLE[0], 19, F64
    yield Launch(plan.CELL, 1, 0, 0, plan.row_warps(32), 1), 21, torch.float32


@every_op
@pytest.mark.parametrize(("launch", "hidden", "dtype"), list(_launches()), ids=str)
@pytest.mark.parametrize("packed", ["", "unsorted"])
def test_every_configuration(
    op: str, launch: Launch, hidden: int, dtype: torch.dtype, packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles that are full and partial; with few units, as the interpreter is slow."""
    batch = launch.block_m + 2 if launch.block_m > 1 and hidden < 64 else 3
    case = Case(op, 2, batch, 3, hidden, dtype=dtype, packed=packed, bidirectional=bool(packed))
    monkeypatch.setattr(plan, "forced", launch)
    monkeypatch.setattr(plan, "allows_tf32", lambda: dtype != torch.float32)  # its own tiles are in full precision
    check(case, "triton")


def test_every_configuration_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {
        plan.choose(dtype, steps, batch, hidden, norm=norm).kind
        for dtype in (F16, torch.float32, F64)
        for steps, batch, hidden, norm in ((9, 4, 32, False), (9, 4, 700, False), (1, 64, 32, False), (9, 4, 32, True))
    }
    assert chosen == {plan.SEQUENCE, plan.STEP, plan.CELL}
    assert {plan.choose(F16, 9, b, 700, norm=False) for b in (4, 64)} == set(plan.STEPS)
    with pytest.raises(ValueError, match="at most 2048 units of a recurrent layer, got 5000"):
        plan.choose(F16, 9, 4, 5000, norm=True)
    monkeypatch.setattr(plan, "forced", plan.DOUBLE[0])
    with pytest.raises(ValueError, match="none of the configurations"):
        plan.choose(F16, 9, 4, 32, norm=False)


# ------------------------------------------------------------------------------------------ variants
def _varied(op: str, **changes: Any) -> variant_cases.Case:
    options: dict[str, Any] = {"layer_norm": True, **({} if op == "rnn" else {"activation": "relu"})}
    if op == "lstm":
        options["return_all_cells"] = True
    return variant_cases.Case(op, tuple(options.items()), **changes)


@every_op
@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 3, "bidirectional": True, "packed": True},
        {"steps": 3, "bias": False, "hx": False, "layers": 2},
        {"steps": 2, "dtype": F64, "packed": True},
        {"steps": 1, "batch": 1, "hidden": 16},
    ],
    ids=str,
)
def test_layer_norm(op: str, changes: dict[str, Any]) -> None:
    variant_cases.check(_varied(op, **changes), "triton")


@pytest.mark.parametrize("op", ["lstm", "gru"])
@pytest.mark.parametrize("kind", [plan.SEQUENCE, plan.STEP, plan.CELL])
def test_relu(op: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = plan.candidates(torch.float32, 11, norm=False)
    monkeypatch.setattr(plan, "forced", next(launch for launch in launches if launch.kind == kind))
    options = (("activation", "relu"), *((("return_all_cells", True),) if op == "lstm" else ()))
    variant_cases.check(variant_cases.Case(op, options, steps=3, packed=True, bidirectional=True), "triton")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"peephole": True}, "peepholes"),
        ({"zoneout": 0.1}, "zoneout"),
        ({"recurrent_dropout": 0.1}, "recurrent dropout"),
        ({"activation": "elu"}, "with tanh and relu, not with 'elu'"),
        ({"recurrent_activation": "hardsigmoid"}, "gates with a sigmoid, not with 'hardsigmoid'"),
        ({"proj_size": 3}, "a projection of h"),
    ],
)
def test_what_is_left_out_says_why(options: dict[str, Any], reason: str) -> None:
    layer = dlkern.nn.LSTM(3, 5, **options)
    with dlkern.backend("triton"), pytest.raises(RuntimeError, match=f"cannot run it: .*{reason}"):
        layer(torch.zeros(2, 1, 3))


@pytest.mark.skipif(HAS_CUDA, reason="of the interpreter")
def test_bfloat16_waits_for_a_gpu() -> None:
    request = Request("cpu", torch.bfloat16, "tanh", False, False, False, False, False, False, True)
    assert triton_op.supports(request) == "Triton's interpreter multiplies bfloat16 wrongly"


# ----------------------------------------------------------------------------------------- gradients
@every_op
@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck(op: str, norm: bool) -> None:
    torch.manual_seed(1)
    layer = getattr(dlkern.nn, op.upper())(2, 3, dtype=F64, layer_norm=norm, bidirectional=not norm)
    names = [n for n, _ in layer.named_parameters()]
    x = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        y, final = torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))
        return (y, *final) if op == "lstm" else (y, final)

    inputs = [x, *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    with dlkern.backend("triton"):
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@every_op
def test_saturated_gates(op: str) -> None:
    check(Case(op, 3, 3, 5, 9, scale=50.0), "triton")


@every_op
def test_deterministic(op: str) -> None:
    case = Case(op, 4, 5, 4, 10, packed="unsorted", bidirectional=True)
    with dlkern.backend("triton"):
        first, second = (call(case, case.module(dlkern.nn), case.dtype) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_op
def test_memory_efficient(op: str) -> None:
    variant_cases.check(variant_cases.Case(op, (("memory_efficient", True),), steps=3, packed=True), "triton")


@every_op
def test_swapped_cell(op: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(nn, f"{op.upper()}Cell")(4, 6)
    ours = getattr(dlkern.nn, f"{op.upper()}Cell")(4, 6)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4)
    with dlkern.backend("triton"):
        found = ours(x)
    for a, b in zip(found, theirs(x), strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=12)
@given(
    op=st.sampled_from(OPS),
    steps=st.integers(1, 4),
    batch=st.integers(1, 19),
    hidden=st.integers(1, 35),
    packed=st.sampled_from(["", "unsorted"]),
    bidirectional=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_size(op: str, steps: int, batch: int, hidden: int, packed: str, bidirectional: bool, seed: int) -> None:
    check(Case(op, steps, batch, 3, hidden, packed=packed, bidirectional=bidirectional, seed=seed), "triton")
