"""Cases of batch_norm_act: how inputs are made, run on a backend, and judged against PyTorch in float64."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import evidence
import parity
import pytest
import torch
import torch.nn.functional as F
from conftest import HAS_CUDA
from guard import Guards, guarded
from torch import Tensor

import dlkern
from dlkern import dispatch
from dlkern.kernels.activation import Activation, from_name
from dlkern.kernels.reference import activation as reference_activation

#: Where each implementation is tested: (device, backend). Without a GPU Triton runs in its interpreter.
TARGETS: list[Any] = [("cpu", "reference"), ("cpu", "cpu")]
if HAS_CUDA:
    TARGETS += [pytest.param(("cuda", name), marks=pytest.mark.gpu) for name in ("reference", "triton", "cuda")]
else:
    TARGETS.append(("cpu", "triton"))


def target_id(target: Any) -> str:
    return "-".join(target)


every_target = pytest.mark.parametrize("target", TARGETS, ids=target_id)


class Case(NamedTuple):
    """One configuration; layouts are those of :func:`arrange`."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None
    activation: str = "relu"
    param: float | None = None
    residual: str | None = None
    grad: str = "contiguous"
    training: bool = True
    weight: bool = True
    bias: bool = True
    track: bool = True
    momentum: float = 0.1
    mean: float = 0.3
    std: float = 1.0
    seed: int = 0

    @property
    def act(self) -> Activation:
        name, default = from_name(self.activation)
        return Activation(name, default if self.param is None else self.param)

    @property
    def batch_stats(self) -> bool:
        return self.training or not self.track

    def __str__(self) -> str:
        changed = [
            f"{k}={str(v).removeprefix('torch.')}"
            for k, v in self._asdict().items()
            if k != "shape" and v != self._field_defaults[k]
        ]
        return "-".join(["x".join(map(str, self.shape)), *changed])


class Data(NamedTuple):
    """Values, in the case's dtypes."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    grad: Tensor


class Results(NamedTuple):
    """What a run gives; None where the case has no such tensor."""

    y: Tensor
    dx: Tensor
    dweight: Tensor | None
    dbias: Tensor | None
    dresidual: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


# Where the derivative jumps (of elu only when alpha is not 1).
KINKS = {
    "relu": (0.0,),
    "relu6": (0.0, 6.0),
    "leaky_relu": (0.0,),
    "hardswish": (-3.0, 3.0),
    "hardsigmoid": (-3.0, 3.0),
    "elu": (0.0,),
}


def arrange(values: Tensor, layout: str, guards: Guards) -> Tensor:
    """A copy of ``values`` stored between guard zones as ``layout`` says."""
    if layout == "contiguous":
        return guards.place(values.contiguous())
    if layout == "channels_last":
        memory_format = torch.channels_last if values.dim() == 4 else torch.channels_last_3d
        return guards.place(values.contiguous(memory_format=memory_format))
    if layout == "offset":  # off its alignment by one element
        return guards.place(values.contiguous(), offset=1)
    if layout == "sliced":  # every second element of the last dimension
        stride = torch.empty((*values.shape[:-1], 2 * values.shape[-1]), device="meta").stride()
        return guards.place(values, (*stride[:-1], 2))
    if layout == "transposed":  # the last two dimensions swapped in memory
        swapped = torch.empty(values.transpose(-1, -2).shape, device="meta")
        return guards.place(values, swapped.transpose(-1, -2).stride())
    if layout == "expanded":
        return guards.place(values.flatten()[:1]).view([1] * values.dim()).expand(values.shape)
    raise ValueError(layout)


@functools.lru_cache(maxsize=64)
def data(case: Case, device: str) -> Data:
    """The case's values; the gradient is 0 where the pre-activation is so near a kink that rounding decides."""
    generator = torch.Generator().manual_seed(case.seed)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    channels, param_dtype = case.shape[1], case.param_dtype or case.dtype
    x = (randn(case.shape) * case.std + case.mean).to(case.dtype)
    weight = (1 + 0.3 * randn(channels)).to(param_dtype) if case.weight else None
    bias = (0.4 * randn(channels)).to(param_dtype) if case.bias else None
    residual = randn(case.shape).to(case.dtype) if case.residual is not None else None
    if residual is not None and case.residual == "expanded":
        residual = residual.flatten()[:1].view([1] * x.dim()).expand(x.shape)
    running_mean = (case.mean + 0.2 * randn(channels)).to(param_dtype) if case.track else None
    running_var = (case.std**2 * (0.5 + randn(channels).abs())).to(param_dtype) if case.track else None
    grad = randn(case.shape).to(case.dtype)
    made = Data(x, weight, bias, residual, running_mean, running_var, grad)
    if case.grad == "expanded":
        assert case.activation not in KINKS, "an expanded gradient cannot be masked at kinks"
        grad = grad.flatten()[:1].view([1] * x.dim()).expand(x.shape)
    else:
        z, size = _preactivation(case, made)
        margin = 4 * torch.finfo(case.dtype).eps * size  # rounding of z, in PyTorch's own path too
        near = torch.zeros_like(z, dtype=torch.bool)
        for kink in KINKS.get(case.activation, ()):
            near |= (z - kink).abs() <= margin
        assert near.sum() <= 1 + near.numel() // 2, "most of the gradient is masked: the case shows little"
        grad = torch.where(near, torch.zeros_like(grad), grad)
    return Data(*(None if v is None else v.to(device) for v in made._replace(grad=grad)))


def _statistics(case: Case, d: Data) -> tuple[Tensor, Tensor]:
    """Mean and biased variance used by the case, in float64, shaped to broadcast."""
    shape = (1, -1, *([1] * (len(case.shape) - 2)))
    if not case.batch_stats:
        assert d.running_mean is not None
        assert d.running_var is not None
        return d.running_mean.double().view(shape), d.running_var.double().view(shape)
    dims = [0, *range(2, len(case.shape))]
    x = d.x.double()
    return x.mean(dims).view(shape), x.var(dims, correction=0).view(shape)


def _channel(v: Tensor | None, case: Case, default: float) -> Tensor | float:
    return default if v is None else v.double().view(1, -1, *([1] * (len(case.shape) - 2)))


def _preactivation(case: Case, d: Data) -> tuple[Tensor, Tensor]:
    """The activation's input in float64, and the sum of the absolute values that make it."""
    mean, var = _statistics(case, d)
    weight, bias = _channel(d.weight, case, 1.0), _channel(d.bias, case, 0.0)
    scale = weight * torch.rsqrt(var + EPS)
    residual = torch.zeros((), dtype=torch.float64) if d.residual is None else d.residual.double()
    x = d.x.double()
    z = (x - mean) * scale + bias + residual
    return z, (x.abs() + mean.abs()) * scale.abs() + abs(bias) + residual.abs()


EPS = 1e-5


def terms(case: Case, d: Data) -> Results:
    """The sums of absolute terms behind each result (see tests/parity.py)."""
    d = Data(*(None if v is None else v.cpu() for v in d))
    mean, var = _statistics(case, d)
    _, size = _preactivation(case, d)
    invstd = torch.rsqrt(var + EPS)
    dims = [0, *range(2, len(case.shape))]
    steep = max(1.0, abs(case.act.param))
    bent = 0.0 if case.activation in ("identity", "relu", "relu6", "leaky_relu", "hardsigmoid") else 1.0
    dz = d.grad.double().abs() * steep * (1.0 + bent * size)  # an error of z moves the derivative of a curve
    xhat = (d.x.double().abs() + mean.abs()) * invstd
    dweight, dbias = (dz * xhat).sum(dims), dz.sum(dims)
    count = d.x.numel() // d.x.shape[1]
    dx = dz
    if case.batch_stats:
        dx = dz + _channel(dbias, case, 0.0) / count + xhat * _channel(dweight, case, 0.0) / count
    dx = dx * invstd * abs(_channel(d.weight, case, 1.0))
    running_mean = running_var = None
    if d.running_mean is not None and d.running_var is not None:
        running_mean, running_var = d.running_mean.double().abs(), d.running_var.double()
        if case.batch_stats:
            eps = torch.finfo(case.dtype).eps if case.dtype == torch.float64 else torch.finfo(torch.float32).eps
            running_mean = running_mean + case.momentum * d.x.double().abs().mean(dims)
            # the mean's own rounding enters the variance squared
            moved = var.flatten() * count / max(count - 1, 1) + eps * mean.flatten() ** 2
            running_var = running_var + case.momentum * moved
    return Results(
        steep * (size + 1.0), dx,
        None if d.weight is None else dweight, None if d.bias is None else dbias,
        None if d.residual is None else dz, running_mean, running_var,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def expected(case: Case, device: str, dtype: torch.dtype | None) -> Results:
    """The case by PyTorch's own ops: in float64 (the truth), or in the case's dtype where ``dtype`` is None."""

    def leaf(v: Tensor | None) -> Tensor | None:
        return None if v is None else v.to(dtype or v.dtype, copy=True)

    values = Data(*map(leaf, data(case, device)))
    x, weight, bias, residual, running_mean, running_var, grad = values
    inputs = [v.requires_grad_() for v in (x, weight, bias, residual) if v is not None]
    z = F.batch_norm(x, running_mean, running_var, weight, bias, case.batch_stats, case.momentum, EPS)
    z = z if residual is None else z + residual
    # PyTorch's derivative of hardsigmoid is float32's 1 / 6 in float64 too: no truth
    exact = case.activation == "hardsigmoid" and dtype == torch.float64
    y = F.relu6(z + 3) / 6 if exact else reference_activation.forward(z, case.act)
    grads = iter(torch.autograd.grad(y, inputs, grad))
    found = [None if v is None else next(grads) for v in (x, weight, bias, residual)]
    return Results(y.detach(), *found, running_mean, running_var)  # type: ignore[arg-type]


@contextlib.contextmanager
def spied() -> Iterator[list[tuple[str, str]]]:
    """Records (backend, "forward" or "backward") of each call of an implementation."""
    calls: list[tuple[str, str]] = []
    original = dispatch.implementation

    class Spy:
        def __init__(self, module: ModuleType, backend: str) -> None:
            self.module, self.backend = module, backend

        def __getattr__(self, name: str) -> Any:
            if name in ("forward", "backward"):
                calls.append((self.backend, name))
            return getattr(self.module, name)

    with mock.patch.object(dispatch, "implementation", lambda op, name: Spy(original(op, name), name)):
        yield calls


def run(case: Case, target: tuple[str, str]) -> Results:
    """The case through dlkern.functional under a forced backend, guarded and poisoned.

    Asserts which implementation ran, that inputs were not written, and that y has PyTorch's strides.
    """
    device, backend = target
    values = data(case, device)
    with guarded() as guards:
        x = arrange(values.x, case.layout, guards)
        residual = None if values.residual is None else arrange(values.residual, case.residual or "", guards)
        weight, bias, running_mean, running_var = (
            None if v is None else guards.place(v)
            for v in (values.weight, values.bias, values.running_mean, values.running_var)
        )
        grad = values.grad if case.grad == "like" else arrange(values.grad, case.grad, guards)
        inputs = [v.requires_grad_() for v in (x, weight, bias, residual) if v is not None]
        before = [v.detach().clone() for v in [*inputs, grad]]
        with spied() as calls:
            with dlkern.backend(backend):
                y = dlkern.functional.batch_norm_act(
                    x, running_mean, running_var, weight, bias,
                    training=case.training, momentum=case.momentum, eps=EPS, activation=case.act, residual=residual,
                )  # fmt: skip
            # outside of the block: the choice made in forward holds
            grads = iter(torch.autograd.grad(y, inputs, grad))
        wanted = [] if backend == "torch" else [(backend, "forward"), (backend, "backward")]
        assert calls == wanted, f"expected {wanted}, ran {calls}"
        for tensor, copy in zip([*inputs, grad], before, strict=True):
            assert torch.equal(tensor.detach(), copy), "an input was written"
        found = [None if v is None else next(grads) for v in (x, weight, bias, residual)]
    zero, one = torch.zeros(case.shape[1], device=device), torch.ones(case.shape[1], device=device)
    peer = F.batch_norm(x.detach(), zero.to(case.dtype), one.to(case.dtype))
    strict = case.layout in ("contiguous", "offset", "channels_last")  # else the stride of a size of 1 is anything
    for size, mine, theirs in zip(y.shape, y.stride(), peer.stride(), strict=True):
        assert mine == theirs or (size == 1 and not strict), f"strides {y.stride()}, PyTorch's {peer.stride()}"
    assert y.dtype == case.dtype
    return Results(y.detach(), *found, running_mean, running_var)  # type: ignore[arg-type]


def check(case: Case, target: tuple[str, str]) -> None:
    """Run the case and hold every output and gradient to the parity rule."""
    device, _ = target
    results = run(case, target)
    truth, peer = expected(case, device, torch.float64), expected(case, device, None)
    floors = terms(case, data(case, device))
    for name in Results._fields:
        result, true = getattr(results, name), getattr(truth, name)
        assert (result is None) == (true is None), f"{name}: {result} against {true}"
        if result is not None:
            like = getattr(peer, name)
            assert result.dtype == like.dtype, f"{name}: {result.dtype}, PyTorch's {like.dtype}"
            parity.assert_parity(name, result, true, getattr(floors, name), peer=like)
    evidence.record("batch_norm_act", target[1], case.dtype)


def double(shape: tuple[int, ...], seed: int, device: str) -> list[Tensor]:
    """x, weight, bias and residual in float64, leaves that need gradients."""
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
    return [v.to(device).requires_grad_() for v in (x, weight + 2, bias, residual)]
