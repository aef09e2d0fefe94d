"""Jobs of kernels/triton/recurrent_*.py: every kernel in every launch configuration and dtype, families dealt out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton

from dlkern.kernels.activation import CODES
from dlkern.kernels.triton import recurrent as launcher
from dlkern.kernels.triton import recurrent_cells as cells
from dlkern.kernels.triton import recurrent_plan as plan
from dlkern.kernels.triton import recurrent_sequence as sequence
from dlkern.kernels.triton import recurrent_steps as steps
from dlkern.kernels.triton.recurrent_plan import Launch

from . import Job

_TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
#: (dtype, whether TF32 is allowed) that run on tensor cores, or in full precision.
_PRODUCTS = (("fp16", False), ("bf16", False), ("fp32", True), ("fp32", False))
#: (family, bare) in turn over configurations and dtypes; ``bare``: no bias, no initial states, nothing kept, relu.
_DEALT = (
    ("lstm", False),
    ("gru", True),
    ("lstm", False),
    ("rnn", False),
    ("lstm", True),
    ("gru", False),
    ("rnn", True),
)
#: Pointers to what is kept in the dtype that is computed in; a family has not got those of others.
_WIDE = ("gates", "state", "cells", "extra", "normal", "inverses", "grad_h", "grad_c", "grad_gates", "grad_recurrent",
         "grad_normal", "grad_cells", "grad", "out")  # fmt: skip
_ABSENT = {
    "lstm": ("extra",),
    "gru": ("state", "cells", "grad_c", "c0", "grad_cells", "norm_c", "norm_c_bias", "grad_normal"),
    "rnn": ("state", "cells", "extra", "grad_c", "c0", "grad_cells", "norm_c", "norm_c_bias", "grad_normal"),
}
_INTEGERS = ("offset", "before", "batch", "before_batch", "after", "after_batch", "hidden", "steps", "width")
#: In the code of a kernel for one family these pointers are read for no other reason than that they are there.
_OPTIONAL = ("bias_hh", "h0")


def _signature(kernel: Any, family: str, data: str, norm: bool, bare: bool) -> dict[str, Any]:
    """Types by argument; ``bare``: no bias and no initial states."""
    wide = "*fp64" if data == "fp64" else "*fp32"
    absent = set(_ABSENT[family])
    absent |= set() if norm else {"norm_hh", "norm_c", "norm_c_bias", "normal", "inverses", "grad_normal"}
    absent |= {*_OPTIONAL, "c0", "grad_cells"} if bare else set()
    found: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name.isupper():
            continue
        if name in _INTEGERS:
            found[name] = "i32"
        elif name in ("offsets", "sizes"):
            found[name] = "*i64" if name == "offsets" else "*i32"
        else:
            found[name] = None if name in absent else wide if name in _WIDE else f"*{data}"
    return found


def _job(kernel: Any, family: str, launch: Launch, data: str, tf32: bool, extra: dict[str, Any], bare: bool) -> Job:
    norm = bool(extra.get("NORM"))
    signature = _signature(kernel, family, data, norm, bare)
    code, gates = launcher._FAMILIES[family]
    words = [kernel.__name__, family, "tf32" if tf32 else data, "x".join(map(str, launch))]
    activation = "relu" if bare else "tanh"
    constants = {"FAMILY": code, "GATES": gates, "CODE": CODES[activation], "SAVES": not bare, "REVERSE": bare, **extra}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    constants |= {name: None for name, kind in signature.items() if kind is None}
    words += [*["norm"] * norm, activation, *["bare"] * bare]
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if launch.kind == plan.SEQUENCE:
        options["maxnreg"] = 255
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    divisible = () if bare else ("hidden",)
    return Job(" ".join(words), kernel, signature, constants, options, divisible)


def _products() -> Iterator[Job]:
    families = itertools.cycle(_DEALT)
    for data, tf32 in (*_PRODUCTS, ("fp64", False)):
        with mock.patch.object(plan, "allows_tf32", lambda tf32=tf32: tf32):
            found = [plan.candidates(_TORCH[data], size, norm=False) for size in plan.SEQUENCES]
        launches = dict.fromkeys(launch for each in found for launch in each if launch.kind != plan.CELL)
        for launch in launches:
            meta = {"PRECISION": "tf32" if tf32 else "ieee", "BLOCK_M": launch.block_m}
            whole = launch.kind == plan.SEQUENCE
            meta |= (
                {"BLOCK_H": launch.block_n}
                if whole
                else {"BLOCK_N": launch.block_n, "BLOCK_K": plan.depth(launch, _TORCH[data])}
            )
            kernels = (
                (sequence.sequence_forward_kernel, sequence.sequence_backward_kernel)
                if whole
                else (steps.step_forward_kernel, steps.step_backward_kernel)
            )
            family, bare = next(families)
            for kernel in kernels:
                yield _job(kernel, family, launch, data, tf32, meta, bare)


def _rows() -> Iterator[Job]:
    """Cells of whole rows: few units, and as many as there may be."""
    for family, hidden, data, norm in (
        ("lstm", 64, "fp16", True),
        ("lstm", 1024, "bf16", False),
        ("lstm", plan.MOST_UNITS, "fp32", True),
        ("lstm", 256, "fp64", True),
        ("gru", plan.MOST_UNITS, "bf16", True),
        ("gru", 1024, "fp32", False),
        ("rnn", 64, "fp32", False),
        ("rnn", plan.MOST_UNITS, "fp16", True),
    ):
        launch = Launch(plan.CELL, 1, hidden, 0, plan.row_warps(hidden), 1)
        width = launcher._FAMILIES[family][1] * hidden
        blocks = {"BLOCK_W": triton.next_power_of_2(width), "BLOCK_H": hidden, "NORM": norm}
        for kernel in (cells.cell_forward_kernel, cells.cell_backward_kernel):
            extra = {name: value for name, value in blocks.items() if name in kernel.arg_names}
            yield _job(kernel, family, launch, data, False, extra, family == "rnn")
        if norm:
            launch = launch._replace(num_warps=plan.norm_warps(width))
            yield _job(cells.norm_backward_kernel, family, launch, data, False, blocks, False)


def jobs() -> Iterator[Job]:
    """Every kernel, configuration and dtype."""
    yield from _products()
    yield from _rows()
