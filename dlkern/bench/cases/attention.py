"""Attention beside PyTorch's best form of it: windows with a table of biases, padded batches, dense; parity of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dlkern
from dlkern.bench import parity
from dlkern.functional import RelativePositionBias, T5Bias, attention, attention_varlen

from .base import Unsupported, chosen, dtype_name

Step = Callable[[], tuple[Tensor, ...]]

#: What hides or adds: see ``AttentionProblem``.
KINDS = ("relative", "padding", "varlen", "t5", "causal", "window", "dense")


@dataclass(frozen=True)
class AttentionCase:
    """query, key and value (batch, heads, length, dim), stored as projections leave them (batch, length, ...).

    ``lengths`` are the tokens of each sequence that are not padding. ``target`` is the least wanted ratio of PyTorch's
    time to dlkern's, or None.
    """

    kind: str
    batch: int
    heads: int
    length: int
    dim: int
    training: bool
    lengths: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    target: float | None = None

    def __str__(self) -> str:
        mixed = "-mixed" if len(set(self.lengths)) > 1 else ""
        sizes = f"{self.batch}x{self.heads}x{self.length}x{self.dim}"
        mode = "training" if self.training else "inference"
        return f"{self.kind}{mixed}-{sizes}-{mode}-{dtype_name(self.dtype)}"

    @property
    def facts(self) -> dict[str, Any]:
        """What tells rows of a results file apart."""
        return {
            "kind": self.kind,
            "batch": self.batch,
            "heads": self.heads,
            "length": self.length,
            "dim": self.dim,
            "lengths": list(self.lengths),
            "training": self.training,
            "dtype": dtype_name(self.dtype),
        }


_HALF, _MIXED = (256,) * 8, (32, 128, 448, 512, 64, 300, 200, 364)  # both of mean 256


#: kind, batch, heads, length, dim, lengths, and the ratio that training must reach.
_SHAPES: tuple[tuple[str, int, int, int, int, tuple[int, ...], float | None], ...] = (
    ("relative", 64, 4, 49, 32, (), 1.5),
    ("padding", 8, 8, 512, 64, _HALF, 1.7),
    ("padding", 8, 8, 512, 64, _MIXED, 1.5),
    ("varlen", 8, 8, 512, 64, _HALF, 2.5),
    ("varlen", 8, 8, 512, 64, _MIXED, 2.0),
    ("t5", 4, 8, 128, 64, (), None),
    ("window", 1, 8, 1024, 64, (), None),
    ("causal", 2, 8, 512, 64, (), None),
    ("dense", 4, 8, 197, 64, (), 0.98),
)


#: The same on a GPU: training's ratio to reach, and inference's where it has one of its own.
_GPU_SHAPES: tuple[tuple[str, int, int, int, int, tuple[int, ...], float | None, float | None], ...] = (
    ("dense", 4, 16, 2048, 128, (), 0.75, 0.85),
    ("dense", 4, 16, 2048, 64, (), 0.80, 0.95),
    ("dense", 64, 16, 128, 64, (), 1.4, 1.15),
    ("dense", 64, 12, 197, 64, (), 1.4, 1.15),
    ("causal", 4, 16, 2048, 64, (), None, None),
    ("relative", 2048, 4, 49, 32, (), 3.0, None),
    ("t5", 16, 8, 512, 64, (), 2.5, None),
    ("padding", 16, 16, 512, 64, (512,) * 16, 0.95, None),
    ("padding", 16, 16, 512, 64, (256,) * 16, 1.7, None),
    ("varlen", 16, 16, 512, 64, (256,) * 16, None, None),
    ("window", 4, 16, 2048, 64, (), None, None),
)


def cases(device_type: str = "cpu") -> list[AttentionCase]:
    """Every case of a kind of device, with the ratio to reach there where one is set."""
    if device_type == "cuda":
        return [
            AttentionCase(kind, batch, heads, length, dim, training, lengths, dtype, wanted if training else inference)
            for dtype in (torch.bfloat16, torch.float16)
            for training in (True, False)
            for kind, batch, heads, length, dim, lengths, wanted, inference in _GPU_SHAPES
        ]
    found = []
    for training in (True, False):
        for kind, batch, heads, length, dim, lengths, wanted in _SHAPES:
            target = wanted if training or kind == "dense" else None
            found.append(AttentionCase(kind, batch, heads, length, dim, training, lengths, target=target))
        for kind, batch, heads, length, dim, lengths, _ in _SHAPES[:2]:
            found.append(AttentionCase(kind, batch, heads, length, dim, training, lengths, torch.bfloat16))
    return found


class AttentionProblem:
    """A case's inputs, and the calls on them; a row is "eager", "dlkern", or "dlkern-BACKEND" with that one forced;
    "sdpa-BACKEND" is eager with that one of PyTorch's backends.

    Eager is the fastest of PyTorch's forms that was found for each kind: for "relative" the explicit softmax, for the
    others scaled_dot_product_attention with a mask. "varlen" is the batch of "padding" without its padding, beside the
    same padded call of PyTorch.
    """

    def __init__(self, case: AttentionCase, device: torch.device | str = "cpu") -> None:
        self.case, self.device = case, torch.device(device)
        generator = torch.Generator().manual_seed(0)
        b, h, n, d = case.batch, case.heads, case.length, case.dim

        def drawn(*shape: int) -> Tensor:  # the same numbers on every device
            return torch.randn(shape, generator=generator).to(self.device)

        self.qkv = [drawn(b, n, h, d) for _ in range(3)]
        self.grad = drawn(b, n, h, d)
        self.padding = (torch.arange(n) >= torch.tensor(case.lengths or (n,) * b)[:, None]).to(self.device)
        self.tokens = (~self.padding).flatten().nonzero().flatten()
        lengths = torch.tensor((0, *case.lengths))
        self.ends = lengths.cumsum(0).to(self.device)
        side = round(n**0.5)
        self.table = drawn((2 * side - 1) ** 2 if case.kind == "relative" else 32, h)
        steps = torch.arange(side)
        at = torch.stack(torch.meshgrid(steps, steps, indexing="ij")).flatten(1)
        rows, columns = at[:, :, None] - at[:, None, :] + side - 1
        self.index = (rows * (2 * side - 1) + columns).to(self.device)

    # ------------------------------------------------------------------------------------ calls
    def _eager(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        case, n = self.case, self.case.length
        if case.kind == "relative":
            bias = table[self.index.flatten()].view(n, n, -1).permute(2, 0, 1)
            return ((q * case.dim**-0.5) @ k.mT + bias).softmax(-1) @ v
        steps = torch.arange(n, device=self.device)
        distance = steps - steps[:, None]
        buckets = T5Bias(table).check(q, case.heads, n, n)[1] if case.kind == "t5" else distance
        mask = {
            "padding": lambda: ~self.padding[:, None, None, :],
            "varlen": lambda: ~self.padding[:, None, None, :],
            "t5": lambda: table[buckets[distance.clamp(-128, 128) + 128]].permute(2, 0, 1),
            "window": lambda: distance.abs() <= 64,
        }.get(case.kind, lambda: None)()  # fmt: skip
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=case.kind == "causal")

    def _ours(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        options: dict[str, Callable[[], dict[str, Any]]] = {
            "relative": lambda: {"bias": RelativePositionBias(table, self.index)},
            "padding": lambda: {"key_padding_mask": self.padding},
            "t5": lambda: {"bias": T5Bias(table)},
            "window": lambda: {"window": 64},
            "causal": lambda: {"is_causal": True},
            "dense": dict,
        }
        out: Any = attention(q, k, v, **options[self.case.kind]())
        return out

    def step(self, row: str, dtype: torch.dtype | None = None) -> Step:
        """The timed call: the forward, and in training the backward to query, key, value and the table."""
        case, dtype = self.case, dtype or self.case.dtype
        laid = case.kind == "varlen" and row.startswith("dlkern")
        inputs = [t.to(dtype, copy=True) for t in self.qkv]
        grad = self.grad.to(dtype)
        if laid:
            inputs = [t.flatten(0, 1)[self.tokens] for t in inputs]
            grad = grad.flatten(0, 1)[self.tokens]
        else:
            inputs, grad = [t.transpose(1, 2) for t in inputs], grad.transpose(1, 2)
            if case.kind == "varlen":  # of what is padding nobody wants a gradient
                grad = grad.masked_fill(self.padding[:, None, :, None], 0.0)
        table = self.table.to(dtype, copy=True)
        inputs = [t.detach().requires_grad_(case.training) for t in inputs]
        q, k, v = inputs
        wanted = inputs if case.kind not in ("relative", "t5") else [*inputs, table.requires_grad_(case.training)]

        def output() -> Tensor:
            if laid:
                out: Any = attention_varlen(q, k, v, self.ends, self.ends)
                return out
            return (self._ours if row.startswith("dlkern") else self._eager)(q, k, v, table)

        def train() -> tuple[Tensor, ...]:
            out = output()
            return (out, *torch.autograd.grad(out, wanted, grad))

        def infer() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (output(),)

        return train if case.training else infer

    @contextlib.contextmanager
    def candidate(self, row: str) -> Iterator[Step]:
        """A row's call, with its backend forced inside of the block."""
        owner, _, backend = row.partition("-")
        forced: Any = contextlib.nullcontext()
        if owner == "sdpa":
            forced = sdpa_kernel(getattr(SDPBackend, backend.upper()))
        elif backend:
            forced = dlkern.backend(attention=backend)
        with forced:
            yield self.step(row)

    # ----------------------------------------------------------------------------------- parity
    def check(self, step: Step, eager: Step) -> str:
        """The parity rule for everything that a call returns; the backend that ran.

        Raises:
            AssertionError: a result is farther from float64 than the rule allows.
        """
        with chosen("attention") as backends:
            try:
                results = step()
            except RuntimeError as error:
                if "No available kernel" in str(error) or "No viable backend" in str(error):  # what it cannot run
                    raise Unsupported(str(error)) from error
                raise
        truths, peers = self.step("eager", torch.float64)(), eager()
        for index, (result, peer, truth) in enumerate(zip(results, peers, truths, strict=True)):
            name = "y" if index == 0 else f"gradient {index}"
            if result.shape != truth.shape:  # laid end to end
                peer, truth = (t.transpose(1, 2).flatten(0, 1)[self.tokens] for t in (peer, truth))
            # an element's rounding is of the size of what it adds up, of which the result is a part
            terms = truth.abs() + truth.abs().mean()
            parity.assert_parity(name, result, truth, terms, peer=peer, dtype=self.case.dtype)
        return backends[0] if backends else ""
