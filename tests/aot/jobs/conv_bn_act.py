"""Jobs of kernels/triton/implicit_gemm.py, the products of conv_bn_act.

Every kernel in each mode that it knows, in every launch configuration and dtype; epilogues, and sizes of 1, are dealt
out over them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from dlkern.kernels.activation import CODES
from dlkern.kernels.triton import conv_bn_act, gemm_plan, statistics
from dlkern.kernels.triton import implicit_gemm as gemm
from dlkern.kernels.triton.gemm_plan import Launch

from . import ARCHITECTURES, Job

#: (dtype, whether TF32 is allowed)
_TYPES = (("fp16", True), ("bf16", True), ("fp32", True), ("fp32", False), ("fp64", False))
_TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
#: Mode of a product: the kernel's size and the channels (plenty, a multiple of 16, but where they are few).
_MODES = {
    "pointwise": (gemm.POINTWISE.value, (1, 1), 64),
    "taps": (gemm.TAPS.value, (3, 3), 64),
    "tap_loop": (gemm.TAP_LOOP.value, (7, 7), 64),
    "flat": (gemm.FLAT.value, (7, 7), 3),
    "phases": (gemm.PHASES.value, (4, 4), 64),
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
#: Sizes that are multiples of 16 in most networks.
_ROUND = ("channels", "out_channels", "depth", "columns")


def _pointers(kernel: Any, data: str, epilogue: tuple[Any, ...]) -> dict[str, str | None]:
    wide, data = "*fp64" if data == "fp64" else "*fp32", f"*{data}"
    if kernel is gemm.input_gradient_kernel:
        norm, _, bias, _, keeps = epilogue
        if norm == "batch":  # a gradient
            return {"dc": data, "weight": data, "dx": data, "scale": None, "shift": None, "y": None}
        transposed = {"dc": data, "weight": data, "dx": data if keeps else None, "y": data}
        shift = wide if norm == "running" else data if bias else None
        return {**transposed, "scale": wide if norm == "running" else None, "shift": shift}
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


def _job(
    kernel: Any,
    launch: Launch,
    mode: str,
    data: str,
    tf32: bool,
    epilogue: tuple[Any, ...],
    unit: bool,
    skip: bool = False,
) -> Job:
    """``unit``: stride, dilation and groups of 1, which Triton makes constants of; ``skip``: SKIP, dilations vary."""
    code, size, depth = _MODES[mode]
    if mode == "taps" and launch not in gemm_plan.TENSOR:
        size = (1, 3)  # (less to compile)
    int64 = launch.block_n == 32
    meta = gemm_plan.meta(
        launch, _TORCH[data], size, code, int64, None if kernel is gemm.weight_gradient_kernel else depth, skip=skip
    )
    pointers = _pointers(kernel, data, epilogue)
    options = {name: meta.pop(name) for name in ("num_warps", "num_stages", "maxnreg")}
    options["enable_fp_fusion"] = kernel is not gemm.forward_kernel
    constants = {**meta, **{k: None for k, v in pointers.items() if v is None}}
    words = [kernel.__name__, mode, "x".join(map(str, launch)), "tf32" if data == "fp32" and tf32 else data]
    if kernel is gemm.forward_kernel:
        norm, activation, bias, residual, keeps = epilogue
        constants |= {"EPS": 1e-5, "CODE": CODES[activation], "PARAM": 0.01, "NORM": _NORMS[norm]}
        words += [f"norm-{norm}", activation, *["bias"] * bias, *["residual"] * residual, *["c"] * keeps]
    if kernel is gemm.input_gradient_kernel:
        norm, activation, *_ = epilogue
        constants |= {"CODE": CODES["identity" if norm == "batch" else activation], "PARAM": 0.01}
        words += [] if norm == "batch" else ["transposed", f"norm-{norm}", activation]
    if skip:
        words.append("skip")
        constants |= {name: 1 for name in ("groups", "stride_h", "stride_w") if name in kernel.arg_names}
    elif mode == "phases":
        constants |= {"groups": 1, "dilation_h": 1, "dilation_w": 1}
    elif unit or (kernel is gemm.input_gradient_kernel and mode in ("taps", "pointwise")):  # (these have no phases)
        ones = ("groups", "stride_h", "stride_w", "dilation_h", "dilation_w")
        constants |= {name: 1 for name in ones if name in kernel.arg_names}
        words.append("unit")
    signature = {**dict.fromkeys(kernel.arg_names, "i32"), **pointers, **dict.fromkeys(constants, "constexpr")}
    divisible = tuple(name for name in _ROUND if name in kernel.arg_names and mode != "flat")
    where = tuple(arch for arch in ARCHITECTURES if launch in gemm_plan.table(_TORCH[data], code, arch, skip=skip))
    wgmma = data in ("fp16", "bf16")
    return Job(" ".join(words), kernel, signature, constants, options, divisible, wgmma, where)


def _products() -> Iterator[Job]:
    epilogues = itertools.cycle(_EPILOGUES)
    unit = itertools.cycle((True, False, True, True, False))
    for kernel in (gemm.forward_kernel, gemm.input_gradient_kernel, gemm.weight_gradient_kernel):
        for mode, (code, _, _) in _MODES.items():
            if kernel is gemm.weight_gradient_kernel and mode == "tap_loop":
                continue  # the kernel does not tell it from "taps"
            if mode == "phases" and kernel is not gemm.input_gradient_kernel:
                continue
            for data, tf32 in _TYPES:
                with mock.patch.object(gemm_plan, "allows_tf32", lambda tf32=tf32: tf32):
                    for launch in gemm_plan.table(_TORCH[data], code):
                        # a transposed convolution's epilogue where its phases are, a gradient elsewhere
                        epilogue = next(epilogues)
                        if kernel is gemm.input_gradient_kernel and mode != "phases":
                            epilogue = _EPILOGUES[0]
                        yield _job(kernel, launch, mode, data, tf32, epilogue, next(unit))


def _atrous() -> Iterator[Job]:
    """Taps outside of the image left out: every configuration in half types and float32."""
    for kernel in (gemm.forward_kernel, gemm.input_gradient_kernel, gemm.weight_gradient_kernel):
        for data, tf32 in (("bf16", True), ("fp32", False)):
            with mock.patch.object(gemm_plan, "allows_tf32", lambda tf32=tf32: tf32):
                for launch in gemm_plan.table(_TORCH[data], gemm.TAPS.value):
                    yield _job(kernel, launch, "taps", data, tf32, _EPILOGUES[0], False, skip=True)


def _sums() -> Iterator[Job]:
    """What follows a product: statistics condensed, shares of a weight gradient added."""
    options = {"num_warps": 4}
    for wide in ("fp32", "fp64"):
        blocks = {"BLOCK_S": statistics.BLOCK_SHARES, "BLOCK_C": statistics.BLOCK_CHANNELS}
        signature = {
            **dict.fromkeys(("partial", "out"), f"*{wide}"),
            **dict.fromkeys(("channels", "shares", "shares_per_split"), "i32"),
            **dict.fromkeys(blocks, "constexpr"),
        }
        kernel = gemm.condense_statistics_kernel
        yield Job(f"{kernel.__name__} {wide}", kernel, signature, blocks, options)
    kernel = gemm.sum_splits_kernel
    for data, wide in (("fp16", "fp32"), ("bf16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
        signature = {"partial": f"*{wide}", "out": f"*{data}", "size": "i32", "splits": "i32", "BLOCK": "constexpr"}
        yield Job(f"{kernel.__name__} {data}", kernel, signature, {"BLOCK": conv_bn_act._SUM_BLOCK}, options)


def jobs() -> Iterator[Job]:
    """Every kernel, mode, configuration and dtype."""
    yield from _products()
    yield from _atrous()
    yield from _sums()
