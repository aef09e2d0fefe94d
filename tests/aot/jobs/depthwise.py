"""Jobs of kernels/triton/depthwise*.py.

Every launch configuration of every kernel in each data type that uses it (float16 and bfloat16, which share theirs, in
turn), for the size of kernel that fills its registers most; strides, activations, statistics and offsets in 64 bits
are dealt out over them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from dlkern.kernels.activation import CODES
from dlkern.kernels.triton import depthwise as launcher
from dlkern.kernels.triton import depthwise_kernels as kernels
from dlkern.kernels.triton import depthwise_plan as planning
from dlkern.kernels.triton import depthwise_weight_kernels as weight_kernels
from dlkern.kernels.triton.depthwise_plan import Geometry, Launch

from . import Job

_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
#: (size of the kernel, stride, dilation) whose taps stay in registers, and those that run in a loop; hardest last.
_WINDOWS = (((3, 3), 2, 1), ((3, 3), 1, 1), ((5, 5), 2, 1), ((5, 5), 1, 1), ((7, 7), 1, 1), ((7, 7), 2, 1))
_LOOPS = (((3, 3), 1, 6), ((31, 31), 1, 1))
#: (activation, with bias, with statistics)
_EPILOGUES = (
    ("identity", False, True),
    ("relu6", True, False),
    ("identity", True, True),
    ("gelu", True, False),
    ("silu", False, False),
)


def _held(kernel: Any, g: Geometry) -> int:
    """Taps that the kernel keeps in registers."""
    if kernel is weight_kernels.weight_gradient_loop_kernel:
        return planning.loop_columns(g.kernel)
    if kernel is weight_kernels.weight_gradient_kernel:
        return g.kernel[0] * g.kernel[1] + 1
    window = g.gradient_window if kernel is kernels.input_gradient_kernel else g.window
    return g.kernel[0] * g.kernel[1] if window else 1


def _problems() -> Iterator[tuple[Any, Geometry, str, bool, Launch]]:
    """Every kernel, geometry, data type, memory format and launch configuration that meet."""
    for (size, stride, dilation), data, last in itertools.product((*_LOOPS, *_WINDOWS), _TYPES, (True, False)):
        g = Geometry(size, (stride, stride), (0, 0, 0, 0), (dilation, dilation), 1)
        weight = weight_kernels.weight_gradient_kernel if g.window else weight_kernels.weight_gradient_loop_kernel
        for kernel in (kernels.forward_kernel, kernels.input_gradient_kernel, weight):
            held = planning.elements(_held(kernel, g), _TYPES[data].itemsize, last)
            for launch in (planning.ROWS if last else planning.PLANES)[held]:
                yield kernel, g, data, last, launch


def _job(kernel: Any, g: Geometry, data: str, last: bool, launch: Launch, epilogue: Any, int64: bool) -> Job:
    activation, bias, statistics = epilogue
    dtype, pointer = _TYPES[data], f"*{data}"
    wide = "*fp64" if data == "fp64" else "*fp32"
    meta = planning.meta(g, launch, dtype, last, int64)
    constants = {name: value for name, value in meta.items() if name in kernel.arg_names}
    options = {name: value for name, value in meta.items() if name not in kernel.arg_names}
    window, words = g.window, []
    pointers: dict[str, str | None]
    if kernel is kernels.forward_kernel:
        pointers = {"x": pointer, "weight": pointer, "bias": pointer if bias else None, "y": pointer}
        pointers["partial"] = wide if statistics else None
        constants |= {"CODE": CODES[activation], "PARAM": 0.01, "WINDOW": window}
        constants["STRIDE_H"] = g.stride[0] if window else 1
        words = [activation, *["bias"] * bias, *["statistics"] * statistics]
    elif kernel is kernels.input_gradient_kernel:
        window = g.gradient_window
        pointers = {"grad_y": pointer, "weight": pointer, "dx": pointer}
        vertical, horizontal = g.stride if window else (1, 1)
        constants |= {"STRIDE_H": vertical, "STRIDE_W": horizontal, "WINDOW": window}
    else:
        pointers = {"grad_y": pointer, "x": pointer, "partial": wide}
        if kernel is weight_kernels.weight_gradient_kernel:
            constants |= {"BIAS": True, "STRIDE_H": g.stride[0]}
        else:
            constants["COLUMNS"] = planning.loop_columns(g.kernel)
    constants |= {name: None for name, kind in pointers.items() if kind is None}
    steps = {"stride_h": g.stride[0], "stride_w": g.stride[1], "dilation_h": g.dilation[0], "dilation_w": g.dilation[1]}
    # Triton makes a constant of every integer argument that is 1.
    constants |= {name: 1 for name, value in steps.items() if value == 1 and name in kernel.arg_names}
    signature = {**dict.fromkeys(kernel.arg_names, "i32"), **pointers, **dict.fromkeys(constants, "constexpr")}
    where = ["window" if window else "loop", "x".join(map(str, launch)), "rows" if last else "planes", data]
    size = [f"{g.kernel[0]}x{g.kernel[1]}", f"stride{g.stride[0]}", f"dilation{g.dilation[0]}"]
    label = " ".join([kernel.__name__, *where, *size, *words, *["int64"] * int64])
    return Job(label, kernel, signature, constants, options, ("channels",))


def _merges() -> Iterator[Job]:
    kernel = weight_kernels.merge_weight_gradient_kernel
    blocks = {"BLOCK_S": launcher._MERGE_SHARES, "BLOCK_C": launcher._MERGE_CHANNELS}
    for data, bias in (("fp32", True), ("bf16", True), ("fp16", False), ("fp64", True)):
        pointers = {"partial": "*fp64" if data == "fp64" else "*fp32", "dweight": f"*{data}"}
        pointers["dbias"] = f"*{data}" if bias else None  # type: ignore[assignment]
        constants: dict[str, Any] = {"TAPS": 9, **blocks, **({} if bias else {"dbias": None})}
        signature = {**dict.fromkeys(kernel.arg_names, "i32"), **pointers, **dict.fromkeys(constants, "constexpr")}
        label = " ".join([kernel.__name__, data, *["bias"] * bias])
        yield Job(label, kernel, signature, constants, {"num_warps": 4})


def jobs() -> Iterator[Job]:
    """Of all problems the last, which takes the most, for each kernel, form, data type and launch configuration."""
    halves = {}
    chosen: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for problem in _problems():
        kernel, g, data, last, launch = problem
        window = g.gradient_window if kernel is kernels.input_gradient_kernel else g.window
        key = (kernel.__name__, window, last, launch)
        if data in ("fp16", "bf16"):
            wanted = halves.setdefault(key, ("fp16", "bf16")[len(halves) % 2])
            if data != wanted:
                continue
        chosen[(*key, data)] = problem
    epilogues = itertools.cycle(_EPILOGUES)
    for number, problem in enumerate(chosen.values()):
        yield _job(*problem, next(epilogues), number % 7 == 3)
    yield from _merges()
