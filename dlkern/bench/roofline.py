"""How near a row is to what the machine can do: bytes and FLOPs of a case against rates measured in the same run.

A case cannot take less time than the larger of its bytes by the copy bandwidth and its FLOPs by the matrix rate.
Bytes are the compulsory ones: each tensor as often as the arithmetic needs it anew. Batch statistics must be known
before the first element is normalised, and their gradients likewise, so that training reads its tensors twice.

Source: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import measure
from .cases import Case

_COPY_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # beyond every cache
_MATRIX = {"cpu": 512, "cuda": 4096}


class Peak(NamedTuple):
    """Bytes per second of a copy (read and written), and FLOP per second of a matrix product."""

    bandwidth: float
    rate: float


class Work(NamedTuple):
    """What a call of a case moves and computes at least."""

    bytes: int
    flops: int

    def seconds(self, peak: Peak) -> float:
        """The least time."""
        return max(self.bytes / peak.bandwidth, self.flops / peak.rate)


@functools.cache
def peak(device_type: str, dtype: torch.dtype, threads: int) -> Peak:
    """The rates of this device, measured once; ``threads`` is what they are remembered by."""
    del threads
    device = torch.device(device_type)
    half = _COPY_BYTES[device_type] // 2
    source, target = (torch.zeros(half, dtype=torch.uint8, device=device) for _ in range(2))
    n = _MATRIX[device_type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def copy() -> Tensor:
        return target.copy_(source)

    def product() -> Tensor:
        return torch.mm(a, b, out=out)

    rates = []
    for fn, amount in ((copy, 2 * half), (product, 2 * n**3)):
        found = measure.compare({"": fn}, device=device, min_seconds=0.1, min_rounds=5, max_rounds=200)
        rates.append(amount / min(found.samples[""]))  # the best, as a roof
    return Peak(*rates)


def work(case: Case) -> Work:
    """Bytes and FLOPs of a case's call: the forward, and in training the backward."""
    plain = case.plain()
    size = torch.finfo(case.dtype).bits // 8
    x, y = (math.prod(shape) for shape in (case.shape, case.out_shape))
    residual = y if case.residual else 0
    parameters = sum(p.numel() for p in plain.parameters())
    convolved = 0 if plain.conv is None else y * plain.conv.weight[0].numel()
    if not case.training:
        return Work(size * (x + residual + y + parameters), 2 * convolved + 4 * y)
    normed = plain.bn is not None
    kept = y if normed and plain.conv is not None else 0  # the convolution's output, which the norm needs again
    forward = x + y + residual + parameters + 2 * kept + (x if normed and plain.conv is None else 0)
    again = 2 if normed else 1
    backward = again * (y + (kept or x)) + residual + x + (x if kept else 0) + parameters
    return Work(size * (forward + backward + residual), 6 * convolved + 14 * y)


def facts(case: Case, seconds: float, device: torch.device) -> dict[str, Any]:
    """Plain values for a results file: the work, the rates, and the share of the roof that a time reaches."""
    of = peak(device.type, case.dtype, torch.get_num_threads())
    done = work(case)
    return {
        "bytes": done.bytes,
        "flops": done.flops,
        "gigabytes_per_second": round(of.bandwidth / 1e9, 2),
        "gigaflops": round(of.rate / 1e9, 2),
        "least_ms": float(f"{done.seconds(of) * 1e3:.4g}"),
        "share": round(done.seconds(of) / seconds, 3),
    }
