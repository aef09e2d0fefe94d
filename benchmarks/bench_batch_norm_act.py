"""BatchNorm2d + ReLU (+ residual): eager PyTorch, torch.compile and each dlkern backend that can run here.

Every row is first held to the parity rule on the very call that is timed; a red row shows no time.
Its ratio against eager is measured in turn with eager, in one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import parity
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkern
from dlkern.bench import measure
from dlkern.kernels import triton as triton_backend

CUDA = torch.cuda.is_available()
SHAPES = [(64 if CUDA else 8, *rest) for rest in ((64, 56, 56), (256, 28, 28), (256, 56, 56), (512, 7, 7))]
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16) if CUDA else (torch.float32,)


def backends() -> list[str]:
    """The backends of dlkern's own that run at full speed here (Triton's interpreter does not)."""
    left_out = {"torch", "reference", *(["triton"] if triton_backend.interpreted() else [])}
    found = dlkern.available_backends().items()
    return [name for name, why in found if why is None and name not in left_out and (name != "cpu" or not CUDA)]


ROWS = ["eager", "compile", *(f"dlkern-{name}" for name in backends())]


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    format: str
    residual: bool
    training: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        mode = "training" if self.training else "inference"
        words = ["x".join(map(str, self.shape)), self.format, mode, str(self.dtype).removeprefix("torch.")]
        return "-".join([*words, *(["residual"] if self.residual else [])])


CASES = [
    Case(shape, layout, residual, training, dtype)
    for training in (True, False)
    for dtype in DTYPES
    for layout in FORMATS
    for residual in (False, True)
    for shape in SHAPES
]


def target(case: Case) -> float | None:
    """The ratio that training in float32 on a CPU must reach with the extension, or None."""
    if CUDA or not case.training:
        return None
    channels = case.shape[1]
    if case.format == "channels_last":
        return 1.5 if channels == 64 else 1.05
    if case.residual:
        return 1.6
    return {(64, 56): 1.8, (256, 28): 1.7, (256, 56): 2.0, (512, 7): 1.6}[channels, case.shape[2]]


# --------------------------------------------------------------------------------------- rows
class Problem:
    """The inputs of a case, and a row's call on them."""

    def __init__(self, case: Case, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def maps(values: Tensor) -> Tensor:
            return values.to(device, case.dtype).contiguous(memory_format=FORMATS[case.format])

        channels = case.shape[1]
        self.case, self.device = case, device
        self.x = maps(randn(*case.shape)).requires_grad_(case.training)
        self.residual = maps(randn(*case.shape)).requires_grad_(case.training) if case.residual else None
        self.weight, self.bias = 1 + 0.3 * randn(channels), 0.4 * randn(channels)
        self.grad = maps(randn(*case.shape) * self._away_from_the_kink())

    def norm(self, kind: type[nn.BatchNorm2d], dtype: torch.dtype | None = None) -> nn.BatchNorm2d:
        made = kind(self.case.shape[1]).to(self.device, dtype).train(self.case.training)
        with torch.no_grad():
            made.weight.copy_(self.weight)
            made.bias.copy_(self.bias)
        return made

    def plain(self, norm: nn.BatchNorm2d) -> Callable[..., Tensor]:
        """As torchvision's ResNets write it: the addition and the ReLU in place."""
        if self.case.residual:
            return lambda x, residual: F.relu(norm(x).add_(residual), inplace=True)
        return lambda x, residual: F.relu(norm(x), inplace=True)

    def step(self, layer: Callable[..., Tensor], norm: nn.BatchNorm2d, wide: bool = False) -> Callable[[], Any]:
        """The timed call: forward, and in training backward to everything. ``wide``: in float64."""

        def ready(t: Tensor | None) -> Tensor | None:
            return t.detach().double().requires_grad_(t.requires_grad) if wide and t is not None else t

        x, residual, grad = ready(self.x), ready(self.residual), ready(self.grad)
        inputs = [t for t in (x, norm.weight, norm.bias, residual) if t is not None]

        def train() -> tuple[Tensor, ...]:
            y = layer(x, residual)
            return (y, *torch.autograd.grad(y, inputs, grad))

        def infer() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (layer(x, residual),)

        return train if self.case.training else infer

    def truth(self) -> tuple[Tensor, ...]:
        norm = self.norm(nn.BatchNorm2d, torch.float64)
        return self.step(self.plain(norm), norm, wide=True)()

    def _standard(self) -> tuple[Tensor, Tensor, Tensor]:
        """x normalised, 1 / deviation of each channel, and z; in float64 on the CPU, shaped to broadcast."""
        x = self.x.detach().cpu().double()
        if self.case.training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        else:
            mean, var = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        invstd = torch.rsqrt(var + 1e-5)
        normalised = (x - mean) * invstd
        z = normalised * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return normalised, invstd, z if self.residual is None else z + self.residual.detach().cpu().double()

    def _away_from_the_kink(self) -> Tensor:
        """0 where rounding may decide whether ReLU is on, else 1: the gradient is masked by it."""
        return (self._standard()[2].abs() > 64 * torch.finfo(self.case.dtype).eps).double()

    def terms(self) -> tuple[Tensor, ...]:
        """Sums of absolute terms behind y, dx, dweight, dbias and dresidual (see tests/parity.py)."""
        normalised, invstd, _ = self._standard()
        scale = self.weight.abs().view(1, -1, 1, 1)
        y = normalised.abs() * scale + self.bias.abs().view(1, -1, 1, 1)
        if self.residual is not None:
            y = y + self.residual.detach().cpu().double().abs()
        dz = self.grad.cpu().double().abs()
        dims, count = (0, 2, 3), dz.numel() / dz.shape[1]
        dbias, dweight = dz.sum(dims, keepdim=True), (dz * normalised.abs()).sum(dims, keepdim=True)
        dx = (dz + dbias / count + normalised.abs() * dweight / count) * invstd * scale
        return y, dx, dweight.flatten(), dbias.flatten(), dz


@contextlib.contextmanager
def candidate(row: str, problem: Problem) -> Iterator[Callable[[], Any]]:
    """The timed call of a row."""
    if not row.startswith("dlkern-"):
        norm = problem.norm(nn.BatchNorm2d)
        layer = problem.plain(norm)
        if row == "compile":
            torch._dynamo.reset()
            layer = torch.compile(layer, dynamic=False)
        yield problem.step(layer, norm)
        return
    norm = problem.norm(dlkern.nn.BatchNormAct2d)
    step = problem.step(norm, norm)
    with dlkern.backend(row.removeprefix("dlkern-")):
        yield step


def check(problem: Problem, step: Callable[[], Any], eager: Callable[[], Any]) -> None:
    """The parity rule for everything the call returns."""
    names = ("y", "dx", "dweight", "dbias", "dresidual")
    results, peers, truths = step(), eager(), problem.truth()
    assert len(results) == len(truths)
    for name, result, peer, truth, terms in zip(names, results, peers, truths, problem.terms(), strict=False):
        parity.assert_parity(name, result, truth, terms, peer=peer, dtype=problem.case.dtype)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_batch_norm_act(
    case: Case, row: str, benchmark: Any, record: Any, device: torch.device, request: pytest.FixtureRequest
) -> None:
    benchmark.group = str(case)
    problem = Problem(case, device)
    with candidate("eager", problem) as eager, candidate(row, problem) as step:
        check(problem, step, eager)
        comparison = None
        if row != "eager":
            comparison = measure.compare(
                {"eager": eager, row: step}, device=device, min_seconds=request.config.getoption("--min-seconds")
            )

        def synchronised() -> None:
            step()
            if CUDA:
                torch.cuda.synchronize()

        benchmark.pedantic(synchronised, rounds=15, warmup_rounds=3)
    facts = {} if comparison is None else {"ratio": comparison.ratio(row).paired.median}
    wanted = target(case) if row == "dlkern-cpu" else None
    case_facts = {**case._asdict(), "dtype": str(case.dtype).removeprefix("torch."), "row": row}
    record(case_facts, comparison, {**facts, "target": wanted})
