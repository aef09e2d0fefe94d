"""What is compiled: one module an op, whose ``jobs()`` deals its kernels out over configurations and dtypes."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from typing import Any, NamedTuple

from triton.runtime.jit import JITFunction

from dlkern.kernels import triton as kernels

ARCHITECTURES = (80, 90, 100, 120)


class Job(NamedTuple):
    """A kernel and how it is compiled.

    ``label`` is the op, the kernel's name and further words that together are no other job's. ``signature`` has
    Triton's name of each argument's type ("constexpr" for those in ``constants``). Pointers, and the integers named in
    ``divisible``, are multiples of 16. ``options`` are Triton's (num_warps among them). ``wgmma``: whether tensor cores
    of compute capability 9.0 must stand in sm_90's code. ``architectures`` are those that it is launched on.
    """

    label: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]
    divisible: tuple[str, ...] = ()
    wgmma: bool = False
    architectures: tuple[int, ...] = ARCHITECTURES


@functools.cache
def every_job() -> dict[str, Job]:
    """All jobs by label."""
    found: dict[str, Job] = {}
    for module in pkgutil.iter_modules(__path__):
        for job in importlib.import_module(f"{__name__}.{module.name}").jobs():
            named = job._replace(label=f"{module.name} {job.label}")
            if named.label in found:
                raise ValueError(f"two jobs have the label {named.label!r}")
            found[named.label] = named
    return found


def without_jobs() -> list[str]:
    """Kernels (module.name) that no job compiles."""
    compiled = {id(job.kernel) for job in every_job().values()}
    missing = []
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        for name, value in inspect.getmembers(module, lambda v: isinstance(v, JITFunction)):
            here = value.fn.__module__ == module.__name__
            if here and name.endswith("_kernel") and id(value) not in compiled:
                missing.append(f"{info.name}.{name}")
    return missing
