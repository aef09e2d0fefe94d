"""conv_bn_act: numbers, semantics, errors, compile; the Triton kernels have a file of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batch_norm_act_cases import spied
from conftest import HAS_CUDA
from conv_bn_act_cases import Case, check
from torch import Tensor, nn

import dlkern
from dlkern import dispatch
from dlkern.functional import conv_act, conv_bn_act
from dlkern.kernels.cpu import conv_bn_act as cpu
from dlkern.kernels.reference.conv_bn_act import Request
from dlkern.ops.conv_bn_act import ConvBNActFunction

DEVICE = "cuda" if HAS_CUDA else "cpu"
TARGETS = [(DEVICE, "torch"), (DEVICE, "reference"), *([] if HAS_CUDA else [("cpu", "cpu")])]

CASES = [
    Case((2, 5, 9, 8), 7),
    Case((2, 5, 9, 8), 7, layout="channels_last", residual=True),
    Case((2, 6, 9, 8), 8, (3, 5), (2, 1), (1, 2), (1, 2), 2, bias=True, activation="silu"),
    Case((3, 4, 6, 5), 4, (3, 3), groups=4, activation="relu6", layout="channels_last"),
    Case((2, 3, 17, 16), 6, (7, 7), (2, 2), (3, 3), norm="running", bias=True),
    Case((2, 8, 5, 5), 16, (1, 1), padding=(0, 0), activation="identity", affine=False),
    Case((2, 8, 5, 5), 6, (1, 1), (2, 2), (0, 0), norm="none", bias=True, residual=True, activation="gelu"),
    Case((2, 5, 9, 8), 7, dtype=torch.float64, residual=True, activation="tanh"),
    Case((2, 5, 9, 8), 7, dtype=torch.bfloat16, param_dtype=torch.float32, residual=True),
    Case((1, 3, 4, 4), 2, (4, 3), padding=(0, 1), norm="running", activation="hardswish", residual=True),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t[1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case, target: tuple[str, str]) -> None:
    check(case, target)


INFERENCE = [
    case._replace(norm=norm, activation=activation, residual=residual, dtype=torch.float32, param_dtype=None)
    for case in (CASES[0], CASES[1], CASES[2], CASES[3], CASES[5])
    for norm in ("running", "none")
    for activation, residual in [(name, False) for name in cpu.POST_OPS] + [("relu", True), ("identity", True)]
]


@pytest.mark.skipif(HAS_CUDA, reason="oneDNN is for the CPU")
@pytest.mark.parametrize("case", INFERENCE, ids=str)
def test_folding_on_the_cpu(case: Case) -> None:
    check(case, ("cpu", "cpu"), gradients=False)


@pytest.mark.parametrize("norm", ["batch", "running", "none"])
def test_gradcheck(norm: str) -> None:
    """The Function itself, twice, by the reference implementation."""
    torch.manual_seed(0)
    x, weight, bias, gamma, beta, residual = (
        torch.randn(s, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for s in ((2, 4, 4, 3), (4, 2, 3, 3), (4,), (4,), (4,), (2, 4, 4, 3))
    )
    mean, var = torch.zeros(4, dtype=torch.float64, device=DEVICE), torch.ones(4, dtype=torch.float64, device=DEVICE)

    def run(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        with dlkern.backend(conv_bn_act="reference"):
            if norm == "none":
                return conv_act(x, weight, bias, padding=1, groups=2, activation="silu", residual=rest[-1])
            return conv_bn_act(
                x, weight, bias, mean.clone(), var.clone(), *rest[:2],
                padding=1, groups=2, training=norm == "batch", activation="silu", residual=rest[2],
            )  # fmt: skip

    inputs = (x, weight, bias, residual) if norm == "none" else (x, weight, bias, gamma, beta, residual)
    with spied() as calls:
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs, atol=1e-4)
    assert ("reference", "forward") in calls


def _tensors(k: int = 4, c: int = 6) -> dict[str, Tensor]:
    torch.manual_seed(1)
    made = {
        "x": torch.randn(2, c, 7, 8), "weight": torch.randn(k, c, 3, 3), "bias": torch.randn(k),
        "running_mean": torch.randn(k), "running_var": torch.rand(k) + 0.5,
        "bn_weight": torch.randn(k), "bn_bias": torch.randn(k),
    }  # fmt: skip
    return {name: t.to(DEVICE) for name, t in made.items()}


PADDINGS: list[tuple[dict[str, Any], tuple[int, int]]] = [
    ({"padding": "same"}, (3, 3)),
    ({"padding": "same", "dilation": (2, 3)}, (3, 3)),
    ({"padding": "same"}, (2, 4)),
    ({"padding": "valid", "stride": 2}, (3, 3)),
    ({"padding": (1, 2), "padding_mode": "reflect"}, (3, 3)),
    ({"padding": 1, "padding_mode": "replicate"}, (3, 3)),
    ({"padding": (2, 1), "padding_mode": "circular", "stride": (2, 1)}, (3, 3)),
    ({"padding": "same", "padding_mode": "circular"}, (2, 2)),
]


@pytest.mark.parametrize(("options", "kernel"), PADDINGS, ids=str)
@pytest.mark.parametrize("unbatched", [False, True], ids=["batched", "unbatched"])
def test_paddings_as_in_conv2d(options: dict[str, Any], kernel: tuple[int, int], unbatched: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, kernel, **options).to(DEVICE)
    x = torch.randn(3, 9, 10, device=DEVICE) if unbatched else torch.randn(2, 3, 9, 10, device=DEVICE)
    with torch.no_grad():
        for backend in ("torch", "reference"):
            with dlkern.backend(conv_bn_act=backend):
                ours = conv_act(x, conv.weight, conv.bias, **options)
            torch.testing.assert_close(ours, F.relu(conv(x)))


def test_convolution_bias_is_inside_of_the_running_mean() -> None:
    t = _tensors()
    conv_bn_act(**t, padding=1, training=True, momentum=1.0)
    c = F.conv2d(t["x"], t["weight"], t["bias"], padding=1)
    torch.testing.assert_close(t["running_mean"], c.mean((0, 2, 3)))


def test_frozen_parts_get_no_gradient_work() -> None:
    t = _tensors()
    t["x"].requires_grad_()
    with dlkern.backend(conv_bn_act="reference"):
        y = conv_bn_act(**t, padding=1)  # running statistics: a frozen batch norm in a training model
    (dx,) = torch.autograd.grad(y.sum(), t["x"])
    z = F.conv2d(t["x"], t["weight"], t["bias"], padding=1)
    z = F.batch_norm(z, t["running_mean"], t["running_var"], t["bn_weight"], t["bn_bias"])
    (like,) = torch.autograd.grad(F.relu(z).sum(), t["x"])
    torch.testing.assert_close(dx, like)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast(backend: str) -> None:
    t = _tensors()
    with torch.autocast(DEVICE, dtype=torch.bfloat16), dlkern.backend(conv_bn_act=backend):
        y = conv_bn_act(**t, padding=1, training=True)
        c = F.conv2d(t["x"], t["weight"], t["bias"], padding=1)
        like = F.relu(F.batch_norm(c, None, None, t["bn_weight"], t["bn_bias"], True))
    assert y.dtype == like.dtype == torch.bfloat16
    torch.testing.assert_close(y, like, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(HAS_CUDA, reason="the CPU's rule")
def test_inference_chooses_per_shape() -> None:
    """Folding where the output is large, and larger than the weight; never where a gradient is wanted."""

    def ran(pixels: int, channels: int, kernel: int, norm: str = "running", saves: bool = False) -> str:
        request = Request(
            "cpu", torch.float32, torch.float32, False, (1, 1), (0, 0), (1, 1), 1, (kernel, kernel), channels, channels,
            pixels, norm, saves, False, "relu",
        )  # fmt: skip
        return dispatch.choose("conv_bn_act", request).backend

    assert ran(8 * 56 * 56, 64, 3) == "cpu"
    assert ran(8 * 7 * 7, 512, 3) == "torch"  # the weight is larger than the output
    assert ran(8 * 7 * 7, 512, 3, norm="none") == "cpu"  # folded before
    assert ran(7 * 7, 64, 1) == "torch"  # a call costs more than it saves
    assert ran(0, 64, 3) == "torch"  # torch.compile: not known
    assert ran(8 * 56 * 56, 64, 3, norm="batch") == ran(8 * 56 * 56, 64, 3, saves=True) == "torch"
    t = _tensors()
    t["x"] = torch.randn(2, 6, 100, 100)
    with spied() as calls, torch.no_grad():
        folded = conv_bn_act(**t)
    assert calls == [("cpu", "forward")]
    y = conv_bn_act(**{**t, "weight": t["weight"].clone().requires_grad_()})
    assert "ConvBNAct" not in type(y.grad_fn).__name__
    torch.testing.assert_close(y, folded, rtol=1e-4, atol=1e-4)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(6)}, ValueError, r"x: expected \(N, C, H, W\) or \(C, H, W\), got shape \(6,\)"),
    ({"x": torch.zeros(2, 6, 7, 8, dtype=torch.int64)}, TypeError, "x: expected float32"),
    ({"x": torch.randn(2, 5, 7, 8)}, ValueError, "weight: expected 5 channels a group for an input of 5 channels"),
    ({"groups": 4}, ValueError, "groups: 4 does not divide 6 input and 4 output channels"),
    ({"groups": 0}, ValueError, "groups: expected a positive int, got 0"),
    ({"stride": 0}, ValueError, "stride: expected an int of at least 1"),
    ({"padding": -1}, ValueError, "padding: expected an int of at least 0"),
    ({"padding": "full"}, ValueError, "padding: expected ints, 'same' or 'valid', got 'full'"),
    ({"padding": "same", "stride": 2}, ValueError, "padding: 'same' needs stride 1"),
    ({"padding_mode": "mirror"}, ValueError, "padding_mode: expected one of zeros, reflect.* got 'mirror'"),
    ({"dilation": 4}, ValueError, "smaller than the kernel's reach"),
    ({"bias": torch.randn(5)}, ValueError, r"bias: expected shape \(4,\)"),
    ({"bias": torch.randn(4).double()}, TypeError, "bias: expected torch.float32 like x, got torch.float64"),
    ({"bn_weight": torch.randn(3)}, ValueError, r"bn_weight: expected shape \(4,\)"),
    ({"bn_weight": torch.randn(4).half()}, TypeError, "bn_weight: expected torch.float32"),
    ({"running_var": None}, ValueError, "running_mean and running_var: expected both or neither"),
    ({"residual": torch.randn(2, 4, 7, 8)}, ValueError, r"residual: expected shape \(2, 4, 5, 6\)"),
    ({"residual": torch.randn(2, 4, 5, 6).double()}, TypeError, "residual: expected torch.float32"),
    ({"activation": "swishy"}, ValueError, "unknown activation 'swishy'"),
]


def _id(value: object) -> str | None:
    """What is changed, and the message: the same at each collection, which tensors' values are not."""
    return "-".join(value) if isinstance(value, dict) else value[:40] if isinstance(value, str) else None


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=_id)
def test_errors_come_before_anything_runs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    t = _tensors()
    change = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in change.items()}
    mean = t["running_mean"].clone()
    with spied() as calls, pytest.raises(error, match=message):
        conv_bn_act(**{**t, "training": True, **change})
    assert not calls
    assert torch.equal(t["running_mean"], mean)


def test_one_value_per_channel() -> None:
    t = _tensors()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        conv_bn_act(**{**t, "x": t["x"][:1, :, :3, :3]}, training=True)


# ---------------------------------------------------------------------------------------- compile
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compile_fullgraph(mode: str) -> None:
    torch.manual_seed(0)
    layer = dlkern.nn.ConvBNAct2d(5, 6).to(DEVICE).train(mode == "train")
    x = torch.randn(2, 5, 8, 8, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode == "train"):
        torch.testing.assert_close(compiled(x), layer(x))


def test_opcheck() -> None:
    t = _tensors()
    inputs = (
        t["x"], t["weight"], t["bias"], t["bn_weight"], t["bn_bias"], None, t["running_mean"], t["running_var"],
        [1, 1], [1, 1], [1, 1], 1, "batch", 0.1, 1e-5, "relu", 0.0, True, "reference",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.dlkern.conv_bn_act.default, inputs)
    y, c, mean, invstd = torch.ops.dlkern.conv_bn_act(*inputs)
    backward = (
        torch.randn_like(y), t["x"], t["weight"], t["bias"], t["bn_weight"], t["bn_bias"], None, None, c, mean, invstd,
        [1, 1], [1, 1], [1, 1], 1, "batch", "relu", 0.0, [True] * 4 + [False], "reference",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.dlkern.conv_bn_act_backward.default, backward)
    nothing_but_x = (*backward[:-2], [True] + [False] * 4, "reference")
    torch.library.opcheck(torch.ops.dlkern.conv_bn_act_backward.default, nothing_but_x)


def test_function_is_what_runs() -> None:
    t = _tensors()
    t["weight"].requires_grad_()
    with dlkern.backend(conv_bn_act="reference"):
        y = conv_bn_act(**t, training=True)
    assert type(y.grad_fn).__name__ == ConvBNActFunction.__name__ + "Backward"
