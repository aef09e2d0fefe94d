"""The device's own ceilings: how fast it copies memory and multiplies matrices, through PyTorch.

A kernel that moves bytes is judged by the copy, one that multiplies by the matrix rate, both taken in the same run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dlkern.bench import measure

_CUDA = torch.cuda.is_available()
_COPY_BYTES = (1 << 30) if _CUDA else (64 << 20)
_MATRIX_SIZE = 8192 if _CUDA else 1024
_DTYPES = (torch.bfloat16, torch.float16, torch.float32) if _CUDA else (torch.float32,)


@pytest.fixture
def rate(benchmark: Any, record: Any, device: torch.device, request: pytest.FixtureRequest) -> Any:
    """rate(what, step, work, unit, facts): times the step and records ``work`` of a unit a second."""

    def measured(what: str, step: Any, work: float, unit: str, facts: dict[str, Any]) -> None:
        comparison = measure.compare({what: step}, device=device, min_seconds=request.config.getoption("--min-seconds"))
        benchmark.group = "device"
        benchmark.pedantic(step, rounds=3)
        found = work / comparison.time(what).median
        record({"what": what, **facts}, comparison, {"rate": round(found, 3), "unit": unit})
        print(f"\n{what}: {found:.4g} {unit}")

    return measured


def test_copy(rate: Any, device: torch.device) -> None:
    """Bytes read and bytes written, both counted."""
    source = torch.rand(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    rate("copy", lambda: target.copy_(source), 2 * _COPY_BYTES / 1e9, "GB/s", {"bytes": _COPY_BYTES})


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_matrix_product(dtype: torch.dtype, rate: Any, device: torch.device) -> None:
    """Random operands, not zeros, which some devices multiply faster. float32 as torch's TF32 settings have it."""
    n, name = _MATRIX_SIZE, str(dtype).removeprefix("torch.")
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    facts = {"size": n, "dtype": name}
    rate(f"matrix product {name}", lambda: torch.mm(a, b, out=out), 2 * n**3 / 1e12, "TFLOP/s", facts)
