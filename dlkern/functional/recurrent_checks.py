"""Checks of the arguments of ``lstm``, ``gru``, ``rnn`` and their cells."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from dlkern.ops import library
from dlkern.ops.recurrent import Family, Weights

from .arguments import check_tensor
from .dtypes import DTYPES


def check_probability(name: str, value: Any) -> None:
    """Raise where a value is no number from 0 to 1."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a probability between 0 and 1, got {value!r}")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{name}: expected a probability between 0 and 1, got {value}")


def split(op: Family, x: Tensor, weights: Sequence[Tensor], num_layers: int, directions: int) -> list[Weights]:
    """The weights by layer and direction, with everything about them checked."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor or a PackedSequence, got {type(x).__name__}")
    count = num_layers * directions
    each, rest = divmod(len(weights), count) if count > 0 else (0, 1)
    if rest or each not in ((2, 3, 4, 5) if op.has_cell else (2, 4)):
        counts = "2 or 4, and one more with a projection" if op.has_cell else "2 or 4"
        raise ValueError(
            f"weights: expected {counts} tensors for each of {num_layers} layers and {directions} directions, "
            f"got {len(weights)}"
        )
    found: list[Weights] = []
    inputs = x.size(-1)
    for index in range(count):
        part = weights[index * each : (index + 1) * each]
        hr = part[-1] if each % 2 else None
        bias = part[2:4] if each >= 4 else (None, None)
        for place, value in enumerate(part):
            check_tensor(f"weights[{index * each + place}]", value)
        made = Weights(part[0], part[1], bias[0], bias[1], hr)
        first = index < directions
        if not first:
            inputs = directions * found[0].hh.size(1)
        check_weights(op, x, made, inputs, found[0] if index else None, f"_l{index // directions}", first)
        found.append(made)
    return found


def check_weights(
    op: Family, x: Tensor, weights: Weights, inputs: int, like: Weights | None, ending: str, first: bool
) -> None:
    ih, hh, bias_ih, bias_hh, hr = weights[:5]
    base = hh if like is None else like.hh
    if base.dim() != 2 or base.size(0) % op.gates or base.size(0) == 0 or base.size(1) == 0:
        raise ValueError(
            f"weight_hh{ending}: expected ({op.gates} * hidden_size, hidden_size or proj_size), got {tuple(base.shape)}"
        )
    width, outputs = base.shape
    hidden = width // op.gates
    if hr is None and outputs != hidden:
        raise ValueError(f"weight_hh{ending}: expected shape ({width}, {hidden}), got {tuple(base.shape)}")
    if hr is not None and outputs >= hidden:
        raise ValueError(f"weight_hr{ending}: expected proj_size smaller than hidden_size {hidden}, got {outputs}")
    if first and (ih.dim() != 2 or ih.size(1) != inputs):
        if ih.dim() == 2:
            raise ValueError(f"x: expected {ih.size(1)} features in the last dimension, got shape {tuple(x.shape)}")
        raise ValueError(f"weight_ih{ending}: expected 2 dimensions, got shape {tuple(ih.shape)}")
    expected = ((width, inputs), (width, outputs), (width,), (width,), (outputs, hidden))
    dtype, device = x.dtype, x.device
    for i, value in enumerate(weights[:5]):
        if value is None:
            continue
        if value.shape != expected[i]:
            raise ValueError(f"{_NAMES[i]}{ending}: expected shape {expected[i]}, got {tuple(value.shape)}")
        if value.dtype is not dtype:
            check_dtype(f"{_NAMES[i]}{ending}", value, x)
        if value.device != device:
            raise RuntimeError(f"{_NAMES[i]}{ending}: expected device {device} like x, got {value.device}")
    if dtype not in DTYPES:
        raise TypeError(f"x: expected float32, float64, float16 or bfloat16, got {dtype}")
    if (bias_ih is None) != (bias_hh is None):
        given = "bias_ih" if bias_hh is None else "bias_hh"
        raise ValueError(f"bias_ih and bias_hh: expected both or neither, got {given} alone")


_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def check_dtype(name: str, value: Tensor, x: Tensor) -> None:
    """One dtype for all, except under autocast, which casts."""

    if not library.autocasts(x.device.type):
        raise TypeError(
            f"{name}: expected {x.dtype} like x, got {value.dtype}; convert the input or the model with .to(dtype)"
        )


def check_state(name: str, state: Tensor, x: Tensor, expected: tuple[int, ...]) -> None:
    check_tensor(name, state)
    if state.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(state.shape)}")
    if state.dtype is not x.dtype:
        check_dtype(name, state, x)
    if state.device != x.device:
        raise RuntimeError(f"{name}: expected device {x.device} like x, got {state.device}")


def check_packed(x: PackedSequence) -> None:
    if x.data.dim() != 2:
        raise ValueError(f"x: expected packed data (N, I), got shape {tuple(x.data.shape)}")
    if x.batch_sizes.device.type != "cpu":
        raise RuntimeError(f"x.batch_sizes: expected a tensor on the CPU, got {x.batch_sizes.device}")

    if torch.compiler.is_compiling():
        return
    sizes = x.batch_sizes
    if sizes.dim() != 1 or sizes.numel() == 0 or sizes.dtype != torch.int64:
        raise ValueError(f"x.batch_sizes: expected int64 of shape (T,), got {sizes.dtype} of {tuple(sizes.shape)}")
    if int(sizes.sum()) != x.data.size(0) or int(sizes[-1]) < 1 or bool((sizes[1:] > sizes[:-1]).any()):
        raise ValueError(
            f"x.batch_sizes: expected sizes of at least 1 that never grow and sum to {x.data.size(0)}, the rows of "
            f"x.data; got {sizes.tolist()}"
        )


def check_nonlinearity(nonlinearity: str) -> None:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")


def pair(hx: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        what = f"{len(hx)} entries" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise TypeError(f"hx: expected a pair (h_0, c_0), got {what}")
    return hx[0], hx[1]


def check_step(op: Family, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Weights) -> None:
    """Everything about the tensors of a cell's call; x (B, I) or (I,)."""
    check_weights(op, x, weights, x.size(-1), None, "", True)
    expected = (*x.shape[:-1], weights.hh.size(1))
    for name, state in (("h", h), ("c", c)):
        if state is not None:
            check_state(name, state, x, expected)


def fits(
    op: Family, x: Tensor, sequences: tuple[int, ...], h: Tensor | None, c: Tensor | None, weights: Weights
) -> bool:
    """Whether the tensors of one layer surely fit together: the short way past the checks, for calls of one step.

    ``sequences`` are the leading sizes of h and c. What is False here may be right all the same.
    """
    ih, hh, bias_ih, bias_hh = weights[:4]
    if (
        not isinstance(ih, Tensor)
        or not isinstance(hh, Tensor)
        or hh.dim() != 2
        or (bias_ih is None) != (bias_hh is None)
    ):
        return False
    width, hidden = hh.shape
    if not hidden or width != op.gates * hidden or ih.shape != (width, x.size(-1)):
        return False
    dtype, device = x.dtype, x.device
    state = (*sequences, hidden)
    for t, shape in ((bias_ih, (width,)), (bias_hh, (width,)), (h, state), (c, state)):
        if t is not None and (type(t) not in _PLAIN or t.shape != shape or t.dtype is not dtype or t.device != device):
            return False
    return ih.dtype is dtype and hh.dtype is dtype and ih.device == device and hh.device == device and dtype in DTYPES


_PLAIN = (Tensor, torch.nn.Parameter)
