"""act(batch_norm(x) + residual) in numba: in its simulator where there is no GPU, and compiled to PTX without one.

The simulator has a Python thread for each thread of a block, so shapes are small.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import evidence
import parity
import pytest
import torch
from batch_norm_act_cases import Case, check, data, run
from conftest import HAS_CUDA
from torch import Tensor

import dlkern
from dlkern import dispatch
from dlkern.functional import batch_norm_act
from dlkern.kernels.activation import NAMES, Activation
from dlkern.kernels.reference import activation as reference_activation
from dlkern.kernels.reference.batch_norm_act import Request

if importlib.util.find_spec("numba") is None or importlib.util.find_spec("numba.cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

# infinity and NaN come and go without a word on a GPU
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in scalar:RuntimeWarning")

DEVICE = "cuda" if HAS_CUDA else "cpu"
TARGET = (DEVICE, "numba")
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ROOT = Path(__file__).parent.parent

CASES = [
    # odd and tiny, of every rank; more channels than a block has, and fewer; one channel, one position
    Case((3, 3, 5, 7)),
    Case((2, 1)),
    Case((5, 7), residual="contiguous", activation="tanh"),
    Case((9, 11)),
    Case((3, 5, 17), residual="contiguous"),
    Case((2, 3, 3, 2, 3)),
    Case((1, 5, 3, 4)),
    Case((6, 9, 1, 1), layout="channels_last"),
    # memory
    Case((3, 5, 3, 5), layout="offset", residual="offset", grad="offset"),
    Case((3, 5, 3, 5), layout="sliced", residual="sliced", grad="transposed"),
    Case((6, 5), layout="transposed", grad="sliced"),
    Case((3, 5, 3, 5), layout="channels_last", residual="contiguous", grad="channels_last"),
    Case((3, 5, 3, 5), residual="channels_last", grad="channels_last"),
    Case((2, 3, 2, 3, 2), layout="channels_last", residual="channels_last", grad="sliced"),
    Case((3, 5, 3, 5), layout="channels_last", activation="tanh", residual="expanded", grad="expanded"),
    # dtypes, and float16 with float32 parameters
    Case((3, 3, 5, 5), dtype=F64, activation="gelu"),
    Case((3, 3, 5, 5), dtype=F64, layout="channels_last", residual="channels_last", activation="silu"),
    Case((3, 3, 5, 5), dtype=F16),
    Case((3, 3, 5, 5), dtype=F16, param_dtype=F32, residual="contiguous"),
    Case((3, 3, 5, 5), dtype=F16, param_dtype=F32, layout="channels_last", activation="gelu", training=False),
    # modes
    Case((3, 3, 5, 4), training=False),
    Case((3, 3, 5, 4), layout="channels_last", training=False, residual="channels_last", activation="elu"),
    Case((1, 3, 1, 1), training=False),
    Case((3, 3, 5, 4), track=False, residual="contiguous"),
    Case((3, 3, 5, 4), weight=False, bias=False),
    Case((3, 3, 5, 4), bias=False, residual="contiguous"),
    Case((3, 3, 5, 4), weight=False, training=False),
    Case((3, 3, 5, 4), momentum=1.0),
    # every activation; with a residual the derivative may come from the output
    *(Case((2, 2, 5, 4), activation=name, layout="channels_last") for name in NAMES),
    *(Case((2, 2, 5, 4), activation=name, residual="contiguous") for name in NAMES),
    Case((2, 2, 5, 4), activation="leaky_relu", param=-0.3, residual="contiguous"),
    Case((2, 2, 5, 4), activation="elu", param=-0.5, residual="contiguous"),
    # the mean is far larger than the deviation: a sum of squares would cancel
    Case((6, 2, 7, 7), mean=1e4),
    Case((6, 2, 7, 7), layout="channels_last", mean=1e4),
    Case((6, 2, 5, 5), dtype=F64, mean=1e7),
    Case((3, 2, 5, 4), std=0.0, mean=2.0),  # the variance is eps
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case) -> None:
    check(case, TARGET)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_kinks_and_not_finite_values_as_in_torch(name: str, dtype: torch.dtype) -> None:
    act = Activation(name, {"leaky_relu": 0.25, "elu": 1.5}.get(name, 0.0))
    special = [0.0, 3.0, -3.0, 6.0, 50.0, -50.0, 200.0, -200.0, 1e-30, float("nan"), float("inf"), float("-inf")]
    values = torch.tensor(special, dtype=dtype)
    zero, one = torch.zeros(1, dtype=dtype, device=DEVICE), torch.ones(1, dtype=dtype, device=DEVICE)

    def numba_op(z: Tensor) -> Tensor:
        with dlkern.backend("numba"):
            return batch_norm_act(z, zero, one, eps=0.0, activation=act)

    def torch_op(z: Tensor) -> Tensor:
        return reference_activation.forward(z, act)

    def value_and_slope(op: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.clone().requires_grad_()
        y = op(z)
        (slope,) = torch.autograd.grad(y, z, torch.ones_like(y))
        return y.detach(), slope

    mine = value_and_slope(numba_op, values[:, None].to(DEVICE))
    # PyTorch's scalar and vector loops differ at a few: either is right
    alone = [value_and_slope(torch_op, v[None]) for v in values]
    among = [value_and_slope(torch_op, v.repeat(64)) for v in values]
    # PyTorch's derivative of hardsigmoid is float32's 1 / 6 in float64 too
    precision = F32 if name == "hardsigmoid" else dtype
    for i, what in enumerate(("y", "dx")):
        truths = (torch.stack([pair[i][0] for pair in pairs]) for pairs in (alone, among))
        parity.assert_elementwise(what, mine[i][:, 0], *truths, dtype=precision)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_gradcheck(last: bool, training: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 2, 2, 2, dtype=F64, generator=generator).to(DEVICE) for _ in range(2))
    if last:
        x, residual = (v.contiguous(memory_format=torch.channels_last) for v in (x, residual))
    weight, bias = (torch.randn(2, dtype=F64, generator=generator).to(DEVICE) for _ in range(2))
    mean, var = torch.zeros(2, dtype=F64, device=DEVICE), torch.ones(2, dtype=F64, device=DEVICE)

    def op(*tensors: Tensor) -> Tensor:
        x, weight, bias, residual = tensors
        with dlkern.backend("numba"):
            return batch_norm_act(
                x, mean.clone(), var.clone(), weight, bias, training=training, activation="silu", residual=residual
            )

    inputs = [v.requires_grad_() for v in (x, weight, bias, residual)]
    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repeats_are_bit_identical(layout: str) -> None:
    case = Case((3, 3, 5, 5), layout=layout, activation="gelu")
    for first, again in zip(run(case, TARGET), run(case, TARGET), strict=True):
        assert (first is None and again is None) or torch.equal(first, again)


def test_only_what_is_needed() -> None:
    """Each gradient alone is what it is among all of them, and the others are None."""
    values = data(Case((3, 3, 4, 4), residual="contiguous", activation="silu"), DEVICE)
    module = dispatch.implementation("batch_norm_act", "numba")
    options = {"batch_stats": True, "activation": Activation("silu")}
    inputs = values.x, values.weight, values.bias, values.residual
    y, mean, invstd = module.forward(*inputs, None, None, momentum=0.1, eps=1e-5, **options)
    assert y.dtype == F32

    def gradients(*needs: bool) -> tuple[Tensor | None, ...]:
        named = dict(zip(("needs_x", "needs_params", "needs_residual"), needs, strict=True))
        return module.backward(values.grad, *inputs, None, mean, invstd, **options, **named)

    everything = gradients(True, True, True)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        wanted = (needs[0], needs[1], needs[1], needs[2])
        for found, of_all, is_wanted in zip(gradients(*needs), everything, wanted, strict=True):
            assert (found is not None) == is_wanted
            assert found is None or torch.equal(found, of_all)


def test_strided_statistics_move_in_place() -> None:
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    both = torch.tensor([[0.0, 1.0]] * 2, device=DEVICE)
    with dlkern.backend("numba"):
        batch_norm_act(x, both[:, 0], both[:, 1], training=True, momentum=1.0)
    torch.testing.assert_close(both, torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3))], 1))


def test_supports() -> None:
    module = dispatch.implementation("batch_norm_act", "numba")
    request = Request(DEVICE, F32, F32, False, True, False, "relu")
    assert module.supports(request) is None
    assert module.supports(request._replace(dtype=F16)) is None
    assert "bfloat16" in module.supports(request._replace(dtype=BF16, param_dtype=F32))
    assert "bfloat16" in module.supports(request._replace(param_dtype=BF16))
    assert "complex64" in module.supports(request._replace(dtype=torch.complex64))
    assert "'mps'" in module.supports(request._replace(device="mps"))
    other = "cuda" if DEVICE == "cpu" else "cpu"
    assert repr(other) in module.supports(request._replace(device=other)) or "CUDA" in module.supports(
        request._replace(device=other)
    )


def test_bad_calls() -> None:
    module = dispatch.implementation("batch_norm_act", "numba")
    options = {"momentum": 0.1, "eps": 1e-5}
    x = torch.randn(2, 3, device=DEVICE)
    with pytest.raises(ValueError, match="running statistics"):
        module.forward(x, *[None] * 5, batch_stats=False, activation=Activation("relu"), **options)
    with pytest.raises(ValueError, match="unknown activation 'mish'"):
        module.forward(x, *[None] * 5, batch_stats=True, activation=Activation("mish"), **options)


def test_never_by_default() -> None:
    for device in ("cpu", "cuda"):
        assert (
            dispatch.choose("batch_norm_act", Request(device, F32, F32, False, True, False, "relu")).backend != "numba"
        )


# --------------------------------------------------------------------------------- outside of the simulator
def _python(code: str) -> subprocess.CompletedProcess[str]:
    """A process without the simulator, in which this tree's dlkern is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


#: Prints what is in the PTX of every kernel in several combinations of types and options.
_COMPILE = """
import json, re
from types import SimpleNamespace
from unittest import mock

import numpy as np
from numba import cuda, types
from numba.cuda import dispatcher

from dlkern.kernels.activation import from_name
from dlkern.kernels.numba.batch_norm_act import kernels

TYPES = {"f2": types.float16, "f4": types.float32, "f8": types.float64}


def array(name, dims=1):
    return types.none if name is None else types.Array(TYPES[name], dims, "C")


def signatures(x, wide, param, residual, y, running):
    sizes = (types.int64,) * 3
    stats, affine = (array(wide),) * 2, (array(param),) * 2
    tensors = (array(x), array(x), *affine, array(residual), array(y), *stats)
    return {
        "statistics": (array(x), array(wide, 3), *sizes),
        "merge_statistics": (
            array(x), array(wide, 3), *stats, *(array(running),) * 2, types.float64, types.float64, *sizes
        ),
        "running_statistics": (array(param or wide),) * 2 + (*stats, types.float64),
        "forward": (array(x), *affine, array(residual or y), *stats, array(x), *sizes),
        "sums": (*tensors, array(wide, 3), *sizes),
        "merge_sums": (array(wide, 3), *affine, array(running and wide, 2), types.int64),
        "backward": (*tensors, array(running and wide, 2), array(x), array(residual or y), *sizes),
    }


found = []
for cc, options in CHOICES:
    activation, x, wide, *rest = options
    made = kernels(from_name(activation), np.dtype(wide).type)
    with mock.patch.object(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=tuple(cc))):
        for name, signature in signatures(x, wide, *rest).items():
            ptx, _ = cuda.compile_ptx(getattr(made, name).py_func, signature, cc=tuple(cc))
            found.append([name, cc, x, wide, re.search(r"\\.target (\\w+)", ptx)[1], ".visible .entry" in ptx,
                          ptx.count(".f64"), ptx.count("bar.sync")])
print(json.dumps(found))
"""
#: Compute capability, and activation, x, statistics, parameters, residual, y in its place, running statistics.
_CHOICES = [
    ((8, 0), ("gelu", "f4", "f4", "f4", "f4", None, "f4")),
    ((9, 0), ("relu", "f2", "f4", "f4", None, "f2", None)),
    ((9, 0), ("elu", "f4", "f4", "f2", None, None, "f2")),
    ((8, 0), ("silu", "f8", "f8", None, "f8", None, "f8")),
]


@pytest.mark.slow
def test_compiles_to_ptx() -> None:
    """Every kernel for compute capability 8.0 and 9.0, without a device: a stand-in tells device functions of one."""
    out = _python(_COMPILE.replace("CHOICES", repr(_CHOICES)))
    assert out.returncode == 0, out.stderr[-4000:]
    found = json.loads(out.stdout)
    assert len(found) == 7 * len(_CHOICES)
    for name, cc, _, wide, target, entry, doubles, barriers in found:
        assert target.startswith(f"sm_{cc[0]}{cc[1]}"), name
        assert entry, name
        # a literal in the wrong place would make float64 of float32's arithmetic
        if wide == "f4" and name in ("statistics", "forward", "sums", "backward"):
            assert doubles == 0, name
        assert (barriers > 0) == (name in ("statistics", "sums")), name
    for x in {choice[1][1] for choice in _CHOICES}:
        evidence.record("batch_norm_act", "numba", {"f2": F16, "f4": F32, "f8": F64}[x], "compiled")


def test_without_a_device_the_reason_is_given() -> None:
    out = _python("import dlkern, sys; print(dlkern.available_backends()['numba'])")
    assert out.returncode == 0, out.stderr[-4000:]
    assert out.stdout.strip() == "None" if HAS_CUDA else "NUMBA_ENABLE_CUDASIM=1" in out.stdout


def test_numba_is_imported_only_when_asked_for() -> None:
    out = _python("import sys, torch, dlkern; dlkern.functional.batch_norm_act(torch.ones(2, 3), None, None, "
                  "training=True); print('numba' in sys.modules)")  # fmt: skip
    assert out.returncode == 0, out.stderr[-4000:]
    assert out.stdout.strip() == "False"
