"""Variants of lstm, gru and rnn: against a float64 loop, their gradients, their randomness, their layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_cases import every_backend
from recurrent_variant_cases import F64, Case, call, check, drawn
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dlkern
import dlkern.nn
from dlkern import functional
from dlkern.kernels.cpu import unavailable
from dlkern.kernels.reference.recurrent_variants import ACTIVATIONS

OPS = ("lstm", "gru", "rnn")
every_op = pytest.mark.parametrize("op", OPS)
needs_extension = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def _options(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


_ALL = _options(
    layer_norm=True, peephole=True, zoneout=0.3, recurrent_dropout=0.4, activation="elu",
    recurrent_activation="hardsigmoid", return_all_cells=True,
)  # fmt: skip
_BOTH = _options(layer_norm=True, zoneout=0.3, recurrent_dropout=0.4)

CASES = [
    Case("lstm", _options(activation="relu")),
    Case("lstm", _options(activation="relu", recurrent_activation="hardsigmoid"), packed=True, bidirectional=True),
    Case("lstm", _options(activation="leaky_relu", recurrent_activation="identity"), steps=2, hx=False),
    Case("lstm", _options(layer_norm=True), bidirectional=True, layers=2),
    Case("lstm", _options(layer_norm=True), bias=False, hidden=8, batch=1),
    Case("lstm", _options(layer_norm=True), proj=5, packed=True, bidirectional=True, batch=5),
    Case("lstm", _options(peephole=True)),
    Case("lstm", _options(peephole=True), packed=True, bidirectional=True, batch=6, hx=False),
    Case("lstm", _options(zoneout=0.3)),
    Case("lstm", _options(zoneout=0.3), training=False, packed=True, batch=5),
    Case("lstm", _options(zoneout=0.3), proj=6, bidirectional=True),
    Case("lstm", _options(recurrent_dropout=0.4), bidirectional=True, layers=2),
    Case("lstm", _options(recurrent_dropout=0.4), packed=True, batch=5),
    Case("lstm", _options(return_all_cells=True), bidirectional=True, layers=2),
    Case("lstm", _options(return_all_cells=True), proj=4, packed=True),
    Case("lstm", _ALL, packed=True, bidirectional=True, layers=2, batch=5, proj=6),
    Case("lstm", _ALL, hidden=33, batch=6, inputs=9),
    Case("lstm", _ALL, steps=1, batch=2, dtype=F64),
    Case("lstm", _ALL, packed=True, bidirectional=True, batch=5, dtype=F64),
    Case("gru", _options(activation="relu", recurrent_activation="hardsigmoid"), bidirectional=True),
    Case("gru", _options(layer_norm=True), packed=True, bidirectional=True, batch=5),
    Case("gru", _options(layer_norm=True), bias=False, layers=2),
    Case("gru", _options(zoneout=0.3), hx=False),
    Case("gru", _options(recurrent_dropout=0.4), packed=True, batch=5),
    Case("gru", (*_BOTH, ("activation", "elu")), packed=True, bidirectional=True, layers=2, batch=5, hidden=19),
    Case("gru", _BOTH, bidirectional=True, dtype=F64),
    Case("rnn", _options(layer_norm=True), bidirectional=True, layers=2),
    Case("rnn", _options(layer_norm=True), packed=True, bias=False, batch=5),
    Case("rnn", _options(zoneout=0.3), hx=False),
    Case("rnn", _options(recurrent_dropout=0.4)),
    Case("rnn", _BOTH, packed=True, bidirectional=True, batch=5, hidden=35),
    Case("rnn", _BOTH, bidirectional=True, dtype=F64),
]


@every_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, backend: str) -> None:
    check(case, backend)


@every_backend
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, backend: str) -> None:
    check(Case("lstm", _options(activation=name, recurrent_activation=name), steps=3), backend)
    check(Case("gru", _options(activation=name, recurrent_activation=name), steps=3), backend)


def _smooth(op: str) -> tuple[tuple[str, Any], ...]:
    options = {"layer_norm": True, "zoneout": 0.3, "recurrent_dropout": 0.4}
    if op != "rnn":
        options |= {"activation": "elu", "recurrent_activation": "tanh"}
    if op == "lstm":
        options |= {"peephole": True, "return_all_cells": True}
    return _options(**options)


def _function(op: str, packed: bool) -> tuple[Any, list[Tensor]]:
    module = Case(op, _smooth(op), inputs=2, hidden=3, bidirectional=True, dtype=F64).module()
    names = [n for n, _ in module.named_parameters()]
    x = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        given: Any = pack_padded_sequence(x, torch.tensor([2, 3]), enforce_sorted=False) if packed else x
        y, final, *cells = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (given,))
        found = [y, *(final if op == "lstm" else [final]), *cells]
        return tuple(f if isinstance(f, Tensor) else f.data for f in found)

    return run, [x, *(p.detach().clone().requires_grad_() for p in module.parameters())]


@every_backend
@every_op
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(op: str, packed: bool, backend: str) -> None:
    run, inputs = _function(op, packed)
    with dlkern.backend(backend):
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["torch", "reference", "cpu"])
@every_op
def test_gradgradcheck(op: str, backend: str) -> None:
    run, inputs = _function(op, True)
    with dlkern.backend(backend):
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


# ------------------------------------------------------------------------------- the cpu kernels
@needs_extension
@pytest.mark.parametrize("isa", ["portable", "best"])
@pytest.mark.parametrize("case", [c for c in CASES if len(c.options) > 2], ids=str)
def test_instruction_sets(case: Case, isa: str) -> None:
    from dlkern import _C

    _C.set_isa(isa)
    try:
        check(case, "cpu")
    finally:
        _C.set_isa("best")


@needs_extension
@every_op
@pytest.mark.parametrize("packed", [False, True])
def test_the_number_of_threads_changes_no_bit(op: str, packed: bool) -> None:
    case = Case(op, _smooth(op), batch=5, hidden=150, packed=packed, bidirectional=True)
    found = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of torch's own products the order may depend on it
    try:
        for count in (1, 2, 3, 7):
            torch.manual_seed(2)
            with mock.patch.object(torch, "get_num_threads", return_value=count), dlkern.backend("cpu"):
                found.append(call(case, case.module()))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@needs_extension
@settings(max_examples=20)
@given(
    op=st.sampled_from(OPS),
    steps=st.integers(1, 6),
    batch=st.integers(1, 9),
    hidden=st.integers(1, 41),
    packed=st.booleans(),
    bidirectional=st.booleans(),
    chosen=st.integers(0, 63),
)
def test_any_size(op: str, steps: int, batch: int, hidden: int, packed: bool, bidirectional: bool, chosen: int) -> None:
    options = tuple(option for i, option in enumerate(_smooth(op)) if chosen >> i & 1)
    case = Case(op, options, steps, batch, 3, hidden, packed=packed, bidirectional=bidirectional, dtype=F64)
    found = []
    for backend in ("cpu", "torch"):
        torch.manual_seed(2)
        with dlkern.backend(backend):
            found.append(call(case, case.module()))
    for name, result in found[0].items():
        torch.testing.assert_close(result, found[1][name], rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------ randomness
@every_op
def test_randomness_obeys_the_seed_and_the_mode(op: str) -> None:
    layer = getattr(dlkern.nn, op.upper())(4, 40, zoneout=0.5, recurrent_dropout=0.5)
    x = torch.randn(6, 3, 4)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    layer.eval()
    assert torch.equal(run(1), run(2))


@every_backend
@every_op
def test_zoneout_keeps_units_of_h(op: str, backend: str) -> None:
    layer = getattr(dlkern.nn, op.upper())(4, 200, zoneout=0.25)
    x = torch.randn(30, 5, 4)
    with dlkern.backend(backend):
        y, _ = layer(x)
    kept = (y[1:] == y[:-1]).double().mean()
    assert abs(float(kept) - 0.25) < 5 * (0.25 * 0.75 / y[1:].numel()) ** 0.5
    assert float((y[0] == 0).double().mean()) == pytest.approx(0.25, abs=0.07)
    with dlkern.backend(backend):
        still = getattr(dlkern.nn, op.upper())(4, 5, zoneout=1.0)
        assert bool((still(x)[0] == 0).all())  # h stays what it was
        assert bool((still.eval()(x)[0] == 0).all())


@every_op
def test_dropout_leaves_out_the_same_units_at_each_step(op: str) -> None:
    layer = getattr(dlkern.nn, op.upper())(4, 50, recurrent_dropout=0.2, num_layers=2)
    with drawn() as masks:
        layer(torch.randn(7, 8, 4))
    assert [m.shape for m in masks] == [(8, 50)] * 2
    assert abs(float(torch.cat(masks).mean()) - 0.8) < 5 * (0.2 * 0.8 / 800) ** 0.5
    with drawn() as masks:
        layer.eval()(torch.randn(7, 8, 4))
    assert not masks
    everything = getattr(dlkern.nn, op.upper())(4, 5, recurrent_dropout=1.0)
    x = torch.randn(7, 8, 4)
    assert bool(everything(x)[0].isfinite().all())


# ------------------------------------------------------------------------------------------ layers
_TWO = ("ih_l0", "hh_l0", "ih_l1", "hh_l1")


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (dlkern.nn.LayerNormLSTM(3, 5), {"norm_ih_l0": 20, "norm_hh_l0": 20, "norm_c_l0": 5, "norm_c_bias_l0": 5}),
        (dlkern.nn.LSTM(3, 5, peephole=True, bidirectional=True), {"peephole_l0": 15, "peephole_l0_reverse": 15}),
        (dlkern.nn.GRU(3, 5, layer_norm=True), {"norm_ih_l0": 15, "norm_hh_l0": 15}),
        (dlkern.nn.RNN(3, 5, layer_norm=True, num_layers=2), {f"norm_{k}": 5 for k in _TWO}),
        (dlkern.nn.LSTMCell(3, 5, layer_norm=True, peephole=True),
         {"norm_ih": 20, "norm_hh": 20, "norm_c": 5, "norm_c_bias": 5, "peephole": 15}),
        (dlkern.nn.GRUCell(3, 5, layer_norm=True), {"norm_ih": 15, "norm_hh": 15}),
        (dlkern.nn.RNNCell(3, 5, layer_norm=True), {"norm_ih": 5, "norm_hh": 5}),
        (dlkern.nn.LSTM(3, 5, zoneout=0.1, activation="relu"), {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_state_dict(layer: nn.Module, names: dict[str, int]) -> None:
    base = next(b for b in type(layer).__mro__ if b.__module__.startswith("torch.nn.modules.rnn"))
    kwargs = {k: getattr(layer, k) for k in ("bidirectional", "num_layers") if hasattr(layer, k)}
    theirs = base(3, 5, **kwargs)
    own = {k: v for k, v in layer.state_dict().items() if k not in theirs.state_dict()}
    assert {k: v.numel() for k, v in own.items()} == names
    assert not layer.load_state_dict(theirs.state_dict(), strict=False).unexpected_keys
    theirs.load_state_dict({k: v for k, v in layer.state_dict().items() if k not in own})
    x = torch.randn(4, 3) if isinstance(layer, nn.RNNCellBase) else torch.randn(6, 4, 3)
    torch.manual_seed(0)
    y = layer(x)
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(0)
        torch.testing.assert_close(made(x), y, rtol=0, atol=0)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(7.0)
    layer.reset_parameters()
    for name, value in layer.state_dict().items():
        expected = 0.0 if name.startswith("norm_c_bias") else 1.0 if name.startswith("norm") else None
        assert bool((value == expected).all()) if expected is not None else bool((value.abs() <= 5**-0.5).all())


def test_repr_and_names() -> None:
    assert repr(dlkern.nn.LayerNormLSTM(3, 5)) == "LayerNormLSTM(3, 5, layer_norm=True)"
    layer = dlkern.nn.LSTM(3, 5, zoneout=0.1, peephole=True, activation="relu")
    assert repr(layer) == "LSTM(3, 5, activation='relu', zoneout=0.1, peephole=True)"
    assert repr(dlkern.nn.GRU(3, 5, zoneout=0.0)) == repr(nn.GRU(3, 5))


@every_backend
@every_op
def test_a_loop_of_cells_is_the_layer(op: str, backend: str) -> None:
    options = {k: v for k, v in _smooth(op) if k not in ("return_all_cells", "recurrent_dropout", "zoneout")}
    torch.manual_seed(0)
    layer = getattr(dlkern.nn, op.upper())(4, 6, dtype=F64, zoneout=0.2, **options).eval()
    cell = getattr(dlkern.nn, f"{op.upper()}Cell")(4, 6, dtype=F64, zoneout=0.2, **options).eval()
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(5, 3, 4, dtype=F64)
    with dlkern.backend(backend):
        y, _ = layer(x)
        hx: Any = None
        for t in range(5):
            hx = cell(x[t], hx)
            torch.testing.assert_close(hx[0] if op == "lstm" else hx, y[t])
        one = cell(x[0, 0])
        torch.testing.assert_close(one[0] if op == "lstm" else one, y[0, 0])


@every_backend
def test_all_cells(backend: str) -> None:
    torch.manual_seed(0)
    layer = dlkern.nn.LSTM(4, 6, batch_first=True, return_all_cells=True)
    x = torch.randn(3, 5, 4)
    with dlkern.backend(backend):
        y, (_, c_n), cells = layer(x)
        assert y.shape == cells.shape == (3, 5, 6)
        assert torch.equal(cells[:, -1], c_n[0])
        with torch.no_grad():
            torch.testing.assert_close(layer(x)[2], cells)  # by another route, which keeps nothing
        _, _, alone = layer(x[0])
        torch.testing.assert_close(alone, cells[0])
        packed = pack_padded_sequence(x, torch.tensor([2, 5, 3]), batch_first=True, enforce_sorted=False)
        found = pad_packed_sequence(layer(packed)[2], batch_first=True)[0]
    torch.testing.assert_close(found[2, :3], cells[2, :3])
    torch.testing.assert_close(layer(x)[0], nn.LSTM.forward(layer, x)[0])


# ----------------------------------------------------------------------------------- memory_efficient
@every_backend
@pytest.mark.parametrize(
    "case",
    [
        Case("lstm", (), bidirectional=True, packed=True, batch=5),
        Case("lstm", (), proj=4, layers=2),
        Case("lstm", _options(layer_norm=True, peephole=True, zoneout=0.3, recurrent_dropout=0.3), proj=4, packed=True),
        Case("gru", (), bidirectional=True),
        Case("gru", _BOTH, packed=True, batch=5),
        Case("rnn", _BOTH, bidirectional=True),
    ],
    ids=str,
)
def test_memory_efficient(case: Case, backend: str) -> None:
    lean = case._replace(options=(*case.options, ("memory_efficient", True)))
    kept: dict[Case, int] = {}
    found = {}
    for each in (case, lean):
        sizes: dict[int, int] = {}

        def pack(t: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[t.data_ptr()] = t.numel()
            return t

        torch.manual_seed(2)
        with dlkern.backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            found[each] = call(each, each.module())
        kept[each] = sum(sizes.values())
    for name, result in found[case].items():
        torch.testing.assert_close(found[lean][name], result, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    if case.op != "rnn":
        rows = sum(case.lengths) * case.layers * case.directions
        gates = {"lstm": 4, "gru": 3}[case.op] * case.hidden
        assert kept[case] - kept[lean] >= rows * gates
    check(lean, backend)


# ------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "swish"}, r"activation: expected one of tanh, relu, .*got 'swish'"),
        ({"recurrent_activation": "softmax"}, r"recurrent_activation: expected one of .*got 'softmax'"),
        ({"zoneout": 1.5}, r"zoneout: expected a probability between 0 and 1, got 1\.5"),
        ({"recurrent_dropout": -0.1}, r"recurrent_dropout: expected a probability between 0 and 1, got -0\.1"),
        ({"zoneout": "0.1"}, r"zoneout: expected a probability between 0 and 1, got '0\.1'"),
        ({"recurrent_dropout": None}, "recurrent_dropout: expected a probability between 0 and 1, got None"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        dlkern.nn.LSTM(3, 5, **options)
    layer = nn.LSTM(3, 5)
    with pytest.raises((TypeError, ValueError), match=message):
        functional.lstm(torch.zeros(2, 1, 3), list(layer.parameters()), **options)


def test_bad_tensors() -> None:
    w, x = [p.detach() for p in nn.LSTM(3, 5).parameters()], torch.zeros(2, 1, 3)
    norms = [torch.ones(20), torch.ones(20), torch.ones(5), torch.ones(5)]
    with pytest.raises(ValueError, match=r"layer_norm: expected 4 for each of 1 layers and directions.*got 3 tensors"):
        functional.lstm(x, w, layer_norm=norms[:3])
    with pytest.raises(ValueError, match=r"norm_c of layer and direction 0: expected shape \(5,\), got \(20,\)"):
        functional.lstm(x, w, layer_norm=[norms[0]] * 3 + norms[3:])
    with pytest.raises(ValueError, match=r"peephole of layer and direction 0: expected shape \(15,\), got \(5,\)"):
        functional.lstm(x, w, peephole=[torch.ones(5)])
    with pytest.raises(TypeError, match=r"peephole of layer and direction 0: expected torch.float32 like x"):
        functional.lstm(x, w, peephole=[torch.ones(15, dtype=F64)])
    with pytest.raises(TypeError, match="unexpected keyword argument 'peephole'"):
        dlkern.nn.GRU(3, 5, peephole=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'activation'"):
        dlkern.nn.RNN(3, 5, activation="relu")


@every_op
def test_empty_batch(op: str) -> None:
    layer = getattr(dlkern.nn, op.upper())(3, 5, layer_norm=True)
    y, _ = layer(torch.zeros(4, 0, 3))
    assert y.shape == (4, 0, 5)


# ------------------------------------------------------------------------------- compile, autocast
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiles_whole(backend: str) -> None:
    layer = dlkern.nn.LSTM(3, 5, **{k: v for k, v in _ALL if k not in ("zoneout", "recurrent_dropout")})
    names, parameters = zip(*layer.named_parameters(), strict=True)
    count = 0

    def graph(module: Any, example: Any) -> Any:
        nonlocal count
        count += sum("dlkern" in str(node.target) for node in module.graph.nodes)
        return module

    from torch._dynamo.backends.common import aot_autograd

    def step(x: Tensor, parameters: tuple[Tensor, ...]) -> Any:
        w = dict(zip(names, parameters, strict=True))
        norms = [w[f"{n}_l0"] for n in ("norm_ih", "norm_hh", "norm_c", "norm_c_bias")]
        four = [w[f"{n}_l0"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        y, (h, c), cells = functional.lstm(
            x, four, layer_norm=norms, peephole=[w["peephole_l0"]], activation="elu",
            recurrent_activation="hardsigmoid", return_all_cells=True,
        )  # fmt: skip
        return y, h, c, cells

    x = torch.randn(9, 2, 3, requires_grad=True)
    with dlkern.backend(backend):
        compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=graph, bw_compiler=graph))
        ours, expected = compiled(x, parameters), step(x, parameters)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)
        leaves = [x, *parameters]
        grads = [torch.autograd.grad(sum(r.square().sum() for r in found), leaves) for found in (ours, expected)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert count == 2  # one node forward, one backward, whatever the length


@every_op
def test_autocast(op: str) -> None:
    layer = getattr(dlkern.nn, op.upper())(4, 8, layer_norm=True, zoneout=0.2).eval()
    x = torch.randn(5, 2, 4)
    expected, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.06, atol=0.06)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_torch_backend_has_vmap_and_jvp() -> None:
    layer = dlkern.nn.LSTM(3, 5, layer_norm=True, peephole=True)
    x = torch.randn(2, 4, 2, 3)
    with dlkern.backend("torch"):
        mapped = torch.func.vmap(lambda v: layer(v)[0])(x)
        torch.testing.assert_close(mapped[1], layer(x[1])[0])
        torch.func.jvp(lambda v: layer(v)[0], (x[0],), (x[0],))
