"""The CUDA C++ kernels of batch_norm_act with their own launcher, on the CPU: the host shim in place of a device.

Every launch runs under several orders of its threads, with AddressSanitizer round each tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from unittest import mock

import cuda_host
import host_shim
import pytest
import torch
from batch_norm_act_cases import Case, check, run
from cuda_host import HostRuntime
from host_shim import ShimError
from test_batch_norm_act import CASES
from torch import Tensor

from dlkern.kernels import cuda
from dlkern.kernels.cuda import batch_norm_act_plan, plan
from dlkern.kernels.cuda.plan import Launch

if host_shim.missing() is not None:
    pytest.skip(str(host_shim.missing()), allow_module_level=True)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


runtime = pytest.fixture(cuda_host.forced, name="runtime")


OWN = [
    # long enough for several shares and blocks: channels last, planes, and one channel of either
    Case((129, 3, 33), dtype=F64, residual="contiguous"),
    Case((40, 2, 16, 16), dtype=F16, residual="contiguous"),
    Case((40, 5, 8, 8), dtype=BF16, layout="channels_last", residual="channels_last"),
    Case((1500, 9), residual="contiguous"),
    Case((3000, 1)),
    Case((1, 1, 70, 70)),
    # one of several tensors off its alignment by one element
    Case((3, 16, 4, 8), residual="offset"),
    Case((3, 16, 4, 8), grad="offset"),
    Case((3, 16, 4, 8), dtype=BF16, param_dtype=F32, activation="gelu", grad="expanded"),
    # more channels than a block has side by side
    Case((5, 300)),
    Case((2, 520, 2, 2), layout="channels_last", dtype=F16, param_dtype=F32),
    # one element
    Case((1, 1), training=False),
    Case((1, 1, 1, 1), training=False, residual="contiguous", dtype=F64),
]  # fmt: skip


@pytest.mark.parametrize("case", [*OWN, *CASES], ids=str)
def test_parity(case: Case, runtime: HostRuntime) -> None:
    check(case, ("cpu", "cuda"))
    assert runtime.names >= {"forward", "backward"}
    assert ("statistics" in runtime.names) == case.batch_stats


@pytest.mark.parametrize("dtype", plan.TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_kernel(dtype: torch.dtype, runtime: HostRuntime) -> None:
    """Planes and rows, in packs of 16 bytes and in single elements: each kernel of a dtype runs, and is right."""
    for shape, layout in (((3, 16, 4, 8), "contiguous"), ((3, 16, 4, 8), "offset"), ((3, 5, 4, 7), "contiguous")):
        check(Case(shape, layout=layout, dtype=dtype, residual=layout, grad=layout), ("cpu", "cuda"))
    for channels in (16, 5):
        check(Case((3, channels, 4, 7), layout="channels_last", dtype=dtype, residual="channels_last"), ("cpu", "cuda"))
    assert {launch.kernel for launch in runtime.ran} == set(batch_norm_act_plan.kernels(dtype))


def test_shares_of_a_reduction(runtime: HostRuntime) -> None:
    """What several blocks have of a channel is merged."""
    check(Case((129, 7, 33), activation="silu"), ("cpu", "cuda"))
    assert all(launch.grid[1] > 2 for launch in runtime.ran if "merge" not in launch.kernel)


def test_a_tensor_that_is_too_small_is_reported(runtime: HostRuntime) -> None:
    """The sanitizer looks at the launcher's own tensors: one element less than a kernel writes is an error."""

    def shortened(launches: Sequence[Launch], device: torch.device) -> None:
        *others, last = launches
        y = last.fields["y"]
        assert isinstance(y, Tensor)
        host.run([*others, last._replace(fields={**last.fields, "y": y.flatten()[:-1]})], device)

    host = HostRuntime()
    message = r"forward<float, 1, false>: (.|\n)*heap-buffer-overflow(.|\n)*WRITE of size 4"
    with mock.patch.object(runtime, "run", shortened), pytest.raises(ShimError, match=message):
        run(Case((4, 3, 5, 7)), ("cpu", "cuda"))


def test_a_barrier_that_is_missing_is_reported(runtime: HostRuntime) -> None:
    """Each kernel that reduces, without its barriers, while the others have theirs."""
    broken = HostRuntime(edits=(("__syncthreads();", ";"),))

    def run_some(only: str, launches: Sequence[Launch], device: torch.device) -> None:
        for launch in launches:
            (broken if f"::{only}<" in launch.kernel else runtime).run([launch], device)

    original = HostRuntime()
    for kernel in ("statistics", "merge_statistics", "backward_sums", "merge_sums"):
        some = mock.Mock(run=functools.partial(run_some, kernel), multiprocessors=original.multiprocessors)
        with mock.patch.object(cuda, "forced", some), pytest.raises(ShimError, match=f"{kernel}<.*race: "):
            run(Case((1100, 8)), ("cpu", "cuda"))
