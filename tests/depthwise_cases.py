"""Cases of depthwise: how inputs are made, given to an implementation, and judged against PyTorch in float64.

They call the implementation modules by their contract (kernels/reference/depthwise.py), without dispatch or autograd.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import evidence
import parity
import pytest
import torch
import torch.nn.functional as F
from batch_norm_act_cases import arrange
from conftest import HAS_CUDA
from guard import guarded
from torch import Tensor

from dlkern.kernels import layout
from dlkern.kernels.activation import Activation, from_name
from dlkern.kernels.reference import activation as reference_activation
from dlkern.kernels.reference import depthwise as reference
from dlkern.kernels.reference.batch_norm_act import accumulate_dtype

#: Where the tests of this module's cases run: (device, backend).
TARGETS: list[Any] = [("cpu", "reference"), ("cpu", "cpu")]
if HAS_CUDA:
    TARGETS += [pytest.param(("cuda", name), marks=pytest.mark.gpu) for name in ("reference", "cuda")]

every_target = pytest.mark.parametrize("target", TARGETS, ids="-".join)


class Case(NamedTuple):
    """One configuration: x (N, C, H, W); layouts are batch_norm_act_cases.arrange's.

    ``grad`` "like" is y's own layout. With an activation other than "identity" there are no statistics and no
    gradients: that is inference.
    """

    shape: tuple[int, int, int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    bias: bool = False
    statistics: bool = False
    activation: str = "identity"
    param: float | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    weight: str = "contiguous"
    grad: str = "like"
    mean: float = 0.3
    seed: int = 0

    @property
    def act(self) -> Activation:
        name, default = from_name(self.activation)
        return Activation(name, default if self.param is None else self.param)

    @property
    def geometry(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("stride", "padding", "dilation")}

    @property
    def output(self) -> tuple[int, int]:
        """(OH, OW); a case is possible where both are positive."""
        n, c, _, _ = self.shape
        x, weight = torch.empty(self.shape, device="meta"), torch.empty(n * c, 1, *self.kernel, device="meta")
        return reference.output_size(x, weight, **self.geometry)[2:]

    def __str__(self) -> str:
        changed = [
            f"{k}={str(v).removeprefix('torch.')}"
            for k, v in self._asdict().items()
            if k != "shape" and v != self._field_defaults[k]
        ]
        return "-".join(["x".join(map(str, self.shape)), *changed]).replace(" ", "")


class Data(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    grad: Tensor


class Results(NamedTuple):
    """What a run gives; None where the case has no such tensor."""

    y: Tensor
    mean: Tensor | None = None
    var: Tensor | None = None
    dx: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None


#: For backends that are slow here (interpreters): every code path, little work.
SMALL = [
    Case((2, 5, 6, 7), bias=True, statistics=True),
    Case((1, 9, 7, 6), (5, 5), (2, 2), (2, 2, 2, 2), statistics=True),
    Case((1, 4, 8, 9), (7, 7), padding=(3, 3, 3, 3), bias=True),
    Case((1, 3, 9, 8), padding=(2, 2, 2, 2), dilation=(2, 2), layout="contiguous"),
    Case((2, 3, 6, 9), (3, 5), (2, 1), (0, 1, 2, 3), layout="contiguous", bias=True, statistics=True),
    Case((1, 3, 5, 6), (2, 3), (1, 3), (1, 0, 4, 1), (3, 1), multiplier=2, bias=True),
    Case((2, 2, 5, 4), multiplier=3, layout="contiguous", statistics=True),
    Case((2, 3, 1, 17), (1, 4), (1, 2), (0, 0, 1, 2), layout="contiguous"),
    Case((1, 6, 5, 5), bias=True, activation="hardswish"),
    Case((1, 6, 5, 5), layout="contiguous", bias=True, activation="relu6"),
    Case((2, 5, 6, 5), dtype=torch.float16, bias=True, statistics=True),
    Case((2, 5, 6, 5), dtype=torch.float64, layout="contiguous", statistics=True),
]


def implementation(backend: str) -> ModuleType:
    return importlib.import_module(f"dlkern.kernels.{backend}.depthwise")


def request(case: Case, device: str) -> reference.Request:
    return reference.Request(
        device, case.dtype, case.layout == "channels_last", case.kernel, case.stride, case.dilation,
        case.multiplier, case.activation, case.statistics,
    )  # fmt: skip


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, case: Case) -> Tensor:
    """PyTorch's own convolution: with its own padding where that is symmetric, else of a padded input."""
    top, bottom, left, right = case.padding
    padding = (top, left)
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    return F.conv2d(x, weight, bias, case.stride, padding, case.dilation, groups=case.shape[1])


@functools.lru_cache(maxsize=64)
def data(case: Case, device: str) -> Data:
    generator = torch.Generator().manual_seed(case.seed)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    n, channels, _, _ = case.shape
    outputs = channels * case.multiplier
    x = (randn(case.shape) + case.mean).to(case.dtype)
    weight = (randn(outputs, 1, *case.kernel) / (case.kernel[0] * case.kernel[1]) ** 0.5).to(case.dtype)
    bias = (0.3 * randn(outputs)).to(case.dtype) if case.bias else None
    grad = randn(n, outputs, *case.output).to(case.dtype)
    if case.grad == "expanded":
        grad = grad.flatten()[:1].view(1, 1, 1, 1).expand(grad.shape)
    return Data(*(None if v is None else v.to(device) for v in (x, weight, bias, grad)))  # type: ignore[arg-type]


def terms(case: Case, d: Data) -> Results:
    """The sums of absolute terms behind each result (see dlkern.bench.parity); not of mean and var."""
    x, weight, grad = (v.detach().cpu().double().abs().requires_grad_() for v in (d.x, d.weight, d.grad))
    bias = None if d.bias is None else d.bias.cpu().double().abs()
    y = _conv(x, weight, bias, case)
    dx, dweight = torch.autograd.grad(y, (x, weight), grad)
    size = y.detach() if case.activation == "identity" else max(1.0, abs(case.act.param)) * (y.detach() + 1)
    return Results(size, None, None, dx, dweight, grad.detach().sum((0, 2, 3)))


@functools.lru_cache(maxsize=64)
def expected(case: Case, device: str, dtype: torch.dtype | None) -> Results:
    """y and gradients by PyTorch's own ops: in float64 (the truth), or in the case's dtype where ``dtype`` is None."""
    d = Data(*(None if v is None else v.to(dtype or v.dtype, copy=True) for v in data(case, device)))
    if dtype is None and case.layout == "channels_last":
        d = d._replace(x=d.x.contiguous(memory_format=torch.channels_last))
    inputs = [v.requires_grad_() for v in (d.x, d.weight, d.bias) if v is not None]
    z = _conv(d.x, d.weight, d.bias, case)
    exact = case.activation == "hardsigmoid" and dtype == torch.float64  # PyTorch's own takes float32's 1 / 6
    y = F.relu6(z + 3) / 6 if exact else reference_activation.forward(z, case.act)
    if case.activation != "identity":
        return Results(y.detach())
    grads = torch.autograd.grad(z, inputs, d.grad)
    return Results(y.detach(), None, None, *grads)


def run(case: Case, target: tuple[str, str]) -> Results:
    """The case by one implementation, between guard zones and into poisoned memory.

    Asserts that the implementation says it supports it, that inputs were not written, and the results' strides.
    """
    device, backend = target
    op, values = implementation(backend), data(case, device)
    assert op.supports(request(case, device)) is None
    with guarded() as guards:
        x = arrange(values.x, case.layout, guards)
        weight = arrange(values.weight, case.weight, guards)
        bias = None if values.bias is None else guards.place(values.bias)
        like = case.grad if case.grad != "like" else "channels_last" if reference.channels_last(x) else "contiguous"
        grad = arrange(values.grad, like, guards)
        inputs = [v for v in (x, weight, bias, grad) if v is not None]
        before = [v.clone() for v in inputs]
        y, mean, var = op.forward(
            x, weight, bias, **case.geometry, activation=case.act, statistics=case.statistics
        )  # fmt: skip
        dx = dweight = dbias = None
        if case.activation == "identity":
            dx, dweight, dbias = op.backward(
                grad, x, weight, **case.geometry, needs_x=True, needs_weight=True, needs_bias=case.bias
            )
        for tensor, copy in zip(inputs, before, strict=True):
            assert torch.equal(tensor, copy), "an input was written"
    assert y.dtype == case.dtype
    assert y.is_contiguous(memory_format=reference.memory_format(x)), y.stride()
    assert (mean is not None, var is not None) == (case.statistics, case.statistics)
    if dx is not None and dweight is not None:
        assert dx.stride() == layout.dense(x).stride(), f"{dx.stride()}, x has {layout.dense(x).stride()}"
        assert dweight.is_contiguous()
    return Results(y, mean, var, dx, dweight, dbias)


def check(case: Case, target: tuple[str, str]) -> Results:
    """Run the case and hold every output and gradient to the parity rule."""
    results = run(case, target)
    judge(case, target[0], results)
    evidence.record("depthwise", target[1], case.dtype)
    return results


def judge(case: Case, device: str, results: Results) -> None:
    """Hold what an implementation made to the parity rule; None is not judged."""
    truth, peer = expected(case, device, torch.float64), expected(case, device, None)
    floors = terms(case, data(case, device))
    for name in ("y", "dx", "dweight", "dbias"):
        result, true, like = (getattr(r, name) for r in (results, truth, peer))
        if result is not None:
            assert result.dtype == like.dtype, f"{name}: {result.dtype}, PyTorch's {like.dtype}"
            parity.assert_parity(name, result, true, getattr(floors, name), peer=like, dtype=case.dtype)
    if results.mean is None or results.var is None:
        return
    # of y as it is stored, so that there is no peer: the floor alone
    y, wide = results.y.detach().double().cpu(), accumulate_dtype(case.dtype)
    assert results.mean.dtype == results.var.dtype == wide
    mean = y.mean((0, 2, 3))
    var = (y - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))  # torch.var was seen 7 roundings off
    parity.assert_parity("mean", results.mean, mean, y.abs().mean((0, 2, 3)), peer=None)
    # the mean's own rounding enters the variance squared
    parity.assert_parity("var", results.var, var, var + torch.finfo(wide).eps * mean**2, peer=None)
