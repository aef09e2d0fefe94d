"""What lstm, gru and rnn share: the contract, how a sequence is walked, and the gradients of weights.

Each of the three ops is one direction of one layer over a whole sequence. Its implementations are modules
with ``forward``, ``backward`` and ``supports``, of the signatures of :mod:`.lstm`, which all three share; what
a family has not (a cell state, a projection) is None. Variants are those of :mod:`.recurrent_variants`.

Sequences: padded, (T, B, features), or packed, (N, features) with ``batch_sizes`` (T,), int64 on the CPU, never
growing, as in torch.nn.utils.rnn.PackedSequence; h0, c0 and the final states are (B, features) either way. T, N and B
are at least 1. With ``reverse`` the steps run from the last to the first, and each sequence of a packed batch from
its own last one.

Shapes: I inputs, H = hidden_size, P the length of h (H, or with a projection less), G gates (LSTM i, f, g, o: 4; GRU
r, z, n: 3; RNN: 1). weight_ih (G H, I), weight_hh (G H, P), bias_ih and bias_hh (G H,) or both None, weight_hr (P, H)
or None. One dtype and device for all; half types are computed in float32 and rounded at the end. Where weight_ih is
None, x is (T, B, G H) or (N, G H): the projection of the input, made before, to which bias_ih is still added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Request(NamedTuple):
    """What an implementation is asked to do; ``supports`` answers to it.

    ``device`` is a torch device type. ``few`` means at most ``FEW_SEQUENCES`` of them, ``one_step`` a sequence of
    length 1, ``cell`` a single step asked for as such, ``tiny`` weights of at most ``TINY_WEIGHT`` elements,
    ``training`` that backward may come, ``variant`` anything that torch.nn has not: one of the fields after it, another
    activation, the cells of all steps, or gates that backward makes again.
    """

    device: str
    dtype: torch.dtype
    activation: str
    few: bool
    one_step: bool
    cell: bool
    tiny: bool
    packed: bool
    projected: bool
    training: bool
    variant: bool = False
    recurrent_activation: str = "sigmoid"
    layer_norm: bool = False
    peephole: bool = False
    zoneout: bool = False
    recurrent_dropout: bool = False


#: So few sequences use a weight as it streams by; for more of them a step is a matrix product.
FEW_SEQUENCES = 2

#: Elements of weight_ih and weight_hh up to which a step takes less time than the call that asks for it.
TINY_WEIGHT = 1 << 15


class Forward(NamedTuple):
    """What ``forward`` gives. All from ``gates`` on are for ``backward``, and None without ``saves``.

    ``output`` is (T, B, P) or (N, P), ``h_n`` (B, P), ``c_n`` (B, H) or None. ``gates`` is (N, G H) with N = T B for a
    padded sequence (an RNN: (N, H), what zoneout was to keep from, None without it), ``cells`` (N, H) for an LSTM,
    ``extra`` (N, H) for a GRU (the recurrent part of n) and for an LSTM with a projection (h before it), ``normal``
    (N, G H) and ``inverse`` (N, 1) with a layer norm (``recurrent_variants.normalise`` of h W_hh^T), in the dtype
    that is computed in. Every implementation keeps the same.
    """

    output: Tensor
    h_n: Tensor
    c_n: Tensor | None = None
    gates: Tensor | None = None
    cells: Tensor | None = None
    extra: Tensor | None = None
    normal: Tensor | None = None
    inverse: Tensor | None = None


class Kept(NamedTuple):
    """What ``backward`` gets of forward's; see :class:`Forward`."""

    output: Tensor
    gates: Tensor | None
    cells: Tensor | None
    extra: Tensor | None
    normal: Tensor | None = None
    inverse: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients ``backward`` is to make, in the order in which it returns them."""

    x: bool
    h0: bool
    c0: bool
    weight_ih: bool
    weight_hh: bool
    bias_ih: bool
    bias_hh: bool
    weight_hr: bool
    peephole: bool = False
    norm_hh: bool = False
    norm_c: bool = False
    norm_c_bias: bool = False


Gradients = tuple[Tensor | None, ...]
States = tuple[Tensor, ...]


def supports(request: Request) -> str | None:
    """The reference runs everything."""
    del request
    return None


def step_sizes(x: Tensor, batch_sizes: Tensor | None) -> list[int]:
    """The rows of each step."""
    return [x.size(1)] * x.size(0) if batch_sizes is None else batch_sizes.tolist()


def rows_of(x: Tensor) -> Tensor:
    """A sequence as rows (N, features): step t's follow those of step t - 1."""
    return x.flatten(0, 1) if x.dim() == 3 else x


def like_sequence(rows: Tensor, x: Tensor) -> Tensor:
    """Rows (N, features) in the form of the sequence x."""
    return rows.view(x.size(0), x.size(1), rows.size(1)) if x.dim() == 3 else rows


def initial(state: Tensor | None, batch: int, width: int, like: Tensor) -> Tensor:
    """An initial state in ``like``'s dtype; zero where there is none."""
    return like.new_zeros(batch, width) if state is None else state.to(like.dtype)


def project(x: Tensor, weight_ih: Tensor | None, bias_ih: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W_ih^T + b_ih as rows (N, G H)."""
    rows = rows_of(x).to(dtype)
    if weight_ih is not None:
        rows = rows @ weight_ih.to(dtype).t()
    return rows if bias_ih is None else rows + bias_ih.to(dtype)


def joined(parts: Iterable[tuple[Tensor | None, ...]]) -> tuple[Any, ...]:
    """Column by column, the parts that are there in one tensor."""
    columns = zip(*parts, strict=True)
    return tuple(None if column[0] is None else torch.cat(column) for column in columns)


def scan(
    step: Callable[[slice, States], tuple[States, tuple[Tensor | None, ...]]],
    states: States,
    sizes: list[int],
    reverse: bool,
) -> tuple[States, tuple[Any, ...]]:
    """Run ``step(rows of the step, states) -> (states, kept)`` over all steps.

    Returns the final states, (B, *) each, and what was kept as rows (N, *).
    """
    ends = torch.tensor(sizes).cumsum(0).tolist()
    order = range(len(sizes) - 1, -1, -1) if reverse else range(len(sizes))
    current = tuple(s[: sizes[order[0]]] for s in states)
    finished: list[States] = []  # of the sequences that have ended, the shortest first
    kept: dict[int, tuple[Tensor | None, ...]] = {}
    for t in order:
        size, running = sizes[t], current[0].size(0)
        if size < running:
            finished.append(tuple(s[size:] for s in current))
            current = tuple(s[:size] for s in current)
        elif size > running:
            joining = (first[running:size] for first in states)
            current = tuple(torch.cat(pair) for pair in zip(current, joining, strict=True))
        current, kept[t] = step(slice(ends[t] - size, ends[t]), current)
    final = tuple(torch.cat(parts) for parts in zip(current, *reversed(finished), strict=True))
    return final, joined(kept[t] for t in range(len(sizes)))


def scan_back(
    step: Callable[[slice, States], tuple[States, tuple[Tensor | None, ...]]],
    states: States,
    sizes: list[int],
    reverse: bool,
) -> tuple[States, tuple[Any, ...]]:
    """``scan`` against the order of the recurrence: ``step(rows of the step, gradients of its states)``.

    ``states`` begin as the gradients of the final states, (B, *) each, and end as those of the initial ones.
    """
    ends = torch.tensor(sizes).cumsum(0).tolist()
    kept: dict[int, tuple[Tensor | None, ...]] = {}
    for t in range(len(sizes)) if reverse else range(len(sizes) - 1, -1, -1):
        size = sizes[t]
        moved, kept[t] = step(slice(ends[t] - size, ends[t]), tuple(s[:size] for s in states))
        states = tuple(torch.cat([new, old[size:]]) for new, old in zip(moved, states, strict=True))
    return states, joined(kept[t] for t in range(len(sizes)))


def before(kept: Tensor, first: Tensor | None, sizes: list[int], reverse: bool) -> Tensor:
    """For each row of ``kept`` (N, width) that of the step before it, or of the initial state ``first`` (B, width)."""
    batch, count = max(sizes), kept.size(0)
    first = kept.new_zeros(batch, kept.size(1)) if first is None else first.to(kept.dtype)
    if len(sizes) * batch == count:
        return torch.cat([kept[batch:], first]) if reverse else torch.cat([first, kept[: count - batch]])
    rows = torch.cat([first, kept])
    index, offset = [], 0
    for t, size in enumerate(sizes):
        if reverse:
            running = sizes[t + 1] if t + 1 < len(sizes) else 0
            index += [*range(batch + offset + size, batch + offset + size + running), *range(running, size)]
        elif t:
            index += range(batch + offset - sizes[t - 1], batch + offset - sizes[t - 1] + size)
        else:
            index += range(size)
        offset += size
    return rows.index_select(0, torch.tensor(index, device=kept.device))


def finish(
    x: Tensor,
    h_before: Callable[[], Tensor],
    grad_gates: Tensor,
    grad_recurrent: Tensor,
    grad_product: Tensor,
    weight_ih: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight_ih, weight_hh, bias_ih and bias_hh: one product each, over all steps.

    ``grad_gates`` (N, G H) is the gradient of x W_ih^T + b_ih, ``grad_recurrent`` that of what a step adds to it, and
    ``grad_product`` that of h W_hh^T, another where a layer norm follows the product.
    """
    rows = rows_of(x)
    grad_bias = grad_gates.sum(0) if needs.bias_ih or (needs.bias_hh and grad_recurrent is grad_gates) else None
    grad_bias_hh = None
    if needs.bias_hh:
        shared = grad_bias if grad_recurrent is grad_gates else None
        grad_bias_hh = grad_recurrent.sum(0) if shared is None else shared.clone()
    grad_x = None
    if needs.x:
        rows_grad = grad_gates if weight_ih is None else torch.mm(grad_gates, weight_ih.to(grad_gates.dtype))
        grad_x = like_sequence(rows_grad, x)
    return (
        grad_x,
        torch.mm(grad_gates.t(), rows.to(grad_gates.dtype)) if needs.weight_ih else None,
        torch.mm(grad_product.t(), h_before()) if needs.weight_hh else None,
        grad_bias if needs.bias_ih else None,
        grad_bias_hh,
    )


def narrowed(gradients: tuple[Tensor | None, ...], needs: Needs, dtype: torch.dtype) -> Gradients:
    """The gradients that are needed, in the dtype of the data."""
    pairs = zip(gradients, needs, strict=True)
    return tuple(None if g is None or not need else g.to(dtype) for g, need in pairs)
