"""Jobs of kernels/triton/batch_norm_act.py.

Every launch configuration in every dtype; activations, the parameters' dtype, a residual, offsets in 64 bits and
sizes that are multiples of 16 are dealt out over them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from dlkern.kernels.activation import CODES, from_name, gradient_from_output
from dlkern.kernels.triton import batch_norm_act as kernels
from dlkern.kernels.triton import tiles

from . import Job

_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SIZES = ("outer", "channels", "inner", "n_tiles", "tiles_k", "tiles_per_split")
#: (x's type, parameters' type)
_TYPES = (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp64", "fp64"))
#: (activation, with residual, int64 offsets, running statistics, sizes that are multiples of 16): 11 and 6 have no
#: common divisor, so that each dtype meets each of these.
_VARIANTS = (
    ("relu", False, False, False, True),
    ("gelu", True, False, False, False),
    ("silu", False, True, False, True),
    ("relu", True, False, False, True),
    ("gelu_tanh", True, False, True, False),
    ("hardswish", False, False, False, True),
    ("tanh", True, True, False, False),
    ("elu", False, True, True, True),
    ("silu", True, False, False, False),
    ("identity", True, False, False, True),
    ("relu6", False, True, False, False),
)


def _pointers(kernel: str, data: str, param: str, variant: tuple[Any, ...]) -> dict[str, str | None]:
    activation, residual, _, running, _ = variant
    wide = "*fp64" if data == "fp64" else "*fp32"
    data, param, extra = f"*{data}", f"*{param}", f"*{data}" if residual else None
    affine = {"weight": param, "bias": param}
    if kernel == "_statistics_kernel":
        return {"x": data, "partial": wide}
    if kernel == "_forward_kernel":
        statistics = param if running else wide
        return {"x": data, **affine, "residual": extra, "mean": statistics, "spread": statistics, "y": data,
                "mean_out": wide, "invstd_out": wide}  # fmt: skip
    kept = residual and gradient_from_output(from_name(activation))  # backward then has y in the residual's place
    common = {"grad_y": data, "x": data, **affine, "residual": None if kept else extra, "y": data if kept else None,
              "mean": wide, "invstd": wide}  # fmt: skip
    if kernel == "_backward_sums_kernel":
        return {**common, "partial": wide}
    return {**common, "means": None if running else wide, "dx": data, "dresidual": extra}


def _over_tiles() -> Iterator[Job]:
    variants = itertools.cycle(_VARIANTS)
    for name in ("_statistics_kernel", "_forward_kernel", "_backward_sums_kernel", "_backward_kernel"):
        kernel = getattr(kernels, name)
        for channels_last, launches in ((True, tiles.ROWS), (False, tiles.PLANES)):
            for launch, (data, param) in itertools.product(launches, _TYPES):
                if name == "_statistics_kernel" and (data, param) in (("bf16", "bf16"), ("fp16", "fp32")):
                    continue  # it has no parameters
                variant = next(variants)
                activation, residual, int64, running, round_sizes = variant
                pointers = _pointers(name, data, param, variant)
                constants: dict[str, Any] = {k: None for k, v in pointers.items() if v is None}
                if name != "_statistics_kernel":
                    constants |= {"CODE": CODES[activation], "PARAM": 0.01}
                if name == "_forward_kernel":
                    constants |= {"EPS": 1e-5, "RUNNING": running}
                num_warps = tiles.warps(launch, 8 if data == "fp64" else 4)
                meta = tiles.Plan(launch, num_warps, channels_last, 1, 1, (1,) * 6, int64).meta
                constants |= {k: v for k, v in meta.items() if k in kernel.arg_names}
                options = {k: v for k, v in meta.items() if k not in kernel.arg_names}
                options |= tiles.registers(_DTYPES[data], "identity" if name == "_statistics_kernel" else activation)
                signature = {**pointers, **dict.fromkeys(_SIZES, "i32"), **dict.fromkeys(constants, "constexpr")}
                words = [name, "rows" if channels_last else "planes", "x".join(map(str, launch)), f"{data}/{param}"]
                if name != "_statistics_kernel":
                    words += [activation, *["residual"] * residual, *["running"] * running]
                label = " ".join([*words, *["int64"] * int64, *["round"] * round_sizes])
                yield Job(label, kernel, signature, constants, options, ("channels", "inner") * round_sizes)
        # Triton makes a constant of every integer argument that is 1.
        ones = {**constants, **dict.fromkeys(_SIZES, 1)}
        signature = {**signature, **dict.fromkeys(_SIZES, "constexpr")}
        yield Job(f"{label.removesuffix(' round')} sizes-of-1", kernel, signature, ones, options)


def _merges() -> Iterator[Job]:
    options = {"num_warps": 4}
    integers = ("count", "channels", "splits")
    for wide in ("fp32", "fp64"):
        for running in (wide, "bf16", None) if wide == "fp32" else (wide, None):
            pointers = {
                **dict.fromkeys(("partial", "mean_out", "invstd_out"), f"*{wide}"),
                **dict.fromkeys(("running_mean", "running_var"), running and f"*{running}"),
            }
            constants: dict[str, Any] = {"EPS": 1e-5, **{k: None for k, v in pointers.items() if v is None}}
            signature = {**pointers, **dict.fromkeys(("momentum", "momentum_rest"), "fp32"),
                         **dict.fromkeys(integers, "i32"), **dict.fromkeys(constants, "constexpr")}  # fmt: skip
            label = f"_merge_statistics_kernel {wide} running-{running}"
            yield Job(label, kernels._merge_statistics_kernel, signature, constants, options)
        pointers = dict.fromkeys(("partial", "dweight", "dbias", "means"), f"*{wide}")
        signature = {**pointers, **dict.fromkeys(integers, "i32")}
        yield Job(f"_merge_sums_kernel {wide}", kernels._merge_sums_kernel, signature, {}, options)
        ones = dict.fromkeys(integers, 1)
        signature = {**pointers, **dict.fromkeys(ones, "constexpr")}
        yield Job(f"_merge_sums_kernel {wide} sizes-of-1", kernels._merge_sums_kernel, signature, ones, options)


def jobs() -> Iterator[Job]:
    """Every kernel, configuration and dtype."""
    yield from _over_tiles()
    yield from _merges()
