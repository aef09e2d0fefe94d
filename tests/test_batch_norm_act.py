"""act(batch_norm(x) + residual) on every backend: numbers, gradients, memory, determinism."""

from __future__ import annotations

from collections.abc import Callable

import parity
import pytest
import torch
from batch_norm_act_cases import Case, check, data, double, every_target, run, spied
from conftest import EXAMPLES_TIMES, HAS_CUDA
from guard import guarded
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import dlkern
from dlkern.functional import batch_norm_act
from dlkern.kernels import layout
from dlkern.kernels.activation import NAMES, Activation
from dlkern.kernels.reference import activation as reference_activation
from dlkern.ops import batch_norm_act as op

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

CASES = [
    # shapes: odd, tiny, of every rank, one channel, one position, one image
    Case((4, 3, 5, 7)),
    Case((2, 1)),
    Case((5, 7), residual="contiguous", activation="tanh"),
    Case((33, 130)),
    Case((3, 5, 17), residual="contiguous"),
    Case((2, 3, 3, 4, 5)),
    Case((2, 1, 13, 11), residual="contiguous"),
    Case((1, 9, 6, 5)),
    Case((16, 19, 1, 1), residual="contiguous"),
    Case((16, 19, 1, 1), layout="channels_last"),
    Case((1, 2, 67, 129)),
    Case((40, 2, 3, 3)),
    # memory: misaligned, sliced, transposed, channels_last, and mixtures
    Case((3, 5, 9, 7), layout="offset", residual="offset", grad="offset"),
    Case((3, 4, 8, 8), layout="offset", dtype=BF16, grad="offset"),
    Case((3, 5, 9, 7), layout="sliced", residual="sliced", grad="sliced"),
    Case((6, 10), layout="sliced", grad="sliced"),
    Case((6, 10), layout="transposed", grad="transposed"),
    Case((3, 5, 9, 7), layout="transposed", residual="contiguous", grad="transposed"),
    Case((3, 5, 9, 7), layout="channels_last", residual="channels_last", grad="channels_last"),
    Case((3, 5, 9, 7), layout="channels_last", residual="contiguous", grad="contiguous"),
    Case((3, 5, 9, 7), residual="channels_last", grad="channels_last"),
    Case((2, 33, 8, 8), layout="channels_last", grad="sliced"),
    Case((2, 3, 3, 4, 5), layout="channels_last", residual="transposed", grad="channels_last"),
    Case((3, 5, 9, 7), activation="silu", grad="expanded"),
    Case((3, 5, 9, 7), layout="channels_last", activation="tanh", residual="expanded", grad="expanded"),
    # dtypes, and half activations with float32 parameters
    *(Case((4, 6, 5, 5), dtype=dtype, activation=act, residual=residual)
      for dtype in (F64, BF16, F16) for act, residual in (("relu", None), ("relu", "contiguous"), ("gelu", None))),
    *(Case((4, 6, 5, 5), layout="channels_last", dtype=dtype, param_dtype=F32, activation=act, residual=residual)
      for dtype in (BF16, F16) for act, residual in (("relu", "channels_last"), ("hardswish", None))),
    Case((4, 6, 5, 5), dtype=BF16, param_dtype=F32, training=False, residual="contiguous"),
    Case((4, 6, 5, 5), layout="channels_last", dtype=F64, activation="silu", residual="channels_last"),
    # modes
    Case((4, 3, 5, 7), training=False),
    Case((4, 3, 5, 7), layout="channels_last", training=False, residual="channels_last", activation="elu"),
    Case((1, 3, 1, 1), training=False),
    Case((4, 3, 5, 7), track=False),
    Case((4, 3, 5, 7), track=False, training=False, residual="contiguous"),
    Case((4, 3, 5, 7), weight=False, bias=False),
    Case((4, 3, 5, 7), bias=False, residual="contiguous"),
    Case((4, 3, 5, 7), weight=False, training=False),
    Case((4, 3, 5, 7), momentum=1.0),
    Case((4, 3, 5, 7), momentum=0.0),
    # every activation; with a residual the derivative may come from the output
    *(Case((4, 3, 5, 6), activation=name) for name in NAMES),
    *(Case((4, 3, 5, 6), layout="channels_last", activation=name, residual="channels_last") for name in NAMES),
    Case((4, 3, 5, 6), activation="leaky_relu", param=-0.3, residual="contiguous"),
    Case((4, 3, 5, 6), activation="elu", param=1.7, residual="contiguous"),
    Case((4, 3, 5, 6), activation="elu", param=-0.5, residual="contiguous"),
    *(Case((4, 3, 5, 6), dtype=F64, activation=name) for name in NAMES),
    # the mean is far larger than the deviation: a sum of squares would cancel
    Case((8, 3, 16, 16), mean=1e4),
    Case((8, 3, 16, 16), layout="channels_last", mean=1e4),
    Case((64, 5), mean=-1e4, residual="contiguous"),
    Case((8, 3, 16, 16), dtype=F64, mean=1e7),
    # constant channels: the variance is eps
    Case((4, 3, 5, 7), std=0.0, mean=2.0),
]  # fmt: skip


@every_target
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, target: tuple[str, str]) -> None:
    check(case, target)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_torch_backend_runs_pytorch_alone(case: Case) -> None:
    check(case, ("cpu", "torch"))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dims = draw(st.integers(2, 5))
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 20)), *(draw(st.integers(1, 9)) for _ in range(dims - 2)))
    layouts = ["contiguous", "offset", "sliced", "transposed", *(["channels_last"] if dims >= 4 else [])]
    dtype = draw(st.sampled_from([F32, F64, BF16, F16]))
    half = dtype in (BF16, F16)
    case = Case(
        shape,
        layout=draw(st.sampled_from(layouts)),
        dtype=dtype,
        param_dtype=draw(st.sampled_from([F32, dtype])) if half else None,
        activation=draw(st.sampled_from(NAMES)),
        residual=draw(st.sampled_from([None, *layouts])),
        grad=draw(st.sampled_from(layouts)),
        training=draw(st.booleans()),
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        track=draw(st.booleans()),
        momentum=draw(st.sampled_from([0.0, 0.1, 1.0])),
        mean=draw(st.sampled_from([0.0, 0.5, -2.0] if half else [0.0, 3.0, -300.0])),
        std=draw(st.sampled_from([0.5, 1.0, 3.0])),
        seed=draw(st.integers(0, 1000)),
    )
    count = torch.Size(shape).numel() // shape[1]
    # Two values per channel have xhat = +-1 whatever they are: dx is rounding alone.
    assume(not case.batch_stats or count > 2)
    return case


_RANDOM = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=120 * EXAMPLES_TIMES, **_RANDOM)
@given(case=cases())
def test_random_configurations_reference(case: Case) -> None:
    check(case, ("cpu", "reference"))


@settings(max_examples=150 * EXAMPLES_TIMES, **_RANDOM)
@given(case=cases())
def test_random_configurations_cpu(case: Case) -> None:
    check(case, ("cpu", "cpu"))


@settings(max_examples=20 * EXAMPLES_TIMES, **_RANDOM)
@given(case=cases())
def test_random_configurations_triton(case: Case) -> None:
    check(case, ("cuda" if HAS_CUDA else "cpu", "triton"))


# ------------------------------------------------------------------------------ special values
_SPECIAL = [0.0, -0.0, 3.0, -3.0, 6.0, 5.5, -2.5, 50.0, -50.0, 200.0, -200.0, 1e-30, -1e-30]
_NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


def _plain(x: Tensor, act: Activation, residual: Tensor | None = None) -> Tensor:
    """The op with statistics 0 and 1, no weight and eps 0: the activation alone."""
    zero, one = torch.zeros(x.shape[1], dtype=x.dtype), torch.ones(x.shape[1], dtype=x.dtype)
    return batch_norm_act(x, zero.to(x.device), one.to(x.device), eps=0.0, activation=act, residual=residual)


@every_target
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_kinks_and_not_finite_values_as_in_torch(
    name: str, residual: bool, dtype: torch.dtype, target: tuple[str, str]
) -> None:
    """PyTorch's scalar, vector and CUDA loops differ at a few (the slope of relu6 at NaN): any of them is right."""
    device, backend = target
    act = Activation(name, {"leaky_relu": 0.25, "elu": 1.5}.get(name, 0.0))
    values = torch.tensor(_SPECIAL + _NOT_FINITE, dtype=dtype, device=device)
    stock = [[_value_and_slope(v, act) for v in many] for many in (
        values.cpu()[:, None], values.cpu()[:, None].repeat(1, 64), values[:, None])]  # fmt: skip
    x = values[:, None].clone().requires_grad_()
    with dlkern.backend(backend):
        mine = _plain(x, act, torch.zeros_like(x) if residual else None)
    (dx,) = torch.autograd.grad(mine, x, torch.ones_like(mine))
    # PyTorch's derivative of hardsigmoid is float32's 1 / 6 in float64 too
    slope_dtype = F32 if name == "hardsigmoid" else dtype
    for what, found, index, d in (("y", mine, 0, dtype), ("dx", dx, 1, slope_dtype)):
        truths = (torch.stack([pair[index] for pair in pairs]) for pairs in stock)
        parity.assert_elementwise(what, found[:, 0], *truths, dtype=d)


def _value_and_slope(z: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    y = reference_activation.forward(z, act)
    (slope,) = torch.autograd.grad(y, z, torch.ones_like(y))
    return y.detach()[0], slope[0]


@every_target
@pytest.mark.parametrize("bad", _NOT_FINITE, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_not_finite_values_stay_in_their_channel(
    memory_format: torch.memory_format, bad: float, target: tuple[str, str]
) -> None:
    device, backend = target
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    x[1, 2, 3, 3] = bad
    x = x.to(device).contiguous(memory_format=memory_format)
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    with dlkern.backend(backend):
        y = batch_norm_act(x, mean, var, training=True, activation="relu")
    want_mean, want_var = torch.zeros(4, device=device), torch.ones(4, device=device)
    want = torch.relu(torch.nn.functional.batch_norm(x, want_mean, want_var, training=True))
    assert y[:, 2].isnan().all()
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(mean.isfinite(), want_mean.isfinite())
    assert torch.equal(var.isnan(), want_var.isnan())


# ----------------------------------------------------------------------------------- gradients
def _sum(y: Tensor, g: Tensor) -> Tensor:
    return y.sum()


def _cat(y: Tensor, g: Tensor) -> Tensor:
    return (torch.cat([y, g], dim=1) * torch.cat([g, g], dim=1)).sum()


def _transpose(y: Tensor, g: Tensor) -> Tensor:
    return (y.transpose(1, 3) * g.transpose(1, 3).contiguous()).sum()


def _expand(y: Tensor, g: Tensor) -> Tensor:
    return (y.mean(dim=(2, 3), keepdim=True) * g[..., :1, :1]).sum()


def _slice(y: Tensor, g: Tensor) -> Tensor:
    return (y[..., ::2] * g[..., ::2]).sum()


def _other_format(y: Tensor, g: Tensor) -> Tensor:
    last = torch.channels_last
    other = torch.contiguous_format if y.is_contiguous(memory_format=last) else last
    return (y * g.contiguous(memory_format=other)).sum()


@every_target
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("loss", [_sum, _cat, _transpose, _expand, _slice, _other_format], ids=lambda f: f.__name__)
def test_gradients_of_any_strides(
    loss: Callable[[Tensor, Tensor], Tensor],
    memory_format: torch.memory_format,
    residual: bool,
    target: tuple[str, str],
) -> None:
    """In float64, so that the floor alone is the tolerance; silu has no kinks."""
    device, backend = target
    case = Case((3, 4, 5, 6), dtype=F64, activation="silu", residual="contiguous" if residual else None)
    values = data(case, device)
    names = ("x", "weight", "bias", *(["residual"] if residual else []))

    def leaves() -> dict[str, Tensor]:
        found = {n: getattr(values, n).clone().requires_grad_() for n in names}
        for name in ("x", "residual"):
            if name in found:
                found[name] = found[name].detach().contiguous(memory_format=memory_format).requires_grad_()
        return found

    def norm(leaf: dict[str, Tensor]) -> Tensor:
        return batch_norm_act(
            leaf["x"], None, None, leaf["weight"], leaf["bias"],
            training=True, activation="silu", residual=leaf.get("residual"),
        )  # fmt: skip

    mine, theirs = leaves(), leaves()
    with guarded(), spied() as calls, dlkern.backend(backend):
        loss(norm(mine), values.grad).backward()
    assert calls == [(backend, "forward"), (backend, "backward")]
    with dlkern.backend("torch"):
        loss(norm(theirs), values.grad).backward()
    for name in names:
        got, want = mine[name].grad, theirs[name].grad
        assert got is not None
        assert want is not None
        # every gradient here is a sum of some 90 terms of size 1, or depends on one
        parity.assert_parity(name, got, want, torch.full_like(want, 90.0), peer=None)


@every_target
@pytest.mark.parametrize(
    "wanted", [("x",), ("weight",), ("bias",), ("residual",), ("x", "residual"), ("weight", "bias")], ids="-".join
)
@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
def test_only_what_is_asked_for(activation: str, wanted: tuple[str, ...], target: tuple[str, str]) -> None:
    """A subset of the gradients is bit for bit the same as when all are wanted."""
    device, backend = target
    values = data(Case((3, 4, 5, 6), activation=activation, residual="contiguous"), device)
    names = ("x", "weight", "bias", "residual")

    def gradients(wanted: tuple[str, ...]) -> dict[str, Tensor]:
        leaf = {n: getattr(values, n).clone().requires_grad_(n in wanted) for n in names}
        with dlkern.backend(backend), guarded():
            y = batch_norm_act(
                leaf["x"], None, None, leaf["weight"], leaf["bias"],
                training=True, activation=activation, residual=leaf["residual"],
            )  # fmt: skip
            y.backward(values.grad)
        assert all(leaf[n].grad is None for n in names if n not in wanted)
        return {n: leaf[n].grad for n in wanted}

    everything = gradients(names)
    for name, grad in gradients(wanted).items():
        assert torch.equal(grad, everything[name]), name


@every_target
@pytest.mark.parametrize("training", [True, False])
def test_strided_parameters_and_statistics(training: bool, target: tuple[str, str]) -> None:
    device, backend = target
    values = data(Case((3, 4, 5, 6), dtype=F64), device)
    found = []
    for step in (1, 3):
        vectors = []
        for v in (values.running_mean, values.running_var, values.weight, values.bias):
            assert v is not None
            vectors.append(torch.full((4 * step,), float("nan"), dtype=F64, device=device)[::step].copy_(v))
        leaves = [v.detach().requires_grad_() for v in vectors[2:]]
        with dlkern.backend(backend):
            y = batch_norm_act(values.x, *vectors[:2], *leaves, training=training)
        y.backward(values.grad)
        found.append([y.detach(), *vectors[:2], *(leaf.grad for leaf in leaves)])
    for dense, strided in zip(*found, strict=True):
        assert torch.equal(dense, strided)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str, training: bool) -> Tensor:
    zeros, ones = torch.zeros_like(weight), torch.ones_like(weight)
    return batch_norm_act(
        x, zeros, ones, weight, bias, training=training, activation=activation, residual=residual
    )  # fmt: skip


_GRADCHECK = [
    ("relu", True, False, False),
    ("relu", True, True, True),
    ("gelu", True, False, True),
    ("silu", True, True, False),
    ("sigmoid", True, True, False),
    ("hardswish", False, True, True),
]


@every_target
@pytest.mark.parametrize(("activation", "training", "residual", "last"), _GRADCHECK)
def test_gradcheck(activation: str, training: bool, residual: bool, last: bool, target: tuple[str, str]) -> None:
    device, backend = target
    inputs = double((2, 2, 2, 1) if last else (2, 2, 2), 3, device)
    if last:
        inputs[0] = inputs[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    used = inputs if residual else inputs[:3]

    def function(*values: Tensor) -> Tensor:
        return _norm(*values[:3], values[3] if residual else None, activation, training)

    with spied() as calls, dlkern.backend(backend):
        assert torch.autograd.gradcheck(function, used)
    assert set(calls) == {(backend, "forward"), (backend, "backward")}


@every_target
@pytest.mark.parametrize(("activation", "residual"), [("tanh", True), ("gelu", True), ("silu", False)])
def test_gradgradcheck(activation: str, residual: bool, target: tuple[str, str]) -> None:
    device, backend = target
    inputs = double((2, 1, 2), 5, device)
    used = inputs if residual else inputs[:3]

    def function(*values: Tensor) -> Tensor:
        return _norm(*values[:3], values[3] if residual else None, activation, True)

    with spied() as calls, dlkern.backend(backend):
        assert torch.autograd.gradgradcheck(function, used)
    assert (backend, "forward") in calls


# --------------------------------------------------------------------------------- determinism
@every_target
@pytest.mark.parametrize("layout_name", ["contiguous", "channels_last"])
def test_repeats_are_bit_identical(layout_name: str, target: tuple[str, str]) -> None:
    case = Case((4, 5, 9, 9), layout=layout_name, residual=layout_name)
    first, second = run(case, target), run(case, target)
    for name, a, b in zip(first._fields, first, second, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("shape", [(8, 16, 33, 31), (64, 3, 17, 17), (2, 1, 200, 201), (4096, 40)])
@pytest.mark.parametrize("layout_name", ["contiguous", "channels_last"])
def test_the_number_of_threads_changes_nothing(layout_name: str, shape: tuple[int, ...]) -> None:
    case = Case(shape, layout=layout_name if len(shape) == 4 else "contiguous", residual="contiguous")
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(case, ("cpu", "cpu")))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, a, b in zip(other._fields, found[0], other, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 9, 7), (2, 64, 96, 96)], ids=str)  # the large one would be streamed
def test_in_inference_an_input_that_nobody_holds_is_overwritten(
    shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    x, residual = (t.to(dtype).contiguous(memory_format=memory_format) for t in torch.randn(2, *shape))
    mean, weight = torch.randn(2, shape[1], dtype=dtype)
    var = torch.rand(shape[1]).to(dtype) + 0.5

    def apply(x: Tensor, *, batch_stats: bool = False, overwrite: bool = True) -> Tensor:
        act = Activation("relu")
        inputs = (x, weight, None, residual, mean.clone(), var.clone(), batch_stats, 0.1, 1e-5, act)
        with dlkern.backend("cpu"):
            return op.apply(*inputs, overwrite=overwrite)

    want = apply(x, overwrite=False)
    for keeping in (apply(x, batch_stats=True), apply(x.detach().requires_grad_())):
        assert keeping.data_ptr() != x.data_ptr()
    given = x.clone(memory_format=torch.preserve_format)
    found = apply(given)
    assert found.data_ptr() == given.data_ptr()
    assert torch.equal(found, want)
    with torch.overrides.BaseTorchFunctionMode():  # one may keep what it sees
        assert apply(x).data_ptr() != x.data_ptr()


class _Normalising(torch.utils.data.Dataset):
    """A dataset that runs the op where its item is made."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        with dlkern.backend("cpu"):
            return batch_norm_act(self.x + index, None, None, training=True, activation="relu")


def test_works_in_a_dataloader_worker() -> None:
    data_set = _Normalising(torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0)))
    here = [data_set[0], data_set[1]]
    loader = torch.utils.data.DataLoader(data_set, batch_size=None, num_workers=1, multiprocessing_context="fork")
    for mine, theirs in zip(here, loader, strict=True):
        assert torch.equal(mine, theirs)


# -------------------------------------------------------------------------------------- layout
def test_what_kernels_read_in_place_is_not_copied() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert layout.dense(x) is x
    last = x.contiguous(memory_format=torch.channels_last)
    assert layout.dense(last) is last
    assert layout.dense(x.transpose(2, 3)).is_contiguous()
    assert layout.of(torch.empty(7, 3, 1, 1)) == layout.Layout(True, 7, 3, 1)
    assert layout.of(last) == layout.Layout(True, 40, 3, 1)
    assert layout.of(x) == layout.Layout(False, 2, 3, 20)
