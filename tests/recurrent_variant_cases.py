"""Cases of the variants of recurrent layers, and a float64 loop over sequences and steps as their truth.

The truth takes the random masks that the layer drew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import parity
import torch
from guard import guarded
from recurrent_cases import spied
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dlkern
import dlkern.nn

F64 = torch.float64

#: In plain PyTorch, apart from dlkern's own definitions.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    # (the backward of PyTorch's own has 1 / 6 in float32, whatever the dtype)
    "hardsigmoid": lambda z: torch.clamp(z / 6 + 0.5, 0.0, 1.0),
    "leaky_relu": nn.functional.leaky_relu,
    "elu": nn.functional.elu,
    "identity": lambda z: z,
}


class Case(NamedTuple):
    """One layer with its variant."""

    op: str
    options: tuple[tuple[str, Any], ...]  # constructor's, beyond torch.nn's
    steps: int = 5
    batch: int = 3
    inputs: int = 4
    hidden: int = 11
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    packed: bool = False
    bias: bool = True
    hx: bool = True
    training: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def lengths(self) -> list[int]:
        return (
            [1 + (3 * b + 1) % self.steps for b in range(self.batch - 1)] + [self.steps]
            if self.packed
            else [self.steps] * self.batch
        )

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        kwargs: dict[str, Any] = {"proj_size": self.proj} if self.proj else {}
        made = getattr(dlkern.nn, self.op.upper())(
            self.inputs, self.hidden, num_layers=self.layers, bias=self.bias, bidirectional=self.bidirectional,
            dtype=F64, **kwargs, **dict(self.options),
        )  # fmt: skip
        with torch.no_grad():  # norms of 1 and 0 would hide what they multiply
            for name, p in made.named_parameters():
                if name.startswith("norm"):
                    p.add_(0.3 * torch.randn_like(p))
        return made.to(self.dtype).train(self.training)

    def __str__(self) -> str:
        words = [f"{k}={v}" if v is not True else k for k, v in self.options]
        changed = [f"{k}={str(v).removeprefix('torch.')}" for k, v in self._asdict().items()
                   if k in self._field_defaults and v != self._field_defaults[k]]  # fmt: skip
        return "-".join([self.op, *words, *changed])


class Data(NamedTuple):
    x: Tensor
    states: list[Tensor]
    grads: list[Tensor]  # of y, h_n, c_n and the cells


def data(case: Case) -> Data:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    rows, out = case.layers * case.directions, case.proj or case.hidden
    x = randn(case.steps, case.batch, case.inputs)
    states = [0.5 * randn(rows, case.batch, out)] if case.hx else []
    if case.hx and case.op == "lstm":
        states.append(randn(rows, case.batch, case.hidden))
    shapes = [(case.steps, case.batch, case.directions * out), (rows, case.batch, out)]
    if case.op == "lstm":
        shapes += [(rows, case.batch, case.hidden), (case.steps, case.batch, case.directions * case.hidden)]
    grads = [randn(*shape) for shape in shapes]
    return Data(x.to(case.dtype), [s.to(case.dtype) for s in states], [g.to(case.dtype) for g in grads])


@contextlib.contextmanager
def drawn() -> Iterator[list[Tensor]]:
    """Collects the random masks that are drawn inside of the block."""
    masks: list[Tensor] = []
    original = torch.bernoulli

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        masks.append(original(*args, **kwargs))
        return masks[-1]

    with mock.patch.object(torch, "bernoulli", recorded):
        yield masks


Found = dict[str, Tensor]


def call(case: Case, module: nn.Module, place: Callable[[Tensor], Tensor] = torch.clone) -> Found:
    """Results and gradients of the module, padded."""
    values = data(case)
    x = place(values.x).requires_grad_()
    states = [place(s).requires_grad_() for s in values.states]
    hx: Any = None if not states else tuple(states) if case.op == "lstm" else states[0]
    given: Any = pack_padded_sequence(x, torch.tensor(case.lengths), enforce_sorted=False) if case.packed else x
    found = module(given, hx)
    y, final, *cells = found
    results = [y, *(final if case.op == "lstm" else [final]), *cells]
    results = [pad_packed_sequence(r, total_length=case.steps)[0] if not isinstance(r, Tensor) else r for r in results]
    loss = sum((r * g).sum() for r, g in zip(results, values.grads, strict=False))
    leaves = {"dx": x, **{f"d{n}": s for n, s in zip(("h0", "c0"), states, strict=False)}}
    leaves |= {f"d{n}": p for n, p in module.named_parameters()}
    grads = torch.autograd.grad(loss, list(leaves.values()))  # type: ignore[arg-type]
    named = dict(zip(("y", "h_n", "c_n", "cells"), (r.detach() for r in results), strict=False))
    return named | dict(zip(leaves, grads, strict=True))


def truth(case: Case, masks: list[Tensor]) -> Found:
    """The same by a loop over sequences and steps in float64, with the masks that the layer drew."""
    values, options = data(case), dict(case.options)
    act = ACTIVATIONS[options.get("activation", "tanh")]
    gate_act = ACTIVATIONS[options.get("recurrent_activation", "sigmoid")]
    weights = {n: p.detach().double().requires_grad_() for n, p in case.module().named_parameters()}
    x = values.x.double().requires_grad_()
    states = [s.double().requires_grad_() for s in values.states]
    order = sorted(range(case.batch), key=lambda b: -case.lengths[b])  # of a packed sequence's rows
    waiting = [m.double() for m in masks]
    out, lengths = case.proj or case.hidden, case.lengths
    sequence: dict[tuple[int, int], Tensor] = {(b, t): x[t, b] for b in range(case.batch) for t in range(lengths[b])}
    starts = [sum(sum(n > s for n in lengths) for s in range(t)) for t in range(case.steps)]
    h_n, c_n, cells = [], [], {}
    for layer in range(case.layers):
        parts = []
        for direction in range(case.directions):
            ending, index = f"_l{layer}{'_reverse' * direction}", layer * case.directions + direction
            w = {n.removesuffix(ending): p for n, p in weights.items() if n.endswith(ending)}
            zone = drop = None
            if options.get("zoneout"):
                zone = (
                    waiting.pop(0) if case.training else torch.full((sum(lengths), out), options["zoneout"], dtype=F64)
                )
            if options.get("recurrent_dropout") and case.training:
                drop = waiting.pop(0) / (1 - options["recurrent_dropout"])
            part, last = {}, []
            for b in range(case.batch):
                place = order.index(b)
                h = states[0][index, b] if states else torch.zeros(out, dtype=F64)
                c = states[1][index, b] if len(states) > 1 else torch.zeros(case.hidden, dtype=F64)
                steps = range(lengths[b])
                for t in reversed(steps) if direction else steps:
                    made, c = _step(case, w, sequence[b, t], h, c, act, gate_act, None if drop is None else drop[place])
                    if zone is not None:
                        made = zone[starts[t] + place] * h + (1 - zone[starts[t] + place]) * made
                    h = part[b, t] = made
                    if layer == case.layers - 1:
                        cells[b, t, direction] = c
                last.append((h, c))
            parts.append(part)
            h_n.append(torch.stack([h for h, _ in last]))
            c_n.append(torch.stack([c for _, c in last]))
        sequence = {at: torch.cat([part[at] for part in parts]) for at in sequence}
    assert not waiting

    def padded(table: dict[tuple[int, int], Tensor], width: int) -> Tensor:
        blank = torch.zeros(width, dtype=F64)
        rows = [torch.stack([table.get((b, t), blank) for b in range(case.batch)]) for t in range(case.steps)]
        return torch.stack(rows)

    results = {"y": padded(sequence, case.directions * out), "h_n": torch.stack(h_n)}
    if case.op == "lstm":
        results["c_n"] = torch.stack(c_n)
        if options.get("return_all_cells"):
            both = {(b, t): torch.cat([cells[b, t, d] for d in range(case.directions)]) for b, t in sequence}
            results["cells"] = padded(both, case.directions * case.hidden)
    loss = sum((r * g.double()).sum() for r, g in zip(results.values(), values.grads, strict=False))
    leaves = {"dx": x, **{f"d{n}": s for n, s in zip(("h0", "c0"), states, strict=False)}}
    leaves |= {f"d{n}": p for n, p in weights.items()}
    grads = torch.autograd.grad(loss, list(leaves.values()))  # type: ignore[arg-type]
    return {n: r.detach() for n, r in results.items()} | dict(zip(leaves, grads, strict=True))


def _step(
    case: Case, w: dict[str, Tensor], x: Tensor, h: Tensor, c: Tensor, act: Any, gate_act: Any, drop: Tensor | None
) -> tuple[Tensor, Tensor]:
    norm = nn.functional.layer_norm
    gi, gh = w["weight_ih"] @ x, w["weight_hh"] @ (h if drop is None else h * drop)
    if "norm_ih" in w:
        gi, gh = norm(gi, gi.shape, w["norm_ih"]), norm(gh, gh.shape, w["norm_hh"])
    if case.bias:
        gi, gh = gi + w["bias_ih"], gh + w["bias_hh"]
    if case.op == "rnn":
        return act(gi + gh), c
    if case.op == "gru":
        (xr, xz, xn), (hr, hz, hn) = gi.chunk(3), gh.chunk(3)
        z = gate_act(xz + hz)
        return (1 - z) * act(xn + gate_act(xr + hr) * hn) + z * h, c
    i, f, g, o = (gi + gh).chunk(4)
    if "peephole" in w:
        see_i, see_f, see_o = w["peephole"].chunk(3)
        i, f = i + see_i * c, f + see_f * c
    c = gate_act(f) * c + gate_act(i) * act(g)
    if "peephole" in w:
        o = o + see_o * c
    seen = norm(c, c.shape, w["norm_c"], w["norm_c_bias"]) if "norm_c" in w else c
    h = gate_act(o) * act(seen)
    return w["weight_hr"] @ h if "weight_hr" in w else h, c


def check(case: Case, backend: str) -> None:
    """The parity rule for every result and gradient; PyTorch's own path is the loop of its ops that "torch" is."""
    module = case.module()
    torch.manual_seed(2)
    with guarded() as guards, spied() as calls, dlkern.backend(backend), drawn() as masks:
        found = call(case, module, guards.place)
    assert set(calls) == {(backend, "forward"), (backend, "backward")}, calls
    assert len(calls) == 2 * case.layers * case.directions
    torch.manual_seed(2)
    with spied() as calls, dlkern.backend("torch"):
        peer = call(case, module)
    assert not calls
    true = truth(case, masks)
    assert found.keys() == true.keys() == peer.keys(), (found.keys(), true.keys())
    for name, result in found.items():
        # several steps' rounding, each of the size of what it adds up
        terms = true[name].abs() + true[name].abs().mean()
        terms = terms * (case.steps if case.dtype == F64 else 1)
        parity.assert_parity(name, result, true[name], terms, peer=peer[name])
