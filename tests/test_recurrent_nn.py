"""The layers LSTM, GRU, RNN and their cells: drop-ins for torch.nn's; checks, compilation, swapping, training."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from recurrent_cases import GATES, every_backend, spied
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import dlkern
import dlkern.nn
from dlkern import dispatch, functional
from dlkern.kernels.reference.recurrent import Request
from dlkern.kernels.reference.recurrent_variants import PLAIN, Extras
from dlkern.ops import gru, lstm, rnn

OPS = tuple(GATES)
every_op = pytest.mark.parametrize("op", OPS)
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
F64 = torch.float64


# --------------------------------------------------------------------------------------- drop-ins
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", *CELLS])
def test_is_torch_nn_layer_with_its_state_dict(name: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(nn, name)(3, 5)
    torch.manual_seed(0)
    ours = getattr(dlkern.nn, name)(3, 5)
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is type(ours)
        assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), ours.parameters(), strict=True))


@every_op
def test_copies_run(op: str) -> None:
    layer = getattr(dlkern.nn, op.upper())(3, 5, num_layers=2, bidirectional=True)
    x = torch.randn(4, 2, 3)
    with dlkern.backend("cpu"):
        y = layer(x)[0]
        assert torch.equal(copy.deepcopy(layer)(x)[0], y)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x)[0], y)
    assert torch.allclose(layer.double()(x.double())[0].float(), y, atol=1e-6)


@every_backend
@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (3,)])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [("LSTMCell", {}), ("GRUCell", {"bias": False}), ("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"})],
)
def test_cells(name: str, options: dict[str, Any], given: bool, shape: tuple[int, ...], backend: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(nn, name)(3, 5, dtype=F64, **options)
    ours = getattr(dlkern.nn, name)(3, 5, dtype=F64, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    states = [torch.randn(*shape[:-1], 5, dtype=F64, requires_grad=True) for _ in range(2 if name == "LSTMCell" else 1)]
    hx: Any = None if not given else tuple(states) if name == "LSTMCell" else states[0]

    def run(cell: nn.Module) -> list[Tensor]:
        found = cell(x, hx)
        outputs = list(found) if isinstance(found, tuple) else [found]
        inputs = [x, *(states if given else []), *cell.parameters()]
        loss = sum((k + 1) * o.square().sum() for k, o in enumerate(outputs))
        return [*outputs, *torch.autograd.grad(loss, inputs)]  # type: ignore[arg-type]

    with dlkern.backend(backend), spied() as calls:
        mine = run(ours)
    assert calls == [(backend, "forward"), (backend, "backward")]
    for a, b in zip(mine, run(theirs), strict=True):
        torch.testing.assert_close(a, b)


@every_op
def test_no_gradient_keeps_nothing(op: str) -> None:
    layer = getattr(dlkern.nn, op.upper())(3, 5)
    x = torch.randn(6, 2, 3)
    with dlkern.backend("cpu"):
        with torch.no_grad():
            y, _ = layer(x)
        assert y.grad_fn is None
        torch.testing.assert_close(y, layer(x)[0])


# ----------------------------------------------------------------------------------------- choice
def test_the_choice() -> None:
    usual = Request("cpu", torch.float32, "tanh", False, False, False, False, False, False, True)
    for op in OPS:
        assert dispatch.choose(op, usual._replace(device="cuda")).backend == "torch"
        assert dispatch.choose(op, usual._replace(dtype=torch.bfloat16)).backend == "torch"
        assert dispatch.choose(op, usual._replace(few=True)).backend == "cpu"
        assert dispatch.choose(op, usual._replace(packed=True)).backend == "cpu"
        assert dispatch.choose(op, usual._replace(cell=True, few=True)).backend == "torch"
        few_cells = usual._replace(cell=True, few=True, training=False)
        assert dispatch.choose(op, few_cells).backend == ("torch" if op == "rnn" else "cpu")
        assert dispatch.choose(op, usual._replace(variant=True)).backend == "cpu"
        assert dispatch.choose(op, usual._replace(variant=True, device="cuda")).backend == "torch"
    assert dispatch.choose("lstm", usual).backend == "torch"
    assert dispatch.choose("gru", usual).backend == "cpu"
    assert dispatch.choose("lstm", usual._replace(projected=True)).backend == "cpu"
    for op in OPS:
        with dlkern.backend("cpu"), pytest.raises(RuntimeError, match=r"float32 and float64, not in torch\.float16"):
            dispatch.choose(op, usual._replace(dtype=torch.float16))


# ----------------------------------------------------------------------------------------- checks
def _lstm(**changes: Any) -> dict[str, Any]:
    layer = nn.LSTM(3, 5, num_layers=2)
    return {"x": torch.randn(4, 2, 3), "weights": list(layer.parameters()), "num_layers": 2, **changes}


_WEIGHTS = [p.detach() for p in nn.LSTM(3, 5, num_layers=2).parameters()]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a Tensor or a PackedSequence, got list"),
        ({"x": torch.zeros(3)}, ValueError, r"x: expected \(T, B, I\).*got shape \(3,\)"),
        ({"x": torch.zeros(0, 2, 3)}, ValueError, r"at least one step, got shape \(0, 2, 3\)"),
        ({"x": torch.zeros(4, 2, 7)}, ValueError, r"x: expected 3 features.*got shape \(4, 2, 7\)"),
        ({"x": torch.zeros(4, 2, 3, dtype=F64)}, TypeError, "weight_ih_l0: expected torch.float64 like x, got"),
        ({"x": torch.zeros(4, 2, 3, dtype=torch.int64)}, TypeError, "weight_ih_l0: expected torch.int64 like x"),
        ({"weights": _WEIGHTS[:-1]}, ValueError, "weights: expected 2 or 4.*2 layers and 1 directions, got 7"),
        ({"num_layers": 0}, ValueError, "0 layers"),
        (
            {"weights": [*_WEIGHTS[:5], torch.zeros(20, 4), *_WEIGHTS[6:]]},
            ValueError,
            r"weight_hh_l1: .*\(20, 5\), got",
        ),
        ({"weights": [_WEIGHTS[0], torch.zeros(20, 6), *_WEIGHTS[2:]]}, ValueError, r"weight_hh_l0: .*\(20, 5\), got"),
        ({"weights": [*_WEIGHTS[:3], torch.zeros(5), *_WEIGHTS[4:]]}, ValueError, r"bias_hh_l0: .*\(20,\), got \(5,\)"),
        ({"dropout": 1.5}, ValueError, "dropout: expected a probability between 0 and 1, got 1.5"),
        ({"hx": torch.zeros(2, 2, 5)}, TypeError, r"hx: expected a pair \(h_0, c_0\), got Tensor"),
        ({"hx": (torch.zeros(2, 2, 5),)}, TypeError, "got 1 entries"),
        ({"hx": (torch.zeros(2, 3, 5), torch.zeros(2, 2, 5))}, ValueError, r"h_0: .*\(2, 2, 5\), got \(2, 3, 5\)"),
        ({"hx": (torch.zeros(2, 2, 5), torch.zeros(2, 5))}, ValueError, r"c_0: .*\(2, 2, 5\), got \(2, 5\)"),
        ({"hx": (torch.zeros(2, 2, 5), torch.zeros(2, 2, 5).double())}, TypeError, "c_0: expected torch.float32"),
        ({"x": torch.zeros(4, 3), "hx": (torch.zeros(2, 1, 5),) * 2}, ValueError, r"h_0: expected shape \(2, 5\)"),
        (
            {"x": PackedSequence(torch.zeros(5, 3), torch.tensor([2, 3]))},
            ValueError,
            r"never grow and sum to 5.*got \[2, 3\]",
        ),
        ({"x": PackedSequence(torch.zeros(5, 3), torch.tensor([3, 3]))}, ValueError, r"sum to 5.*got \[3, 3\]"),
    ],
)
def test_bad_sequences(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.lstm(**_lstm(**changes))


def test_bad_projection_and_bias() -> None:
    w = nn.LSTM(3, 5, proj_size=2, bias=False)
    x = torch.zeros(4, 2, 3)
    with pytest.raises(ValueError, match=r"weight_hr_l0: expected shape \(2, 5\), got \(2, 4\)"):
        functional.lstm(x, [w.weight_ih_l0, w.weight_hh_l0, torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="weights: expected 2 or 4 tensors"):
        functional.gru(x, [torch.zeros(15, 3), torch.zeros(15, 5), torch.zeros(2, 5)])
    with pytest.raises(TypeError, match=r"weights\[1\]: expected a Tensor, got NoneType"):
        functional.gru(x, [torch.zeros(15, 3), None])
    with pytest.raises(TypeError, match=r"dropout: expected a probability between 0 and 1, got '0\.5'"):
        functional.gru(x, [torch.zeros(15, 3), torch.zeros(15, 5)], dropout="0.5")
    with pytest.raises(ValueError, match="bias_ih and bias_hh: expected both or neither, got bias_ih alone"):
        functional.gru_cell(x[0], None, torch.zeros(15, 3), torch.zeros(15, 5), torch.zeros(15))
    with pytest.raises(ValueError, match="nonlinearity: expected 'tanh' or 'relu', got 'gelu'"):
        functional.rnn(x, [torch.zeros(5, 3), torch.zeros(5, 5)], nonlinearity="gelu")


@pytest.mark.parametrize(
    ("x", "h", "error", "message"),
    [
        (torch.zeros(2, 2, 3), None, ValueError, r"x: expected \(B, I\) or \(I,\), got shape \(2, 2, 3\)"),
        (torch.zeros(2, 4), None, ValueError, r"x: expected 3 features"),
        (torch.zeros(2, 3), torch.zeros(3, 5), ValueError, r"h: expected shape \(2, 5\), got \(3, 5\)"),
        (torch.zeros(3), torch.zeros(1, 5), ValueError, r"h: expected shape \(5,\), got \(1, 5\)"),
        (torch.zeros(2, 3), torch.zeros(2, 5, dtype=F64), TypeError, "h: expected torch.float32 like x"),
        ("x", None, TypeError, "x: expected a Tensor, got str"),
        (torch.zeros(2, 3), "h", TypeError, "h: expected a Tensor, got str"),
    ],
)
def test_bad_cells(x: Any, h: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dlkern.nn.GRUCell(3, 5)(x, h)


# ------------------------------------------------------------------------------- torch.library, compile
@every_op
@every_backend
@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(op: str, backend: str, packed: bool, varied: bool) -> None:
    torch.manual_seed(0)
    module = {"lstm": lstm, "gru": gru, "rnn": rnn}[op].OP
    sizes = torch.tensor([2, 2, 1]) if packed else None
    projects = op == "lstm" and packed
    layer = nn.LSTM(3, 5, proj_size=4) if projects else getattr(nn, op.upper())(3, 5)
    weights = [p.detach() for p in layer.parameters()] + ([] if projects else [None])
    x = torch.randn(5, 3) if packed else torch.randn(3, 2, 3)
    h0 = torch.randn(2, 4 if projects else 5)
    c0 = torch.randn(2, 5) if op == "lstm" else None
    extras = PLAIN
    if varied:
        if backend == "triton":
            extras = Extras(norm_hh=torch.rand(GATES[op] * 5))
        else:
            zoneout, dropout = torch.rand(*x.shape[:-1], h0.size(1)).flatten(0, -2), torch.rand_like(h0)
            peephole = torch.rand(15) if op == "lstm" else None
            extras = Extras(peephole, torch.rand(GATES[op] * 5), zoneout=zoneout, dropout=dropout)
        if op == "lstm":
            extras = extras._replace(norm_c=torch.rand(5), norm_c_bias=torch.rand(5))
    tensors = (x, h0, c0, *weights, sizes)
    # gradients are the Function's, the ops themselves have none
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for saves, recompute in ((False, False), (True, False), (True, True)):
        options = ("tanh", "sigmoid", True, saves, recompute, backend)
        torch.library.opcheck(module.forward_op, (*options, *tensors, *extras), test_utils=checks)
    implementation = dispatch.implementation(op, backend)
    found = implementation.forward(*tensors, extras, activation="tanh", reverse=True, saves=True)
    grads = (torch.randn_like(found.output), None, None, None if found.cells is None else torch.rand_like(found.cells))
    of_extras = [extras.peephole is not None, varied, varied and op == "lstm", varied and op == "lstm"]
    needs = [True, True, op == "lstm", True, True, True, False, projects, *of_extras]
    torch.library.opcheck(
        module.backward_op,
        ("tanh", "sigmoid", True, needs, backend, *grads, x, h0, c0, weights[0], weights[1], weights[4], sizes,
         found.output, *found[3:], *extras),
        test_utils=checks,
    )  # fmt: skip


@every_op
@pytest.mark.parametrize("training", [False, True])
def test_one_node_of_a_compiled_graph(op: str, training: bool) -> None:
    """Whatever the length: one node for each layer and direction, forward and backward, and no graph break."""
    layer = getattr(nn, op.upper())(3, 5, num_layers=2, bidirectional=True)
    weights = [p.detach().clone().requires_grad_(training) for p in layer.parameters()]
    x = torch.randn(16, 2, 3)
    names: list[str] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    def step(x: Tensor, weights: list[Tensor]) -> Tensor:
        return getattr(functional, op)(x, weights, num_layers=2, bidirectional=True)[0]

    with dlkern.backend("cpu"):
        compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=count, bw_compiler=count))
        y, expected = compiled(x, weights), step(x, weights)
        assert torch.equal(y, expected)
        if training:
            for a, b in zip(
                torch.autograd.grad(y.square().sum(), weights),
                torch.autograd.grad(expected.square().sum(), weights),
                strict=True,
            ):
                torch.testing.assert_close(a, b)
    assert sum(f"dlkern.{op}.default" in name for name in names) == 4
    assert sum(f"dlkern.{op}_backward.default" in name for name in names) == (4 if training else 0)


def test_a_module_compiles_where_dynamo_lets_it() -> None:
    """Dynamo refuses every subclass of torch.nn.LSTM unless it is told otherwise."""
    layer = dlkern.nn.LSTM(3, 5, batch_first=True)
    x = torch.randn(2, 7, 3)
    with dlkern.backend("cpu"), torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])


@every_op
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_default_compiles_whole_in_training(op: str, dynamic: bool) -> None:
    """At sizes for which the default is PyTorch's own, too: its LSTM's backward does not fit into a compiled graph."""
    torch._dynamo.reset()
    weights = list(getattr(nn, op.upper())(4, 5).parameters())
    compiled = torch.compile(
        lambda x: getattr(functional, op)(x, weights)[0], fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for batch in (3, 12):
        x = torch.randn(6, batch, 4)
        y, expected = compiled(x), getattr(functional, op)(x, weights)[0]
        torch.testing.assert_close(y, expected)
        for a, b in zip(
            torch.autograd.grad(y.square().sum(), weights),
            torch.autograd.grad(expected.square().sum(), weights),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- swap
class Tagger(nn.Module):
    """A convolution with its norm, a packed LSTM, a loop over a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.encoder = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.mixer = nn.GRU(10, 7)
        self.cell = nn.RNNCell(7, 3)

    def forward(self, sequences: list[Tensor]) -> Tensor:
        packed = pack_sequence([self.embed(s) for s in sequences], enforce_sorted=False)
        encoded, _ = self.encoder(packed)
        _, last = self.mixer(encoded)
        h = None
        for _ in range(3):
            h = self.cell(last[0], h)
        return h


def test_swap_and_back() -> None:
    torch.manual_seed(0)
    model = Tagger()
    plain = copy.deepcopy(model)
    sequences = [torch.randn(n, 4) for n in (2, 5, 3)]
    before = dict(model.named_parameters())
    assert dlkern.swap(model) is model
    report = dlkern.report(model)
    assert {(row.path, row.kind, row.label) for row in report.swapped} == {
        ("encoder", "lstm", "lstm"), ("mixer", "gru", "gru"), ("cell", "rnn", "rnncell"),
    }  # fmt: skip
    assert "a loop over steps stays a loop" in next(r.reason for r in report.swapped if r.path == "cell")
    assert all(before[name] is p for name, p in model.named_parameters())
    with dlkern.no_fallback(), dlkern.backend("cpu"), spied() as calls:
        y = model(sequences)
    assert calls == [("cpu", "forward")] * 8
    torch.testing.assert_close(y, plain(sequences))
    assert dlkern.report(model).calls.fused == 5
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(sequences), y)
        assert len(dlkern.report(other).swapped) == 3
    assert list(model.state_dict()) == list(plain.state_dict())
    dlkern.unswap(model)
    assert type(model.encoder) is nn.LSTM
    assert type(model.cell) is nn.RNNCell
    assert torch.equal(model(sequences), plain(sequences))


def test_what_swap_leaves() -> None:
    class Own(nn.LSTM):
        def forward(self, input: Any, hx: Any = None) -> Any:
            return super().forward(2 * input, hx)

    model = nn.ModuleDict({"own": Own(3, 4), "kept": nn.GRU(3, 4), "ours": dlkern.nn.RNN(3, 4), "seen": nn.RNN(3, 4)})
    report = dlkern.explain(model)
    assert [row.path for row in report.swapped] == ["kept", "seen"]
    assert [(row.path, row.reason) for row in report.skipped] == [
        ("own", "a Own is a class of its own: its forward may do more than PyTorch's")
    ]
    dlkern.swap(model, filter_fn=lambda module, path: path != "kept")
    assert [row.path for row in dlkern.report(model).swapped] == ["seen"]
    assert "left out by filter_fn" in {row.reason for row in dlkern.report(model).skipped}
    x = torch.randn(5, 2, 3)
    torch.func.vmap(lambda v: v)(x)
    traced = torch.jit.trace(model["seen"], x)  # PyTorch's own forward is traced
    torch.testing.assert_close(traced(x)[0], model["seen"](x)[0])
    assert dlkern.report(model).calls.fallback >= 1
    with dlkern.no_fallback(), pytest.raises(RuntimeError, match="stock forward"):
        torch.jit.trace(model["seen"], x)


# --------------------------------------------------------------------------------------- training
class Classifier(nn.Module):
    """Is the sum of the sequence positive? A two-layer recurrent classifier."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.body = getattr(nn, op.upper())(4, 16, num_layers=2)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][-1])


@every_op
def test_trains_like_torch(op: str) -> None:
    """50 steps; the curve is nearer to PyTorch's than twice PyTorch's own when its inputs move by an ulp."""

    def curve(swapped: bool, moved: bool = False) -> Tensor:
        torch.manual_seed(0)
        model = Classifier(op)
        if swapped:
            dlkern.swap(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(1)
        losses = []
        with dlkern.backend("cpu"):
            for _ in range(50):
                x = torch.randn(12, 8, 4, generator=generator)
                target = (x.sum((0, 2)) > 0).long()
                x = torch.nextafter(x, torch.tensor(9e9)) if moved else x
                loss = nn.functional.cross_entropy(model(x), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        return torch.stack(losses)

    plain, ours, moved = curve(False), curve(True), curve(False, moved=True)
    assert float(plain[-10:].mean()) < 0.9 * float(plain[:5].mean())
    floor = torch.finfo(torch.float32).eps * float(plain.norm())
    assert float((ours - plain).norm()) <= 2 * float((moved - plain).norm()) + 8 * floor


def test_constructors_warn_and_refuse_like_torch() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        dlkern.nn.LSTM(3, 4, dropout=0.5)
    with pytest.raises(ValueError, match="proj_size"):
        dlkern.nn.GRU(3, 4, proj_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dlkern.nn.LSTM(3, 4, num_layers=2, dropout=0.5, proj_size=2, bidirectional=True, batch_first=True, bias=False)
