"""Compile the Triton kernels of conv_bn_act without a GPU, and print what each takes: a JSON list.

Runs as a script in a process of its own: Triton must not be in its interpreter. Every launch configuration of every
kernel is compiled once in each mode that its products know, dtypes, architectures and epilogues dealt out over them.
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
from dlkern.kernels.triton import gemm_plan
from dlkern.kernels.triton import implicit_gemm as gemm
from dlkern.kernels.triton.gemm_plan import Launch

_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
#: Mode of a product: the kernel's size and the channels (None: plenty, a multiple of 16).
_MODES = {
    "pointwise": (gemm.POINTWISE.value, (1, 1), 64),
    "taps": (gemm.TAPS.value, (3, 3), 64),
    "tap_loop": (gemm.TAP_LOOP.value, (7, 7), 64),
    "flat": (gemm.FLAT.value, (7, 7), 3),
}
#: (norm, activation, with bias, with residual, with c)
_EPILOGUES = (
    ("batch", "identity", False, False, True),
    ("running", "gelu", False, True, False),
    ("none", "relu", True, False, True),
    ("running", "silu", True, False, True),
    ("batch", "identity", True, False, True),
    ("running", "hardswish", False, True, True),
    ("none", "tanh", True, True, False),
)
_NORMS = {"none": gemm.NORM_NONE.value, "running": gemm.NORM_RUNNING.value, "batch": gemm.NORM_BATCH.value}
_GEOMETRY = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w")
#: Sizes that are multiples of 16 in most networks.
_ROUND = ("channels", "out_channels", "depth", "columns")


class Job(NamedTuple):
    """A kernel, its arguments, and whether tensor cores of compute capability 9.0 must stand in it."""

    label: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    arch: int
    divisible: tuple[str, ...]
    options: dict[str, Any]
    wgmma: bool


def _pointers(kernel: Any, data: str, epilogue: tuple[Any, ...]) -> dict[str, str | None]:
    wide, data = "*fp64" if data == "fp64" else "*fp32", f"*{data}"
    if kernel is gemm.input_gradient_kernel:
        return {"dc": data, "weight": data, "dx": data}
    if kernel is gemm.weight_gradient_kernel:
        return {"dc": data, "x": data, "partial": wide}
    norm, _, bias, residual, keeps = epilogue
    running = wide if norm == "running" else None
    return {
        "x": data,
        "weight": data,
        "bias": data if bias else None,
        "residual": data if residual else None,
        **dict.fromkeys(("bn_weight", "bn_bias", "mean", "spread", "mean_out", "invstd_out"), running),
        "y": None if norm == "batch" else data,
        "c": data if keeps else None,
        "partial": wide if norm == "batch" else None,
    }


def _job(kernel: Any, launch: Launch, mode: str, data: str, tf32: bool, arch: int, epilogue: Any, unit: bool) -> Job:
    """``unit``: stride, dilation and groups of 1, which Triton makes constants of."""
    code, size, depth = _MODES[mode]
    if mode == "taps" and launch not in gemm_plan.TENSOR:
        size = (1, 3)  # (less to compile)
    dtype = _TYPES[data]
    gemm_plan.allows_tf32 = lambda: tf32
    int64 = launch.block_n == 32
    meta = gemm_plan.meta(launch, dtype, size, code, int64, None if kernel is gemm.weight_gradient_kernel else depth)
    pointers = _pointers(kernel, data, epilogue)
    options = {name: meta.pop(name) for name in ("num_stages", "maxnreg")}
    num_warps = meta.pop("num_warps")
    constants = {**meta, **{k: None for k, v in pointers.items() if v is None}}
    if kernel is gemm.forward_kernel:
        norm, activation, *_ = epilogue
        constants |= {"EPS": 1e-5, "CODE": CODES[activation], "PARAM": 0.01, "NORM": _NORMS[norm]}
    else:
        options["enable_fp_fusion"] = True
    if unit or (kernel is gemm.input_gradient_kernel and mode in ("taps", "pointwise")):  # (these have no phases)
        ones = ("groups", "stride_h", "stride_w", "dilation_h", "dilation_w")
        constants |= {name: 1 for name in ones if name in kernel.arg_names}
    integers = dict.fromkeys(kernel.arg_names, "i32")
    signature = {**integers, **pointers, **dict.fromkeys(constants, "constexpr")}
    flat = mode == "flat"
    divisible = tuple(name for name in _ROUND if name in kernel.arg_names and not flat)
    tensor_cores = arch == 90 and data in ("fp16", "bf16")
    label = f"{kernel.__name__} {tuple(launch)} {mode} {data} {'tf32' if tf32 else 'ieee'} sm_{arch} {epilogue}"
    return Job(label, kernel, signature, constants, num_warps, arch, divisible, options, tensor_cores)


def _launches(code: int) -> Iterator[tuple[Launch, str | None, bool]]:
    """(configuration, its dtype or None for any that tensor cores take, whether TF32 is allowed) of a mode."""
    for dtype, tf32 in (("fp16", True), ("fp32", False), ("fp64", False)):
        gemm_plan.allows_tf32 = lambda tf32=tf32: tf32
        for launch in gemm_plan.table(_TYPES[dtype], code):
            yield launch, None if tf32 else dtype, tf32


def jobs() -> Iterator[Job]:
    """Every kernel, mode and configuration."""
    epilogues = itertools.cycle(_EPILOGUES)
    kinds = itertools.cycle((("fp16", 90), ("bf16", 80), ("fp32", 90), ("bf16", 90), ("fp16", 80), ("fp32", 80)))
    for kernel in (gemm.forward_kernel, gemm.input_gradient_kernel, gemm.weight_gradient_kernel):
        for mode, (code, _, _) in _MODES.items():
            if kernel is gemm.weight_gradient_kernel and mode == "tap_loop":
                continue  # the kernel does not tell it from "taps"
            for i, (launch, only, tf32) in enumerate(_launches(code)):
                data, arch = next(kinds)
                yield _job(kernel, launch, mode, only or data, tf32, arch, next(epilogues), i % 2 == 0)
                if mode != "taps":  # (which take the longest)
                    data, arch = ("bf16", 80) if arch == 90 else ("fp16", 90)
                    yield _job(kernel, launch, mode, only or data, tf32, arch, next(epilogues), i % 2 == 1)
            next(kinds)


def run(index: int) -> dict[str, Any]:
    """Compile the job of an index (jobs themselves do not pickle)."""
    label, kernel, signature, constants, num_warps, arch, divisible, options, wgmma = list(jobs())[index]
    start = time.perf_counter()
    used = compile_one(kernel, signature, constants, num_warps, arch, divisible=divisible, options=options)
    return {"label": label, "arch": arch, "tensor_cores": wgmma, **used, "s": round(time.perf_counter() - start, 2)}


if __name__ == "__main__":
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        json.dump(list(pool.map(run, range(len(list(jobs()))))), sys.stdout)
