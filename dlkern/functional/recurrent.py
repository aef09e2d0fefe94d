"""``lstm``, ``gru``, ``rnn`` and their cells: checks of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from dlkern.ops import gru as _gru
from dlkern.ops import lstm as _lstm
from dlkern.ops import recurrent_layers as _recurrent
from dlkern.ops import rnn as _rnn
from dlkern.ops.recurrent import Family, Weights

from . import recurrent_checks as checks

Sequence_ = Tensor | PackedSequence


def lstm(
    x: Sequence_,
    weights: Sequence[Tensor],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """A multi-layer LSTM over a sequence, as torch.nn.LSTM computes it.

    Args:
        x: (T, B, I), or (B, T, I) with ``batch_first``, or unbatched (T, I), or a PackedSequence; float32, float64,
            float16 or bfloat16.
        weights: for each layer and direction, in this order: weight_ih (4 H, I), weight_hh (4 H, P), then bias_ih and
            bias_hh (4 H,) or neither, then weight_hr (P, H) where h is projected (P < H; else P = H). Gates in the
            order i, f, g, o. Layers after the first take I = P, or 2 P if bidirectional.
        hx: (h_0, c_0) of (num_layers * directions, B, P) and (..., B, H), without B where x is unbatched; zeros by
            default.
        dropout: probability, in training, after each layer but the last.

    Returns:
        The output, (T, B, directions * P) in the form of x, and (h_n, c_n), shaped as hx.

    Raises:
        ValueError: a wrong rank, shape or count of tensors, an empty sequence, or a dropout outside of [0, 1].
        TypeError: what is no tensor or tuple, or dtypes that differ (autocast may mix them).
        RuntimeError: tensors on several devices, or a forced backend that cannot run this.
    """
    output, h_n, c_n = _sequence(
        _lstm.OP, x, weights, hx, num_layers, bidirectional, batch_first, dropout, training, "tanh"
    )
    return output, (h_n, c_n)  # type: ignore[return-value]


def gru(
    x: Sequence_,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Any, Tensor]:
    """A multi-layer GRU over a sequence, as torch.nn.GRU computes it.

    Arguments and errors as in :func:`lstm`, with 3 H in place of 4 H (gates in the order r, z, n), no projection, and
    ``hx`` the one tensor h_0. Returns the output and h_n.
    """
    return _sequence(_gru.OP, x, weights, hx, num_layers, bidirectional, batch_first, dropout, training, "tanh")[:2]


def rnn(
    x: Sequence_,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Any, Tensor]:
    """A multi-layer Elman RNN over a sequence, as torch.nn.RNN computes it.

    Arguments and errors as in :func:`lstm`, with H in place of 4 H, no projection, ``hx`` the one tensor h_0, and
    ``nonlinearity`` "tanh" or "relu". Returns the output and h_n.
    """
    checks.check_nonlinearity(nonlinearity)
    return _sequence(_rnn.OP, x, weights, hx, num_layers, bidirectional, batch_first, dropout, training, nonlinearity)[
        :2
    ]


def lstm_cell(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, as torch.nn.LSTMCell computes it.

    Args:
        x: (B, I) or (I,).
        hx: (h, c), each (B, H) or (H,) as x; None for zeros.
        weight_ih, weight_hh: (4 H, I) and (4 H, H); bias_ih, bias_hh: (4 H,), or both None.

    Returns:
        The new h and c, shaped as hx.

    Raises:
        As :func:`lstm`.
    """
    h, c = (None, None) if hx is None else checks.pair(hx)
    return _cell(_lstm.OP, x, h, c, Weights(weight_ih, weight_hh, bias_ih, bias_hh), "tanh")  # type: ignore[return-value]


def gru_cell(
    x: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU, as torch.nn.GRUCell computes it; arguments as in :func:`lstm_cell` with 3 H and one state."""
    return _cell(_gru.OP, x, hx, None, Weights(weight_ih, weight_hh, bias_ih, bias_hh), "tanh")[0]


def rnn_cell(
    x: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of an RNN, as torch.nn.RNNCell computes it; arguments as in :func:`lstm_cell` with H and one state."""
    checks.check_nonlinearity(nonlinearity)
    return _cell(_rnn.OP, x, hx, None, Weights(weight_ih, weight_hh, bias_ih, bias_hh), nonlinearity)[0]


# ------------------------------------------------------------------------------------ sequences
def _sequence(
    op: Family,
    x: Sequence_,
    weights: Sequence[Tensor],
    hx: Any,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    activation: str,
) -> tuple[Any, Tensor, Tensor | None]:
    directions = 2 if bidirectional else 1
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: expected a probability between 0 and 1, got {dropout}")
    h0, c0 = (hx, None) if hx is None or not op.has_cell else checks.pair(hx)
    if num_layers == directions == 1 and type(x) is Tensor and x.dim() == 3 and len(weights) in (2, 4) and x.numel():
        steps, only = x.transpose(0, 1) if batch_first else x, Weights(*weights)
        if checks.fits(op, steps, (1, steps.size(1)), h0, c0, only):
            output, h_n, c_n = _recurrent.run(op, steps, h0, c0, [only], 1, None, activation, dropout, training)
            return output.transpose(0, 1) if batch_first else output, h_n, c_n
    packed = x if isinstance(x, PackedSequence) else None
    data: Tensor = x.data if packed is not None else x  # type: ignore[assignment,union-attr]
    layers = checks.split(op, data, weights, num_layers, directions)
    hidden, outputs = layers[0].hh.size(0) // op.gates, layers[0].hh.size(1)
    batched = True
    if packed is not None:
        checks.check_packed(packed)
        batch = int(packed.batch_sizes[0])
    else:
        rank = data.dim()
        if rank not in (2, 3):
            raise ValueError(
                f"x: expected (T, B, I), (B, T, I) with batch_first, or unbatched (T, I), got shape {tuple(data.shape)}"
            )
        batched = rank == 3
        if not batched:
            data = data.unsqueeze(1)
        elif batch_first:
            data = data.transpose(0, 1)
        batch = data.size(1)
        if data.size(0) == 0:
            raise ValueError(f"x: expected a sequence of at least one step, got shape {tuple(x.shape)}")  # type: ignore[union-attr]
    for name, state, width in (("h_0", h0, outputs), ("c_0", c0, hidden)):
        if state is not None:
            checks.check_state(name, state, data, (len(layers), batch, width) if batched else (len(layers), width))
    if not batched:
        h0, c0 = (None if s is None else s.unsqueeze(1) for s in (h0, c0))
    batch_sizes = None
    if packed is not None:
        batch_sizes = packed.batch_sizes
        if h0 is None:
            h0 = data.new_zeros(len(layers), batch, outputs)
            c0 = data.new_zeros(len(layers), batch, hidden) if op.has_cell else None
        elif packed.sorted_indices is not None:
            h0, c0 = (None if s is None else s.index_select(1, packed.sorted_indices) for s in (h0, c0))
    output, h_n, c_n = _recurrent.run(op, data, h0, c0, layers, directions, batch_sizes, activation, dropout, training)
    if packed is not None:
        if packed.unsorted_indices is not None:
            h_n = h_n.index_select(1, packed.unsorted_indices)
            c_n = None if c_n is None else c_n.index_select(1, packed.unsorted_indices)
        made = PackedSequence(output, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return made, h_n, c_n
    if not batched:
        return output.squeeze(1), h_n.squeeze(1), None if c_n is None else c_n.squeeze(1)
    return output.transpose(0, 1) if batch_first else output, h_n, c_n


# ---------------------------------------------------------------------------------------- cells
def _cell(
    op: Family, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Weights, activation: str
) -> tuple[Tensor, Tensor | None]:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    rank = x.dim()
    if rank not in (1, 2):
        raise ValueError(f"x: expected (B, I) or (I,), got shape {tuple(x.shape)}")
    if (weights.bias_ih is None) != (weights.bias_hh is None):
        checks.check_weights(op, x, weights, x.size(-1), None, "", True)
    if rank == 2:

        def check() -> None:
            if not checks.fits(op, x, (x.size(0),), h, c, weights):
                checks.check_step(op, x, h, c, weights)

        return _recurrent.cell(op, x, h, c, weights, activation, check)
    checks.check_step(op, x, h, c, weights)
    h, c = h if h is None else h.unsqueeze(0), c if c is None else c.unsqueeze(0)
    h_n, c_n = _recurrent.cell(op, x.unsqueeze(0), h, c, weights, activation, lambda: None)
    return h_n.squeeze(0), None if c_n is None else c_n.squeeze(0)
