"""Whether a model still computes what a reference model computes, judged by PyTorch's own spread.

Two correct float32 paths of one deep network differ by far more than rounding of a single op, so no
fixed tolerance is right. The yardstick is PyTorch against itself on the same model: the other memory
format, another number of threads, the input moved by one unit in the last place.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

VARIANTS = ("memory_format", "threads", "ulp")
_ALL_VARIANTS = (*VARIANTS, "float64")
_ULP_REPEATS = 4  # one sign pattern alone can be lucky

#: A difference within this many units in the last place of the row's norm needs no yardstick.
_FLOOR_ULPS = 4


@dataclass(frozen=True)
class VerifyRow:
    """One output, parameter gradient or buffer: relative L2 difference from the reference, and what is allowed."""

    kind: str
    name: str
    difference: float
    yardstick: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the difference is within what is allowed."""
        return self.difference <= self.allowed  # False for NaN


@dataclass
class VerifyReport:
    """The rows of a comparison; ``ok`` where every one is within what PyTorch allows itself."""

    rows: list[VerifyRow] = field(default_factory=list)
    variants: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every row is."""
        return all(row.ok for row in self.rows)

    @property
    def failed(self) -> list[VerifyRow]:
        """The rows that are not ok."""
        return [row for row in self.rows if not row.ok]

    def __str__(self) -> str:
        lines = [
            f"{'ok' if self.ok else 'NOT ok'}: {len(self.rows) - len(self.failed)} of {len(self.rows)} rows within "
            f"twice the worst difference of PyTorch against itself ({', '.join(self.variants)})",
            "",
            f"{'':4}{'kind':10}{'name':48}{'difference':>12}{'PyTorch':>12}{'ratio':>8}",
        ]
        for row in self.rows:
            ratio = row.difference / row.yardstick if row.yardstick else float("nan")
            mark = "" if row.ok else "!!"
            lines.append(
                f"{mark:4}{row.kind:10}{row.name[-46:]:48}{row.difference:12.2e}{row.yardstick:12.2e}{ratio:8.2f}"
            )
        return "\n".join(lines)

    __repr__ = __str__


def verify(
    reference_model: nn.Module,
    model: nn.Module,
    sample: Any,
    *,
    backward: bool = True,
    variants: Sequence[str] = VARIANTS,
) -> VerifyReport:
    """Compare a model's outputs, buffers and parameter gradients with a reference model's on one sample.

    A row is ok where the relative L2 difference of the two models is at most twice the worst
    difference of the reference model against itself over ``variants``. Where one is not, the reference model
    in float64 is a variant, too: its distance from that is its own error, which the others may share and not
    show. Both models keep their random state, buffers, modes and gradients; the loss is a fixed random
    projection of all outputs.

    Args:
        reference_model: the plain model. It is copied for the memory format variant.
        model: the model to judge, with the same parameters, in the same mode.
        sample: the input: a tensor, a tuple of arguments, or a dict of keyword arguments.
        backward: compare the gradients of all parameters that require one, too.
        variants: of "memory_format" (channels_last against contiguous, models with 4-D input and
            parameters), "threads" (one thread against the current number; CPU), "ulp" (input moved by one
            unit in the last place, four random sign patterns), "float64" (the whole model in double, for
            a model whose other memory format cannot be run).

    Raises:
        TypeError: something that is no module.
        ValueError: models in different modes or with different parameters, or an unknown variant.
    """
    for which, candidate in (("reference_model", reference_model), ("model", model)):
        if not isinstance(candidate, nn.Module):
            raise TypeError(f"{which}: expected a torch.nn.Module, got {type(candidate).__name__}")
    unknown = set(variants) - set(_ALL_VARIANTS)
    if unknown:
        raise ValueError(f"variants: expected some of {', '.join(_ALL_VARIANTS)}, got {', '.join(sorted(unknown))}")
    _check_alike(reference_model, model)
    args, kwargs = _arguments(sample)
    with _preserved(reference_model), _preserved(model), torch.random.fork_rng(devices=_cuda_devices(args, kwargs)):
        seed = torch.random.initial_seed()
        # copied before anything runs: what a forward leaves behind need not be copyable
        twins = {name: copy.deepcopy(reference_model) for name in ("memory_format", "float64") if name in variants}
        base = _run(reference_model, args, kwargs, backward, seed)
        ours = _run(model, args, kwargs, backward, seed)
        spread: dict[tuple[str, str], float] = dict.fromkeys(base, 0.0)
        used = []

        def judged(runs: Iterable[tuple[str, dict[tuple[str, str], Tensor]]]) -> list[VerifyRow]:
            """The rows, after some more runs of the reference model."""
            for label, run in runs:
                used.append(label)
                for key in base.keys() & run.keys():
                    spread[key] = max(spread[key], _difference(run[key].to(base[key].dtype), base[key]))
            return [_row(key, base.get(key), ours.get(key), spread.get(key, 0.0)) for key in {**base, **ours}]

        rows = judged(_variants(reference_model, twins, args, kwargs, backward, seed, variants))
        if not all(row.ok for row in rows) and "float64" not in variants:
            in_double: list[tuple[str, dict[tuple[str, str], Tensor]]] = []
            with contextlib.suppress(Exception):  # a model that does not run in double: its rows stay not ok
                twins = {"float64": copy.deepcopy(reference_model)}
                in_double += _variants(reference_model, twins, args, kwargs, backward, seed, ("float64",))
            rows = judged(in_double)
    if not any(row.kind == "output" for row in rows):
        raise ValueError("the models return no tensor that could be compared")
    return VerifyReport(rows, tuple(dict.fromkeys(used)))


def _row(key: tuple[str, str], reference: Tensor | None, value: Tensor | None, spread: float) -> VerifyRow:
    """One comparison; what only one of the models has is no agreement."""
    if reference is None or value is None:
        return VerifyRow(*key, float("inf"), 0.0, 0.0)
    floor = _FLOOR_ULPS * torch.finfo(reference.dtype).eps if reference.is_floating_point() else 0.0
    yardstick = spread if math.isfinite(spread) else 0.0
    return VerifyRow(*key, _difference(value, reference), yardstick, max(2 * yardstick, floor))


def _check_alike(reference_model: nn.Module, model: nn.Module) -> None:
    ours, theirs = dict(model.named_modules()), dict(reference_model.named_modules())
    for path, module in theirs.items():
        if path in ours and ours[path].training != module.training:
            raise ValueError(
                f"{path or 'the models'}: expected both in one mode, got training={module.training} in the reference "
                f"and {ours[path].training} in the model"
            )
    a = {name: p.shape for name, p in reference_model.named_parameters()}
    b = {name: p.shape for name, p in model.named_parameters()}
    if a != b:
        differing = sorted(set(a.items()) ^ set(b.items()))[:3]
        raise ValueError(f"expected models with the same parameters, got a difference at {differing}")


def _arguments(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(sample, Mapping):
        return (), dict(sample)
    return (tuple(sample), {}) if isinstance(sample, (tuple, list)) else ((sample,), {})


def _cuda_devices(args: Any, kwargs: Any) -> list[int]:
    leaves = pytree.tree_leaves((args, kwargs))
    return sorted({t.get_device() for t in leaves if isinstance(t, Tensor) and t.is_cuda})


@contextlib.contextmanager
def _preserved(model: nn.Module) -> Iterator[None]:
    """Put buffers and modes back afterwards (gradients are never touched)."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    python = random.getstate()
    training = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        random.setstate(python)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for module, was in training:
            module.training = was


def _run(model: nn.Module, args: Any, kwargs: Any, backward: bool, seed: int) -> dict[tuple[str, str], Tensor]:
    """Outputs, buffers and gradients of one run, on the CPU; the model's buffers and the sample are as before."""
    args, kwargs = _mapped(_own_copy, args, kwargs)
    inputs = {
        f"input{pytree.keystr(path)}": t
        for path, t in pytree.tree_flatten_with_path((args, kwargs))[0]
        if isinstance(t, Tensor) and t.requires_grad
    }
    with _preserved(model):
        torch.manual_seed(seed)
        with torch.set_grad_enabled(backward):
            outputs = model(*args, **kwargs)
        leaves, _ = pytree.tree_flatten_with_path(_plain(outputs))
        tensors = {
            pytree.keystr(path).strip(".") or "output": t for path, t in leaves if isinstance(t, Tensor)
        }  # fmt: skip
        rows = {("output", name): t.detach().cpu().clone() for name, t in tensors.items()}
        for path, leaf in leaves:
            if not isinstance(leaf, Tensor):
                rows["output", f"{pytree.keystr(path)} = {leaf!r}"] = torch.tensor(0)  # its name is what is compared
        for name, b in model.named_buffers():
            if name.rpartition(".")[2].startswith("_dlkern_"):  # folded weights: not the model's own
                continue
            rows["buffer", name] = b.detach().cpu().clone()
        if backward:
            rows.update(_gradients(model, inputs, [t for t in tensors.values() if t.requires_grad], seed))
    return rows


def _plain(outputs: Any) -> Any:
    """Mappings and dataclasses that pytree does not know as dicts."""
    if isinstance(outputs, Mapping):
        return {k: _plain(v) for k, v in outputs.items()}
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return {f.name: _plain(getattr(outputs, f.name)) for f in dataclasses.fields(outputs)}
    return outputs


def _own_copy(value: Any) -> Any:
    """A copy for one run: a forward may write into its inputs."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _gradients(
    model: nn.Module, inputs: dict[str, Tensor], outputs: list[Tensor], seed: int
) -> dict[tuple[str, str], Tensor]:
    """By parameter, and by input that requires one; a gradient that there is not has no row."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad] + list(inputs.items())
    if not outputs or not parameters:
        return {}
    generator = torch.Generator().manual_seed(seed % 2**63)
    directions = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in outputs]
    # retained: some models keep a part of their graph between calls (attention biases cached in eval)
    grads = torch.autograd.grad(outputs, [p for _, p in parameters], directions, allow_unused=True, retain_graph=True)
    return {
        ("gradient", name): g.detach().cpu().clone()
        for (name, _), g in zip(parameters, grads, strict=True)
        if g is not None
    }


def _variants(
    model: nn.Module,
    twins: dict[str, nn.Module],
    args: Any,
    kwargs: Any,
    backward: bool,
    seed: int,
    wanted: Sequence[str],
) -> Iterator[tuple[str, dict[tuple[str, str], Tensor]]]:
    leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if "memory_format" in wanted and any(t.dim() == 4 and t.is_floating_point() for t in leaves):
        current = any(
            p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
            for p in model.parameters()
        )
        other = torch.contiguous_format if current else torch.channels_last

        def convert(t: Any) -> Any:
            return t.contiguous(memory_format=other) if isinstance(t, Tensor) and t.dim() == 4 else t

        twin = twins["memory_format"].to(memory_format=other)
        yield "memory format", _run(twin, *_mapped(convert, args, kwargs), backward, seed)
    if "threads" in wanted and torch.get_num_threads() > 1 and all(t.device.type == "cpu" for t in leaves):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            run = _run(model, args, kwargs, backward, seed)
        finally:
            torch.set_num_threads(threads)
        yield "threads", run
    if "float64" in wanted and any(t.is_floating_point() for t in leaves):

        def widen(t: Any) -> Any:
            return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

        twin = twins["float64"].double()
        yield "float64", _run(twin, *_mapped(widen, args, kwargs), backward, seed)
    if "ulp" in wanted and any(t.is_floating_point() for t in leaves):
        for repeat in range(_ULP_REPEATS):
            generator = torch.Generator().manual_seed(repeat)

            def move(t: Any, generator: torch.Generator = generator) -> Any:
                if not isinstance(t, Tensor) or not t.is_floating_point():
                    return t
                up = (torch.rand(t.shape, generator=generator) < 0.5).to(t.device)
                # a relative step: nextafter at a zero would be a denormal, and no perturbation at all
                eps = torch.finfo(t.dtype).eps
                return (t.detach() * torch.where(up, 1 + eps, 1 - eps).to(t.dtype)).to(t.dtype)

            yield "one ulp", _run(model, *_mapped(move, args, kwargs), backward, seed)


def _mapped(function: Callable[[Any], Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    return pytree.tree_map(function, args), pytree.tree_map(function, kwargs)


def _difference(value: Tensor, reference: Tensor) -> float:
    """Relative L2 difference; 0 for equal values (NaN and Inf in the same places too), NaN where only one has them."""
    if value.shape != reference.shape or value.dtype != reference.dtype:
        return float("inf")
    if not value.is_floating_point():
        return 0.0 if torch.equal(value, reference) else (value != reference).double().mean().item()
    a, b = value.double(), reference.double()
    if torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(a.isnan(), b.isnan()):
        return 0.0
    norm = b.norm().item()
    return (a - b).norm().item() / (norm if norm > 0 else 1.0)
