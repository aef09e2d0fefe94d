"""swap, report, unswap, explain: what they do and keep."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import swap_models as models
import torch
import torch.nn.functional as F
from batch_norm_act_cases import spied
from torch import nn

import dlkern


def run(model: nn.Module, *args: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and parameter gradients of one training step's forward and backward."""
    y = model(*args)
    ys = y if isinstance(y, list) else [y]
    grads = torch.autograd.grad(sum((t * t).sum() for t in ys), [p for p in model.parameters() if p.requires_grad])
    return torch.cat([t.flatten() for t in ys]), list(grads)


def assert_same(model: nn.Module, plain: nn.Module, *args: torch.Tensor) -> None:
    """Same outputs, gradients and running statistics, to the rounding of these tiny models."""
    ours, our_grads = run(model, *(a.clone() for a in args))
    theirs, their_grads = run(plain, *(a.clone() for a in args))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    for ours, theirs in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def h() -> torch.Tensor:
    return torch.randn(4, 8, 10, 10, generator=torch.Generator().manual_seed(1))


def calls(model: nn.Module) -> tuple[int, int]:
    c = dlkern.report(model).calls
    return c.fused, c.fallback


@pytest.mark.parametrize("training", [True, False])
def test_every_site_runs_fused_with_the_same_numbers(x: torch.Tensor, training: bool) -> None:
    model, plain = models.pair(models.Stack().train(training))
    assert dlkern.swap(model) is model
    report = dlkern.report(model)
    assert [row.path for row in report.swapped] == ["0.1", "1.bn1", "1.bn2", "2.bn1", "2.bn2", "3.1"]
    assert [row.label for row in report.swapped] == [
        "conv+bn+relu", "conv+bn+relu", "conv+bn+add+relu", "conv+bn+relu", "conv+bn+add+relu", "conv+bn+silu",
    ]  # fmt: skip
    assert {row.kind for row in report.swapped} == {"conv_bn_act"}
    assert {row.backend for row in report.swapped} == {"cpu"}
    assert report.skipped == []
    with dlkern.no_fallback():
        assert_same(model, plain, x)
    assert calls(model) == (6, 0)
    assert "6 sites swapped" in str(dlkern.report(model))


def everything(model: nn.Module) -> dict[str, object]:
    """What must be the same objects, or look the same, after a swap."""
    return {
        "parameters": [id(p) for p in model.parameters()],
        "buffers": [id(b) for b in model.buffers()],
        "keys": list(model.state_dict()),
        "modes": [m.training for m in model.modules()],
        "modules": [id(m) for m in model.modules()],
        "paths": [name for name, _ in model.named_modules()],
        "dicts": [{k: id(v) for k, v in m.__dict__.items()} for m in model.modules()],
        "repr": repr(model),
    }


def test_what_a_swap_keeps(x: torch.Tensor) -> None:
    model = models.Stack()
    model[1].bn1.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    model[1].conv1.register_forward_hook(lambda *_: seen.append("conv1"))
    model[1].register_forward_pre_hook(lambda *_: seen.append("block"))
    before = everything(model)
    dlkern.swap(model)
    assert everything(model) == before
    assert isinstance(model, models.Stack)
    assert isinstance(model[1], models.Block)
    model(x).sum().backward()
    assert seen == ["block", "conv1"]
    weight = model[1].bn2.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, model[1].bn2.weight)


def test_the_modes_of_single_layers_are_read_at_the_call(x: torch.Tensor) -> None:
    model, plain = models.pair(models.Stack())
    dlkern.swap(model)
    for m in (model, plain):
        m.train()
        m[1].bn1.eval()  # a frozen norm in a training model
    assert_same(model, plain, x)
    assert calls(model) == (6, 0)
    for m in (model, plain):
        m.eval()
        m[2].bn2.train()
    assert_same(model, plain, x)
    assert calls(model) == (12, 0)


def test_unswap_gives_the_original_back(x: torch.Tensor) -> None:
    model = models.Stack()
    classes = [type(m) for m in model.modules()]
    dlkern.swap(model)
    assert [type(m) for m in model.modules()] != classes
    assert dlkern.unswap(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert dlkern.report(model).swapped == []
    model(x)
    assert calls(model) == (0, 0)


def test_swapping_twice_is_swapping_once(x: torch.Tensor) -> None:
    model = dlkern.swap(models.Stack())
    model(x)
    classes = [type(m) for m in model.modules()]
    dlkern.swap(model)
    assert [type(m) for m in model.modules()] == classes
    assert calls(model) == (0, 0)  # counting starts afresh
    model(x)
    assert calls(model) == (6, 0)


def test_filter_fn_leaves_sites_out(x: torch.Tensor) -> None:
    model, plain = models.pair(models.Stack())
    dlkern.swap(model, filter_fn=lambda module, path: isinstance(module, nn.BatchNorm2d) and path != "1.bn2")
    report = dlkern.report(model)
    assert "1.bn2" not in [row.path for row in report.swapped]
    assert [(row.path, row.reason) for row in report.skipped] == [("1.bn2", "left out by filter_fn")]
    assert_same(model, plain, x)
    assert calls(model) == (5, 0)


def test_a_failed_swap_changes_nothing() -> None:
    model = models.Stack()
    classes = [type(m) for m in model.modules()]
    dicts = [{k: id(v) for k, v in m.__dict__.items()} for m in model.modules()]

    def broken(module: nn.Module, path: str) -> bool:
        if path == "2.bn1":
            raise KeyError("not this one")
        return True

    with pytest.raises(KeyError, match="not this one"):
        dlkern.swap(model, filter_fn=broken)
    with pytest.raises(TypeError, match="memory_format"):
        dlkern.swap(model, memory_format="channels_last")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
        dlkern.swap(3)  # type: ignore[arg-type]
    assert [type(m) for m in model.modules()] == classes
    assert [{k: id(v) for k, v in m.__dict__.items()} for m in model.modules()] == dicts


def test_memory_format_is_applied(x: torch.Tensor) -> None:
    model, plain = models.pair(models.Stack())
    plain.to(memory_format=torch.channels_last)
    ids = [id(p) for p in model.parameters()]
    dlkern.swap(model, memory_format=torch.channels_last)
    assert model[1].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert ids == [id(p) for p in model.parameters()]
    assert_same(model, plain, x.to(memory_format=torch.channels_last))
    h = model[1](model[0](x.to(memory_format=torch.channels_last)))
    assert h.is_contiguous(memory_format=torch.channels_last)


def test_explain_changes_nothing() -> None:
    model = models.Stack()
    classes = [type(m) for m in model.modules()]
    explained = dlkern.explain(model)
    assert [row.path for row in explained.swapped] == ["0.1", "1.bn1", "1.bn2", "2.bn1", "2.bn2", "3.1"]
    assert "would be swapped" in str(explained)
    assert [type(m) for m in model.modules()] == classes
    dlkern.swap(model)
    swapped = [type(m) for m in model.modules()]
    assert [r.path for r in dlkern.explain(model).swapped] == [r.path for r in explained.swapped]
    assert [type(m) for m in model.modules()] == swapped


def test_deepcopy_stays_fused_and_independent(x: torch.Tensor) -> None:
    model = dlkern.swap(models.Stack())
    model(x)
    twin = copy.deepcopy(model)
    assert calls(twin) == (0, 0)
    assert_same(twin, model, x)
    assert calls(twin) == (6, 0)
    assert calls(model) == (12, 0)
    assert [r.path for r in dlkern.report(twin).swapped] == [r.path for r in dlkern.report(model).swapped]
    dlkern.unswap(twin)
    model(x)
    assert calls(model) == (18, 0)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickle_stays_fused(x: torch.Tensor, how: str) -> None:
    model = dlkern.swap(models.AcrossContainers())
    h = torch.randn(2, 8, 6, 6)
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert_same(twin, model, h)
    assert calls(twin) == (3, 0)


def test_a_fresh_process_stays_fused(tmp_path: Path, x: torch.Tensor) -> None:
    model = dlkern.swap(models.Stack().eval())
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"model, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(model(x), y)\n"
        "import dlkern\n"
        "calls = dlkern.report(model).calls\n"
        "print(calls.fused, calls.fallback, len(dlkern.report(model).swapped))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "0", "6"]


def test_state_dict_goes_both_ways(x: torch.Tensor) -> None:
    swapped, plain = dlkern.swap(models.Stack()), models.Stack()
    plain.load_state_dict(swapped.state_dict())
    assert_same(swapped, plain, x)
    other = models.Stack()
    swapped.load_state_dict(other.state_dict())
    other.train()
    assert_same(swapped, other, x)


def test_an_averaged_model_and_functional_call_stay_fused(x: torch.Tensor) -> None:
    model = dlkern.swap(models.Stack())
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    averaged(x)
    assert calls(averaged) == (6, 0)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    y = torch.func.functional_call(model, state, (x,))
    assert y.shape == (4, 8)
    assert calls(model) == (6, 0)


def test_checkpoint_round_a_block(x: torch.Tensor) -> None:
    model, plain = models.pair(models.Stack())
    dlkern.swap(model)
    for m in (model, plain):
        m[0].eval()  # so that the two forwards of a checkpoint see the same input

    def step(m: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        h = m[0](x)
        y = torch.utils.checkpoint.checkpoint(m[1], h, use_reentrant=False)
        y.square().sum().backward()
        return y, m[1].conv1.weight.grad

    for ours, theirs in zip(step(model), step(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    # stem, block, and the block again in backward, where checkpoint stops within the last op
    assert calls(model) == (4, 0)


def test_amp(x: torch.Tensor) -> None:
    model, plain = models.pair(models.Stack())
    dlkern.swap(model)
    with torch.autocast("cpu", torch.bfloat16), dlkern.no_fallback():
        ours, theirs = model(x), plain(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    ours.float().square().sum().backward()
    assert model[1].bn1.weight.grad.dtype == torch.float32
    assert calls(model)[1] == 0


def test_double_backward_through_a_swapped_model(x: torch.Tensor) -> None:
    """A gradient penalty, as WGAN-GP has it."""
    model, plain = models.pair(nn.Sequential(models.Block(), models.ConvBN()).double())
    dlkern.swap(model)
    h = torch.randn(2, 8, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def penalty(m: nn.Module) -> list[torch.Tensor]:
        (g,) = torch.autograd.grad(m(h).square().sum(), h, create_graph=True)
        return list(torch.autograd.grad(g.square().sum(), list(m.parameters())))

    for ours, theirs in zip(penalty(model), penalty(plain), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert calls(model) == (3, 0)


def test_torch_func_transforms_run_the_stock_modules(h: torch.Tensor) -> None:
    model, plain = models.pair(models.ConvBN().eval())
    dlkern.swap(model)
    ours = torch.vmap(model)(h[:, None])
    torch.testing.assert_close(ours, torch.vmap(plain)(h[:, None]))
    assert calls(model) == (0, 1)
    _, tangent = torch.func.jvp(model, (h,), (torch.ones_like(h),))
    torch.testing.assert_close(tangent, torch.func.jvp(plain, (h,), (torch.ones_like(h),))[1])
    assert calls(model) == (0, 2)


def test_compile_fullgraph_of_a_forward_that_calls_a_method(x: torch.Tensor) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.implementation(x)

        def implementation(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.bn(self.conv(x)))

    model, plain = models.pair(Model())
    dlkern.swap(model)
    with dlkern.no_fallback():
        assert_same(torch.compile(model, fullgraph=True, backend="eager"), plain, x)
    model.implementation = plain.implementation  # the guard still sees it
    with dlkern.no_fallback(), pytest.raises(RuntimeError, match="overrides a name"):
        model(x)


@pytest.mark.parametrize("training", [True, False])
def test_compile_fullgraph(x: torch.Tensor, training: bool) -> None:
    model, plain = models.pair(models.Stack().train(training))
    dlkern.swap(model)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)  # type: ignore[return-value]

    assert_same(torch.compile(model, fullgraph=True, backend=backend), plain, x)
    assert len(graphs) == 1
    nodes = [node for m in graphs[0].modules() if isinstance(m, torch.fx.GraphModule) for node in m.graph.nodes]
    assert [str(node.target) for node in nodes].count("dlkern.batch_norm_act.default") == 6
    torch._dynamo.reset()


def test_export_keeps_the_op(x: torch.Tensor) -> None:
    model = dlkern.swap(models.Stack().eval())
    program = torch.export.export(model, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("dlkern.batch_norm_act.default") == 6
    torch.testing.assert_close(program.module()(x), model(x))


def test_fx_traces_a_swapped_model_as_the_plain_one(x: torch.Tensor) -> None:
    model, plain = models.pair(models.Stack().eval())
    dlkern.swap(model)
    ours, theirs = torch.fx.symbolic_trace(model), torch.fx.symbolic_trace(plain)
    assert str(ours.graph) == str(theirs.graph)
    assert torch.equal(ours(x), theirs(x))


def test_jit_script_wants_unswap_first(x: torch.Tensor) -> None:
    model = dlkern.swap(models.ConvBN().eval())
    with pytest.raises(Exception, match=r"."):  # TorchScript cannot read the generated forward
        torch.jit.script(model)
    dlkern.unswap(model)
    torch.jit.script(model)


def test_a_graph_module_is_left_alone_and_says_so(h: torch.Tensor) -> None:
    graph = torch.fx.symbolic_trace(models.ConvBN())
    report = dlkern.report(dlkern.swap(graph))
    assert report.swapped == []
    assert "is a GraphModule" in dlkern.explain(graph).skipped[0].reason
    outer = nn.Sequential(graph, models.ConvBN())
    dlkern.swap(outer)
    outer(h)
    assert calls(outer) == (1, 0)


def test_a_class_extended_after_the_swap_is_refused(h: torch.Tensor) -> None:
    model = dlkern.swap(models.ConvBN())
    extended = type("Extended", (type(model),), {})
    model.__class__ = extended
    for function in (dlkern.unswap, dlkern.swap):
        with pytest.raises(RuntimeError, match="extended after the swap"):
            function(model)
    assert type(model) is extended
    model(h)
    assert calls(model) == (1, 0)


def test_forced_backends_reach_swapped_sites(h: torch.Tensor) -> None:
    model, plain = models.pair(models.ConvBN())
    dlkern.swap(model)
    for name in ("torch", "reference", "cpu"):
        with dlkern.backend(name):
            assert {row.backend for row in dlkern.report(model).swapped} == {name}
            assert_same(model, plain, h)
    assert calls(model) == (3, 0)


def test_errors_of_the_stock_modules_stay_theirs() -> None:
    model, plain = models.pair(models.ConvBN())
    dlkern.swap(model)
    for bad in (torch.randn(8, 10, 10), torch.randn(1, 8, 1, 1)):
        with pytest.raises(ValueError, match=r".") as ours:
            model(bad)
        with pytest.raises(ValueError, match=r".") as theirs:
            plain(bad)
        assert str(ours.value) == str(theirs.value)
    assert int(model.bn.num_batches_tracked) == int(plain.bn.num_batches_tracked)


def test_memory_kept_for_backward_is_not_more_than_plain(x: torch.Tensor) -> None:
    def kept(model: nn.Module) -> int:
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            pointer = t.untyped_storage().data_ptr()
            if pointer not in parameters:
                storages[pointer] = t.untyped_storage().nbytes()
            keep.append(t)  # alive, so that no two storages share an address
            return t

        keep: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        del y
        return sum(storages.values())

    model, plain = models.pair(models.Stack())
    assert kept(dlkern.swap(model)) <= kept(plain)


def test_conv_bn_functional_forms(h: torch.Tensor) -> None:
    class Forms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norms[0](x))
            x = self.norms[1](x).relu_()
            x = F.leaky_relu(self.norms[2](x), 0.2)
            x = torch.tanh(torch.add(self.norms[3](x), x))
            x = F.gelu(x + self.norms[4](x), approximate="tanh")
            return F.hardswish(self.norms[5](x).add_(x))

    model, plain = models.pair(Forms())
    dlkern.swap(model)
    assert [row.label for row in dlkern.report(model).swapped] == [
        "bn+relu", "bn+relu", "bn+leaky_relu", "bn+add+tanh", "bn+add+gelu_tanh", "bn+add+hardswish",
    ]  # fmt: skip
    with dlkern.no_fallback():
        assert_same(model, plain, h)


@pytest.mark.parametrize("norms_train", [False, True])
def test_transfer_learning_with_a_frozen_backbone(x: torch.Tensor, norms_train: bool) -> None:
    """The backbone needs no gradient: in eval mode its batch norms fold although the model trains."""
    torch.manual_seed(0)
    plain = nn.Sequential(models.Stack(), nn.Linear(8, 3)).train()
    for p in plain[0].parameters():
        p.requires_grad_(False)
    plain[0].train(norms_train)
    model = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(m[1].parameters(), lr=0.1, momentum=0.9) for m in (model, plain)]
    dlkern.swap(model)
    with dlkern.no_fallback(), spied() as ran:
        for _ in range(3):
            for m, optimizer in zip((model, plain), optimizers, strict=True):
                optimizer.zero_grad()
                m(x).square().sum().backward()
                optimizer.step()
    assert all(p.grad is None for p in model[0].parameters())
    assert calls(model) == (18, 0)
    assert ran == [("cpu", "forward")] * 18
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
