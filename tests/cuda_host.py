"""The cuda backend on CPU tensors: its launches run by the host shim in place of a device.

Every launch runs under several orders of its threads, with AddressSanitizer round each tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from unittest import mock

import host_shim
import torch
from host_shim import Struct
from torch import Tensor

from dlkern import dispatch
from dlkern.kernels import cuda
from dlkern.kernels.cuda import nvrtc
from dlkern.kernels.cuda.plan import Launch


@functools.cache
def program(op: str, dtype: torch.dtype, edits: tuple[tuple[str, str], ...] = ()) -> host_shim.Program:
    """The kernels of an op that serve a dtype (as NVRTC sees the source: without the host's part)."""
    kernels = tuple(nvrtc.plan_of(f"dlkern::cuda::{op}::").kernels(dtype))
    return host_shim.build(nvrtc.sources() / "cuda" / f"{op}.cu", kernels, ("__CUDACC_RTC__",), edits)


class HostRuntime:
    """Runs launches through the host shim (see ``dlkern.kernels.cuda.Runtime``), and keeps them."""

    def __init__(self, edits: tuple[tuple[str, str], ...] = ()) -> None:
        self.edits = edits
        self.ran: list[Launch] = []

    def multiprocessors(self, device: torch.device) -> int:
        assert device.type == "cpu"
        return 4  # few: several blocks, and several shares of a reduction, on small tensors

    def run(self, launches: Sequence[Launch], device: torch.device) -> None:
        for launch in launches:
            self.ran.append(launch)
            x = next(t for name in ("x", "grad_y") if isinstance(t := launch.fields.get(name), Tensor))
            argument = Struct(launch.args, dict(_pointers(launch)))
            program(nvrtc.op_of(launch.kernel), x.dtype, self.edits).launch(
                launch.kernel, launch.grid, (launch.threads,), [argument], shared=launch.shared_bytes
            )

    @property
    def names(self) -> set[str]:
        """The kernels that ran, without namespace and template arguments."""
        return {launch.kernel.rpartition("::")[2].partition("<")[0] for launch in self.ran}


def _pointers(launch: Launch) -> Iterator[tuple[int, Tensor]]:
    """(offset in the kernels' argument, tensor) of each pointer that is given."""
    for i, name in enumerate(nvrtc.plan_of(launch.kernel).ARGS.pointers):
        value = launch.fields.get(name)
        if isinstance(value, Tensor):
            yield 8 * i, value


def forced() -> Iterator[HostRuntime]:
    """The body of a fixture: the cuda backend on CPU tensors, by the runtime that it yields."""
    available, runtime = dispatch.unavailable, HostRuntime()
    with (
        mock.patch.object(cuda, "forced", runtime),
        mock.patch.object(dispatch, "unavailable", lambda name: None if name == "cuda" else available(name)),
        mock.patch.object(dispatch, "_choices", {}),
    ):
        yield runtime
