"""torch.compile, torch.export and the op as one node of a graph."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import parity
import pytest
import torch
from batch_norm_act_cases import every_target, spied
from torch import Tensor, nn

import dlkern
from dlkern import nn as dnn
from dlkern.functional import batch_norm_act


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Block(nn.Module):
    """conv -> bn -> act, conv -> bn -> add -> act: a small residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), dnn.BatchNormAct2d(4, activation="silu")
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), dnn.BatchNormAct2d(4, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), x)


def _step(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = model(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
    return y.detach(), *grads


def _compare(model: nn.Module, compiled: Any, compiled_model: nn.Module, x: Tensor, *, exact: bool) -> None:
    for _ in range(2):
        for index, (mine, theirs) in enumerate(zip(_step(compiled, x), _step(model, x), strict=True)):
            if exact:
                assert torch.equal(mine, theirs), index
            else:  # convolutions and sums may be ordered otherwise: sums of some 200 terms
                parity.assert_parity(f"{index}", mine, theirs.double(), 100 * (theirs.abs().double() + 1), peer=None)
    state, other = model.state_dict(), compiled_model.state_dict()
    for name in state:
        if exact:
            assert torch.equal(state[name], other[name]), name
        elif state[name].is_floating_point():
            parity.assert_parity(name, other[name], state[name].double(), state[name].double().abs() + 1, peer=None)
        else:
            assert torch.equal(state[name], other[name])


@every_target
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fullgraph_aot_eager(memory_format: torch.memory_format, training: bool, target: tuple[str, str]) -> None:
    device, backend = target
    torch.manual_seed(0)
    model = Block().to(device, memory_format=memory_format).train(training)
    other = copy.deepcopy(model)
    x = torch.randn(2, 4, 6, 6).to(device, memory_format=memory_format)
    graphs = []

    def keep(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    compiled = torch.compile(other, fullgraph=True, backend=keep)
    with dlkern.backend(backend), spied() as calls:
        _compare(model, compiled, other, x, exact=True)
    assert len(graphs) == 1
    named = [str(n.target) for g in graphs for m in g.modules() if hasattr(m, "graph") for n in m.graph.nodes]
    assert sum("dlkern.batch_norm_act.default" in name for name in named) == 2
    assert set(calls) == {(backend, "forward"), (backend, "backward")}


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_fullgraph_inductor(training: bool) -> None:
    torch.manual_seed(0)
    model = Block().train(training)
    other = copy.deepcopy(model)
    with dlkern.backend("cpu"), spied() as calls:
        _compare(model, torch.compile(other, fullgraph=True), other, torch.randn(2, 4, 6, 6), exact=False)
    assert set(calls) == {("cpu", "forward"), ("cpu", "backward")}


def test_dynamic_shapes() -> None:
    torch.manual_seed(0)
    model = Block()
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (6, 7, 9):
        _compare(model, compiled, other, torch.randn(2, 4, size, size), exact=True)


def _ran(compiled: Any, x: Tensor) -> list[str]:
    with spied() as calls:
        compiled(x)
    return [name for name, _ in calls]


def _function(x: Tensor) -> Tensor:
    return batch_norm_act(x, None, None, training=True)


def test_a_change_of_the_forced_backend_is_seen() -> None:
    """A with block is not baked into a compiled function."""
    compiled, x = torch.compile(_function, fullgraph=True, backend="eager"), torch.randn(2, 3, 4, 4)
    with dlkern.backend("reference"):
        assert _ran(compiled, x) == ["reference"]
    with dlkern.backend("torch"):
        assert _ran(compiled, x) == []
    assert _ran(compiled, x) == ["cpu"]


def test_the_environment_is_read_when_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLKERN_BACKEND", "reference")
    assert _ran(torch.compile(_function, fullgraph=True, backend="eager"), torch.randn(2, 3, 4, 4)) == ["reference"]


def test_compiled_in_a_fresh_process() -> None:
    """Nothing has been chosen, imported or cached before the first trace."""
    code = (
        "import torch, dlkern\n"
        "from dlkern import nn\n"
        "layer = nn.BatchNormAct2d(3)\n"
        "f = torch.compile(layer, fullgraph=True, backend='eager')\n"
        "f(torch.randn(2, 3, 4, 4)).sum().backward()\n"
        "print(int(layer.num_batches_tracked))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.stdout.strip() == "1", out.stderr


@pytest.mark.parametrize("training", [True, False])
def test_export(training: bool) -> None:
    torch.manual_seed(0)
    model, x = Block().train(training), torch.randn(2, 4, 6, 6)
    with dlkern.backend("cpu"):
        program = torch.export.export(copy.deepcopy(model), (x,))
        y = program.module()(x)
        want = model(x)
    assert any("dlkern.batch_norm_act" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(y, want)


def test_compile_without_gradients() -> None:
    model, x = Block().eval(), torch.randn(2, 4, 6, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(compiled(x), model(x))
