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
from dlkern.ops.recurrent_layers import Variant

from . import recurrent_checks as checks
from .arguments import check_tensor
from .recurrent_variants import variant as _variant
from .recurrent_variants import with_extras

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
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
    layer_norm: Sequence[Tensor] = (),
    peephole: Sequence[Tensor] = (),
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    memory_efficient: bool = False,
    return_all_cells: bool = False,
) -> Any:
    """A multi-layer LSTM over a sequence, as torch.nn.LSTM computes it, or a variant of it.

    Args:
        x: (T, B, I), or (B, T, I) with ``batch_first``, or unbatched (T, I), or a PackedSequence; float32, float64,
            float16 or bfloat16.
        weights: for each layer and direction, in this order: weight_ih (4 H, I), weight_hh (4 H, P), then bias_ih and
            bias_hh (4 H,) or neither, then weight_hr (P, H) where h is projected (P < H; else P = H). Gates in the
            order i, f, g, o. Layers after the first take I = P, or 2 P if bidirectional.
        hx: (h_0, c_0) of (num_layers * directions, B, P) and (..., B, H), without B where x is unbatched; zeros by
            default.
        dropout: probability, in training, after each layer but the last.
        activation, recurrent_activation: in place of tanh (of g, and of c on its way to h) and of sigmoid (of i, f and
            o): "tanh", "relu", "sigmoid", "hardsigmoid", "leaky_relu", "elu" or "identity".
        layer_norm: for each layer and direction norm_ih and norm_hh (4 H,), norm_c and norm_c_bias (H,). The gates are
            then made of LN(x W_ih^T) norm_ih + LN(h W_hh^T) norm_hh + biases, each norm over all four together, and h
            of LN(c) norm_c + norm_c_bias (Ba et al., 2016; eps 1e-5).
        peephole: for each layer and direction the weights (3 H,) with which i and f see the last c, and o the new one.
        zoneout: probability, in training, with which a unit of h stays as it was; otherwise the share that stays.
        recurrent_dropout: probability, in training, with which a unit of h is left out of h W_hh^T: the same units at
            each step of a sequence, the others scaled up.
        memory_efficient: keep h and c alone for backward, which makes the gates again.
        return_all_cells: return the cells of all steps as well.

    Returns:
        The output, (T, B, directions * P) in the form of x, and (h_n, c_n), shaped as hx; with ``return_all_cells`` a
        third: c of each step of the last layer, (T, B, directions * H) in the form of x.

    Raises:
        ValueError: a wrong rank, shape or count of tensors, an empty sequence, an unknown activation, or a probability
            outside of [0, 1].
        TypeError: what is no tensor or tuple, or dtypes that differ (autocast may mix them).
        RuntimeError: tensors on several devices, or a forced backend that cannot run this.
    """
    variant = _variant(activation, recurrent_activation, zoneout, recurrent_dropout, memory_efficient, return_all_cells)
    output, h_n, c_n, cells = _sequence(
        _lstm.OP, x, weights, hx, num_layers, bidirectional, batch_first, dropout, training, variant, layer_norm,
        peephole,
    )  # fmt: skip
    return (output, (h_n, c_n), cells) if return_all_cells else (output, (h_n, c_n))


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
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
    layer_norm: Sequence[Tensor] = (),
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    memory_efficient: bool = False,
) -> tuple[Any, Tensor]:
    """A multi-layer GRU over a sequence, as torch.nn.GRU computes it, or a variant of it.

    Arguments and errors as in :func:`lstm`, with 3 H in place of 4 H (gates in the order r, z, n), no projection, and
    ``hx`` the one tensor h_0. ``activation`` is that of n, ``recurrent_activation`` that of r and z; ``layer_norm`` is
    norm_ih and norm_hh (3 H,) for each layer and direction. Returns the output and h_n.
    """
    variant = _variant(activation, recurrent_activation, zoneout, recurrent_dropout, memory_efficient)
    return _sequence(
        _gru.OP, x, weights, hx, num_layers, bidirectional, batch_first, dropout, training, variant, layer_norm
    )[:2]


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
    layer_norm: Sequence[Tensor] = (),
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    memory_efficient: bool = False,
) -> tuple[Any, Tensor]:
    """A multi-layer Elman RNN over a sequence, as torch.nn.RNN computes it, or a variant of it.

    Arguments and errors as in :func:`lstm`, with H in place of 4 H, no projection, ``hx`` the one tensor h_0, and
    ``nonlinearity`` "tanh" or "relu"; ``layer_norm`` is norm_ih and norm_hh (H,) for each layer and direction. Returns
    the output and h_n.
    """
    checks.check_nonlinearity(nonlinearity)
    variant = _variant(nonlinearity, "sigmoid", zoneout, recurrent_dropout, memory_efficient)
    return _sequence(
        _rnn.OP, x, weights, hx, num_layers, bidirectional, batch_first, dropout, training, variant, layer_norm
    )[:2]


def lstm_cell(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
    layer_norm: Sequence[Tensor] = (),
    peephole: Sequence[Tensor] = (),
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, as torch.nn.LSTMCell computes it, or a variant of it.

    Args:
        x: (B, I) or (I,).
        hx: (h, c), each (B, H) or (H,) as x; None for zeros.
        weight_ih, weight_hh: (4 H, I) and (4 H, H); bias_ih, bias_hh: (4 H,), or both None.
        activation, recurrent_activation, layer_norm, peephole, zoneout, recurrent_dropout, training: as in
            :func:`lstm`. What is random is drawn anew at each call.

    Returns:
        The new h and c, shaped as hx.

    Raises:
        As :func:`lstm`.
    """
    h, c = (None, None) if hx is None else checks.pair(hx)
    variant = _variant(activation, recurrent_activation, zoneout, recurrent_dropout)
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh)
    return _cell(_lstm.OP, x, h, c, weights, variant, training, layer_norm, peephole)  # type: ignore[return-value]


def gru_cell(
    x: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
    layer_norm: Sequence[Tensor] = (),
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """One step of a GRU, as torch.nn.GRUCell computes it, or a variant of it.

    Arguments as in :func:`lstm_cell` and :func:`gru`, with one state.
    """
    variant = _variant(activation, recurrent_activation, zoneout, recurrent_dropout)
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh)
    return _cell(_gru.OP, x, hx, None, weights, variant, training, layer_norm)[0]


def rnn_cell(
    x: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    layer_norm: Sequence[Tensor] = (),
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """One step of an RNN, as torch.nn.RNNCell computes it, or a variant of it.

    Arguments as in :func:`lstm_cell` and :func:`rnn`, with one state.
    """
    checks.check_nonlinearity(nonlinearity)
    variant = _variant(nonlinearity, "sigmoid", zoneout, recurrent_dropout)
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh)
    return _cell(_rnn.OP, x, hx, None, weights, variant, training, layer_norm)[0]


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
    variant: Variant,
    layer_norm: Sequence[Tensor] = (),
    peephole: Sequence[Tensor] = (),
) -> tuple[Any, Tensor, Tensor | None, Any]:
    directions = 2 if bidirectional else 1
    if dropout != 0.0:
        checks.check_probability("dropout", dropout)
    h0, c0 = (hx, None) if hx is None or not op.has_cell else checks.pair(hx)
    plain = not layer_norm and not peephole and not variant.all_cells
    if (
        plain
        and num_layers == directions == 1
        and type(x) is Tensor
        and x.dim() == 3
        and len(weights) in (2, 4)
        and x.numel()
    ):
        steps, only = x.transpose(0, 1) if batch_first else x, Weights(*weights)
        if checks.fits(op, steps, (1, steps.size(1)), h0, c0, only):
            output, h_n, c_n, _ = _recurrent.run(op, steps, h0, c0, [only], 1, None, variant, dropout, training)
            return output.transpose(0, 1) if batch_first else output, h_n, c_n, None
    packed = x if isinstance(x, PackedSequence) else None
    data: Tensor = x.data if packed is not None else x  # type: ignore[assignment,union-attr]
    layers = checks.split(op, data, weights, num_layers, directions)
    layers = with_extras(op, data, layers, layer_norm, peephole)
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
    found = _recurrent.run(op, data, h0, c0, layers, directions, batch_sizes, variant, dropout, training)
    output, h_n, c_n, cells = found
    if packed is not None:
        if packed.unsorted_indices is not None:
            h_n = h_n.index_select(1, packed.unsorted_indices)
            c_n = None if c_n is None else c_n.index_select(1, packed.unsorted_indices)
        made, every = (None if t is None else PackedSequence(t, *packed[1:]) for t in (output, cells))
        return made, h_n, c_n, every
    if not batched:
        return tuple(None if t is None else t.squeeze(1) for t in found)  # type: ignore[return-value]
    if batch_first:
        return output.transpose(0, 1), h_n, c_n, None if cells is None else cells.transpose(0, 1)
    return output, h_n, c_n, cells


# ---------------------------------------------------------------------------------------- cells
def _cell(
    op: Family,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Weights,
    variant: Variant,
    training: bool,
    layer_norm: Sequence[Tensor],
    peephole: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor | None]:
    check_tensor("x", x)
    for name, state in (("h", h), ("c", c)):
        if state is not None:
            check_tensor(name, state)
    rank = x.dim()
    if rank not in (1, 2):
        raise ValueError(f"x: expected (B, I) or (I,), got shape {tuple(x.shape)}")
    if (weights.bias_ih is None) != (weights.bias_hh is None):
        checks.check_weights(op, x, weights, x.size(-1), None, "", True)
    if layer_norm or peephole:
        checks.check_step(op, x, h, c, weights)
        (weights,) = with_extras(op, x, [weights], layer_norm, peephole)
    if rank == 2:

        def check() -> None:
            if not checks.fits(op, x, (x.size(0),), h, c, weights):
                checks.check_step(op, x, h, c, weights)

        return _recurrent.cell(op, x, h, c, weights, variant, training, check)
    checks.check_step(op, x, h, c, weights)
    h, c = h if h is None else h.unsqueeze(0), c if c is None else c.unsqueeze(0)
    h_n, c_n = _recurrent.cell(op, x.unsqueeze(0), h, c, weights, variant, training, lambda: None)
    return h_n.squeeze(0), None if c_n is None else c_n.squeeze(0)
