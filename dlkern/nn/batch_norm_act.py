"""BatchNorm with its activation, and optionally a residual, in one layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlkern import activations
from dlkern.functional.batch_norm_act import check, run
from dlkern.kernels.activation import Activation
from dlkern.kernels.reference import activation as reference_activation
from dlkern.ops import sync_batch_norm


class State(NamedTuple):
    """What a call of a BatchNorm works with, read from the module when the call begins."""

    training: bool
    momentum: float
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    tracked: Tensor | None

    def refused(self) -> None:
        """The call did not run: it does not count."""
        if self.tracked is not None:
            self.tracked.sub_(1)


def begin(norm: _BatchNorm) -> State:
    """Read a BatchNorm for one call: its mode, parameters, running statistics and momentum.

    ``num_batches_tracked`` counts as in torch.nn.BatchNorm2d; ``State.refused`` takes it back.
    """
    training, momentum, tracked = norm.training, norm.momentum, None
    parameters, buffers = norm._parameters, norm._buffers
    weight, bias = own(norm, parameters, "weight"), own(norm, parameters, "bias")
    running_mean, running_var = own(norm, buffers, "running_mean"), own(norm, buffers, "running_var")
    if training and norm.track_running_stats:
        tracked = norm.num_batches_tracked
    elif training:  # batch statistics, and the running ones, if any, are left alone
        running_mean = running_var = None
    if momentum is None:
        # the cumulative average over the batches so far, this one included
        momentum = 0.0 if tracked is None else 1.0 / (float(tracked) + 1.0)
    if tracked is not None:
        tracked.add_(1)  # before the op, as in torch.nn: recomputation under a checkpoint stops inside the op
    return State(training, momentum, running_mean, running_var, weight, bias, tracked)


def apply(
    norm: _BatchNorm, x: Tensor, activation: Activation, residual: Tensor | None = None, overwrite: bool = False
) -> Tensor:
    """What ``activation(norm(x) + residual)`` computes, by the fused op.

    ``overwrite``: nobody else holds x, and in inference the result may take its memory.

    A SyncBatchNorm in training that has several ranks to share statistics with takes them from all of them, on the
    CPU, too, where PyTorch's own refuses to. All ranks must then make the call.
    """
    group = sync_group(norm)
    if group is not None:
        return _synchronised(norm, x, activation, residual, group)
    state = begin(norm)
    try:
        return run(
            x,
            state.running_mean,
            state.running_var,
            state.weight,
            state.bias,
            residual,
            state.training,
            state.momentum,
            norm.eps,
            activation,
            overwrite,
        )
    except (TypeError, ValueError, RuntimeError):  # refused: nothing ran
        state.refused()
        raise


def sync_group(norm: nn.Module) -> Any:
    """The process group whose statistics a call of this norm takes now; None where its own batch is all.

    Only a torch.nn.SyncBatchNorm in training mode has one, where torch.distributed is initialised and this process
    is not alone.
    """
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _synchronised(norm: _BatchNorm, x: Tensor, activation: Activation, residual: Tensor | None, group: Any) -> Tensor:
    """``apply`` over the ranks of a process group."""
    norm._check_input_dim(x)
    backend = sync_batch_norm.choose(x, residual is not None, activation)
    if backend == "torch" and x.device.type != "cpu":  # on the CPU PyTorch has none of its own
        z = norm(x)
        return reference_activation.forward(z if residual is None else z + residual, activation)
    state = begin(norm)
    statistics, parameters = (state.running_mean, state.running_var), (state.weight, state.bias)
    try:
        check(x, *statistics, *parameters, residual)
    except (TypeError, ValueError, RuntimeError):
        state.refused()
        raise
    return sync_batch_norm.apply(
        x, *parameters, residual, *statistics, state.momentum, norm.eps, activation, group, backend
    )


def own(norm: nn.Module, table: dict[str, Any], name: str) -> Any:
    """A tensor of the module's, without nn.Module's attribute access, which would cost as much as all the rest.

    A name that a parametrization took out of the table is read as an attribute.
    """
    return table[name] if name in table else getattr(norm, name)


class _BatchNormAct(_BatchNorm):
    """The common part; see :class:`BatchNormAct2d`."""

    def __init__(self, *args: Any, activation: str | nn.Module = "relu", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        activations.resolve(activation)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(batch_norm(x) + residual)``; shapes as in the class's description."""
        self._check_input_dim(x)
        return apply(self, x, activations.resolve(self.activation), residual)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return f"{text}, activation={self.activation!r}" if isinstance(self.activation, str) else text


class BatchNormAct1d(_BatchNormAct, nn.BatchNorm1d):
    """``activation(BatchNorm1d(x) + residual)``; x (N, C) or (N, C, L). See :class:`BatchNormAct2d`."""


class BatchNormAct2d(_BatchNormAct, nn.BatchNorm2d):
    """``activation(BatchNorm2d(x) + residual)`` as one fused op; x (N, C, H, W).

    Arguments, Parameters, buffers and state_dict keys are those of torch.nn.BatchNorm2d.
    ``activation`` is a name (relu, relu6, leaky_relu, silu, gelu, gelu_tanh, hardswish, hardsigmoid,
    sigmoid, tanh, elu, identity) or a torch.nn module of one of them. ``forward(x, residual=None)``
    adds ``residual``, a tensor like x, before the activation.

    Raises:
        ValueError: an unknown activation, or an input of another rank or number of channels.
    """


class BatchNormAct3d(_BatchNormAct, nn.BatchNorm3d):
    """``activation(BatchNorm3d(x) + residual)``; x (N, C, D, H, W). See :class:`BatchNormAct2d`."""
