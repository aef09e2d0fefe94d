"""Compile the Triton kernels of batch_norm_act without a GPU, and print what each takes: a JSON list.

Runs as a script in a process of its own: Triton must not be in its interpreter. Every launch configuration of
every kernel is compiled once; dtypes, architectures and options are dealt out over them so that each appears.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dlkern.kernels.activation import CODES
from dlkern.kernels.triton import batch_norm_act as kernels
from dlkern.kernels.triton import tiles

_SIZES = ("outer", "channels", "inner", "n_tiles", "tiles_k", "tiles_per_split")
_CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")

#: (x's type, parameters' type, activation, with residual, architecture, int64 offsets)
_VARIANTS = (
    ("fp32", "fp32", "relu", False, 90, False),
    ("bf16", "fp32", "gelu", True, 80, False),
    ("fp16", "fp16", "silu", False, 90, True),
    ("bf16", "bf16", "relu", True, 90, False),
    ("fp32", "fp32", "gelu_tanh", True, 80, False),
    ("fp16", "fp32", "hardswish", False, 80, False),
    ("fp64", "fp64", "tanh", True, 90, True),
    ("fp32", "fp32", "elu", False, 80, True),
)


def _pointers(kernel: str, variant: tuple[Any, ...]) -> dict[str, str | None]:
    data, param, _, residual, _, _ = variant
    wide = "*fp64" if data == "fp64" else "*fp32"
    data, param, extra = f"*{data}", f"*{param}", f"*{data}" if residual else None
    affine = {"weight": param, "bias": param}
    if kernel == "_statistics_kernel":
        return {"x": data, "partial": wide}
    if kernel == "_forward_kernel":
        return {"x": data, **affine, "residual": extra, "mean": wide, "spread": wide, "y": data,
                "mean_out": wide, "invstd_out": wide}  # fmt: skip
    common = {"grad_y": data, "x": data, **affine, "residual": extra, "y": None, "mean": wide, "invstd": wide}
    if kernel == "_backward_sums_kernel":
        return {**common, "partial": wide}
    return {**common, "means": wide, "dx": data, "dresidual": extra}


def jobs() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any], int, int]]:
    """(label, kernel, signature, constants, number of warps, architecture)."""
    variants = itertools.cycle(_VARIANTS)
    for name in ("_statistics_kernel", "_forward_kernel", "_backward_sums_kernel", "_backward_kernel"):
        for channels_last, launches in ((True, tiles.ROWS), (False, tiles.PLANES)):
            for launch in launches:
                variant = next(variants)
                data, _, activation, _, arch, int64 = variant
                pointers = _pointers(name, variant)
                constants: dict[str, Any] = {k: None for k, v in pointers.items() if v is None}
                if name != "_statistics_kernel":
                    constants |= {"CODE": CODES[activation], "PARAM": 0.01}
                if name == "_forward_kernel":
                    constants |= {"EPS": 1e-5, "RUNNING": channels_last}
                constants |= {"CHANNELS_LAST": channels_last, "INT64": int64}
                constants |= {"BLOCK_R": launch.block_r, "BLOCK_K": launch.block_k}
                signature = {**pointers, **dict.fromkeys(_SIZES, "i32"), **dict.fromkeys(constants, "constexpr")}
                label = f"{name} {tuple(launch)} {'rows' if channels_last else 'planes'} {variant}"
                num_warps = tiles.warps(launch, 8 if data == "fp64" else 4)
                yield label, getattr(kernels, name), signature, constants, num_warps, arch
        # Triton makes a constant of every integer argument that is 1.
        ones = {**constants, **dict.fromkeys(_SIZES, 1)}
        signature |= dict.fromkeys(_SIZES, "constexpr")
        yield f"{name} sizes of 1", getattr(kernels, name), signature, ones, num_warps, arch
        next(variants)  # another pairing of launch and variant for the next kernel
    for wide, arch in (("*fp32", 80), ("*fp64", 90)):
        signature = {
            **dict.fromkeys(("partial", "mean_out", "invstd_out", "running_mean", "running_var"), wide),
            "momentum": "fp32", "momentum_rest": "fp32", "count": "i32", "channels": "i32", "splits": "i32",
            "EPS": "constexpr",
        }  # fmt: skip
        yield f"_merge_statistics_kernel {wide}", kernels._merge_statistics_kernel, signature, {"EPS": 1e-5}, 4, arch
        signature = {
            **dict.fromkeys(("partial", "dweight", "dbias", "means"), wide),
            **dict.fromkeys(("count", "channels", "splits"), "i32"),
        }
        yield f"_merge_sums_kernel {wide}", kernels._merge_sums_kernel, signature, {}, 4, arch
        ones = dict.fromkeys(("count", "channels", "splits"), 1)
        signature |= dict.fromkeys(ones, "constexpr")
        yield f"_merge_sums_kernel {wide} sizes of 1", kernels._merge_sums_kernel, signature, ones, 4, arch


def compile_one(
    kernel: Any,
    signature: dict[str, Any],
    constants: dict[str, Any],
    num_warps: int,
    arch: int,
    *,
    divisible: tuple[str, ...] = (),
    options: dict[str, Any] | None = None,
) -> dict[str, int]:
    """Registers, bytes of stack and local memory (spills), shared memory and wgmma instructions of one kernel.

    Pointers, and the integers named in ``divisible``, are multiples of 16. ``options`` are further ones of Triton's.
    """
    ordered = {name: signature[name] for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, t) in enumerate(ordered.items())
        if str(t).startswith("*") or name in divisible
    }
    source = ASTSource(kernel, ordered, constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()},
                       attrs=aligned)  # fmt: skip
    target = GPUTarget("cuda", arch, 32)
    options = {"num_warps": num_warps, "enable_fp_fusion": False, **(options or {})}
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", out.stdout))
    used = {key.lower(): int(usage[key]) for key in ("REG", "STACK", "LOCAL")}
    return {**used, "shared": compiled.metadata.shared, "wgmma": compiled.asm["ptx"].count("wgmma.mma_async")}


if __name__ == "__main__":
    found = [{"label": label, "arch": job[-1], **compile_one(*job)} for label, *job in jobs()]
    json.dump(found, sys.stdout)
