"""act(batch_norm(x)) into channels of a wider map on the CPU; the contract is kernels/reference/atrous.py.

The kernels of csrc/cpu/batch_norm_act.cpp write, and in backward read, the wider map in place.
"""

from __future__ import annotations

import functools

from torch import Tensor

from ..activation import Activation
from ..reference import atrous as reference
from . import batch_norm_act
from .batch_norm_act import supports

__all__ = ["backward", "forward", "supports"]


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    out: Tensor,
    *,
    batch_stats: bool,
    momentum: float,
    eps: float,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """Fill ``out``; the mean and invstd that were used."""
    _, mean, invstd = batch_norm_act.forward(
        x,
        weight,
        bias,
        None,
        running_mean,
        running_var,
        batch_stats=batch_stats,
        momentum=momentum,
        eps=eps,
        activation=activation,
        out=out,
    )
    return mean, invstd


backward = functools.partial(reference.backward_by, batch_norm_act)
