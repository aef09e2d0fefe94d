"""depthwise_conv2d and depthwise_separable_conv2d: what they take, what they refuse, and conv2d's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batch_norm_act_cases import spied
from torch import Tensor, nn

import dlkern
from dlkern.functional import depthwise_conv2d, depthwise_separable_conv2d

X = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(12, 1, 3, 3, generator=torch.Generator().manual_seed(1))
BIAS = torch.randn(12, generator=torch.Generator().manual_seed(2))

#: What is changed in a good call, the exception, and what its message holds.
BAD: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "not a tensor": ({"x": [[1.0]]}, TypeError, ["x: expected a Tensor", "list"]),
    "weight is no tensor": ({"weight": 3}, TypeError, ["weight: expected a Tensor", "int"]),
    "bias is no tensor": ({"bias": 0.5}, TypeError, ["bias: expected a Tensor", "float"]),
    "rank 2": ({"x": torch.randn(6, 9)}, ValueError, ["(N, C, H, W) or (C, H, W)", "(6, 9)"]),
    "rank 5": ({"x": X[None]}, ValueError, ["(N, C, H, W)", "(1, 2, 6, 9, 8)"]),
    "integer": ({"x": X.int()}, TypeError, ["float32", "torch.int32"]),
    "weight of rank 3": ({"weight": WEIGHT[0]}, ValueError, ["(C * multiplier, 1, kh, kw)", "(1, 3, 3)"]),
    "weight of a dense convolution": ({"weight": torch.randn(12, 6, 3, 3)}, ValueError, ["(12, 6, 3, 3)"]),
    "empty kernel": ({"weight": torch.randn(12, 1, 0, 3)}, ValueError, ["(12, 1, 0, 3)"]),
    "groups that do not divide": ({"x": X[:, :5]}, ValueError, ["multiple of x's 5 channels", "got 12"]),
    "fewer outputs than inputs": ({"weight": WEIGHT[:3], "bias": None}, ValueError, ["x's 6 channels", "got 3"]),
    "bias of other channels": ({"bias": BIAS[:6]}, ValueError, ["bias: expected shape (12,)", "(6,)"]),
    "weight of another dtype": ({"weight": WEIGHT.double()}, TypeError, ["weight", "torch.float32", "torch.float64"]),
    "half weight": ({"weight": WEIGHT.half()}, TypeError, ["weight", "torch.float32", "torch.float16"]),
    "bias of another dtype": ({"bias": BIAS.double()}, TypeError, ["bias", "torch.float32", "torch.float64"]),
    "weight elsewhere": ({"weight": WEIGHT.to("meta")}, RuntimeError, ["weight", "cpu", "meta"]),
    "bias elsewhere": ({"bias": BIAS.to("meta")}, RuntimeError, ["bias", "cpu", "meta"]),
    "stride 0": ({"stride": 0}, ValueError, ["stride: expected an int of at least 1", "got 0"]),
    "stride (1, 0)": ({"stride": (1, 0)}, ValueError, ["stride", "(1, 0)"]),
    "three strides": ({"stride": (1, 1, 1)}, ValueError, ["stride", "(1, 1, 1)"]),
    "dilation 0": ({"dilation": 0}, ValueError, ["dilation: expected an int of at least 1", "got 0"]),
    "negative padding": ({"padding": -1}, ValueError, ["padding: expected an int of at least 0", "got -1"]),
    "negative side": ({"padding": (1, 1, -1, 1)}, ValueError, ["(top, bottom, left, right)", "(1, 1, -1, 1)"]),
    "three paddings": ({"padding": (1, 1, 1)}, ValueError, ["padding", "(1, 1, 1)"]),
    "unknown padding": ({"padding": "full"}, ValueError, ["'same' or 'valid'", "'full'"]),
    "same with stride 2": ({"padding": "same", "stride": 2}, ValueError, ["'same' needs stride 1", "(2, 2)"]),
    "larger than the image": ({"weight": torch.randn(12, 1, 10, 3)}, ValueError, ["9 x 8", "reach, 10 x 3"]),
    "reaches too far": ({"dilation": (1, 5), "padding": (0, 1)}, ValueError, ["9 x 10", "reach, 3 x 11"]),
    "unknown activation": ({"activation": "swish"}, ValueError, ["swish", "hardswish"]),
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("what", BAD)
def test_errors_come_before_anything_runs(what: str, backend: str) -> None:
    change, error, words = BAD[what]
    with spied() as calls, dlkern.backend(depthwise=backend), pytest.raises(error) as caught:
        depthwise_conv2d(**{"x": X, "weight": WEIGHT, "bias": BIAS, **change})
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"
    assert calls == []


#: How padding may be said, with what it stands for: (left, right, top, bottom) of torch.nn.functional.pad.
PADDINGS = [
    (0, (0, 0, 0, 0)),
    (2, (2, 2, 2, 2)),
    ((1, 3), (3, 3, 1, 1)),
    ([2], (2, 2, 2, 2)),
    ((0, 2, 3, 1), (3, 1, 0, 2)),
    ("valid", (0, 0, 0, 0)),
    ("same", (1, 2, 2, 2)),
]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("padding", "sides"), PADDINGS, ids=str)
def test_padding(padding: Any, sides: tuple[int, ...], backend: str) -> None:
    """A kernel of 3 x 4, dilated by (2, 1): "same" adds 4 rows and 3 columns."""
    weight = torch.randn(6, 1, 3, 4, dtype=torch.float64)
    x = X.double()
    want = F.conv2d(F.pad(x, sides), weight, dilation=(2, 1), groups=6)
    with dlkern.backend(depthwise=backend):
        y = depthwise_conv2d(x, weight, padding=padding, dilation=(2, 1))
    torch.testing.assert_close(y, want)
    if padding == "same":
        assert y.shape == x.shape
        torch.testing.assert_close(y, F.conv2d(x, weight, padding="same", dilation=(2, 1), groups=6))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("activation", ["identity", "relu6", "silu", nn.LeakyReLU(0.2), nn.GELU("tanh")], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_as_conv2d(activation: Any, channels_last: bool, backend: str) -> None:
    """Values, gradients and strides, with and without gradients, of every memory format."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = X.double().contiguous(memory_format=memory_format)
    leaves = [t.clone().requires_grad_() for t in (x, WEIGHT.double(), BIAS.double())]
    function = activation if isinstance(activation, nn.Module) else _module(activation)
    want = function(F.conv2d(*leaves, stride=(2, 1), padding=1, groups=6))
    with dlkern.backend(depthwise=backend):
        y = depthwise_conv2d(*leaves, stride=(2, 1), padding=1, activation=activation)
        with torch.no_grad():
            alone = depthwise_conv2d(*leaves, stride=(2, 1), padding=1, activation=activation)
    grad = torch.randn(y.shape, dtype=y.dtype)
    ours, theirs = (torch.autograd.grad(t, leaves, grad) for t in (y, want))
    for mine, other in zip((y, alone, *ours), (want, want, *theirs), strict=True):
        torch.testing.assert_close(mine, other)
    for mine, leaf in zip(ours, leaves, strict=True):
        assert mine.stride() == leaf.stride() or leaf is leaves[1]  # a depthwise weight's strides are ambiguous
    for mine in (y, alone):
        assert mine.is_contiguous(memory_format=memory_format)


def _module(name: str) -> Any:
    return {"identity": nn.Identity(), "relu6": nn.ReLU6(), "silu": nn.SiLU()}[name]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    x, weight, bias = (t.to(dtype) for t in (X, WEIGHT, BIAS))
    with dlkern.backend(depthwise=backend):
        y = depthwise_conv2d(x, weight, bias, padding="same")
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=6)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_unbatched_and_not_dense(backend: str) -> None:
    x = X.double()
    weight = torch.randn(3, 3, 1, 6, dtype=torch.float64).permute(3, 2, 0, 1)  # (6, 1, 3, 3), of odd strides
    with dlkern.backend(depthwise=backend):
        want = F.conv2d(x, weight, groups=6)
        torch.testing.assert_close(depthwise_conv2d(x[0], weight), want[0])
        torch.testing.assert_close(depthwise_conv2d(x.transpose(2, 3), weight), F.conv2d(x.mT, weight, groups=6))
        torch.testing.assert_close(depthwise_conv2d(x[:, :, ::2], weight), F.conv2d(x[:, :, ::2], weight, groups=6))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_as_conv2d(backend: str) -> None:
    x, weight, bias = (t.clone().requires_grad_() for t in (X, WEIGHT, BIAS))
    with torch.autocast("cpu", torch.bfloat16), dlkern.backend(depthwise=backend), spied() as calls:
        y = depthwise_conv2d(x, weight, bias, padding=1)
        want = F.conv2d(x, weight, bias, padding=1, groups=6)
        assert depthwise_conv2d(x.double(), weight.double()).dtype == torch.float64
    assert calls == ([] if backend == "torch" else [("reference", "forward")] * 2)
    assert y.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)
    y.sum().backward()
    for t in (x, weight, bias):
        assert t.grad is not None
        assert t.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty_batch(backend: str) -> None:
    x = torch.randn(0, 6, 9, 8, requires_grad=True)
    weight = WEIGHT.clone().requires_grad_()
    with dlkern.backend(depthwise=backend), spied() as calls:
        y = depthwise_conv2d(x, weight, padding=(1, 0, 2, 1), activation="relu")
    assert y.shape == (0, 12, 8, 9)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert calls == []


# -------------------------------------------------------------------------------------- separable
def _separable() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "x": X, "depthwise_weight": WEIGHT, "depthwise_bias": BIAS,
        "pointwise_weight": torch.randn(5, 12, 1, 1), "pointwise_bias": torch.randn(5),
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_separable(backend: str) -> None:
    t = {k: v.double().requires_grad_() for k, v in _separable().items()}
    h = F.conv2d(t["x"], t["depthwise_weight"], t["depthwise_bias"], 2, 1, groups=6)
    want = F.silu(F.conv2d(F.relu(h), t["pointwise_weight"], t["pointwise_bias"]))
    with dlkern.backend(depthwise=backend):
        y = depthwise_separable_conv2d(**t, stride=2, padding=1, depthwise_activation="relu", activation="silu")
        one = depthwise_separable_conv2d(
            **{**t, "x": t["x"][0]}, stride=2, padding=1, depthwise_activation="relu", activation="silu"
        )
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(one, want[0])
    for mine, other in zip(*(torch.autograd.grad(v.square().sum(), list(t.values())) for v in (y, want)), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pointwise_weight": torch.randn(5, 6, 1, 1)}, ValueError, r"expected shape \(K, 12, 1, 1\).*\(5, 6, 1, 1\)"),
        ({"pointwise_weight": torch.randn(5, 12, 3, 3)}, ValueError, r"\(5, 12, 3, 3\)"),
        ({"pointwise_weight": None}, TypeError, "pointwise_weight: expected a Tensor, got NoneType"),
        ({"depthwise_weight": [1]}, TypeError, "depthwise_weight: expected a Tensor, got list"),
        ({"depthwise_weight": torch.randn(3)}, ValueError, r"depthwise_weight: .* got \(3,\)"),
        (
            {"pointwise_weight": torch.randn(5, 12, 1, 1).double()},
            TypeError,
            "pointwise_weight: expected torch.float32",
        ),
        ({"pointwise_bias": torch.randn(5, device="meta")}, RuntimeError, "pointwise_bias: expected device cpu"),
        ({"pointwise_bias": torch.randn(4)}, ValueError, r"pointwise_bias: expected shape \(5,\), got \(4,\)"),
        ({"activation": "swish"}, ValueError, "swish"),
        ({"stride": 0}, ValueError, "stride"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None if isinstance(v, type) else v[:30],
)
def test_errors_of_separable(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with spied() as calls, dlkern.backend(depthwise="reference"), pytest.raises(error, match=message):
        depthwise_separable_conv2d(**{**_separable(), **change})
    assert calls == []
