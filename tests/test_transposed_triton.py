"""The Triton kernels of transposed: right in every launch configuration, by phases and in the other modes.

Without a GPU they run in Triton's interpreter, which computes TF32 in float32 and bfloat16 wrongly: bfloat16 is only
compiled, ahead of time (tests/aot), and everything else of it waits for a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from conftest import HAS_CUDA
from transposed_cases import Case, check

from dlkern.kernels.triton import gemm_plan
from dlkern.kernels.triton import implicit_gemm as gemm
from dlkern.kernels.triton.gemm_plan import DOUBLE, EXACT, TENSOR, Launch

DEVICE = "cuda" if HAS_CUDA else "cpu"
TARGET = (DEVICE, "triton")

#: DCGAN's layer: rows, columns and depth of several tiles each, the last of them partial; and one for small tiles.
_CASE = Case((2, 35, 6, 7), 34, layout="channels_last", activation="silu")
_SMALL = Case((1, 17, 4, 3), 18, layout="channels_last", activation="silu")


def _launches() -> Iterator[tuple[torch.dtype, Launch]]:
    halves = itertools.cycle((torch.float32, torch.float16))
    for launch in (*TENSOR, *EXACT, *DOUBLE):
        if launch.num_warps > 4 and launch not in DOUBLE:
            continue  # loops over taps are compiled for at most 4 warps
        wide = torch.float64 if launch in DOUBLE else torch.float32 if launch in EXACT else next(halves)
        yield wide, launch


@pytest.mark.parametrize(("dtype", "launch"), list(_launches()), ids=str)
def test_every_configuration(dtype: torch.dtype, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward by phases; the gradients are a convolution's of 16 taps."""
    monkeypatch.setattr(gemm_plan, "allows_tf32", lambda: launch in TENSOR)
    assert launch in gemm_plan.table(dtype, gemm.PHASES.value)
    monkeypatch.setattr(gemm_plan, "forced", launch)
    modes = []
    original = gemm_plan.mode
    monkeypatch.setattr(gemm_plan, "mode", lambda *a, **k: modes.append(original(*a, **k)) or modes[-1])
    check((_CASE if launch.block_m > 32 else _SMALL)._replace(dtype=dtype), TARGET)
    assert modes == [gemm.PHASES.value, gemm.TAP_LOOP.value, gemm.TAP_LOOP.value]


CASES = [
    # without a stride; one output pixel a phase; more stride than kernel, with phases that no tap reaches
    Case((2, 18, 1, 1), 17, stride=(1, 1), padding=(0, 0), layout="channels_last"),
    Case((1, 17, 3, 3), 5, (2, 1), (3, 2), (0, 0), layout="channels_last", bias=True, activation="silu"),
    # output_padding, groups, dilation (with a stride: a loop over all taps)
    Case((2, 34, 4, 3), 6, (3, 3), (2, 2), (1, 1), (1, 1), 2, bias=True, activation="silu"),
    Case((2, 18, 3, 4), 5, (3, 2), (2, 3), (1, 0), (1, 2), 1, (3, 2), activation="silu"),
    Case((1, 18, 3, 3), 4, (3, 3), (1, 1), (2, 2), (0, 0), 1, (2, 2), layout="channels_last", activation="tanh"),
    # an output_padding beyond the stride, below the dilation
    Case((1, 17, 3, 3), 4, (2, 2), (1, 1), (0, 0), (1, 2), 1, (3, 3), norm="none", bias=True, activation="silu"),
    # few channels in, few out; 1 x 1; depthwise
    Case((2, 3, 4, 4), 19, activation="leaky_relu"),
    Case((2, 19, 4, 4), 2, activation="tanh", norm="none", layout="channels_last"),
    Case((2, 19, 4, 4), 6, (1, 1), (1, 1), (0, 0), layout="channels_last"),
    Case((2, 4, 4, 4), 4, (3, 3), (2, 2), (1, 1), groups=4, activation="hardswish"),
    # float32 parameters beside half data; strides of their own
    Case((2, 17, 3, 4), 7, dtype=torch.float16, param_dtype=torch.float32, layout="channels_last"),
    Case((2, 5, 3, 4), 7, layout="transposed", activation="silu"),
    Case((2, 5, 3, 4), 7, layout="sliced", activation="silu"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case) -> None:
    check(case, TARGET)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["running", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_inference_is_one_kernel(norm: str, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch norm and the activation in the epilogue."""
    from dlkern.kernels.triton import batch_norm_act

    monkeypatch.setattr(batch_norm_act, "forward", None)
    case = Case((2, 17, 3, 4), 6, norm=norm, bias=bias, dtype=dtype, layout="channels_last", activation="silu")
    check(case, TARGET, gradients=False)
    check(case._replace(kernel=(3, 3), stride=(1, 1), affine=False), TARGET, gradients=False)


def test_offsets_in_int64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_plan, "_INT32_END", 0)
    check(_SMALL, TARGET)
