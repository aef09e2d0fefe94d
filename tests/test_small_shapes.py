"""Small and odd shapes of every op on every GPU backend: what a sanitizer is run over, and quick everywhere.

compute-sanitizer slows a kernel down by two orders of magnitude; these cases are small, and there are twenty and more
for each op. Without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import batch_norm_act_cases
import conv_bn_act_cases
import depthwise_cases
import pytest
import torch
from conftest import HAS_CUDA

import dlkern

_DEVICE = "cuda" if HAS_CUDA else "cpu"
F64, F16, BF16 = torch.float64, torch.float16, torch.bfloat16


def _targets(op: str, *backends: str) -> list[Any]:
    """(device, backend) of each backend that has the op's kernels for a GPU; the others are named as skipped."""
    found = []
    for backend in backends:
        reason = dlkern.available_backends()[backend]
        marks = [pytest.mark.skip(reason=f"{backend}: {reason}")] if reason is not None else []
        found.append(pytest.param((_DEVICE, backend), marks=marks, id=backend))
    return found


_Norm = batch_norm_act_cases.Case
NORM_CASES = [
    _Norm((2, 1)),
    _Norm((3, 129)),
    _Norm((1, 1, 1, 2)),
    _Norm((2, 1, 3, 1), activation="silu"),
    _Norm((5, 3, 7, 9)),
    _Norm((5, 3, 7, 9), residual="contiguous"),
    _Norm((3, 33, 5, 3), layout="channels_last"),
    _Norm((3, 33, 5, 3), layout="channels_last", residual="channels_last", activation="tanh"),
    _Norm((2, 130, 1, 1), layout="channels_last"),
    _Norm((1, 2, 17, 65)),
    _Norm((9, 2, 3, 3), residual="contiguous", activation="gelu"),
    _Norm((4, 6, 5, 5), dtype=F64),
    _Norm((4, 6, 5, 5), dtype=F64, layout="channels_last", activation="elu"),
    _Norm((3, 4, 8, 8), layout="offset", residual="offset", grad="offset"),
    _Norm((3, 5, 9, 7), layout="sliced", grad="sliced"),
    _Norm((3, 5, 9, 7), activation="silu", grad="expanded"),
    _Norm((3, 5, 9, 7), training=False),
    _Norm((3, 5, 9, 7), training=False, residual="contiguous", layout="channels_last"),
    _Norm((3, 5, 9, 7), weight=False, bias=False),
    _Norm((3, 5, 9, 7), track=False, layout="channels_last"),
    _Norm((3, 5, 9, 7), mean=100.0),
    _Norm((2, 3, 3, 4, 5)),
]

_Conv = conv_bn_act_cases.Case
CONV_CASES = [
    _Conv((1, 1, 1, 1), 1, (1, 1), padding=(0, 0), norm="running"),
    _Conv((2, 3, 5, 5), 4),
    _Conv((2, 3, 5, 5), 4, layout="channels_last", residual=True),
    _Conv((2, 3, 6, 5), 5, stride=(2, 2), norm="running"),
    _Conv((1, 2, 7, 4), 3, (5, 3), padding=(2, 1), norm="running", activation="silu"),
    _Conv((2, 4, 5, 5), 6, (1, 1), padding=(0, 0)),
    _Conv((2, 4, 5, 5), 6, (1, 1), padding=(0, 0), layout="channels_last", norm="running"),
    _Conv((2, 4, 5, 5), 6, groups=2),
    _Conv((1, 6, 4, 4), 6, groups=6, norm="running"),
    _Conv((1, 2, 9, 9), 3, dilation=(2, 2), padding=(2, 2)),
    _Conv((1, 2, 5, 5), 3, dilation=(6, 6), padding=(6, 6), norm="running"),
    _Conv((2, 3, 5, 5), 4, norm="none", bias=True),
    _Conv((2, 3, 5, 5), 4, norm="none", bias=True, residual=True, layout="channels_last"),
    _Conv((2, 3, 5, 5), 4, dtype=F64),
    _Conv((2, 3, 5, 5), 4, affine=False),
    _Conv((2, 3, 5, 5), 17, mean=20.0, norm="running"),
    _Conv((3, 17, 3, 3), 33, norm="running", layout="channels_last"),
    _Conv((2, 3, 4, 9), 4, (2, 2), padding=(0, 0), stride=(2, 1)),
    _Conv((2, 3, 5, 5), 4, dtype=F16, param_dtype=torch.float32, norm="running"),
    _Conv((2, 3, 5, 5), 4, dtype=F16, param_dtype=torch.float32, layout="channels_last"),
]


@pytest.mark.parametrize("target", _targets("batch_norm_act", "triton", "cuda", "numba"))
@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_batch_norm_act(case: Any, target: tuple[str, str]) -> None:
    batch_norm_act_cases.check(case, target)


@pytest.mark.gpu
@pytest.mark.parametrize("target", _targets("batch_norm_act", "triton", "cuda"))
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_norm_act_in_half(layout: str, dtype: torch.dtype, target: tuple[str, str]) -> None:
    case = _Norm((3, 33, 5, 3), layout=layout, dtype=dtype, param_dtype=torch.float32, residual=layout)
    batch_norm_act_cases.check(case, target)


@pytest.mark.parametrize("target", _targets("conv_bn_act", "triton"))
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_conv_bn_act(case: Any, target: tuple[str, str]) -> None:
    conv_bn_act_cases.check(case, target)


@pytest.mark.gpu
def test_conv_bn_act_in_bfloat16() -> None:
    case = _Conv((3, 17, 6, 5), 33, dtype=BF16, param_dtype=torch.float32, layout="channels_last")
    conv_bn_act_cases.check(case, (_DEVICE, "triton"))


_Depthwise = depthwise_cases.Case
DEPTHWISE_CASES = [
    *depthwise_cases.SMALL,
    _Depthwise((1, 1, 1, 1), (1, 1), padding=(0, 0, 0, 0)),
    _Depthwise((1, 1, 1, 1), padding=(1, 1, 1, 1), layout="contiguous"),
    _Depthwise((2, 33, 3, 4), statistics=True),
    _Depthwise((1, 3, 4, 70), layout="contiguous", bias=True),
    _Depthwise((1, 4, 5, 5), (9, 2), padding=(6, 4, 1, 0)),
    _Depthwise((1, 4, 5, 5), dilation=(7, 7), padding=(7, 7, 7, 7)),
    _Depthwise((1, 2, 5, 5), dilation=(1, 6), padding=(1, 1, 6, 6), layout="contiguous"),
    _Depthwise((2, 3, 7, 6), stride=(3, 3), grad="expanded"),
    _Depthwise((2, 3, 7, 6), layout="sliced", grad="transposed"),
    _Depthwise((1, 5, 4, 4), mean=100.0, statistics=True),
    # whole packs of channels
    *(_Depthwise((2, 8, 9, 7), (k, k), (s, s), (k // 2,) * 4, statistics=True) for k in (3, 5, 7) for s in (1, 2)),
    _Depthwise((1, 8, 20, 9), (31, 5), padding=(15, 15, 2, 2)),
    _Depthwise((1, 8, 7, 9), (4, 3), (2, 3), (2, 1, 1, 1), (3, 2), statistics=True),
]


@pytest.mark.parametrize("target", _targets("depthwise", "triton", "cuda", "numba"))
@pytest.mark.parametrize("case", DEPTHWISE_CASES, ids=str)
def test_depthwise(case: Any, target: tuple[str, str]) -> None:
    reason = depthwise_cases.implementation(target[1]).supports(depthwise_cases.request(case, target[0]))
    if reason is not None:
        pytest.skip(reason)
    depthwise_cases.check(case, target)


@pytest.mark.gpu
@pytest.mark.parametrize("target", _targets("depthwise", "triton", "cuda"))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_depthwise_in_bfloat16(layout: str, target: tuple[str, str]) -> None:
    depthwise_cases.check(_Depthwise((2, 9, 6, 7), dtype=BF16, layout=layout, statistics=True), target)


def test_there_are_twenty_shapes_of_each_op() -> None:
    assert min(len(NORM_CASES), len(CONV_CASES), len(DEPTHWISE_CASES)) >= 20
