"""What a case is, the call of it that is timed, and the parity of that call."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkern
from dlkern import dispatch
from dlkern.bench import parity

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

Step = Callable[[], tuple[Tensor, ...]]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Plain(nn.Module):
    """[convolution,] batch norm, [addition,] ReLU by PyTorch, the last two in place as torchvision writes them.

    Without a batch norm: the convolution alone, with no ReLU either.
    """

    def __init__(self, bn: nn.BatchNorm2d | None, conv: nn.Conv2d | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn

    @property
    def activates(self) -> bool:
        """Whether a ReLU comes last."""
        return self.bn is not None

    def before(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The activation's input, where there is an activation."""
        z = x if self.conv is None else self.conv(x)
        z = z if self.bn is None else self.bn(z)
        return z if residual is None else z.add_(residual)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.before(x, residual)
        return F.relu(z, inplace=True) if self.activates else z


@dataclass(frozen=True)
class Case:
    """One problem: the plain module, dlkern's, the inputs, and the ratio to reach.

    ``shape`` is x's and ``out_shape`` the residual's and the result's. ``plain()`` makes a module with float32
    parameters on the CPU, with the same values at each call; ``fused(plain)`` makes dlkern's module with copies of
    them, in the same order. ``terms(problem)`` has the sums of absolute terms behind each result by name (see
    :mod:`dlkern.bench.parity`). ``target`` is the least wanted ratio of eager's time to dlkern's, or None. ``quick``
    cases are in the suite that ``dlkern bench`` runs by default. ``facts`` tell rows of a results file apart.
    ``peers`` are fused calls of other libraries by row: what they make is called as the plain module is.
    """

    op: str
    label: str
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    format: str
    residual: bool
    training: bool
    dtype: torch.dtype
    plain: Callable[[], Plain]
    fused: Callable[[Plain], nn.Module]
    terms: Callable[[Problem], dict[str, Tensor]]
    target: float | None
    quick: bool
    facts: Mapping[str, Any]
    peers: Mapping[str, Callable[[Plain], nn.Module]] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [self.label, self.format, "training" if self.training else "inference", dtype_name(self.dtype)]
        return "-".join([*words, *(["residual"] if self.residual else [])])


class Problem:
    """A case's inputs on a device, and the rows' calls on them.

    A row is "eager", "compile" (torch.compile of the plain module), "dlkern" (dlkern's module with the backend
    that dispatch chooses), "dlkern-BACKEND" (with that backend forced) or one of the case's peers. The
    call is the forward, and in training the backward to every input and parameter.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def maps(shape: tuple[int, ...]) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device)
            return values.to(case.dtype).contiguous(memory_format=layout)

        layout = FORMATS[case.format]
        self.case, self.device = case, device
        self.x = maps(case.shape).requires_grad_(case.training)
        self.residual = maps(case.out_shape).requires_grad_(case.training) if case.residual else None
        self.reference = _halved(case.plain(), case.dtype).to(device).to(memory_format=layout).train(case.training)
        # truths are made once, and with the gradient zero where rounding may decide whether the ReLU is on
        self.wide = copy.deepcopy(self.reference).double()
        self.grad = maps(case.out_shape)
        if case.training and self.reference.activates:
            self.grad = self.grad * self._away_from_the_kink()

    def names(self) -> list[str]:
        """Of what a call returns: y, and in training the gradients."""
        if not self.case.training:
            return ["y"]
        parameters = [f"d{name}" for name, _ in self.reference.named_parameters()]
        return ["y", "dx", *parameters, *(["dresidual"] if self.residual is not None else [])]

    def module(self, row: str) -> nn.Module:
        """A fresh module for a row."""
        plain = copy.deepcopy(self.reference)
        if row.startswith("dlkern"):
            return self.case.fused(plain).train(self.case.training)
        if row == "compile":
            torch._dynamo.reset()
            plain.compile(dynamic=False)
        elif row != "eager":
            if row not in self.case.peers:
                raise Unsupported(f"{row} has no call of its own for {self.case}")
            return self.case.peers[row](plain).train(self.case.training)
        return plain

    def step(self, module: nn.Module, *, wide: bool = False) -> Step:
        """The timed call; ``wide``: on the inputs in float64."""

        def ready(t: Tensor | None) -> Tensor | None:
            return t.detach().double().requires_grad_(t.requires_grad) if wide and t is not None else t

        x, residual, grad = ready(self.x), ready(self.residual), ready(self.grad)
        inputs = [t for t in (x, *module.parameters(), residual) if t is not None]

        def train() -> tuple[Tensor, ...]:
            y = module(x, residual)
            return (y, *torch.autograd.grad(y, inputs, grad))

        def infer() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (module(x, residual),)

        return train if self.case.training else infer

    def forward(self, module: nn.Module) -> Callable[[], Tensor]:
        """The forward alone, for counting what autograd keeps."""
        return lambda: module(self.x, self.residual)

    @contextlib.contextmanager
    def candidate(self, row: str) -> Iterator[tuple[nn.Module, Step]]:
        """A row's module and call, with its backend forced inside of the block."""
        module = self.module(row)
        _, _, backend = row.partition("-")
        with dlkern.backend(backend) if backend else contextlib.nullcontext():
            yield module, self.step(module)

    def check(self, step: Step, eager: Step) -> None:
        """The parity rule for everything that a call returns.

        Raises:
            AssertionError: a result is farther from float64 than the rule allows.
        """
        names, results, peers = self.names(), step(), eager()
        truths, terms = self.step(copy.deepcopy(self.wide), wide=True)(), self.case.terms(self)
        for name, result, peer, truth in zip(names, results, peers, truths, strict=True):
            parity.assert_parity(name, result, truth, terms[name], peer=peer, dtype=self.case.dtype)

    def _away_from_the_kink(self) -> Tensor:
        """0 where z is so near to 0 that PyTorch's rounding, sixteen times over, may turn the ReLU; else 1."""
        with torch.no_grad():
            narrow = copy.deepcopy(self.reference).before(self.x, self.residual).double()
            residual = None if self.residual is None else self.residual.double()
            z = copy.deepcopy(self.wide).before(self.x.double(), residual)
        margin = 16 * (narrow - z).square().mean().sqrt()
        return (z.abs() > margin).to(self.case.dtype)


def _halved(plain: Plain, dtype: torch.dtype) -> Plain:
    """The convolutions in ``dtype`` and the batch norms in float32, as under autocast."""
    for module in plain.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            module.to(dtype)
    return plain


class Unsupported(RuntimeError):
    """A forced backend that cannot run a case; the message says why."""


@contextlib.contextmanager
def chosen(op: str) -> Iterator[list[str]]:
    """Collects the backends that dispatch chooses for an op inside of the block.

    Raises:
        Unsupported: inside of the block, where a forced backend cannot run the request.
    """
    names: list[str] = []
    original = dispatch.choose

    def choose(op_name: str, request: Any, *sizes: Any) -> dispatch.Choice:
        try:
            choice = original(op_name, request, *sizes)
        except RuntimeError as error:
            raise Unsupported(str(error)) from error
        if op_name == op:
            names.append(choice.backend)
        return choice

    with mock.patch.object(dispatch, "choose", choose):
        yield names
