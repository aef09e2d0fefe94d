"""Cases of transposed: how inputs are made, run on a backend, and judged against PyTorch in float64."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import evidence
import parity
import torch
import torch.nn.functional as F
from batch_norm_act_cases import EPS, KINKS, arrange, spied
from guard import guarded
from torch import Tensor

import dlkern
from dlkern.kernels.activation import Activation, from_name
from dlkern.kernels.reference import activation as reference_activation
from dlkern.kernels.reference.transposed import Geometry

_CURVED = ("silu", "gelu", "gelu_tanh", "hardswish", "sigmoid", "tanh", "elu")


class Case(NamedTuple):
    """One configuration: x (N, C, H, W), K output channels; layouts are batch_norm_act_cases.arrange's."""

    shape: tuple[int, int, int, int]
    out: int
    kernel: tuple[int, int] = (4, 4)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (1, 1)
    output_padding: tuple[int, int] = (0, 0)
    groups: int = 1
    dilation: tuple[int, int] = (1, 1)
    bias: bool = False
    norm: str = "batch"
    affine: bool = True
    activation: str = "relu"
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    momentum: float = 0.1
    seed: int = 0

    @property
    def act(self) -> Activation:
        return from_name(self.activation)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.padding, self.output_padding, self.groups, self.dilation)

    def __str__(self) -> str:
        changed = [
            f"{k}={str(v).removeprefix('torch.')}"
            for k, v in self._asdict().items()
            if k not in ("shape", "out") and v != self._field_defaults[k]
        ]
        return "-".join(["x".join(map(str, self.shape)), f"to{self.out}", *changed]).replace(" ", "")


class Data(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    grad: Tensor


class Results(NamedTuple):
    """What a run gives; None where the case has no such tensor, or made no gradients."""

    y: Tensor
    dx: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    dbn_weight: Tensor | None = None
    dbn_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None


def _preactivation(case: Case, d: Data) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In float64: the activation's input, the sum of absolute terms behind it, those behind c, scale and mean."""
    x, weight = d.x.double(), d.weight.double()
    bias = None if d.bias is None else d.bias.double()
    c = F.conv_transpose2d(x, weight, bias, *case.geometry)
    size_c = F.conv_transpose2d(x.abs(), weight.abs(), None if bias is None else bias.abs(), *case.geometry)
    if case.norm == "none":
        one = torch.ones(1, dtype=torch.float64)
        return c, size_c, size_c, one, 0 * one
    shape = (1, -1, 1, 1)
    if case.norm == "batch":
        mean, var = c.mean((0, 2, 3)).view(shape), c.var((0, 2, 3), correction=0).view(shape)
    else:
        assert d.running_mean is not None
        assert d.running_var is not None
        mean, var = d.running_mean.double().view(shape), d.running_var.double().view(shape)
    scale = torch.rsqrt(var + EPS)
    if d.bn_weight is not None:
        scale = scale * d.bn_weight.double().view(shape)
    shift = 0.0 if d.bn_bias is None else d.bn_bias.double().view(shape)
    return (c - mean) * scale + shift, (size_c + mean.abs()) * scale.abs() + abs(shift), size_c, scale, mean


@functools.lru_cache(maxsize=64)
def data(case: Case, device: str) -> Data:
    """The case's values; the gradient is 0 where the pre-activation is so near a kink that rounding decides."""
    generator = torch.Generator().manual_seed(case.seed)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    k, dtype, param_dtype = case.out, case.dtype, case.param_dtype or case.dtype
    fan_in = case.shape[1] // case.groups * case.kernel[0] * case.kernel[1] / (case.stride[0] * case.stride[1])
    x = (randn(case.shape) + 0.3).to(dtype)
    weight = (randn(case.shape[1], k // case.groups, *case.kernel) / max(fan_in, 1.0) ** 0.5).to(dtype)
    bias = (0.3 * randn(k)).to(dtype) if case.bias else None
    normed = case.norm != "none"
    bn_weight = (1 + 0.3 * randn(k)).to(param_dtype) if normed and case.affine else None
    bn_bias = (0.4 * randn(k)).to(param_dtype) if normed and case.affine else None
    running_mean = (0.2 * randn(k)).to(param_dtype) if normed else None
    running_var = (0.5 + randn(k).abs()).to(param_dtype) if normed else None
    grad = randn(case.geometry.output_size(x, weight)).to(dtype)
    made = Data(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, grad)
    z, size, *_ = _preactivation(case, made)
    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in KINKS.get(case.activation, ()):
        near |= (z - kink).abs() <= 4 * torch.finfo(dtype).eps * size
    assert near.sum() <= 1 + near.numel() // 2, "most of the gradient is masked: the case shows little"
    grad = torch.where(near, torch.zeros_like(grad), grad)
    return Data(*(None if v is None else v.to(device) for v in made._replace(grad=grad)))


def terms(case: Case, d: Data) -> Results:
    """The sums of absolute terms behind each result (see dlkern.bench.parity)."""
    d = Data(*(None if v is None else v.cpu() for v in d))
    _, size, size_c, scale, mean = _preactivation(case, d)
    invstd = scale if d.bn_weight is None else scale / d.bn_weight.double().view(1, -1, 1, 1)
    dz = d.grad.double().abs() * (1.0 + (size if case.activation in _CURVED else 0.0))
    xhat, dims = (size_c + mean.abs()) * invstd.abs(), (0, 2, 3)
    dbn_weight, dbn_bias = (dz * xhat).sum(dims), dz.sum(dims)
    count = d.grad.numel() // case.out
    dc = dz
    if case.norm == "batch":
        dc = dz + (dbn_bias.view(1, -1, 1, 1) + xhat * dbn_weight.view(1, -1, 1, 1)) / count
    dc = dc * scale.abs()
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dc, d.x.double().abs(), d.weight.double().abs(), [case.out], case.stride, case.padding, case.dilation,
        True, case.output_padding, case.groups, [True, True, True],
    )  # fmt: skip
    running_mean = running_var = None
    if d.running_mean is not None and d.running_var is not None:
        running_mean, running_var = d.running_mean.double().abs(), d.running_var.double()
        if case.norm == "batch":
            running_mean = running_mean + case.momentum * size_c.mean(dims)
            running_var = running_var + case.momentum * size_c.square().mean(dims) * count / max(count - 1, 1)
    return Results(size + 1.0, dx, dweight, dbias, dbn_weight, dbn_bias, running_mean, running_var)


def differentiable(d: Data) -> list[Tensor]:
    return [v for v in d[:5] if v is not None]


@functools.lru_cache(maxsize=64)
def expected(case: Case, device: str, dtype: torch.dtype | None) -> Results:
    """The case by PyTorch's own ops: in float64 (the truth), or in the case's dtype where ``dtype`` is None."""
    d = Data(*(None if v is None else v.to(dtype or v.dtype, copy=True) for v in data(case, device)))
    inputs = [v.requires_grad_() for v in differentiable(d)]
    z = F.conv_transpose2d(d.x, d.weight, d.bias, *case.geometry)
    if case.norm != "none":
        z = F.batch_norm(
            z, d.running_mean, d.running_var, d.bn_weight, d.bn_bias, case.norm == "batch", case.momentum, EPS
        )
    y = reference_activation.forward(z, case.act)
    grads = iter(torch.autograd.grad(y, inputs, d.grad))
    found = [None if v is None else next(grads) for v in d[:5]]
    return Results(y.detach(), *found, d.running_mean, d.running_var)


def run(case: Case, target: tuple[str, str], *, gradients: bool = True) -> Results:
    """The case through dlkern.functional under a forced backend, between guard zones.

    Asserts which implementation ran, that inputs were not written, and that y has PyTorch's strides.
    """
    device, backend = target
    values = data(case, device)
    with guarded() as guards:
        x = arrange(values.x, case.layout, guards)
        weight = arrange(values.weight, case.layout if case.layout == "channels_last" else "contiguous", guards)
        bias, bn_weight, bn_bias, running_mean, running_var = (
            None if v is None else guards.place(v) for v in values[2:7]
        )
        d = Data(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, values.grad)
        inputs = [v.requires_grad_(gradients) for v in differentiable(d)]
        before = [v.detach().clone() for v in inputs]
        options: dict[str, Any] = {**case.geometry._asdict(), "activation": case.act}
        with spied() as calls, dlkern.backend(transposed=backend):
            if case.norm == "none":
                y = dlkern.functional.conv_transpose_act(x, weight, bias, **options)
            else:
                y = dlkern.functional.conv_transpose_bn_act(
                    x, weight, bias, running_mean, running_var, bn_weight, bn_bias, **options,
                    training=case.norm == "batch", momentum=case.momentum, eps=EPS,
                )  # fmt: skip
        with spied() as later:
            found: list[Any] = [None] * 5
            if gradients:
                grads = iter(torch.autograd.grad(y, inputs, values.grad))
                found = [None if v is None else next(grads) for v in d[:5]]
        if backend != "torch":
            assert calls == [(backend, "forward")], calls
            assert later[:1] == ([(backend, "backward")] if gradients else []), later
        for tensor, copy in zip(inputs, before, strict=True):
            assert torch.equal(tensor.detach(), copy), "an input was written"
    peer = F.conv_transpose2d(x.detach(), weight.detach(), None, *case.geometry)
    for size, mine, theirs in zip(y.shape, y.stride(), peer.stride(), strict=True):
        assert mine == theirs or size == 1, f"strides {y.stride()}, PyTorch's {peer.stride()}"
    return Results(y.detach(), *found, running_mean, running_var)


def check(case: Case, target: tuple[str, str], *, gradients: bool = True) -> None:
    """Run the case and hold every output and gradient to the parity rule."""
    device, backend = target
    results = run(case, target, gradients=gradients)
    truth, peer = expected(case, device, torch.float64), expected(case, device, None)
    floors = terms(case, data(case, device))
    for name in Results._fields:
        result = getattr(results, name)
        if result is None:
            continue
        like = getattr(peer, name)
        assert result.dtype == like.dtype, f"{name}: {result.dtype}, PyTorch's {like.dtype}"
        parity.assert_parity(name, result, getattr(truth, name), getattr(floors, name), peer=like, dtype=case.dtype)
    evidence.record("transposed", backend, case.dtype)
