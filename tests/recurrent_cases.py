"""Cases of lstm, gru and rnn: a float64 loop over steps as truth, and how a layer is run and judged against it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import evidence
import parity
import pytest
import torch
from batch_norm_act_cases import spied
from guard import guarded
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dlkern
import dlkern.nn

BACKENDS = ("reference", "cpu")
every_backend = pytest.mark.parametrize("backend", BACKENDS)

#: Gates of an op, and its module's name.
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


class Case(NamedTuple):
    """One layer and its input; the shapes are those of torch.nn.LSTM's arguments."""

    op: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    packed: str = ""  # "sorted" or "unsorted" lengths
    batch_first: bool = False
    unbatched: bool = False
    bias: bool = True
    hx: bool = True
    only: str = ""  # the one result that the loss sees: "y" or "h_n"
    nonlinearity: str = "tanh"
    dtype: torch.dtype = torch.float32
    scale: float = 1.0  # of the input
    seed: int = 0

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def outputs(self) -> int:
        return self.proj or self.hidden

    @property
    def lengths(self) -> list[int]:
        """Of the sequences; the longest has ``steps``."""
        if not self.packed:
            return [self.steps] * self.batch
        found = [1 + (5 * b + self.seed) % self.steps for b in range(self.batch)]
        found[self.batch // 2] = self.steps
        return sorted(found, reverse=True) if self.packed == "sorted" else found

    def module(self, home: Any) -> nn.Module:
        """torch.nn's layer or dlkern.nn's, always with the same weights."""
        kwargs: dict[str, Any] = {"proj_size": self.proj} if self.op == "lstm" else {}
        if self.op == "rnn":
            kwargs["nonlinearity"] = self.nonlinearity
        torch.manual_seed(self.seed)
        return getattr(home, self.op.upper())(
            self.inputs, self.hidden, num_layers=self.layers, bias=self.bias, batch_first=self.batch_first,
            bidirectional=self.bidirectional, dtype=torch.float64, **kwargs,
        ).to(self.dtype)  # fmt: skip

    def __str__(self) -> str:
        changed = [
            f"{k}={str(v).removeprefix('torch.')}"
            for k, v in self._asdict().items()
            if k in self._field_defaults and v != self._field_defaults[k]
        ]
        return "-".join([self.op, f"{self.steps}x{self.batch}x{self.inputs}x{self.hidden}", *changed])


class Data(NamedTuple):
    """x (T, B, I), h0, c0 as the module takes them with a batch; grads of y (T, B, D P), h_n, c_n."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    grads: tuple[Tensor, Tensor, Tensor]


@functools.lru_cache(maxsize=32)
def data(case: Case) -> Data:
    generator = torch.Generator().manual_seed(case.seed)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    states = case.layers * case.directions
    x = (randn(case.steps, case.batch, case.inputs) * case.scale).to(case.dtype)
    h0 = (0.5 * randn(states, case.batch, case.outputs)).to(case.dtype) if case.hx else None
    c0 = randn(states, case.batch, case.hidden).to(case.dtype) if case.hx and case.op == "lstm" else None
    seen = [float(case.only in ("", name)) for name in ("y", "h_n", "c_n")]
    shapes = ((case.steps, case.batch, case.directions * case.outputs), (states, case.batch, case.outputs),
              (states, case.batch, case.hidden))  # fmt: skip
    grads = tuple((randn(shape) * on).to(case.dtype) for shape, on in zip(shapes, seen, strict=True))
    return Data(x, h0, c0, grads)  # type: ignore[arg-type]


Found = dict[str, Tensor]


# ------------------------------------------------------------------------------------- a layer
def call(case: Case, module: nn.Module, dtype: torch.dtype, place: Callable[[Tensor], Tensor] = torch.clone) -> Found:
    """Forward and backward of a module: y padded as (T, B, *), the final states, and every gradient."""
    values = data(case)
    x = place(values.x.to(dtype)).requires_grad_()
    states = [place(s.to(dtype)).requires_grad_() for s in (values.h0, values.c0) if s is not None]
    given: Any = x.transpose(0, 1).contiguous() if case.batch_first else x
    hx: Any = tuple(states) if case.op == "lstm" else next(iter(states), None)
    if case.unbatched:
        given = x[:, 0]
        hx = tuple(s[:, 0] for s in states) if case.op == "lstm" else states[0][:, 0] if states else None
    elif case.packed:
        given = pack_padded_sequence(given, torch.tensor(case.lengths), case.batch_first, case.packed == "sorted")
    y, final = module(given, hx if states else None)
    finals = list(final) if case.op == "lstm" else [final]
    if case.packed:
        y, lengths = pad_packed_sequence(y, case.batch_first, total_length=case.steps)
        assert lengths.tolist() == case.lengths
    if case.unbatched:
        y, finals = y.unsqueeze(1), [f.unsqueeze(1) for f in finals]
    elif case.batch_first:
        y = y.transpose(0, 1)
    outputs = [y, *finals]
    loss = sum((o * g.to(dtype)).sum() for o, g in zip(outputs, values.grads, strict=False) if bool(g.any()))
    inputs = {"dx": x, **dict(zip(("dh0", "dc0"), states, strict=False))}
    inputs |= {f"d{name}": p for name, p in module.named_parameters()}
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)  # type: ignore[arg-type]
    found = dict(zip(("y", "h_n", "c_n"), (o.detach() for o in outputs), strict=False))
    return found | {name: g for name, g in zip(inputs, grads, strict=True) if g is not None}


# ------------------------------------------------------------------------------------ the truth
class _Step(NamedTuple):
    """What one step of one sequence went through, in float64."""

    b: int
    t: int
    x: Tensor
    h: Tensor
    gi: Tensor  # x W_ih^T + b_ih
    gh: Tensor  # h W_hh^T + b_hh
    size: Tensor  # sum of absolute terms of gi + gh
    made: Tensor  # h before a projection
    out: Tensor


def _step(case: Case, w: dict[str, Tensor], b: int, t: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[_Step, Tensor]:
    zero = torch.zeros((), dtype=torch.float64)
    bias_ih, bias_hh = w.get("bias_ih", zero), w.get("bias_hh", zero)
    gi, gh = w["weight_ih"] @ x + bias_ih, w["weight_hh"] @ h + bias_hh
    if not gh.requires_grad:
        gh.requires_grad_()
    with torch.no_grad():
        size = w["weight_ih"].abs() @ x.abs() + w["weight_hh"].abs() @ h.abs() + bias_ih.abs() + bias_hh.abs()
    if case.op == "lstm":
        i, f, g, o = (gi + gh).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        made = torch.sigmoid(o) * torch.tanh(c)
    elif case.op == "gru":
        (xr, xz, xn), (hr, hz, hn) = gi.chunk(3), gh.chunk(3)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        made = (1 - z) * torch.tanh(xn + r * hn) + z * h
    else:
        made = torch.tanh(gi + gh) if case.nonlinearity == "tanh" else torch.relu(gi + gh)
    out = w["weight_hr"] @ made if "weight_hr" in w else made
    return _Step(b, t, x, h, gi, gh, size, made, out), c


@functools.lru_cache(maxsize=32)
def truth(case: Case) -> tuple[Found, Found]:
    """Every result of the case by a loop over sequences and steps in float64, and the sums of absolute terms behind it.

    The terms are those of the last few operations: rounding of earlier steps has shrunk by then.
    """
    values = data(case)
    module = case.module(nn)
    parameters = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    x = values.x.double().requires_grad_()
    h0, c0 = (None if s is None else s.double().requires_grad_() for s in (values.h0, values.c0))
    lengths, zero = case.lengths, torch.zeros
    rows = {(b, t): x[t, b] for b in range(case.batch) for t in range(lengths[b])}
    sizes = {at: row.detach().abs() for at, row in rows.items()}
    walked: list[tuple[str, int, dict[str, Tensor], list[_Step]]] = []
    final_h, final_c, size_h = [], [], []
    for layer in range(case.layers):
        found: list[dict[tuple[int, int], Tensor]] = []
        large: list[dict[tuple[int, int], Tensor]] = []
        for direction in range(case.directions):
            ending = f"_l{layer}{'_reverse' if direction else ''}"
            w = {n.removesuffix(ending): p for n, p in parameters.items() if n.endswith(ending)}
            index, steps = layer * case.directions + direction, []
            outs, outs_size = {}, {}
            last_h, last_c, last_size = [], [], []
            for b in range(case.batch):
                h = zero(case.outputs, dtype=torch.float64) if h0 is None else h0[index, b]
                c = zero(case.hidden, dtype=torch.float64) if c0 is None else c0[index, b]
                order = range(lengths[b])
                for t in reversed(order) if direction else order:
                    step, c = _step(case, w, b, t, rows[b, t], h, c)
                    h = outs[b, t] = step.out
                    # a gate's rounding passes slopes of about 1 / 4
                    per_unit = step.made.detach().abs() + step.size.view(GATES[case.op], -1).mean(0) / 4
                    outs_size[b, t] = w["weight_hr"].detach().abs() @ per_unit if "weight_hr" in w else per_unit
                    steps.append(step)
                    last = outs_size[b, t]
                last_h.append(h)
                last_c.append(c)
                last_size.append(last)
            walked.append((ending, index, w, steps))
            final_h.append(torch.stack(last_h))
            final_c.append(torch.stack(last_c))
            size_h.append(torch.stack(last_size))
            found.append(outs)
            large.append(outs_size)
        rows = {at: torch.cat([f[at] for f in found]) for at in rows}
        sizes = {at: torch.cat([f[at] for f in large]) for at in rows}

    def padded(table: dict[tuple[int, int], Tensor]) -> Tensor:
        blank = zero(case.directions * case.outputs, dtype=torch.float64)
        return torch.stack(
            [torch.stack([table.get((b, t), blank) for b in range(case.batch)]) for t in range(case.steps)]
        )

    results = {"y": padded(rows), "h_n": torch.stack(final_h)}
    terms = {"y": padded(sizes), "h_n": torch.stack(size_h)}
    if case.op == "lstm":
        results["c_n"] = torch.stack(final_c)
        terms["c_n"] = 2 * results["c_n"].detach().abs()
    loss = sum((results[n] * g.double()).sum() for n, g in zip(("y", "h_n", "c_n"), values.grads, strict=True)
               if n in results and bool(g.any()))  # fmt: skip
    leaves = {"dx": x, **({} if h0 is None else {"dh0": h0}), **({} if c0 is None else {"dc0": c0})}
    leaves |= {f"d{name}": p for name, p in parameters.items()}
    every = [s for _, _, _, steps in walked for s in steps]
    inner = [t for s in every for t in (s.gi, s.gh, s.out)]
    grads = torch.autograd.grad(loss, [*leaves.values(), *inner], allow_unused=True)  # type: ignore[arg-type]
    results |= {name: g for name, g in zip(leaves, grads, strict=False) if g is not None}
    around = iter(grads[len(leaves) :])
    terms |= {name: torch.zeros_like(t) for name, t in leaves.items() if name in results}
    for ending, index, w, steps in walked:
        _gradient_terms(case, terms, ending, index, w, steps, around)
    for name in ("dh0", "dc0"):  # what passes the gates by
        if name in terms:
            terms[name] = terms[name] + 2 * results[name].abs()
    return {n: t.detach() for n, t in results.items()}, {n: t.detach() for n, t in terms.items()}


def _gradient_terms(
    case: Case, terms: Found, ending: str, index: int, w: dict[str, Tensor], steps: list[_Step], around: Any
) -> None:
    """Add one direction of one layer."""
    layer0 = index < case.directions

    def absolute(g: Tensor | None, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if g is None else g.abs()

    weight_ih, weight_hh = w["weight_ih"].detach().abs(), w["weight_hh"].detach().abs()
    for step in steps:
        gi, gh, out = (absolute(next(around), like) for like in (step.gi, step.gh, step.out))
        # a gate's gradient is a product with the sum `out`, and with slopes that moved with the gates
        carried = weight_hh.t() @ gh + out
        if "weight_hr" in w:
            carried = w["weight_hr"].detach().abs().t() @ carried
            terms[f"dweight_hr{ending}"] += torch.outer(out, step.made.detach().abs())
        near = carried.repeat(GATES[case.op]) / 16
        gi, gh = ((g + near) * (1 + step.size / 4) for g in (gi, gh))
        x, h = step.x.detach().abs(), step.h.detach().abs()
        terms[f"dweight_ih{ending}"] += torch.outer(gi, x)
        terms[f"dweight_hh{ending}"] += torch.outer(gh, h)
        if case.bias:
            terms[f"dbias_ih{ending}"] += gi
            terms[f"dbias_hh{ending}"] += gh
        if layer0:
            terms["dx"][step.t, step.b] += weight_ih.t() @ gi
        else:
            terms["dx"][step.t, step.b] += (weight_ih.t() @ gi).mean()
        if "dh0" in terms:
            terms["dh0"][index, step.b] += weight_hh.t() @ gh / case.steps
        if "dc0" in terms:
            terms["dc0"][index, step.b] += gh.view(4, -1).sum(0) / case.steps


# ---------------------------------------------------------------------------------------- checks
@functools.lru_cache(maxsize=32)
def peer(case: Case) -> Found:
    """The case by torch.nn in its own dtype."""
    return call(case, case.module(nn), case.dtype)


def run(case: Case, backend: str) -> Found:
    """The case by dlkern.nn under a forced backend, guarded and poisoned; asserts which implementation ran."""
    module = case.module(dlkern.nn)
    with guarded() as guards, spied() as calls, dlkern.backend(backend):
        found = call(case, module, case.dtype, guards.place)
    each = case.layers * case.directions
    # backward does not reach a direction that the loss does not see
    assert set(calls) == {(backend, "forward"), (backend, "backward")}, calls
    assert calls.count((backend, "forward")) == each, calls
    assert calls.count((backend, "backward")) <= each, calls
    return found


def judge(case: Case, found: Found) -> None:
    """Hold results to the parity rule."""
    (true, terms), like = truth(case), peer(case)
    assert found.keys() == true.keys() == like.keys(), (found.keys(), true.keys(), like.keys())
    for name, result in found.items():
        assert result.dtype == like[name].dtype
        parity.assert_parity(name, result, true[name], terms[name], peer=like[name])


def check(case: Case, backend: str) -> None:
    """Run the case and judge every output and gradient."""
    judge(case, run(case, backend))
    evidence.record(case.op, backend, case.dtype)
