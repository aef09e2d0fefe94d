"""transposed: numbers, semantics, errors, compile, the layer; the Triton kernels have a file of their own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batch_norm_act_cases import spied
from conftest import HAS_CUDA
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transposed_cases import Case, check

import dlkern
from dlkern.functional import conv_transpose_act, conv_transpose_bn_act
from dlkern.kernels.cpu import transposed as cpu
from dlkern.kernels.reference.transposed import Geometry
from dlkern.ops.transposed import ConvTransposeBNActFunction

DEVICE = "cuda" if HAS_CUDA else "cpu"
TARGETS = [(DEVICE, "torch"), (DEVICE, "reference"), *([] if HAS_CUDA else [("cpu", "cpu")])]

CASES = [
    Case((2, 7, 5, 4), 6),  # DCGAN's
    Case((2, 8, 5, 4), 6, layout="channels_last", bias=True, activation="leaky_relu"),
    Case((3, 9, 1, 1), 5, stride=(1, 1), padding=(0, 0)),  # DCGAN's first
    Case((2, 6, 5, 6), 8, (3, 2), (2, 3), (1, 0), (1, 2), 2, bias=True, activation="silu"),
    Case((2, 4, 5, 6), 4, (3, 3), (1, 2), (2, 1), (1, 1), 4, (2, 3), norm="running", activation="hardswish"),
    Case((2, 5, 4, 4), 3, (2, 2), padding=(0, 0), norm="none", bias=True, activation="tanh"),
    Case((2, 5, 4, 4), 3, affine=False, activation="identity", dtype=torch.float64),
    Case((2, 8, 4, 4), 6, dtype=torch.bfloat16, param_dtype=torch.float32),
    Case((2, 5, 4, 4), 3, layout="transposed"),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t[1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, target: tuple[str, str]) -> None:
    check(case, target)


_ALL = tuple(cpu.conv_bn_act.POST_OPS)
_FUSED = {CASES[0]: ("relu", "tanh"), CASES[1]: _ALL, CASES[3]: ("relu",), CASES[4]: ("silu",)}
INFERENCE = [
    case._replace(norm=norm, activation=activation, dtype=torch.float32, param_dtype=None)
    for case, activations in _FUSED.items()
    for activation in activations
    for norm in ("running", "none")
]


@pytest.mark.skipif(HAS_CUDA, reason="oneDNN is for the CPU")
@pytest.mark.parametrize("case", INFERENCE, ids=str)
def test_folding_on_the_cpu(case: Case) -> None:
    check(case, ("cpu", "cpu"), gradients=False)


def _geometries() -> st.SearchStrategy[Case]:
    def case(v: dict[str, Any]) -> Case:
        stride, dilation = v["stride"], v["dilation"]
        extra = tuple(e % max(s, d) for e, s, d in zip(v["extra"], stride, dilation, strict=True))
        size, groups = v["size"], v["groups"]
        made = Case(
            (2, 2 * groups, *size), groups * v["out"], v["kernel"], stride, (0, 0), extra, groups, dilation,
            norm="none", activation="identity", dtype=torch.float64, layout=v["layout"],
        )  # type: ignore[arg-type]  # fmt: skip
        x, weight = torch.empty(made.shape, device="meta"), torch.empty(2 * groups, v["out"], *v["kernel"])
        _, _, h, w = made.geometry.output_size(x, weight)
        padding = min(v["padding"][0], (h - 1) // 2), min(v["padding"][1], (w - 1) // 2)
        return made._replace(padding=padding)

    def pairs(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(least, most), st.integers(least, most))

    return st.fixed_dictionaries(
        {
            "size": pairs(1, 4), "kernel": pairs(1, 4), "stride": pairs(1, 3), "dilation": pairs(1, 3),
            "padding": pairs(0, 3), "extra": pairs(0, 2), "groups": st.integers(1, 2), "out": st.integers(1, 2),
            "layout": st.sampled_from(("contiguous", "channels_last")),
        }
    ).map(case)  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True)
@given(_geometries())
def test_any_geometry(case: Case) -> None:
    for target in TARGETS[1:] + ([] if HAS_CUDA else [("cpu", "triton")]):
        check(case, target)


@pytest.mark.parametrize("backend", [*(name for _, name in TARGETS), *([] if HAS_CUDA else ["triton"])])
@pytest.mark.parametrize("norm", ["batch", "running", "none"])
def test_gradcheck(norm: str, backend: str) -> None:
    torch.manual_seed(0)
    x, weight, bias, gamma, beta = (
        torch.randn(s, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for s in ((2, 4, 2, 3), (4, 2, 3, 3), (4,), (4,), (4,))
    )
    mean, var = torch.zeros(4, dtype=torch.float64, device=DEVICE), torch.ones(4, dtype=torch.float64, device=DEVICE)
    geometry: dict[str, Any] = {"stride": 2, "padding": 1, "output_padding": (1, 0), "groups": 2}

    def run(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        with dlkern.backend(transposed=backend):
            if norm == "none":
                return conv_transpose_act(x, weight, bias, **geometry, activation="silu")
            return conv_transpose_bn_act(
                x, weight, bias, mean.clone(), var.clone(), *rest, **geometry, training=norm == "batch",
                activation="silu",
            )  # fmt: skip

    inputs = (x, weight, bias) if norm == "none" else (x, weight, bias, gamma, beta)
    with spied() as calls:
        assert torch.autograd.gradcheck(run, inputs, fast_mode=backend == "triton")
        if backend == "reference":
            assert torch.autograd.gradgradcheck(run, inputs, atol=1e-4)
    assert backend == "torch" or {(backend, "forward"), (backend, "backward")} <= set(calls)


def _tensors() -> dict[str, Tensor]:
    torch.manual_seed(1)
    made = {
        "x": torch.randn(2, 6, 5, 4), "weight": torch.randn(6, 4, 4, 4), "bias": torch.randn(4),
        "running_mean": torch.randn(4), "running_var": torch.rand(4) + 0.5,
        "bn_weight": torch.randn(4), "bn_bias": torch.randn(4),
    }  # fmt: skip
    return {name: t.to(DEVICE) for name, t in made.items()}


@pytest.mark.parametrize("layout", ["expanded", "channels_last", "sliced"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t[1])
def test_gradients_of_any_strides(layout: str, target: tuple[str, str]) -> None:
    t = _tensors()
    t["x"].requires_grad_(), t["weight"].requires_grad_()
    with dlkern.backend(transposed=target[1]):
        y = conv_transpose_bn_act(**t, stride=2, padding=1, training=True, activation="silu")
    grad = torch.randn_like(y)
    if layout == "expanded":
        grad = grad[:1, :1, :1, :1].expand_as(y)
    strided = grad
    if layout == "channels_last":
        strided = grad.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        strided = torch.stack([grad, grad], -1).flatten(-2)[..., ::2]
    inputs = t["x"], t["weight"]
    dense = grad.contiguous()
    for ours, like in zip(
        torch.autograd.grad(y, inputs, strided, retain_graph=True), torch.autograd.grad(y, inputs, dense), strict=True
    ):
        torch.testing.assert_close(ours, like)
        assert ours.stride() == like.stride()


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(6)}, ValueError, r"x: expected \(N, C, H, W\) or \(C, H, W\), got shape \(6,\)"),
    ({"x": torch.zeros(2, 6, 5, 4, dtype=torch.int64)}, TypeError, "x: expected float32"),
    ({"x": torch.randn(2, 5, 7, 8)}, ValueError, "weight: expected 5 input channels for an input of 5 channels"),
    ({"groups": 4}, ValueError, "groups: 4 does not divide 6 input channels"),
    ({"groups": 0}, ValueError, "groups: expected a positive int, got 0"),
    ({"stride": 0}, ValueError, "stride: expected an int of at least 1"),
    ({"dilation": 0}, ValueError, "dilation: expected an int of at least 1"),
    ({"padding": -1}, ValueError, "padding: expected an int of at least 0"),
    ({"output_padding": 2}, ValueError, r"output_padding: expected less than stride \(2, 2\) or dilation"),
    ({"output_padding": (0, 3)}, ValueError, r"got \(0, 3\)"),
    ({"padding": 12}, ValueError, r"padding: \(12, 12\) leaves an output of -12 x -14"),
    ({"bias": torch.randn(5)}, ValueError, r"bias: expected shape \(4,\)"),
    ({"bias": torch.randn(4).double()}, TypeError, "bias: expected torch.float32 like x, got torch.float64"),
    ({"bn_weight": torch.randn(3)}, ValueError, r"bn_weight: expected shape \(4,\)"),
    ({"bn_weight": torch.randn(4).half()}, TypeError, "bn_weight: expected torch.float32"),
    ({"running_var": None}, ValueError, "running_mean and running_var: expected both or neither"),
    ({"activation": "swishy"}, ValueError, "unknown activation 'swishy'"),
]


def _id(value: object) -> str | None:
    return "-".join(value) if isinstance(value, dict) else value[:40] if isinstance(value, str) else None


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=_id)
def test_errors_come_before_anything_runs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    t = _tensors()
    change = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in change.items()}
    mean = t["running_mean"].clone()
    arguments = {**t, "stride": 2, "training": True, **change}
    with spied() as calls, pytest.raises(error, match=message):
        conv_transpose_bn_act(**arguments)
    assert not calls
    assert torch.equal(t["running_mean"], mean)


def test_one_value_per_channel() -> None:
    t = _tensors()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        conv_transpose_bn_act(**{**t, "x": t["x"][:1, :, :1, :1], "weight": t["weight"][..., :1, :1]}, training=True)


def test_a_forced_backend_that_cannot_says_why() -> None:
    t = {name: v.half() for name, v in _tensors().items()}
    with (
        dlkern.backend(transposed="cpu"),
        pytest.raises(RuntimeError, match=r"folds in float32, not in torch\.float16"),
    ):
        conv_transpose_bn_act(**t, stride=2)


@pytest.mark.skipif(HAS_CUDA, reason="the CPU's rule")
def test_pytorchs_convolution_by_default() -> None:
    """oneDNN's fused one is slower than it; the batch norm behind it is ours."""
    t = _tensors()
    with torch.no_grad():
        with dlkern.backend(transposed="cpu"), spied() as calls:
            folded = conv_transpose_bn_act(**t, stride=2, padding=1)
        assert calls == [("cpu", "forward")]
        plain = conv_transpose_bn_act(**t, stride=2, padding=1)
    y = conv_transpose_bn_act(**{**t, "weight": t["weight"].clone().requires_grad_()}, stride=2, padding=1)
    assert type(y.grad_fn).__name__ == "BatchNormActFunctionBackward"
    torch.testing.assert_close(plain, folded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.detach(), folded, rtol=1e-4, atol=1e-4)


def test_opcheck() -> None:
    t = _tensors()
    geometry = [2, 2], [1, 1], [0, 0], 1, [1, 1]
    inputs = (
        t["x"], t["weight"], t["bias"], t["bn_weight"], t["bn_bias"], t["running_mean"], t["running_var"],
        *geometry, "batch", 0.1, 1e-5, "relu", 0.0, True, "reference",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.dlkern.conv_transpose_bn_act.default, inputs)
    y, c, mean, invstd = torch.ops.dlkern.conv_transpose_bn_act(*inputs)
    backward = (
        torch.randn_like(y), t["x"], t["weight"], t["bias"], t["bn_weight"], t["bn_bias"], c, mean, invstd,
        *geometry, "batch", "relu", 0.0, [True] * 4, "reference",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.dlkern.conv_transpose_bn_act_backward.default, backward)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compile_fullgraph(mode: str) -> None:
    torch.manual_seed(0)
    layer = dlkern.nn.ConvTransposeBNAct2d(5, 6, 4, 2, 1).to(DEVICE).train(mode == "train")
    x = torch.randn(2, 5, 4, 4, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode == "train"):
        torch.testing.assert_close(compiled(x), layer(x))


def test_function_is_what_runs() -> None:
    t = _tensors()
    t["weight"].requires_grad_()
    with dlkern.backend(transposed="reference"):
        y = conv_transpose_bn_act(**t, training=True)
    assert type(y.grad_fn).__name__ == ConvTransposeBNActFunction.__name__ + "Backward"


def test_transforms_are_pytorchs() -> None:
    t = _tensors()

    def f(x: Tensor) -> Tensor:
        return conv_transpose_act(x, t["weight"], stride=2, activation="silu")

    _, tangent = torch.func.jvp(f, (t["x"],), (torch.ones_like(t["x"]),))
    assert tangent.shape == f(t["x"]).shape
    with dlkern.backend(transposed="reference"), pytest.raises(RuntimeError, match=r"no torch\.func transforms"):
        torch.func.jvp(f, (t["x"],), (torch.ones_like(t["x"]),))


# -------------------------------------------------------------------------------------- the layer
def test_layer_is_conv_bn_act_in_a_row() -> None:
    torch.manual_seed(0)
    conv, bn = nn.ConvTranspose2d(6, 8, 3, 2, 1, 1, groups=2, bias=False), nn.BatchNorm2d(8)
    layer = dlkern.nn.ConvTransposeBNAct2d.from_modules(conv, bn, nn.LeakyReLU(0.2)).to(DEVICE)
    plain = copy.deepcopy(nn.Sequential(conv, bn, nn.LeakyReLU(0.2)))
    assert list(layer.state_dict()) == [f"conv.{k}" for k in conv.state_dict()] + [f"bn.{k}" for k in bn.state_dict()]
    for shape in ((2, 6, 5, 4), (6, 5, 4)):
        x = torch.randn(shape, device=DEVICE)
        for training in (True, False):
            layer.train(training), plain.train(training)
            theirs = plain(x[None])[0] if len(shape) == 3 else plain(x)  # BatchNorm2d wants a batch
            torch.testing.assert_close(layer(x), theirs)
            if not training:
                with torch.no_grad():
                    torch.testing.assert_close(layer(x), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bn.running_var, plain[1].running_var)
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer.eval())))
    torch.testing.assert_close(again(x), layer(x))


def test_layers_arguments() -> None:
    layer = dlkern.nn.ConvTransposeBNAct2d(4, 6, 4, 2, 1, norm_layer=None, activation_layer="tanh")
    assert layer.bn is None
    assert layer.conv.bias is not None
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(layer(x), torch.tanh(layer.conv(x)))
    with pytest.raises(ValueError, match=r"output_padding: expected less than stride \(2, 2\).*got \(2, 2\)"):
        dlkern.nn.ConvTransposeBNAct2d(4, 6, 4, 2, 1, output_padding=2)
    with pytest.raises(TypeError, match=r"bn: expected a torch\.nn\.BatchNorm2d"):
        dlkern.nn.ConvTransposeBNAct2d(4, 6, 4, norm_layer=lambda n: nn.GroupNorm(1, n))
    with pytest.raises(ValueError, match="bn: expected 6 features like conv, got 5"):
        dlkern.nn.ConvTransposeBNAct2d.from_modules(nn.ConvTranspose2d(4, 6, 1), nn.BatchNorm2d(5))
    fresh = dlkern.nn.ConvTransposeBNAct2d(4, 6, 4)
    with pytest.raises(ValueError, match="weight: expected 5 input channels"):
        fresh(torch.randn(2, 5, 6, 6))
    assert fresh.bn.num_batches_tracked == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_folded_weights(groups: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.randn(4 * groups, dtype=torch.float64)
    norm = [torch.rand(4 * groups, dtype=torch.float64) + 0.5 for _ in range(4)]
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    geometry = Geometry((2, 2), (1, 1), (1, 1), groups)
    folded = F.conv_transpose2d(x, *cpu.fold(weight, bias, *norm, 1e-5, groups), *geometry)
    plain = F.conv_transpose2d(x, weight, bias, *geometry)
    torch.testing.assert_close(folded, F.batch_norm(plain, norm[2], norm[3], norm[0], norm[1]))
