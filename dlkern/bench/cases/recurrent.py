"""LSTM, GRU and RNN layers and cells, beside torch.nn's: what is timed, and its parity."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import dlkern
import dlkern.nn
from dlkern.bench import parity

from .base import chosen, dtype_name

Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class RecurrentCase:
    """One layer and its input: (steps, batch, hidden) of ``hidden`` inputs, or (batch, hidden) for a cell.

    ``target`` is the least wanted ratio of PyTorch's time to dlkern's, or None. What is timed beside a ``variant``, of
    which PyTorch has no layer, is a loop over steps of the cell, composed of PyTorch's operations.
    """

    op: str
    steps: int
    batch: int
    hidden: int
    training: bool
    packed: bool = False
    cell: bool = False
    target: float | None = None
    variant: str = ""
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [self.op + ("_cell" if self.cell else ""), f"{self.steps}x{self.batch}x{self.hidden}"]
        words += ["training" if self.training else "inference", *(["packed"] if self.packed else [])]
        words += [self.variant] if self.variant else []
        return "-".join([*words, *([] if self.dtype == torch.float32 else [dtype_name(self.dtype)])])

    @property
    def facts(self) -> dict[str, Any]:
        """What tells rows of a results file apart."""
        return {
            "op": self.op,
            "steps": self.steps,
            "batch": self.batch,
            "hidden": self.hidden,
            "training": self.training,
            "packed": self.packed,
            "cell": self.cell,
            "variant": self.variant,
            "dtype": dtype_name(self.dtype),
        }


def _gpu_cases() -> list[RecurrentCase]:
    case = functools.partial(RecurrentCase, "lstm", steps=512)
    found = []
    for training in (False, True):
        for hidden, half, brain in ((256, (1.3, 1.1), (1.5, 1.3)), (512, (1.3, 1.1), (1.5, 1.3)),
                                    (1024, (1.0, 1.0), (1.5, 1.3))):  # fmt: skip
            for dtype, targets in ((torch.float16, half), (torch.bfloat16, brain)):
                found.append(case(batch=16, hidden=hidden, training=training, target=targets[training], dtype=dtype))
        found.append(case(batch=4, hidden=256, training=training, target=2.0))
        found.append(case(batch=16, hidden=64, training=training, dtype=torch.float16))  # a sequence in one kernel
        found.append(RecurrentCase("gru", 512, 16, 256, training, target=1.3, dtype=torch.float16))
        found.append(RecurrentCase("rnn", 512, 16, 256, training, dtype=torch.float16))
    return [*found, RecurrentCase("lstm", 1, 1, 256, False, target=2.0)]


def cases(device_type: str = "cpu") -> list[RecurrentCase]:
    """Every case of a kind of device, with the ratio to reach there where one is set."""
    if device_type == "cuda":
        return _gpu_cases()
    case = functools.partial(RecurrentCase, hidden=256)
    found = [
        case("lstm", 1, 1, training=False, target=5.0),
        case("lstm", 1, 1, training=False, cell=True, target=3.0),
        case("gru", 1, 1, training=False, cell=True),
        case("lstm", 1, 16, training=True),
    ]
    targets = {
        ("lstm", 1): (1.0, 1.3),
        ("lstm", 4): (None, None),
        ("lstm", 16): (1.0, 1.0),
        ("gru", 1): (None, 5.0),
        ("gru", 4): (None, 3.0),
        ("gru", 16): (None, None),
        ("rnn", 1): (None, 3.0),
        ("rnn", 4): (None, 3.0),
        ("rnn", 16): (None, None),
    }
    for (op, batch), (inference, training) in targets.items():
        found.append(case(op, 128, batch, training=False, target=inference))
        found.append(case(op, 128, batch, training=True, target=training))
    found += [case(op, 128, 16, training=True, packed=True, target=1.3 if op == "lstm" else None) for op in
              ("lstm", "gru")]  # fmt: skip
    for op, variant, batch in (("lstm", "layer_norm", 1), ("lstm", "layer_norm", 16), ("gru", "layer_norm", 16),
                               ("lstm", "relu", 16), ("lstm", "peephole", 16), ("lstm", "zoneout", 16)):  # fmt: skip
        for training, target in ((False, 3.0), (True, 5.0)):
            found.append(case(op, 128, batch, training=training, variant=variant, target=target))
    return [*found, RecurrentCase("gru", 64, 32, 512, True), RecurrentCase("lstm", 64, 32, 512, True)]


#: Of dlkern.nn's layers and cells; zoneout is that of evaluation, which draws nothing.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "relu": {"activation": "relu"},
    "layer_norm": {"layer_norm": True},
    "peephole": {"peephole": True},
    "zoneout": {"zoneout": 0.1},
}


class _Loop(nn.Module):
    """A layer as a loop over its steps; the weights are those that the layer would have, under their names."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, hx: Any) -> Any:
        outputs = []
        state = tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0]
        with dlkern.backend("torch"):
            for t in range(x.size(0)):
                state = self.cell(x[t], state)
                outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs), state


class RecurrentProblem:
    """A case's inputs, and the calls on them; a row is "eager", "dlkern", or "dlkern-BACKEND" with that one forced."""

    def __init__(self, case: RecurrentCase, device: torch.device | str = "cpu") -> None:
        self.case, self.device = case, torch.device(device)
        generator = torch.Generator().manual_seed(0)
        shape = (case.batch, case.hidden) if case.cell else (case.steps, case.batch, case.hidden)

        def drawn(shape: tuple[int, ...]) -> Tensor:  # the same numbers on every device
            return torch.randn(shape, generator=generator).to(self.device)

        self.x = drawn(shape)
        states = shape if case.cell else (1, case.batch, case.hidden)
        self.states = [drawn(states) for _ in range(2 if case.op == "lstm" else 1)]
        self.grad = drawn(shape)
        # lengths from half of the steps to all of them
        self.lengths = [case.steps - (b * case.steps) // (2 * case.batch) for b in range(case.batch)]

    def module(self, home: Any, dtype: torch.dtype | None = None) -> nn.Module:
        """torch.nn's or dlkern.nn's, with the same weights at each call."""
        case, loops = self.case, bool(self.case.variant) and home is nn
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            name = case.op.upper() + ("Cell" if case.cell or loops else "")
            made: nn.Module = getattr(dlkern.nn if loops else home, name)(
                case.hidden, case.hidden, **VARIANTS[case.variant]
            )
        with torch.no_grad():
            for parameter in (p for n, p in made.named_parameters() if n.startswith(("norm_ih", "norm_hh"))):
                # at 1 gradients grow over 128 steps, and the rounding of two right paths with them
                parameter.fill_(0.1)
        made = made.to(self.device, dtype or case.dtype).train(case.variant != "zoneout")
        return _Loop(made) if loops else made

    def step(self, module: nn.Module, dtype: torch.dtype | None = None) -> Step:
        """The timed call: the forward, and in training the backward to the input and every parameter."""
        case, parameters = self.case, list(module.parameters())
        dtype = dtype or case.dtype
        x, grad = self.x.to(dtype).requires_grad_(case.training), self.grad.to(dtype)
        states = [s.to(dtype) for s in self.states]
        hx = tuple(states) if case.op == "lstm" else states[0]
        given: Any = x
        if case.packed:
            packed = pack_padded_sequence(x.detach(), torch.tensor(self.lengths))
            x = packed.data.requires_grad_(case.training)
            given, grad = packed._replace(data=x), pack_padded_sequence(grad, torch.tensor(self.lengths)).data

        def output() -> Tensor:
            y = module(given, hx)
            y = y[0] if isinstance(y, tuple) else y
            return y.data if case.packed else y

        def train() -> tuple[Tensor, ...]:
            y = output()
            return (y, *torch.autograd.grad(y, [x, *parameters], grad))

        def infer() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (output(),)

        return train if case.training else infer

    @contextlib.contextmanager
    def candidate(self, row: str) -> Iterator[Step]:
        """A row's call, with its backend forced inside of the block."""
        _, _, backend = row.partition("-")
        with dlkern.backend(backend) if backend else contextlib.nullcontext():
            yield self.step(self.module(dlkern.nn if row.startswith("dlkern") else nn))

    def check(self, step: Step, eager: Step) -> str:
        """The parity rule for everything that a call returns; the backend that ran.

        Raises:
            AssertionError: a result is farther from float64 than the rule allows.
        """
        with chosen(self.case.op) as backends:
            results = step()
        truths = self.step(self.module(nn, torch.float64), torch.float64)()
        for index, (result, peer, truth) in enumerate(zip(results, eager(), truths, strict=True)):
            name = "y" if index == 0 else f"gradient {index}"
            # a step's rounding is of the size of what it adds up, of which the result is a part
            terms = truth.abs() + truth.abs().mean()
            parity.assert_parity(name, result, truth, terms, peer=peer, dtype=self.case.dtype)
        return backends[0] if backends else ""
