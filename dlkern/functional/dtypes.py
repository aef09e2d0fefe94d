"""Which dtypes may be mixed."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALF_DTYPES = (torch.float16, torch.bfloat16)


def check_parameter_dtype(name: str, parameter: torch.dtype, data: torch.dtype) -> None:
    """A batch norm's parameters have the data's dtype, or float32 beside a half one; TypeError else."""
    if parameter != data and not (parameter == torch.float32 and data in HALF_DTYPES):
        allowed = f"{data} or torch.float32" if data in HALF_DTYPES else f"{data}"
        raise TypeError(f"{name}: expected {allowed} with an input of {data}, got {parameter}")
