"""Compile the Triton kernels of depthwise without a GPU, and print what each takes: a JSON list.

Runs as a script in a process of its own: Triton must not be in its interpreter. Every launch configuration of every
kernel is compiled in each data type that uses it, for sizes of kernels that fill its registers; architectures,
strides, activations and the rest are dealt out over them.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from aot_compile import compile_one

from dlkern.kernels.activation import CODES
from dlkern.kernels.triton import depthwise_kernels as kernels
from dlkern.kernels.triton import depthwise_plan as planning
from dlkern.kernels.triton import depthwise_weight_kernels as weight_kernels
from dlkern.kernels.triton.depthwise_plan import Geometry, Launch

_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
#: (size of the kernel, stride, dilation) whose taps stay in registers, and those that run in a loop.
_WINDOWS = (
    ((3, 3), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1)),
    ((5, 5), (1, 1), (1, 1)),
    ((5, 5), (2, 2), (1, 1)),
    ((7, 7), (1, 1), (1, 1)),
    ((7, 7), (2, 2), (1, 1)),
)
_LOOPS = (((3, 3), (1, 1), (6, 6)), ((31, 31), (1, 1), (1, 1)))
_ARCHITECTURES = (90, 80, 120, 100)
#: (activation, with bias, with statistics)
_EPILOGUES = (
    ("identity", False, True),
    ("relu6", True, False),
    ("identity", True, True),
    ("gelu", True, False),
    ("silu", False, False),
)


class Job(NamedTuple):
    """A kernel and its arguments; integers named in ``divisible`` are multiples of 16."""

    label: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    arch: int
    divisible: tuple[str, ...]
    options: dict[str, Any]


def _held(kernel: Any, g: Geometry) -> int:
    """Taps that the kernel keeps in registers."""
    if kernel is weight_kernels.weight_gradient_loop_kernel:
        return planning.loop_columns(g.kernel)
    if kernel is weight_kernels.weight_gradient_kernel:
        return g.kernel[0] * g.kernel[1] + 1
    window = g.gradient_window if kernel is kernels.input_gradient_kernel else g.window
    return g.kernel[0] * g.kernel[1] if window else 1


def _job(kernel: Any, g: Geometry, launch: Launch, data: str, last: bool, arch: int, epilogue: Any, int64: bool) -> Job:
    activation, bias, statistics = epilogue
    dtype, pointer = _TYPES[data], f"*{data}"
    wide = "*fp64" if data == "fp64" else "*fp32"
    constants = planning.meta(g, launch, dtype, last, int64)
    num_warps, maxnreg = constants.pop("num_warps"), constants.pop("maxnreg")
    if kernel is kernels.forward_kernel:
        pointers = {"x": pointer, "weight": pointer, "bias": pointer if bias else None, "y": pointer}
        pointers["partial"] = wide if statistics else None
        constants |= {"CODE": CODES[activation], "PARAM": 0.01, "WINDOW": g.window}
        constants["STRIDE_H"] = g.stride[0] if g.window else 1
    elif kernel is kernels.input_gradient_kernel:
        pointers = {"grad_y": pointer, "weight": pointer, "dx": pointer}
        constants |= {"STRIDE_H": 1, "STRIDE_W": 1, "WINDOW": g.gradient_window}
        if g.gradient_window:
            constants |= {"STRIDE_H": g.stride[0], "STRIDE_W": g.stride[1]}
    elif kernel is weight_kernels.weight_gradient_kernel:
        pointers = {"grad_y": pointer, "x": pointer, "partial": wide}
        constants |= {"BIAS": True, "STRIDE_H": g.stride[0]}
    else:
        pointers = {"grad_y": pointer, "x": pointer, "partial": wide}
        constants["COLUMNS"] = planning.loop_columns(g.kernel)
    constants |= {name: None for name, kind in pointers.items() if kind is None}
    steps = {"stride_h": g.stride[0], "stride_w": g.stride[1], "dilation_h": g.dilation[0], "dilation_w": g.dilation[1]}
    # Triton makes a constant of every integer argument that is 1.
    constants |= {name: 1 for name, value in steps.items() if value == 1 and name in kernel.arg_names}
    signature = {**dict.fromkeys(kernel.arg_names, "i32"), **pointers, **dict.fromkeys(constants, "constexpr")}
    form = "channels_last" if last else "contiguous"
    label = f"{kernel.__name__} {tuple(launch)} {form} {data} {g.kernel} stride {g.stride} dilation {g.dilation}"
    label += f" {epilogue}" if kernel is kernels.forward_kernel else ""
    options = {"enable_fp_fusion": True, "maxnreg": maxnreg}
    return Job(label, kernel, signature, constants, num_warps, arch, ("channels",), options)


def problems() -> Iterator[tuple[Any, Geometry, str, bool, Launch]]:
    """Every kernel, geometry, data type, memory format and launch configuration that meet."""
    common = kernels.forward_kernel, kernels.input_gradient_kernel
    for (size, stride, dilation), data, last in itertools.product((*_WINDOWS, *_LOOPS), _TYPES, (True, False)):
        g = Geometry(size, stride, (0, 0, 0, 0), dilation, 1)
        for kernel in (
            *common,
            weight_kernels.weight_gradient_kernel if g.window else weight_kernels.weight_gradient_loop_kernel,
        ):
            held = planning.elements(_held(kernel, g), _TYPES[data].itemsize, last)
            for launch in (planning.ROWS if last else planning.PLANES)[held]:
                yield kernel, g, data, last, launch


def all_jobs() -> Iterator[Job]:
    """Every problem, on architectures and with epilogues in turn."""
    architectures, epilogues = itertools.cycle(_ARCHITECTURES), itertools.cycle(_EPILOGUES)
    for i, (kernel, g, data, last, launch) in enumerate(problems()):
        yield _job(kernel, g, launch, data, last, next(architectures), next(epilogues), i % 7 == 3)
        if i % 4 == 3:
            next(architectures)


def jobs() -> Iterator[Job]:
    """Of ``all_jobs`` the last, which takes the most, for each kernel, form, data type and launch configuration."""
    chosen = {}
    for job in all_jobs():
        c, data = job.constants, job.signature.get("x", job.signature.get("grad_y"))
        chosen[job.kernel.__name__, c.get("WINDOW"), data, c["BLOCK_P"], c["BLOCK_C"]] = job
    yield from chosen.values()


def run(index: int) -> dict[str, Any]:
    """Compile the job of an index of ``all_jobs`` (jobs themselves do not pickle)."""
    label, kernel, signature, constants, num_warps, arch, divisible, options = list(all_jobs())[index]
    start = time.perf_counter()
    used = compile_one(kernel, signature, constants, num_warps, arch, divisible=divisible, options=options)
    return {"label": label, "arch": arch, **used, "s": round(time.perf_counter() - start, 2)}


if __name__ == "__main__":
    every = list(all_jobs())
    labels = {job.label for job in (every if "all" in sys.argv else jobs())}
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        json.dump(list(pool.map(run, [i for i, job in enumerate(every) if job.label in labels])), sys.stdout)
