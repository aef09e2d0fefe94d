"""The same kernels compiled at run time by NVRTC, through cupy: for an installation that has no nvcc.

The sources are those that nvcc builds. A group of kernels is compiled when one of them is first launched (a second
or two; cupy keeps the result on disk).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .plan import Launch


def sources() -> Path:
    """The folder that has ``cuda/`` and ``include/``: beside this file as installed, or csrc of the clone."""
    here = Path(__file__).resolve().parent
    installed = here / "csrc"
    return installed if installed.is_dir() else here.parents[1] / "csrc"


@functools.cache
def toolkit_include() -> Path:
    """The folder of cuda_fp16.h: a CUDA toolkit's, or that of the packages that PyTorch's wheels depend on.

    Raises:
        RuntimeError: there is none.
    """
    found = []
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            found.append(Path(os.environ[name], "include"))
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec is not None else ():
        found += [*sorted(Path(root).glob("cu[0-9]*/include"), reverse=True), Path(root, "cuda_runtime", "include")]
    found += [Path("/usr/local/cuda/include"), Path("/usr/include")]
    for folder in found:
        if (folder / "cuda_fp16.h").is_file() and (folder / "cuda_bf16.h").is_file():
            return folder
    raise RuntimeError(
        "NVRTC needs cuda_fp16.h, and it was not found: pip install nvidia-cuda-runtime, or set CUDA_HOME"
    )


@functools.cache
def options() -> tuple[str, ...]:
    """NVRTC's options, without the architecture."""
    folders = sources(), sources() / "include", toolkit_include()
    # cupy keeps what it has compiled by source and options, and does not look into headers
    content = b"\0".join(path.read_bytes() for path in sorted(folders[0].rglob("*.*h")))
    key = hashlib.sha256(content).hexdigest()[:16]
    return ("-std=c++17", f"-DDLKERN_HEADERS=0x{key}", *(f"-I{folder}" for folder in folders))


def op_of(kernel: str) -> str:
    """The op of a kernel, by its full name."""
    return kernel.split("::")[2]


def source(kernel: str) -> str:
    """The source file of a kernel."""
    return (sources() / "cuda" / f"{op_of(kernel)}.cu").read_text()


def plan_of(kernel: str) -> ModuleType:
    """The plan that asks for a kernel: <op>_plan.py."""
    return importlib.import_module(f".{op_of(kernel)}_plan", __package__)


class Nvrtc:
    """Runs launches through cupy (see ``dlkern.kernels.cuda.Runtime``)."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[str, int], Any] = {}

    def multiprocessors(self, device: torch.device) -> int:
        return _multiprocessors(device)

    def _kernel(self, name: str, index: int) -> Any:
        kernel = self._kernels.get((name, index))
        if kernel is None:
            import cupy

            names = plan_of(name).group(name)
            module = cupy.RawModule(code=source(name), options=options(), name_expressions=names)
            for member in names:
                self._kernels[member, index] = module.get_function(member)
            kernel = self._kernels[name, index]
        return kernel

    def run(self, launches: Sequence[Launch], device: torch.device) -> None:
        import cupy
        import numpy

        with torch.cuda.device(device):
            index, stream = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
            with cupy.cuda.Device(index), cupy.cuda.ExternalStream(stream, index):
                for launch in launches:
                    # an array of one structure: cupy passes it by value
                    argument = numpy.frombuffer(launch.args, dtype=f"V{len(launch.args)}")
                    kernel = self._kernel(launch.kernel, index)
                    kernel(launch.grid, (launch.threads,), (argument,), shared_mem=launch.shared_bytes)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
