"""The benchmark cases of every op, shared by ``dlkern bench`` and pytest-benchmark."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import atrous, batch_norm_act, conv_bn_act, depthwise, transposed
from .base import DTYPES, Case, Problem, dtype_name

__all__ = ["DTYPES", "OPS", "Case", "Problem", "dtype_name", "of"]

#: Each op's ``cases(device_type, batch, dtypes)``, in the order in which they run.
OPS = {
    "batch_norm_act": batch_norm_act.cases,
    "conv_bn_act": conv_bn_act.cases,
    "depthwise": depthwise.cases,
    "atrous": atrous.cases,
    "transposed": transposed.cases,
}


def of(
    op: str, device_type: str, *, batch: int | None = None, dtypes: Sequence[torch.dtype] | None = None
) -> list[Case]:
    """The cases of an op on a type of device ("cpu" or "cuda").

    Args:
        op: a name in ``OPS``.
        batch: instead of the op's own: 8 on a CPU, 64 on a GPU.
        dtypes: instead of the op's own: float32 on a CPU; the halves and float32 on a GPU.

    Raises:
        ValueError: an unknown op.
    """
    if op not in OPS:
        raise ValueError(f"op {op!r}: expected one of {', '.join(OPS)}")
    cuda = device_type == "cuda"
    own = (torch.bfloat16, torch.float16, torch.float32) if cuda else (torch.float32,)
    return OPS[op](device_type, batch or (64 if cuda else 8), tuple(dtypes or own))
