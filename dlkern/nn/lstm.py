"""LSTM, LayerNormLSTM and LSTMCell."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dlkern import functional

from .recurrent import Varied, cell_options, cell_weights, flat_weights, options


class LSTM(Varied, nn.LSTM):
    """torch.nn.LSTM, faster where that was measured: the same arguments, Parameters, state_dict and numbers.

    ``forward(input, hx=None)`` takes (T, B, I), (B, T, I) with ``batch_first``, unbatched (T, I) or a PackedSequence,
    and returns ``output, (h_n, c_n)``; shapes and errors are those of :func:`dlkern.functional.lstm`. Gradients in
    eval mode and gradients of gradients work.

    Beyond torch.nn's arguments, by name (:func:`dlkern.functional.lstm` defines them):

    - ``activation="tanh"``, ``recurrent_activation="sigmoid"``: as Keras names them;
    - ``layer_norm=False``: with the Parameters norm_ih_l{k} and norm_hh_l{k} (4 H,), norm_c_l{k} and norm_c_bias_l{k}
      (H,);
    - ``peephole=False``: with the Parameters peephole_l{k} (3 H,) for i, f and o;
    - ``zoneout=0.0``, ``recurrent_dropout=0.0``: probabilities, in training;
    - ``memory_efficient=False``: gates are made again in backward, not kept for it;
    - ``return_all_cells=False``: ``forward`` returns a third result, c of each step of the last layer.

    torch.compile runs an LSTM eagerly, as it does torch.nn's, unless torch._dynamo.config.allow_rnn is set: then,
    and where functional.lstm is called, it is one node of the graph for each layer and direction.
    """

    def __init__(
        self,
        *args: Any,
        activation: str = "tanh",
        recurrent_activation: str = "sigmoid",
        layer_norm: bool = False,
        peephole: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        memory_efficient: bool = False,
        return_all_cells: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._vary(
            "lstm", activation=activation, recurrent_activation=recurrent_activation, layer_norm=layer_norm,
            peephole=peephole, zoneout=zoneout, recurrent_dropout=recurrent_dropout, memory_efficient=memory_efficient,
            return_all_cells=return_all_cells,
        )  # fmt: skip

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:  # type: ignore[override]
        """The output and (h_n, c_n), and with ``return_all_cells`` the cells."""
        return functional.lstm(input, flat_weights(self), hx, **options(self))


class LayerNormLSTM(LSTM):
    """LSTM with ``layer_norm=True``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, layer_norm=True, **kwargs)


class LSTMCell(Varied, nn.LSTMCell):
    """torch.nn.LSTMCell: the same arguments, Parameters, state_dict and numbers; see functional.lstm_cell.

    Beyond torch.nn's arguments: ``activation``, ``recurrent_activation``, ``layer_norm``, ``peephole``, ``zoneout`` and
    ``recurrent_dropout`` as in :class:`LSTM`, with Parameters named without a layer. What is random is drawn anew at
    each call: for the same units left out at every step use :class:`LSTM`.
    """

    def __init__(
        self,
        *args: Any,
        activation: str = "tanh",
        recurrent_activation: str = "sigmoid",
        layer_norm: bool = False,
        peephole: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._vary(
            "lstm", activation=activation, recurrent_activation=recurrent_activation, layer_norm=layer_norm,
            peephole=peephole, zoneout=zoneout, recurrent_dropout=recurrent_dropout,
        )  # fmt: skip

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The new (h, c) from input (B, I) or (I,) and hx = (h, c)."""
        return functional.lstm_cell(input, hx, *cell_weights(self), **cell_options(self))
