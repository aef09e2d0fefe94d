"""The CUDA C++ kernels of batch_norm_act with their own launcher, on the CPU: the host shim in place of a device.

Every launch runs under several orders of its threads, with AddressSanitizer round each tensor.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import host_shim
import pytest
import torch
from batch_norm_act_cases import Case, check, run
from host_shim import ShimError, Struct
from test_batch_norm_act import CASES
from torch import Tensor

from dlkern import dispatch
from dlkern.kernels import cuda
from dlkern.kernels.cuda import plan
from dlkern.kernels.cuda.plan import Launch

_SOURCE = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "batch_norm_act.cu"

if host_shim.missing() is not None:
    pytest.skip(str(host_shim.missing()), allow_module_level=True)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@functools.cache
def program(dtype: torch.dtype, edits: tuple[tuple[str, str], ...] = ()) -> host_shim.Program:
    """The kernels that serve a dtype (as NVRTC sees the source: without the host's part)."""
    return host_shim.build(_SOURCE, tuple(plan.kernels(dtype)), ("__CUDACC_RTC__",), edits)


class HostRuntime:
    """Runs launches through the host shim (see ``dlkern.kernels.cuda.Runtime``), and counts kernels."""

    def __init__(self, edits: tuple[tuple[str, str], ...] = ()) -> None:
        self.edits = edits
        self.ran: list[Launch] = []

    def multiprocessors(self, device: torch.device) -> int:
        assert device.type == "cpu"
        return 4  # few: several blocks, and several shares of a reduction, on small tensors

    def run(self, launches: Sequence[Launch], device: torch.device) -> None:
        for launch in launches:
            self.ran.append(launch)
            x = launch.fields["x"]
            assert isinstance(x, Tensor)
            argument = Struct(plan.pack(launch.fields), dict(_pointers(launch)))
            program(x.dtype, self.edits).launch(
                launch.kernel, launch.grid, (launch.threads,), [argument], shared=launch.shared_bytes
            )


def _pointers(launch: Launch) -> Iterator[tuple[int, Tensor]]:
    """(offset in the kernels' argument, tensor) of each pointer that is given."""
    for i, (name, letter) in enumerate(plan.ARGS):
        value = launch.fields.get(name)
        if isinstance(value, Tensor):
            assert letter == "Q", name
            yield struct.calcsize("@" + "".join(kind for _, kind in plan.ARGS[:i])), value


@pytest.fixture
def runtime() -> Iterator[HostRuntime]:
    """The cuda backend on CPU tensors."""
    available, runtime = dispatch.unavailable, HostRuntime()
    with (
        mock.patch.object(cuda, "forced", runtime),
        mock.patch.object(dispatch, "unavailable", lambda name: None if name == "cuda" else available(name)),
        mock.patch.object(dispatch, "_choices", {}),
    ):
        yield runtime


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
    names = {launch.kernel.removeprefix(plan.NAMESPACE).partition("<")[0] for launch in runtime.ran}
    assert names >= {"forward", "backward"}
    assert ("statistics" in names) == case.batch_stats


@pytest.mark.parametrize("dtype", plan.TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_kernel(dtype: torch.dtype, runtime: HostRuntime) -> None:
    """Planes and rows, in packs of 16 bytes and in single elements: each kernel of a dtype runs, and is right."""
    for shape, layout in (((3, 16, 4, 8), "contiguous"), ((3, 16, 4, 8), "offset"), ((3, 5, 4, 7), "contiguous")):
        check(Case(shape, layout=layout, dtype=dtype, residual=layout, grad=layout), ("cpu", "cuda"))
    for channels in (16, 5):
        check(Case((3, channels, 4, 7), layout="channels_last", dtype=dtype, residual="channels_last"), ("cpu", "cuda"))
    assert {launch.kernel for launch in runtime.ran} == set(plan.kernels(dtype))


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
