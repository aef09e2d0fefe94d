"""Bad input to dlkern.functional: the exact error, with what was seen and expected, before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batch_norm_act_cases import spied
from torch import Tensor, nn

import dlkern
from dlkern import functional
from dlkern.functional import batch_norm_act
from dlkern.kernels.activation import NAMES

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def _v(n: int = 3, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(n, dtype=dtype, device=device)


#: What is changed in a good call, the exception, and what its message holds.
BAD: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "not a tensor": ({"x": [[1.0]]}, TypeError, ["x", "list"]),
    "rank 1": ({"x": torch.ones(3)}, ValueError, ["2 dimensions", "(3,)"]),
    "rank 0": ({"x": torch.tensor(1.0)}, ValueError, ["2 dimensions", "()"]),
    "integer": ({"x": X.int()}, TypeError, ["float32", "torch.int32"]),
    "boolean": ({"x": X > 0}, TypeError, ["float32", "torch.bool"]),
    "complex": ({"x": X.to(torch.complex64)}, TypeError, ["float32", "torch.complex64"]),
    "weight of other channels": ({"weight": _v(4)}, ValueError, ["weight", "(3,)", "(4,)"]),
    "bias of other channels": ({"bias": _v(1)}, ValueError, ["bias", "(3,)", "(1,)"]),
    "running_mean of other channels": ({"running_mean": _v(2)}, ValueError, ["running_mean", "(3,)", "(2,)"]),
    "running_var of other channels": ({"running_var": _v(5)}, ValueError, ["running_var", "(3,)", "(5,)"]),
    "input of other channels": ({"x": X[:, :2]}, ValueError, ["(2,)", "(3,)"]),
    "weight of rank 2": ({"weight": torch.ones(3, 1)}, ValueError, ["weight", "(3,)", "(3, 1)"]),
    "one running statistic": ({"running_var": None}, ValueError, ["running_mean", "running_var", "both"]),
    "float64 weight": ({"weight": _v(dtype=torch.float64)}, TypeError, ["weight", "torch.float32", "torch.float64"]),
    "half weight": ({"weight": _v(dtype=torch.half)}, TypeError, ["weight", "torch.float32", "torch.float16"]),
    "float64 input": ({"x": X.double()}, TypeError, ["torch.float64", "torch.float32"]),
    "bias unlike weight": ({"bias": _v(dtype=torch.float64)}, TypeError, ["bias", "torch.float32", "torch.float64"]),
    "running unlike weight": (
        {"x": X.half(), "running_mean": _v(dtype=torch.half), "running_var": _v(dtype=torch.half)},
        TypeError,
        ["running_mean", "torch.float32", "torch.float16"],
    ),
    "other half weight": (
        {"x": X.half(), **{k: _v(dtype=torch.bfloat16) for k in ("weight", "bias", "running_mean", "running_var")}},
        TypeError,
        ["weight", "torch.float16", "torch.bfloat16"],
    ),
    "weight elsewhere": ({"weight": _v(device="meta")}, RuntimeError, ["weight", "cpu", "meta"]),
    "input elsewhere": ({"x": X.to("meta")}, RuntimeError, ["cpu", "meta"]),
    "residual of other shape": ({"residual": X[:1]}, ValueError, ["residual", "(2, 3, 4, 4)", "(1, 3, 4, 4)"]),
    "residual of other dtype": ({"residual": X.double()}, TypeError, ["residual", "torch.float32", "torch.float64"]),
    "residual elsewhere": ({"residual": X.to("meta")}, RuntimeError, ["residual", "cpu", "meta"]),
    "one value per channel": ({"x": torch.ones(1, 3, 1, 1)}, ValueError, ["more than 1 value", "(1, 3, 1, 1)"]),
    "unknown activation": ({"activation": "swish"}, ValueError, ["swish", *NAMES]),
    "unknown module": ({"activation": nn.Softmax(1)}, ValueError, ["Softmax", "ReLU", "Hardswish"]),
}


@pytest.mark.parametrize("backend", ["torch", "reference", "cpu", "triton"])
@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str, backend: str) -> None:
    changed, error, words = BAD[what]
    if backend == "triton" and torch.cuda.is_available():
        backend = "reference"  # the tensors here are on the CPU
    arguments: dict[str, Any] = {
        "x": X, "running_mean": _v() * 7, "running_var": _v() * 9, "weight": _v(), "bias": _v(), **changed
    }  # fmt: skip
    running = {k: arguments[k] for k in ("running_mean", "running_var") if arguments[k] is not None}
    before = {k: v.clone() for k, v in running.items()}
    with spied() as calls, dlkern.backend(backend), pytest.raises(error) as caught:
        batch_norm_act(**arguments, training=True)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"
    assert calls == []
    for name, value in running.items():
        assert torch.equal(value, before[name]), name


def test_one_value_per_channel_without_running_statistics_in_eval() -> None:
    with pytest.raises(ValueError, match=re.escape("(1, 3)")):
        batch_norm_act(torch.ones(1, 3), None, None, training=False)


@pytest.mark.parametrize("backend", ["torch", "reference", "cpu"])
def test_one_value_per_channel_is_fine_in_eval(backend: str) -> None:
    with dlkern.backend(backend):
        y = batch_norm_act(torch.full((1, 3), 2.0), torch.zeros(3), torch.ones(3), eps=0.0, activation="identity")
    assert torch.equal(y, torch.full((1, 3), 2.0))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("backend", ["torch", "reference", "cpu", "triton"])
@pytest.mark.parametrize("training", [True, False])
def test_empty_input_as_in_torch(shape: tuple[int, ...], backend: str, training: bool) -> None:
    """Whatever torch says of an empty batch: the same tensor, or the same kind of error."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    x = torch.randn(shape, device=device, requires_grad=True)
    statistics = torch.zeros(3, device=device), torch.ones(3, device=device)
    try:
        want = torch.relu(torch.nn.functional.batch_norm(x, *(s.clone() for s in statistics), training=training))
    except (ValueError, RuntimeError) as error:
        with dlkern.backend(backend), pytest.raises(type(error)):
            batch_norm_act(x, *statistics, training=training)
        return
    with dlkern.backend(backend):
        y = batch_norm_act(x, *statistics, training=training)
    assert (y.shape, y.dtype, y.stride()) == (want.shape, want.dtype, want.stride())
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


FOUR, NORM = torch.randn(2, 4, 6, 6), (torch.zeros(4), torch.ones(4))
W, D = torch.randn(4, 4, 3, 3), torch.randn(4, 1, 3, 3)
PART = functional.ConvNorm(torch.randn(4, 4, 1, 1), *NORM)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: functional.batch_norm_act(FOUR, *NORM, 1.0), TypeError, "weight: expected a Tensor, got float"),
        (lambda: functional.batch_norm_act(FOUR, [0.0] * 4, [1.0] * 4), TypeError, "running_mean: .* got list"),
        (lambda: functional.batch_norm_act(FOUR, *NORM, residual=1.0), TypeError, "residual: .* got float"),
        (lambda: functional.conv_bn_act(FOUR, None), TypeError, "weight: expected a Tensor, got NoneType"),
        (lambda: functional.conv_bn_act(FOUR, W, 1.0), TypeError, "bias: expected a Tensor, got float"),
        (lambda: functional.conv_bn_act(FOUR, W, None, *NORM, 1.0), TypeError, "bn_weight: .* got float"),
        (lambda: functional.conv_bn_act(FOUR[0], W, padding=1, residual=1.0), TypeError, "residual: .* got float"),
        (lambda: functional.conv_act(FOUR, W, stride=1.5), ValueError, "stride: expected an int .* got 1.5"),
        (lambda: functional.conv_act(FOUR, W, padding=None), ValueError, "padding: expected an int .* got None"),
        (lambda: functional.depthwise_conv2d(FOUR, D, dilation=2.0), ValueError, "dilation: .* got 2.0"),
        (
            lambda: functional.depthwise_separable_conv2d(FOUR, D, PART.weight, None, 2.0),
            TypeError,
            "pointwise_bias: .* got float",
        ),
        (lambda: functional.conv_transpose_bn_act(FOUR, None), TypeError, "weight: .* got NoneType"),
        (lambda: functional.aspp(FOUR, [(1, 2)], None, PART), TypeError, r"branches\[0\]: .* ConvNorm, got tuple"),
        (lambda: functional.aspp(FOUR, [PART], None, None), TypeError, "projection: .* ConvNorm, got NoneType"),
        (
            lambda: functional.aspp(FOUR, [PART._replace(weight=None)], None, PART),
            TypeError,
            r"branches\[0\]: weight: .* got NoneType",
        ),
    ],
)
def test_arguments_of_another_kind(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with spied() as calls, pytest.raises(error, match=message):
        call()
    assert not calls
