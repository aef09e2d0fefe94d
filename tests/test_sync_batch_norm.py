"""SyncBatchNorm with its activation on two gloo processes; the truth is a BatchNorm of the concatenated batch.

One pair of processes runs every case and leaves the results in files, which the tests read.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import parity
import pytest
import swap_models as models
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import dlkern
from dlkern.kernels.activation import Activation
from dlkern.nn import batch_norm_act as layer

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
STEPS = 2


class Case(NamedTuple):
    """A norm with its activation, and the batches of the two ranks."""

    activation: str = "relu"
    residual: bool = False
    dtype: torch.dtype = F64
    param_dtype: torch.dtype | None = None  # dtype where None
    shape: tuple[int, ...] = (6, 5, 3)  # without N
    sizes: tuple[int, int] = (3, 3)
    channels_last: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    training: bool = True
    backend: str | None = None
    offset: float = 0.0


CASES = {
    "relu": Case(),
    "silu": Case("silu"),
    "add-relu": Case(residual=True),
    "add-silu": Case("silu", residual=True),
    "add-identity": Case("identity", residual=True),
    "unequal": Case("silu", residual=True, sizes=(5, 2)),
    "one-value": Case("silu", shape=(6,), sizes=(1, 1)),
    "one-empty": Case("silu", residual=True, sizes=(4, 0)),
    "one-empty-relu": Case(residual=True, sizes=(0, 4)),
    "channels-last": Case(residual=True, channels_last=True, sizes=(2, 3)),
    "channels-last-silu": Case("silu", channels_last=True),
    "rows": Case("tanh", shape=(6,), sizes=(7, 4)),
    "sequence": Case("gelu", shape=(6, 7)),
    "volume": Case("silu", residual=True, shape=(6, 3, 2, 2)),
    "no-affine": Case("silu", residual=True, options=(("affine", False),), sizes=(2, 4)),
    "cumulative": Case(options=(("momentum", None),), sizes=(2, 4)),
    "untracked": Case("silu", options=(("track_running_stats", False),)),
    "frozen": Case("silu", residual=True, training=False),
    "frozen-untracked": Case(options=(("track_running_stats", False),), training=False),
    "reference": Case("silu", residual=True, sizes=(2, 4), backend="reference"),
    "torch": Case(residual=True, sizes=(2, 4), backend="torch"),
    "float32": Case(residual=True, dtype=F32, sizes=(2, 4)),
    "float32-silu": Case("silu", dtype=F32, channels_last=True, sizes=(2, 4)),
    "float32-far-from-zero": Case("silu", dtype=F32, sizes=(2, 4), offset=1000.0),
    "bfloat16": Case("silu", residual=True, dtype=BF16, param_dtype=F32, sizes=(2, 4)),
    "bfloat16-relu": Case(dtype=BF16, sizes=(2, 4), channels_last=True),
}
#: Statistics that no two ranks share.
LOCAL = ("frozen-untracked",)


def make(case: Case, kind: type[nn.Module], dtype: torch.dtype) -> Any:
    """The norm of a case with parameters and running statistics that are not the initial ones."""
    norm = kind(case.shape[0], dtype=dtype, **dict(case.options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if value is not None:
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return norm.train(case.training)


def batches(case: Case, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual and grad_y of the whole batch."""
    generator = torch.Generator().manual_seed(step)
    shape = (sum(case.sizes), *case.shape)
    values = [torch.randn(shape, generator=generator, dtype=F64) for _ in range(3)]
    values[0] = values[0] * 1.5 + case.offset + torch.arange(case.shape[0]).view(-1, *[1] * (len(case.shape) - 1)) * 0.3
    # each rank's own mean and variance are far from the common ones
    values[0][: case.sizes[0]] *= 2.0
    values[0][: case.sizes[0]] += 1.0
    memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
    x, residual, grad = (v.to(case.dtype).contiguous(memory_format=memory_format) for v in values)
    return x, residual, grad


def names(case: Case) -> list[str]:
    return ["y", "dx", *(["dresidual"] if case.residual else [])]


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def tensors(norm: Any) -> dict[str, Tensor]:
    found = {"dweight": norm.weight, "dbias": norm.bias}
    gradients = {name: p.grad.clone() for name, p in found.items() if p is not None}
    return {**gradients, **{name: b.clone() for name, b in norm.named_buffers()}}


# ------------------------------------------------------------------------------------ in a rank
def run_case(case: Case, rank: int) -> dict[str, Any]:
    norm = make(case, nn.SyncBatchNorm, case.param_dtype or case.dtype)
    begin = sum(case.sizes[:rank])
    results: dict[str, Any] = {"steps": []}
    with dlkern.backend(batch_norm_act=case.backend) if case.backend else contextlib.nullcontext():
        for step in range(STEPS):
            x, residual, grad = (v[begin : begin + case.sizes[rank]] for v in batches(case, step))
            x, residual = leaf(x), leaf(residual)
            y = layer.apply(norm, x, Activation(case.activation), residual if case.residual else None)
            y.backward(grad)
            results["steps"].append({"y": y.detach(), "dx": x.grad, "dresidual": residual.grad})
    return {**results, **tensors(norm)}


def only_what_is_needed(rank: int) -> dict[str, Any]:
    """How many collectives backward makes, and which gradients there are."""
    case = CASES["add-silu"]
    found = {}
    for needed in ("x", "residual", "weight", "bias"):
        norm = make(case, nn.SyncBatchNorm, F64).requires_grad_(False)
        x, residual, grad = (v[rank * 3 : rank * 3 + 3].clone() for v in batches(case, 0))
        inputs = {"x": x, "residual": residual, "weight": norm.weight, "bias": norm.bias}
        inputs[needed].requires_grad_()
        y = layer.apply(norm, x, Activation("silu"), residual)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
            y.backward(grad)
        found[needed] = (reduce.call_count, [name for name, value in inputs.items() if value.grad is not None])
    with torch.no_grad():
        found["nothing"] = layer.apply(norm, x, Activation("silu"), residual).requires_grad
    return found


def beside_the_stock_module(rank: int) -> dict[str, Any]:
    """Rank 1 sends what PyTorch's SyncBatchNorm sends, which on the CPU does not run."""
    case = CASES["silu"]
    x, _, grad = (v[rank * 3 : rank * 3 + 3] for v in batches(case, 0))
    norm = make(case, nn.SyncBatchNorm, F64)
    if rank == 0:
        x = leaf(x)
        layer.apply(norm, x, Activation("silu")).backward(grad)
        return {"dx": x.grad}
    channels = x.size(1)
    variance, mean = torch.var_mean(x, [0, 2, 3], correction=0)
    count = torch.full((1,), x.numel() / channels, dtype=F64)
    mine = torch.cat([mean, torch.rsqrt(variance + norm.eps), count])
    everyone = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(everyone, mine)
    # by the ranks' own statistics (the counts are equal), and autograd for dz
    means = torch.stack([t[:channels] for t in everyone])
    variances = torch.stack([t[channels:-1].pow(-2) - norm.eps for t in everyone])
    mean = means.mean(0)
    variance = (variances + (means - mean).square()).mean(0)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    centred = x - mean.view(1, -1, 1, 1)
    z = leaf(centred * scale.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1))
    F.silu(z).backward(grad)
    sums = torch.cat([z.grad.sum([0, 2, 3]), (z.grad * centred).sum([0, 2, 3])])
    dist.all_reduce(sums)
    mean_dz, mean_dz_centred = (sums / (2 * count)).view(2, 1, -1, 1, 1)
    through = centred * mean_dz_centred / (variance + norm.eps).view(1, -1, 1, 1)
    return {"dx": ((z.grad - mean_dz - through) * scale.view(1, -1, 1, 1)).detach()}


def with_a_group_of_its_own(rank: int) -> dict[str, Any]:
    groups = [dist.new_group([r]) for r in range(2)]
    x = batches(CASES["silu"], 0)[0][rank * 3 : rank * 3 + 3]
    norm = make(CASES["silu"], nn.SyncBatchNorm, F64)
    norm.process_group = groups[rank]
    plain = make(CASES["silu"], nn.BatchNorm2d, F64)
    return {"y": layer.apply(norm, x, Activation("silu")).detach(), "expected": F.silu(plain(x)).detach()}


def under_a_checkpoint(rank: int) -> dict[str, Any]:
    case, gradients = CASES["add-silu"], []
    for used in (False, True):
        norm = make(case, nn.SyncBatchNorm, F64)
        x, residual, grad = (v[rank * 3 : rank * 3 + 3].clone() for v in batches(case, 0))
        x.requires_grad_()
        arguments = (norm, x, Activation("silu"), residual)
        y = checkpoint(layer.apply, *arguments, use_reentrant=False) if used else layer.apply(*arguments)
        y.backward(grad)
        gradients.append(x.grad)
    return {"gradients": gradients}


def differentiated_twice(rank: int) -> str:
    x = leaf(batches(CASES["silu"], 0)[0][rank * 3 : rank * 3 + 3])
    y = layer.apply(make(CASES["silu"], nn.SyncBatchNorm, F64), x, Activation("silu"))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    try:
        dx.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def model_and_data() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = models.Stack().double()
    return model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=F64)


def steps(model: nn.Module, called: nn.Module, x: Tensor) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(called.parameters(), lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        called(x).square().mean().backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train_model(rank: int) -> dict[str, Any]:
    model, x = model_and_data()
    ddp = DistributedDataParallel(model)  # which refuses a SyncBatchNorm on the CPU: it is converted afterwards
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    dlkern.swap(model)
    x = x.view(2, 2, 3, 8, 8)[rank]
    with dlkern.no_fallback():
        state = steps(model, ddp, x)
    calls = dlkern.report(model).calls
    model.eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        evaluated = [model(x), compiled(x)]
    return {"state": state, "calls": (calls.fused, calls.fallback), "evaluated": evaluated}


def compiled_in_training(rank: int) -> str:
    """A graph takes the stock module, which on the CPU says what it says."""
    model = dlkern.swap(nn.Sequential(nn.SyncBatchNorm(6), nn.ReLU()))
    try:
        torch.compile(model, backend="eager")(torch.randn(2, 6, 4, 4))
    except Exception as error:
        return str(error)
    return "no error"


def rank_main(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))  # no endless wait
    torch.set_num_threads(1)
    results: dict[str, Any] = {name: run_case(case, rank) for name, case in CASES.items()}
    for function in (
        only_what_is_needed,
        beside_the_stock_module,
        with_a_group_of_its_own,
        under_a_checkpoint,
        differentiated_twice,
        train_model,
        compiled_in_training,
    ):
        results[function.__name__] = function(rank)
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank_main, args=(port, str(folder)), nprocs=2, join=True)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in (0, 1)]


# --------------------------------------------------------------------------------- the comparison
def whole_batch(case: Case, dtype: torch.dtype, param_dtype: torch.dtype) -> dict[str, Any]:
    """PyTorch's BatchNorm, addition and activation on the concatenated batch."""
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(case.shape)]
    norm = make(case, kind, param_dtype)
    activation = nn.Identity() if case.activation == "identity" else getattr(F, case.activation)
    results: dict[str, Any] = {"steps": []}
    for step in range(STEPS):
        x, residual, grad = (v.to(dtype) for v in batches(case, step))
        x, residual = leaf(x), leaf(residual)
        z = norm(x)
        y = activation(z + residual if case.residual else z)
        y.backward(grad)
        results["steps"].append({"y": y.detach(), "dx": x.grad, "dresidual": residual.grad})
    return {**results, **tensors(norm)}


def summands(case: Case) -> dict[str, Any]:
    """What is added to make each result, in absolute values (activations have derivatives of about 1 at most)."""
    norm = make(case, nn.SyncBatchNorm, F64)
    dims = [0, *range(2, len(case.shape) + 1)]
    found: dict[str, Any] = {"steps": []}
    for step in range(STEPS):
        x, residual, grad = (v.double() for v in batches(case, step))
        variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        if not case.training:
            mean, variance = (v.view_as(mean) for v in (norm.running_mean, norm.running_var))
        weight, bias = (1.0 if v is None else v.detach().view_as(mean) for v in (norm.weight, norm.bias))
        invstd = torch.rsqrt(variance + norm.eps)
        normalised, grad = ((x - mean) * invstd).abs(), grad.abs()
        through = grad.mean(dims, keepdim=True) + normalised * (grad * normalised).mean(dims, keepdim=True)
        found["steps"].append({
            "y": normalised * weight + bias + residual.abs(),
            "dx": weight * invstd * (grad + through),
            "dresidual": grad,
        })  # fmt: skip
        sums = {"dweight": (grad * normalised).sum(dims), "dbias": grad.sum(dims)}
        sums |= {"running_mean": x.abs().mean(dims), "running_var": variance.flatten() + mean.flatten().square()}
        for name, value in sums.items():
            found[name] = found.get(name, 0.0) + value
    return found


@pytest.mark.parametrize("name", [name for name in CASES if name not in LOCAL])
def test_two_ranks_compute_what_one_does_with_the_whole_batch(name: str, ranks: list[dict[str, Any]]) -> None:
    case = CASES[name]
    truth, terms = whole_batch(case, F64, F64), summands(case)
    peer = whole_batch(case, case.dtype, case.param_dtype or case.dtype)
    first, second = (r[name] for r in ranks)

    def check(what: str, result: Tensor, *references: dict[str, Any]) -> None:
        true, term, other = (r[what] for r in references)
        parity.assert_parity(f"{name} {what}", result, true, term, peer=other, dtype=case.dtype)

    for step in range(STEPS):
        for what in names(case):
            parts = [r["steps"][step][what] for r in (first, second)]
            check(what, torch.cat(parts), *(r["steps"][step] for r in (truth, terms, peer)))
            if case.channels_last:
                assert all(p.is_contiguous(memory_format=torch.channels_last) for p in parts)
    assert first.keys() == truth.keys()
    for what in first.keys() - {"steps"}:
        if what.startswith("d"):  # each rank has its share
            check(what, first[what] + second[what], truth, terms, peer)
            continue
        assert torch.equal(first[what], second[what]), what
        if what == "num_batches_tracked":
            assert first[what] == truth[what]
        else:
            check(what, first[what], truth, terms, peer)


def test_statistics_are_not_shared_in_evaluation(ranks: list[dict[str, Any]]) -> None:
    case = CASES["frozen-untracked"]
    for rank in (0, 1):
        norm = make(case, nn.BatchNorm2d, F64)
        x = batches(case, 0)[0][rank * 3 : rank * 3 + 3]
        torch.testing.assert_close(ranks[rank]["frozen-untracked"]["steps"][0]["y"], norm(x).relu().detach())


def test_gradients_only_where_they_are_needed(ranks: list[dict[str, Any]]) -> None:
    expected = {name: (1 if name == "x" else 0, [name]) for name in ("x", "residual", "weight", "bias")}
    assert ranks[0]["only_what_is_needed"] == ranks[1]["only_what_is_needed"] == {**expected, "nothing": False}


def test_beside_a_rank_that_runs_the_stock_module(ranks: list[dict[str, Any]]) -> None:
    expected = whole_batch(CASES["silu"], F64, F64)["steps"][0]["dx"]
    found = torch.cat([r["beside_the_stock_module"]["dx"] for r in ranks])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_process_group_of_one_is_an_ordinary_batch_norm(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        torch.testing.assert_close(found["with_a_group_of_its_own"]["y"], found["with_a_group_of_its_own"]["expected"])


def test_a_checkpoint_computes_the_same(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        plain, recomputed = found["under_a_checkpoint"]["gradients"]
        assert torch.equal(plain, recomputed)


def test_a_second_derivative_is_refused(ranks: list[dict[str, Any]]) -> None:
    assert all("once_differentiable" in found["differentiated_twice"] for found in ranks)


def test_a_swapped_model_trains_as_one_process_does(ranks: list[dict[str, Any]]) -> None:
    model, x = model_and_data()
    expected = steps(model, model, x)
    model.eval()
    evaluated = model(x).view(2, 2, -1)
    for rank, found in enumerate(r["train_model"] for r in ranks):
        assert found["calls"] == (6 * STEPS, 0)
        torch.testing.assert_close(found["state"], expected, rtol=1e-9, atol=1e-11)
        for y in found["evaluated"]:
            torch.testing.assert_close(y, evaluated[rank], rtol=1e-9, atol=1e-11)


def test_torch_compile_takes_the_stock_module_in_training(ranks: list[dict[str, Any]]) -> None:
    assert all("SyncBatchNorm expected input tensor to be on GPU" in r["compiled_in_training"] for r in ranks)


# ------------------------------------------------------------------------------------ one process
@pytest.fixture
def alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def one_process(shape: tuple[int, ...], kind: type[nn.Module]) -> None:
    x = torch.randn(shape)
    model, plain = models.pair(nn.Sequential(nn.SyncBatchNorm(shape[1]), nn.SiLU()))
    plain[0] = kind(shape[1])
    dlkern.swap(model)
    for training in (True, False):
        results = []
        for m in (model.train(training), plain.train(training)):
            h = leaf(x)
            y = m(h)
            y.square().sum().backward()
            results.append((y.detach(), h.grad, m[0].weight.grad, m[0].bias.grad, dict(m.named_buffers())))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert (dlkern.report(model).calls.fused, dlkern.report(model).calls.fallback) == (2, 0)


KINDS = [((6, 5), nn.BatchNorm1d), ((6, 5, 4), nn.BatchNorm1d), ((6, 5, 4, 3), nn.BatchNorm2d),
         ((6, 5, 3, 2, 2), nn.BatchNorm3d)]  # fmt: skip


@pytest.mark.parametrize(("shape", "kind"), KINDS)
def test_without_a_process_group(shape: tuple[int, ...], kind: type[nn.Module]) -> None:
    one_process(shape, kind)


def test_in_a_process_group_of_one(alone: None) -> None:
    one_process(*KINDS[2])


def test_behind_a_convolution_and_with_an_addition() -> None:
    model, plain = models.pair(nn.SyncBatchNorm.convert_sync_batchnorm(models.Stack()))
    dlkern.swap(model)
    x = torch.randn(4, 3, 8, 8)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), plain.train(training)(x), rtol=1e-5, atol=1e-5)
    assert (dlkern.report(model).calls.fused, dlkern.report(model).calls.fallback) == (12, 0)


def test_torch_compile_without_a_process_group() -> None:
    model, plain = models.pair(nn.Sequential(nn.SyncBatchNorm(5), nn.SiLU()))
    dlkern.swap(model)
    x = torch.randn(4, 5, 6, 6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[0].running_var, plain[0].running_var)


def test_what_a_sync_batch_norm_refuses_it_refuses_in_its_own_words() -> None:
    model, plain = models.pair(nn.Sequential(nn.SyncBatchNorm(5), nn.ReLU()))
    dlkern.swap(model)
    for x in (torch.randn(5), torch.randn(1, 5), torch.randn(2, 4, 3), torch.randn(2, 0, 3)):
        errors = []
        for m in (model, plain):
            with pytest.raises((ValueError, RuntimeError)) as caught:
                m(x)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]
    assert model[0].num_batches_tracked == plain[0].num_batches_tracked


def test_where_pytorch_own_passes_are_chosen_on_a_gpu_the_module_itself_runs() -> None:
    norm = nn.SyncBatchNorm(5, device="meta")  # not the CPU, and none of ours runs there
    x = torch.randn(2, 5, 4, device="meta", requires_grad=True)
    with mock.patch.object(norm, "forward", wraps=norm.forward) as forward:
        y = layer._synchronised(norm, x, Activation("relu"), x.detach(), None)
    assert forward.call_count == 1
    assert y.shape == x.shape
    assert y.grad_fn.name() == "ReluBackward0"


def test_a_forward_of_its_own_is_left_alone() -> None:
    model = dlkern.swap(nn.Sequential(Chatty(5), nn.ReLU()))
    assert not dlkern.report(model).swapped


class Chatty(nn.SyncBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1
