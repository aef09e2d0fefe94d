"""Jobs of kernels/triton/atrous.py: every configuration and dtype, activations dealt out over them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from dlkern.kernels.activation import CODES
from dlkern.kernels.triton import atrous, tiles

from . import Job

_TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
_SIZES = ("outer", "channels", "inner", "n_tiles", "tiles_k", "tiles_per_split", "further")


def jobs() -> Iterator[Job]:
    """Every configuration and dtype; relu and one other activation in turn, running and batch statistics in turn."""
    names = itertools.cycle(("relu", "silu", "relu", "hardswish", "relu", "gelu"))
    running = itertools.cycle((False, False, True))
    kernel = atrous._forward_into_kernel
    for channels_last, launches in ((True, tiles.ROWS), (False, tiles.PLANES)):
        for data, dtype in _TORCH.items():
            for launch in launches:
                activation, by_running = next(names), next(running)
                wide = "*fp64" if data == "fp64" else "*fp32"
                pointers = {
                    **dict.fromkeys(("x", "y"), f"*{data}"),
                    **dict.fromkeys(("weight", "bias", "mean", "spread", "mean_out", "invstd_out"), wide),
                }
                constants = {
                    "EPS": 1e-5,
                    "CODE": CODES[activation],
                    "PARAM": 0.01,
                    "RUNNING": by_running,
                    "CHANNELS_LAST": channels_last,
                    "INT64": launch.block_k == 64,
                    "BLOCK_R": launch.block_r,
                    "BLOCK_K": launch.block_k,
                }
                options = {
                    "num_warps": tiles.warps(launch, dtype.itemsize),
                    "enable_fp_fusion": False,
                    **tiles.registers(dtype, activation),
                }
                where = "channels_last" if channels_last else "nchw"
                words = [kernel.__name__, where, "x".join(map(str, launch)), data, activation]
                words += ["running"] * by_running
                signature = {
                    **pointers,
                    **dict.fromkeys(_SIZES, "i32"),
                    **dict.fromkeys(constants, "constexpr"),
                }
                divisible = ("channels", "further") if channels_last else ("inner",)
                yield Job(" ".join(words), kernel, signature, constants, options, divisible)
