"""lstm, gru and rnn: gradients of gradients, saturation, threads, instruction sets, dropout, transforms."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_cases import GATES, Case, call, check, every_backend
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import dlkern
import dlkern.nn
from dlkern import functional
from dlkern.kernels.cpu import unavailable

OPS = tuple(GATES)
every_op = pytest.mark.parametrize("op", OPS)
F64 = torch.float64
needs_extension = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _small(op: str, projects: bool = False) -> tuple[list[Tensor], Any]:
    """x, states and weights of two layers in both directions, and the function of them."""
    torch.manual_seed(1)
    kwargs = {"proj_size": 2} if projects else {}
    module = getattr(nn, op.upper())(2, 3, num_layers=2, bidirectional=True, dtype=F64, **kwargs)
    weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
    states = [torch.randn(4, 2, 2 if projects else 3, dtype=F64, requires_grad=True)]
    if op == "lstm":
        states.append(torch.randn(4, 2, 3, dtype=F64, requires_grad=True))
    x = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx: Any = rest[:2] if op == "lstm" else rest[0]
        function = getattr(functional, op)
        y, final = function(x, rest[len(states) :], hx, num_layers=2, bidirectional=True)
        return (y, *final) if op == "lstm" else (y, final)

    return [x, *states, *weights], run


@every_backend
@pytest.mark.parametrize(("op", "projects"), [*((op, False) for op in OPS), ("lstm", True)])
def test_gradcheck(op: str, projects: bool, backend: str) -> None:
    inputs, run = _small(op, projects)
    with dlkern.backend(backend):
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@every_backend
@pytest.mark.parametrize("reverse", [False, True])
@every_op
def test_gradcheck_of_a_packed_sequence(op: str, reverse: bool, backend: str) -> None:
    torch.manual_seed(2)
    sizes = torch.tensor([3, 2, 2, 1])
    module = getattr(nn, op.upper())(2, 3, bidirectional=reverse, dtype=F64)
    weights = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x = torch.randn(8, 2, dtype=F64, requires_grad=True)

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        y, _ = getattr(functional, op)(PackedSequence(x, sizes), weights, bidirectional=reverse)
        return y.data

    with dlkern.backend(backend):
        assert torch.autograd.gradcheck(run, [x, *weights], fast_mode=True)


@every_backend
@pytest.mark.parametrize(("op", "projects"), [*((op, False) for op in OPS), ("lstm", True)])
def test_gradgradcheck(op: str, projects: bool, backend: str) -> None:
    inputs, run = _small(op, projects)
    with dlkern.backend(backend):
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@every_backend
@every_op
def test_saturated_gates(op: str, backend: str) -> None:
    case = Case(op, 7, 3, 5, 9, scale=50.0)
    found = call(case, case.module(dlkern.nn), case.dtype)
    assert all(bool(t.isfinite().all()) for t in found.values())
    check(case, backend)


@needs_extension
@pytest.mark.parametrize(
    "case",
    [
        *(Case(op, 5, 6, 16, 128, bidirectional=True) for op in OPS),
        *(Case(op, 5, 1, 16, 200) for op in OPS),
        *(Case(op, 5, 3, 16, 180, packed="unsorted", bidirectional=True) for op in OPS),
        *(Case(op, 6, 7, 16, 130, packed="unsorted", bidirectional=True) for op in OPS),
        Case("lstm", 5, 1, 16, 260, proj=150),
    ],
    ids=str,
)
def test_the_number_of_threads_changes_no_bit(case: Case, threads: None) -> None:
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(1)  # of torch's own products the order may depend on it
        x, weights, states = _layer(case)
        with _kernel_threads(count), dlkern.backend("cpu"):
            y, _ = getattr(functional, case.op)(x, weights, states, bidirectional=case.bidirectional)
            data = y.data if case.packed else y
            leaves = [x.data if case.packed else x, *weights]
            found.append([data, *torch.autograd.grad(data.square().sum(), leaves)])
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            assert torch.equal(one, another)


def _layer(case: Case) -> tuple[Any, list[Tensor], Any]:
    generator = torch.Generator().manual_seed(0)
    weights = list(case.module(nn).parameters())
    x = torch.randn(case.steps, case.batch, case.inputs, generator=generator)
    if case.packed:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(case.lengths), enforce_sorted=False)
        return packed._replace(data=packed.data.requires_grad_()), weights, None
    return x.requires_grad_(), weights, None


def _kernel_threads(count: int) -> Any:
    """The extension's loops on so many threads, whatever torch's own setting."""
    return mock.patch.object(torch, "get_num_threads", return_value=count)


@needs_extension
@pytest.mark.parametrize("isa", ["portable", "best"])
@pytest.mark.parametrize(
    "case",
    [
        *(Case(op, 3, 6, 9, 21) for op in OPS),
        *(Case(op, 3, 3, 9, 13, dtype=F64, packed="unsorted") for op in OPS),
        Case("lstm", 3, 11, 5, 12, proj=7),
        Case("rnn", 3, 2, 5, 12, nonlinearity="relu"),
    ],
    ids=str,
)
def test_instruction_sets(case: Case, isa: str) -> None:
    from dlkern import _C

    _C.set_isa(isa)
    try:
        check(case, "cpu")
    finally:
        _C.set_isa("best")


@every_backend
@every_op
def test_gradients_in_eval_mode(op: str, backend: str) -> None:
    module = getattr(dlkern.nn, op.upper())(3, 5).eval()
    with dlkern.backend(backend):
        module(torch.randn(4, 2, 3))[0].sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())


@every_backend
@every_op
@pytest.mark.parametrize("packed", ["", "unsorted"])
def test_deterministic(op: str, packed: str, backend: str) -> None:
    case = Case(op, 7, 6, 5, 40, layers=2, bidirectional=True, packed=packed)
    torch.use_deterministic_algorithms(True)
    try:
        with dlkern.backend(backend):
            first, second = (call(case, case.module(dlkern.nn), case.dtype) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_backend
@every_op
def test_any_strides(op: str, backend: str) -> None:
    """Inputs, weights, states and gradients that are not contiguous, and those that PyTorch negates lazily."""
    torch.manual_seed(0)
    gates = GATES[op]
    x = torch.randn(3, 5, 4, dtype=F64).permute(1, 2, 0)[:, ::2]  # (5, 2, 3)
    weights = [torch.randn(3, gates * 4, dtype=F64).t(), torch.randn(4, gates * 8, dtype=F64).t()[::2]]
    weights += [torch.randn(gates * 8, dtype=F64)[::2], torch._neg_view(torch.randn(gates * 4, dtype=F64))]
    states = [torch._neg_view(torch.randn(1, 4, 2, dtype=F64)).transpose(1, 2) for _ in range(2 if op == "lstm" else 1)]

    def run(backend: str, copy: bool) -> list[Tensor]:
        leaves = [t.contiguous().resolve_neg() if copy else t.detach() for t in (x, *weights, *states)]
        for t in leaves:
            t.requires_grad_()
        hx: Any = tuple(leaves[5:]) if op == "lstm" else leaves[5]
        with dlkern.backend(backend):
            y, _ = getattr(functional, op)(leaves[0], leaves[1:5], hx)
            grad = torch.ones((), dtype=F64).expand(y.shape)
            return [y, *torch.autograd.grad(y, leaves, grad)]

    for ours, theirs in zip(run(backend, False), run("torch", True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@every_op
def test_some_gradients_only(op: str) -> None:
    module = getattr(dlkern.nn, op.upper())(3, 5, dtype=F64)
    plain = copy.deepcopy(module)
    x = torch.randn(4, 2, 3, dtype=F64)
    for names in (["weight_ih_l0"], ["weight_hh_l0", "bias_hh_l0"], ["bias_ih_l0"]):
        grads = []
        for layer, backend in ((module, "cpu"), (plain, "torch")):
            for name, p in layer.named_parameters():
                p.requires_grad_(name in names)
            with dlkern.backend(backend):
                y, _ = layer(x)
                loss = y.square().sum()
                torch.autograd.grad(loss, [p for p in layer.parameters() if p.requires_grad], retain_graph=True)
                grads.append(torch.autograd.grad(loss, [p for p in layer.parameters() if p.requires_grad]))
        torch.testing.assert_close(*grads)


@settings(max_examples=25)
@given(
    op=st.sampled_from(OPS),
    steps=st.integers(1, 9),
    batch=st.integers(1, 19),
    inputs=st.integers(1, 19),
    hidden=st.integers(1, 41),
    bidirectional=st.booleans(),
    packed=st.sampled_from(["", "sorted", "unsorted"]),
    seed=st.integers(0, 9),
)
@needs_extension
def test_any_size(
    op: str, steps: int, batch: int, inputs: int, hidden: int, bidirectional: bool, packed: str, seed: int
) -> None:
    case = Case(op, steps, batch, inputs, hidden, bidirectional=bidirectional, packed=packed, seed=seed, dtype=F64)
    with dlkern.backend("cpu"):
        ours = call(case, case.module(dlkern.nn), F64)
    theirs = call(case, case.module(nn), F64)
    for name, result in ours.items():
        torch.testing.assert_close(result, theirs[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@every_op
def test_dropout_is_torch_dropout(op: str) -> None:
    torch.manual_seed(0)
    plain = getattr(nn, op.upper())(6, 40, num_layers=3, dropout=0.4)
    ours = getattr(dlkern.nn, op.upper())(6, 40, num_layers=3, dropout=0.4)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(5, 4, 6)

    def run(module: nn.Module, backend: str, seed: int) -> Tensor:
        torch.manual_seed(seed)
        with dlkern.backend(backend):
            return module(x)[0]

    for seed in (1, 2):
        torch.testing.assert_close(run(ours, "cpu", seed), run(plain, "torch", seed))
    assert not torch.equal(run(ours, "cpu", 1), run(ours, "cpu", 2))
    assert torch.equal(run(ours, "cpu", 1), run(ours, "cpu", 1))
    for module in (plain.eval(), ours.eval()):
        assert torch.equal(run(module, "cpu", 1), run(module, "cpu", 2))


@every_op
def test_vmap_and_jvp_say_that_they_are_not_there(op: str) -> None:
    module = getattr(dlkern.nn, op.upper())(3, 5)
    x = torch.randn(2, 4, 2, 3)
    with dlkern.backend("cpu"):
        with pytest.raises(NotImplementedError, match=f"dlkern's {op} has no vmap"):
            torch.func.vmap(lambda v: module(v)[0])(x)
        with pytest.raises(NotImplementedError, match=f"dlkern's {op} has no forward-mode derivative"):
            torch.func.jvp(lambda v: module(v)[0], (x[0],), (x[0],))


@every_op
def test_functional_grad(op: str) -> None:
    module = getattr(dlkern.nn, op.upper())(3, 5, dtype=F64)
    x = torch.randn(4, 2, 3, dtype=F64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,))[0].square().sum()

    with dlkern.backend("cpu"):
        found = torch.func.grad(loss)(parameters)
    module(x)[0].square().sum().backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


@pytest.mark.parametrize("op", OPS)
def test_autocast(op: str) -> None:
    torch.manual_seed(0)
    plain = getattr(nn, op.upper())(6, 8, num_layers=2)
    ours = getattr(dlkern.nn, op.upper())(6, 8, num_layers=2)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(5, 2, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours_y, theirs_y = ours(x)[0], plain(x)[0]
        assert torch.equal(ours_y, theirs_y)
        assert ours_y.dtype == theirs_y.dtype
        with dlkern.backend("cpu"), pytest.raises(RuntimeError, match=r"float32 and float64, not in torch\.bfloat16"):
            ours(x)
        with dlkern.backend("reference"):
            y, _ = ours(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), ours(x)[0], rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())
