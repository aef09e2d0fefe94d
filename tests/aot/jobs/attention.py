"""Jobs of kernels/triton/attention*.py.

Every launch configuration of every kernel; dtypes, architectures and what is added to or hidden from the scores are
dealt out over them, one architecture a job.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl

from dlkern.kernels.triton import attention as triton_op
from dlkern.kernels.triton import attention_gradients as gradients
from dlkern.kernels.triton import attention_kernels as kernels
from dlkern.kernels.triton import attention_plan as plan
from dlkern.kernels.triton import implicit_gemm as gemm
from dlkern.kernels.triton.attention_plan import Launch

from . import Job

_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
_KINDS = {"half": ("fp16", "bf16"), "tf32": ("fp32",), "ieee": ("fp32",), "double": ("fp64",)}
_SCORES = ("mask", "bias", "table", "index", "padding", "lengths", "slopes", "seed")


class Variant(NamedTuple):
    """What is added to the scores or hidden of them; ``arguments`` are those of _SCORES and the band's by type."""

    name: str
    cost: int
    arguments: dict[str, str]
    capped: bool = False
    dropout: bool = False


#: "data" stands for the dtype of query, "wide" for that of accumulation. Costs are those of attention_plan.cost.
VARIANTS = (
    Variant("plain", 0, {}),
    Variant("causal", 0, {"right": "i32", "padding": "*u8", "lengths": "*i64"}),
    Variant("mask", 1, {"mask": "*data", "right": "i32", "padding": "*u8", "lengths": "*i64"}),
    Variant("table", 2, {"table": "*data", "index": "*i64"}),
    Variant("t5", 2, {"table": "*data", "index": "*i64", "reach": "i32", "padding": "*u8", "right": "i32"}),
    Variant("swin", 3, {"table": "*data", "index": "*i64", "mask": "*data"}),
    Variant("odd", 1, {"right": "i32"}),
    Variant("t5-dropout", 3, {"table": "*data", "index": "*i64", "reach": "i32", "padding": "*u8"}, dropout=True),
    Variant("capped", 2, {"left": "i32", "right": "i32", "padding": "*u8"}, capped=True),
    Variant("triple", 3, {"mask": "*u8", "bias": "*wide", "slopes": "*fp32", "right": "i32"}),
    Variant("masked-dropout", 3, {"mask": "*data", "left": "i32", "right": "i32", "lengths": "*i64"}, dropout=True),
    Variant("all", 9, {
        "mask": "*data", "bias": "*wide", "table": "*wide", "index": "*i64", "padding": "*u8",
        "lengths": "*i32", "slopes": "*fp32", "left": "i32", "right": "i32",
    }, capped=True, dropout=True),
)  # fmt: skip


def _job(
    kernel: Any, what: str, data: str, arch: int, meta: dict[str, Any], pointers: dict[str, str | None],
    *, wgmma: bool = False, odd: bool = False,
) -> Job:  # fmt: skip
    """``pointers`` are types by name, None where an argument is None; ``odd``: strides are no multiples of 16."""
    meta = dict(meta)
    num_warps = meta.pop("num_warps")
    options = {name: meta.pop(name) for name in ("num_stages", "maxnreg") if name in meta} | {"enable_fp_fusion": True}
    constants = {**meta, **{name: None for name, kind in pointers.items() if kind is None}}
    signature = {**dict.fromkeys(kernel.arg_names, "i32"), **pointers, **dict.fromkeys(constants, "constexpr")}
    steps = () if odd else tuple(n for n in kernel.arg_names if n[-2:] in ("_b", "_h", "_m", "_n") and n[:4] != "bias")
    label = f"{kernel.__name__} {what} {data} sm_{arch}"
    return Job(label, kernel, signature, constants, {"num_warps": num_warps, **options}, steps, wgmma, (arch,))


def _scored(
    kernel: Any, what: str, kind: str, data: str, arch: int, launch: Launch, depths: tuple[int, int], variant: Variant,
    **own: Any,
) -> Job:  # fmt: skip
    """A job of a kernel that computes scores; ``own`` are its own pointers and constants."""
    wide = "fp64" if data == "fp64" else "fp32"
    names = (*_SCORES, "left", "right", "reach")
    pointers: dict[str, str | None] = dict.fromkeys(names)
    pointers |= {n: t.replace("data", data).replace("wide", wide) for n, t in variant.arguments.items()}
    if variant.dropout:
        pointers["seed"] = "*i64"
    own_types = {n: own.pop(n) for n in list(own) if own[n] is None or (isinstance(own[n], str) and n != "SIDE")}
    pointers |= {n: None if t is None else t.replace("data", data).replace("wide", wide) for n, t in own_types.items()}
    meta = {
        **triton_op.meta(launch),
        "FACTOR": 0.18, "CAP": 43.2 if variant.capped else 0.0, "DROPOUT": 2**28 if variant.dropout else -1,
        "KEEP_SCALE": 1.25 if variant.dropout else 1.0, "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "DEPTH": depths[0], "VALUE_DEPTH": depths[1], **own,
    }  # fmt: skip
    side = own.get("SIDE")
    large = (launch.block_n if side == "key" else launch.block_m if side is None else max(launch[:2])) >= 64
    tile = "x".join(map(str, launch))
    what = f"{what} {kind} {tile} {depths[0]}x{depths[1]} {variant.name}"
    tensor_cores = arch == 90 and kind == "half" and large
    return _job(kernel, what, data, arch, meta, pointers, wgmma=tensor_cores, odd=variant.name == "odd")


def configurations() -> Iterator[tuple[str, str, int, Launch, tuple[Variant, ...]]]:
    """(kernel, kind of arithmetic, depth, configuration, what may run in it) of every kernel that computes scores."""

    def of_cost(least: int, most: int) -> tuple[Variant, ...]:
        return tuple(v for v in VARIANTS if least <= v.cost <= most)

    limits = ((0, plan.PLAIN), (plan.PLAIN + 1, plan.RICH), (plan.RICH + 1, 99))
    for kind, by_depth in plan.TABLES.items():
        for depth, tables in by_depth.items():
            for launches, limit in zip(tables, limits, strict=True):
                for launch in launches.forward:
                    yield "forward", kind, depth, launch, of_cost(*limit)
                for name in ("query", "key", "bias"):
                    yield name, kind, depth, getattr(launches, name), of_cost(*limit)
                if launches.both is not None:
                    few = (v for v in of_cost(*limit) if v.cost <= plan.PLAIN or v.name in ("table", "t5"))
                    yield "both", kind, depth, launches.both, tuple(few) or of_cost(*limit)


def score_job(name: str, kind: str, data: str, depth: int, launch: Launch, variant: Variant, arch: int, i: int) -> Job:
    """The job of a configuration; ``i`` deals out what is left."""
    depths = (depth, depth) if i % 5 else (depth, max(16, depth // 2))
    qkv = dict.fromkeys(("q", "k", "v"), "*data")
    if name == "forward":
        packed, split = i % 3 == 1, i % 4 == 2
        return _scored(
            kernels.forward_kernel, name, kind, data, arch, launch, depths, variant, **qkv, lse="*wide",
            out="*wide" if split else "*data", PACKED=packed, SPLIT=split,
            ACC=tl.float64 if kind == "double" else tl.float32,
        )  # fmt: skip
    given = {**qkv, "grad_out": "*data", "lse": "*wide", "delta": "*wide", "partial": None}
    if name == "bias":
        over_queries, over_keys, table = ((False, False, True), (False, False, False), (True, False, False))[i % 3]
        table = table and "table" in variant.arguments
        return _scored(
            gradients.bias_kernel, name, kind, data, arch, launch, depths, variant, **{**given, "partial": "*wide"},
            OVER_QUERIES=over_queries, OVER_KEYS=over_keys, TABLE=table,
        )  # fmt: skip
    both = name == "both"
    sums = both and "table" in variant.arguments
    return _scored(
        gradients.tiles_kernel, name, kind, data, arch, launch, depths, variant,
        **{**given, "partial": "*wide" if sums else None},
        **dict.fromkeys(("dq", "dk", "dv"), "*data"), out="*data" if both else None,
        grad_lse="*wide" if both and i % 2 else None, SIDE=name, SCALE=0.125,
    )  # fmt: skip


def jobs() -> Iterator[Job]:
    """Every kernel and configuration; variants, dtypes and architectures are dealt out."""
    arches, halves = itertools.cycle((80, 100, 120)), itertools.cycle(("fp16", "bf16"))
    deals: dict[str, Iterator[Variant]] = {}
    seen = set()
    for i, (name, kind, depth, launch, variants) in enumerate(configurations()):
        names = " ".join(variant.name for variant in variants)
        if (name, kind, depth, launch, names) in seen:
            continue
        seen.add((name, kind, depth, launch, names))
        variant = next(deals.setdefault(names, itertools.cycle(variants)))
        data = next(halves) if kind == "half" else _KINDS[kind][0]
        arch = 90 if kind == "half" and (i % 3 or name == "both") else next(arches)
        yield score_job(name, kind, data, depth, launch, variant, arch, i)
    for data, acc, arch in (("bf16", tl.float32, 90), ("fp64", tl.float64, 80)):
        wide = "*fp64" if data == "fp64" else "*fp32"
        pointers = {"grad_out": f"*{data}", "out": f"*{data}", "grad_lse": wide, "delta": wide}
        meta = {"ACC": acc, "BLOCK_M": 64, "VALUE_DEPTH": 64, "num_warps": 4}
        yield _job(gradients.delta_kernel, "delta", data, arch, meta, pointers)
        pointers = {"parts": wide, "part_lse": wide, "out": f"*{data}", "lse": wide}
        meta = {"BLOCK_S": plan.MAX_SPLITS, "VALUE_DEPTH": 64 if data == "fp64" else 256, "num_warps": 4}
        yield _job(kernels.combine_kernel, "combine", data, arch, meta, pointers)
        meta = {"BLOCK": triton_op.SUM_BLOCK, "num_warps": 4}
        yield _job(gemm.sum_splits_kernel, "sum", data, arch, meta, {"partial": wide, "out": f"*{data}"})
