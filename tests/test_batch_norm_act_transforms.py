"""batch_norm_act as a library op and under torch.func."""

from __future__ import annotations

import parity
import pytest
import torch
from batch_norm_act_cases import double, every_target, spied
from torch import Tensor

import dlkern
from dlkern.functional import batch_norm_act

F64 = torch.float64


# ------------------------------------------------------------------------------ the library ops
@every_target
@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck_forward(memory_format: torch.memory_format, batch_stats: bool, target: tuple[str, str]) -> None:
    device, backend = target
    x, residual = (torch.randn(2, 3, 4, 4, device=device).contiguous(memory_format=memory_format) for _ in range(2))
    weight, bias, mean, var = (torch.rand(3, device=device) + 0.5 for _ in range(4))
    args = (x, weight, bias, residual, mean, var, batch_stats, 0.1, 1e-5, "relu", 0.0, backend)
    torch.library.opcheck(torch.ops.dlkern.batch_norm_act.default, args)
    args = (x.half(), None, None, None, mean, var, batch_stats, 0.1, 1e-5, "elu", 1.0, backend)
    torch.library.opcheck(torch.ops.dlkern.batch_norm_act.default, args)


@every_target
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck_backward(needs: tuple[bool, bool, bool], target: tuple[str, str]) -> None:
    device, backend = target
    x, residual, grad = (torch.randn(2, 3, 4, 4, device=device) for _ in range(3))
    weight, bias, mean, invstd = (torch.rand(3, device=device) + 0.5 for _ in range(4))
    args = (grad.transpose(2, 3), x, weight, bias, residual, None, mean, invstd, True, "relu", 0.0, *needs, backend)
    torch.library.opcheck(torch.ops.dlkern.batch_norm_act_backward.default, args)


# ---------------------------------------------------------------------------------- torch.func
@every_target
def test_func_grad(target: tuple[str, str]) -> None:
    device, backend = target
    x, weight, bias, residual = double((2, 3, 4), 1, device)
    running = torch.zeros(3, dtype=F64, device=device), torch.ones(3, dtype=F64, device=device)

    def loss(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        y = batch_norm_act(x, *running, weight, bias.detach(), training=True, activation="silu", residual=residual)
        return y.pow(2).sum()

    with spied() as calls, dlkern.backend(backend):
        found = torch.func.grad(loss, argnums=(0, 1, 2))(x.detach(), weight.detach(), residual.detach())
    # torch.func.grad always asks for a gradient that can be differentiated again: PyTorch's own ops
    assert calls == [(backend, "forward")]
    assert running[0].abs().sum() > 0
    with dlkern.backend("torch"):
        wanted = torch.autograd.grad(loss(x, weight, residual), (x, weight, residual))
    for mine, theirs in zip(found, wanted, strict=True):
        parity.assert_parity("gradient", mine, theirs, theirs.abs() + 8.0, peer=None)


@every_target
def test_vmap_and_forward_mode_raise(target: tuple[str, str]) -> None:
    device, backend = target
    x = torch.randn(2, 3, 4, 5, device=device)

    def function(x: Tensor) -> Tensor:
        return batch_norm_act(x, None, None, training=True)

    with dlkern.backend(backend):
        with pytest.raises(RuntimeError, match="vmap"):
            torch.func.vmap(function)(x)
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            torch.func.jvp(function, (x,), (x,))
        for needs in (False, True):
            with (
                torch.autograd.forward_ad.dual_level(),
                pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"),
            ):
                function(torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(needs), x))


def test_vmap_over_the_residual_alone() -> None:
    x, residuals = torch.randn(2, 3, 4, 5), torch.randn(4, 2, 3, 4, 5)
    with dlkern.backend("torch"):
        mapped = torch.func.vmap(lambda r: batch_norm_act(x, None, None, residual=r))(residuals)
        torch.testing.assert_close(mapped[2], batch_norm_act(x, None, None, residual=residuals[2]))


def test_the_torch_backend_keeps_vmap_and_jvp() -> None:
    x = torch.randn(2, 3, 4, 5)

    def function(x: Tensor) -> Tensor:
        return batch_norm_act(x, None, None, training=True, activation="tanh")

    with dlkern.backend("torch"):
        both = torch.func.vmap(function)(x)
        _, tangent = torch.func.jvp(function, (x,), (torch.ones_like(x),))
    parity.assert_parity("vmap", both[1], function(x[1].double()), torch.full_like(both[1], 8.0), peer=None)
    assert tangent.shape == x.shape
