"""Depthwise convolution in numba: in its simulator where there is no GPU, and compiled to PTX without one.

The simulator has a Python thread for each thread of a block, so shapes are small.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HAS_CUDA
from depthwise_cases import SMALL, Case, check, request

if not HAS_CUDA:
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # read when numba is imported, as find_spec of a submodule does
if importlib.util.find_spec("numba") is None or importlib.util.find_spec("numba.cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from dlkern.kernels.activation import from_name
from dlkern.kernels.numba import depthwise as numba_op

DEVICE = "cuda" if HAS_CUDA else "cpu"
TARGET = (DEVICE, "numba")

CASES = [
    Case((1, 2, 5, 4), padding=(3, 0, 1, 4), dilation=(2, 1), statistics=True),
    Case((1, 2, 4, 5), (2, 3), (3, 2), (1, 1, 1, 1), layout="contiguous"),
    Case((1, 1, 1, 1), (1, 1), padding=(0, 0, 0, 0), statistics=True),
    Case((2, 2, 3, 4), (2, 2), grad="expanded", weight="sliced"),
    Case((2, 2, 3, 4), (2, 2), grad="sliced", layout="transposed"),
    # a mean far from 0: the statistics must not cancel
    Case((2, 2, 4, 5), (1, 2), padding=(0, 0, 0, 0), mean=3000.0, statistics=True),
]


@pytest.mark.parametrize("case", [*SMALL, *CASES], ids=str)
def test_parity(case: Case) -> None:
    check(case, TARGET)


def test_bit_for_bit_repeatable() -> None:
    for first, again in zip(check(CASES[0], TARGET), check(CASES[0], TARGET), strict=True):
        assert (first is None and again is None) or torch.equal(first, again)


def test_supports() -> None:
    case = Case((1, 1, 1, 1))
    assert numba_op.supports(request(case, DEVICE)) is None
    assert "mps" in numba_op.supports(request(case, "mps"))
    assert "bfloat16" in numba_op.supports(request(case._replace(dtype=torch.bfloat16), DEVICE))
    assert "complex64" in numba_op.supports(request(case, DEVICE)._replace(dtype=torch.complex64))
    assert "relu" in numba_op.supports(request(case._replace(activation="relu", statistics=True), DEVICE))


def test_bad_calls() -> None:
    x, weight = torch.randn(2, 3, 5, 5, device=DEVICE), torch.randn(3, 1, 3, 3, device=DEVICE)
    options = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "activation": from_name("relu")}
    with pytest.raises(ValueError, match="'identity', not 'relu'"):
        numba_op.forward(x, weight, None, **options, statistics=True)
    for image in (x[:0], x[..., :2]):
        with pytest.raises(ValueError, match="nothing to convolve"):
            numba_op.forward(image, weight, None, **options, statistics=False)


_COMPILE = """
import json
from types import SimpleNamespace
from unittest import mock

import numpy as np
from numba import cuda, types
from numba.cuda import dispatcher

from dlkern.kernels.activation import from_name
from dlkern.kernels.numba.depthwise import kernels

found = []
for data, wide, cc in ((types.float16, types.float32, (8, 0)), (types.float64, types.float64, (9, 0))):
    made = kernels(from_name("gelu"), getattr(np, wide.name))
    x, partial = data[::1], wide[:, :, ::1]
    n, pair, size = types.int64, types.UniTuple(types.int64, 2), types.UniTuple(types.int64, 3)
    geometry = (size, size, pair, pair, pair, pair, types.boolean)
    signatures = [
        ("forward", (x, x, x, x, *geometry)),
        ("forward", (x, x, types.none, x, *geometry)),
        ("statistics", (x, partial, n, size, types.boolean)),
        ("merge_statistics", (x, partial, wide[::1], wide[::1], size, types.boolean)),
        ("input_gradient", (x, x, x, *geometry)),
        ("weight_gradient", (x, x, wide[:, ::1], n, *geometry)),
        ("merge_weight_gradient", (wide[:, ::1], x)),
    ]
    with mock.patch.object(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=cc)):
        for name, signature in signatures:
            ptx, _ = cuda.compile_ptx(getattr(made, name).py_func, signature, cc=cc)
            found.append([name, wide.name, ".visible .entry" in ptx, ".f64" in ptx])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_compiles_to_ptx() -> None:
    """Every kernel, without a device: a stand-in tells device functions of one."""
    environment = {k: v for k, v in os.environ.items() if k not in ("NUMBA_ENABLE_CUDASIM", "TRITON_INTERPRET")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, sys.path)])
    out = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-4000:]
    found = json.loads(out.stdout)
    assert len(found) == 14
    for name, wide, entry, doubles in found:
        assert entry, name
        # a literal in the wrong place would make float64 of float32's arithmetic
        assert doubles == (wide == "float64" or name == "merge_statistics"), (name, wide)
