"""act(batch_norm(x) + residual) with the statistics of a whole process group, as torch.nn.SyncBatchNorm has them.

Each rank takes the statistics of its own batch, one all_gather brings those of the others, and the passes over the
data are those of batch_norm_act's implementations with the merged statistics. Backward adds up two sums per channel
over the ranks. What is sent is what PyTorch's own SyncBatchNorm sends, number for number (mean, 1 / sqrt(var + eps)
and the count; the sums of dz and of dz * (x - mean)), so that a rank on which a site runs its stock modules, say for
a hook that only rank 0 has, still works with those on which it runs fused.

PyTorch's SyncBatchNorm refuses CPU tensors where there are several ranks. This op takes them (gloo): there is no
reason to refuse, and a training loop can be tried without GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlkern import dispatch
from dlkern.kernels import layout
from dlkern.kernels.activation import Activation
from dlkern.kernels.reference.batch_norm_act import Request, accumulate_dtype

from . import batch_norm_act as local
from . import library


def choose(x: Tensor, residual: bool, activation: Activation) -> str:
    """The backend whose passes run: batch_norm_act's choice for statistics that are given.

    "torch" where PyTorch's own passes are to run. Raises RuntimeError where a forced backend cannot run this.
    """
    parameters = accumulate_dtype(x.dtype)  # see ``apply``
    channels_last = layout.is_channels_last(x)
    request = Request(x.device.type, x.dtype, parameters, channels_last, False, residual, activation.name)
    return dispatch.choose(local.NAME, request).backend


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: Activation,
    group: Any,
    backend: str,
) -> Tensor:
    """act(batch_norm(x) + residual) by the statistics of the batches of all ranks of a process group.

    A collective call: every rank of the group makes it, each with a batch of its own, which may be of another size
    than the others', or empty. Differentiable once in x, weight, bias and residual; the gradients of weight and bias
    are this rank's share, as DistributedDataParallel expects them.

    Args:
        x: (N, C, *); residual: like x or None. They have been checked, as everything has.
        weight, bias, running_mean, running_var: (C,) or None; the running statistics move by ``momentum`` in place,
            towards the mean and the unbiased variance of all ranks' values.
        group: the process group.
        backend: an implementation of batch_norm_act; for "torch" the reference, PyTorch's ops one by one.
    """
    backend = "reference" if backend == "torch" else backend
    return _SyncFunction.apply(
        x, weight, bias, residual, running_mean, running_var, momentum, eps, *activation, group, backend
    )


# ------------------------------------------------------------------------------------- statistics
def _statistics(x: Tensor, eps: float, backend: str) -> Tensor:
    """Mean, 1 / sqrt(biased variance + eps) and count of this rank's values, in one tensor (2 C + 1,)."""
    channels, wide = x.size(1), accumulate_dtype(x.dtype)
    if x.numel() == 0:
        return torch.zeros(2 * channels + 1, dtype=wide, device=x.device)
    if x.is_cuda:
        mean, invstd = torch.batch_norm_stats(layout.dense(x), eps)
    else:
        # The pass that this writes to memory for nothing costs less than torch.var_mean, which is not vectorised.
        nothing = (None,) * 5
        _, mean, invstd = _run(x, *nothing, True, 0.0, eps, "identity", 0.0, backend)
    count = torch.full((1,), x.numel() // channels, dtype=wide, device=x.device)
    return torch.cat([mean, invstd, count])


def _gather(combined: Tensor, group: Any) -> Tensor:
    """Every rank's ``combined`` (K,), as (ranks, K)."""
    everyone = combined.new_empty(dist.get_world_size(group), combined.numel())
    if combined.device.type == "cpu" or dist.get_backend(group) == "gloo":
        dist.all_gather(list(everyone.unbind(0)), combined, group)
    else:
        dist.all_gather_into_tensor(everyone, combined, group)
    return everyone


def _merge(everyone: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (C,) of the values of all ranks, and how many there are per channel (1,).

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
    (1979).
    """
    channels = everyone.size(1) // 2
    means, invstds, counts = everyone.split([channels, channels, 1], 1)
    total = counts.sum(0)
    share = counts / total.clamp(min=1)
    # an empty batch has 0 for its invstd; rounding can put a variance of 0 a little below
    variances = torch.where(counts > 0, invstds.pow(-2) - eps, 0).clamp(min=0)
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean).square())).sum(0)
    return mean, variance, total


def _move(running: Tensor | None, value: Tensor, momentum: float) -> None:
    if running is not None:
        running.mul_(1 - momentum).add_(value.to(running.dtype), alpha=momentum)


# --------------------------------------------------------------------------------------- autograd
def _run(x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (local.run_forward if library.unwatched(x) else local.forward_op)(x, *inputs)


def _wide(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    """weight or bias in the dtype of the statistics: an implementation takes parameters of one dtype."""
    return None if parameter is None else parameter.detach().to(like.dtype)


class _SyncFunction(torch.autograd.Function):
    """The op with its gradients; the arguments are those of ``apply``, with the activation's two fields."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        activation: str,
        param: float,
        group: Any,
        backend: str,
    ) -> Tensor:
        mean, variance, total = _merge(_gather(_statistics(x, eps, backend), group), eps)
        _move(running_mean, mean, momentum)
        _move(running_var, variance * (total / (total - 1).clamp(min=1)), momentum)
        wide_weight, wide_bias = _wide(weight, mean), _wide(bias, mean)
        if x.numel() == 0:
            y, invstd = torch.empty_like(x), torch.rsqrt(variance + eps)
        else:
            y, mean, invstd = _run(
                x, wide_weight, wide_bias, residual, mean, variance, False, 0.0, eps, activation, param, backend
            )
        residual, kept_y = local.kept_of(residual, y, Activation(activation, param))
        ctx.save_for_backward(x, weight, bias, residual, kept_y, mean, invstd, total)
        ctx.options = (activation, param, group, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, y, mean, invstd, total = ctx.saved_tensors
        activation, param, group, backend = ctx.options
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        wide_weight, wide_bias = _wide(weight, mean), _wide(bias, mean)
        shared = needs_residual and activation == "identity"  # the residual's gradient is grad_y itself
        gradients: Any  # of x, weight, bias and residual
        if x.numel() == 0:
            gradients = [torch.zeros_like(v) for v in (x, mean, mean, x)]
        else:
            needs_sums = needs_x or needs_weight or needs_bias
            run = local.run_backward if library.unwatched(grad_y) else local.backward_op
            gradients = run(
                grad_y,
                x,
                wide_weight,
                wide_bias,
                residual,
                y,
                mean,
                invstd,
                False,
                activation,
                param,
                needs_x,
                needs_sums,
                needs_residual and not shared,
                backend,
            )
        dx, dweight, dbias, dresidual = gradients
        if shared:
            dresidual = grad_y
        if needs_x:
            sums = torch.cat([dbias, dweight / invstd])
            dist.all_reduce(sums, group=group)
            if x.numel():
                dx = _through_statistics(dx, x, wide_weight, mean, invstd, sums / total, backend)
        return (
            dx if needs_x else None,
            dweight.to(weight.dtype) if needs_weight else None,
            dbias.to(bias.dtype) if needs_bias else None,
            dresidual if needs_residual else None,
            *((None,) * 8),
        )


def _through_statistics(
    dx: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, means: Tensor, backend: str
) -> Tensor:
    """The gradient of x with the part that goes through mean and variance; ``dx`` is the part that does not.

    ``means`` (2 C,) are those of dz and of dz * (x - mean), over the values of all ranks. The part is affine in x,
    so this is one pass of the op itself: (x - mean) * slope + offset + dx, with a variance of 1.
    """
    mean_dz, mean_dz_centred = means.chunk(2)
    scale = invstd if weight is None else invstd * weight
    slope = -scale * invstd.square() * mean_dz_centred
    unit = torch.ones_like(mean)
    grad, _, _ = _run(
        x, slope, -scale * mean_dz, dx, mean, unit, False, 0.0, 0.0, "identity", 0.0, backend
    )  # fmt: skip
    return grad
