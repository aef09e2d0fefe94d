"""GRU and GRUCell."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dlkern import functional

from .recurrent import Varied, cell_options, cell_weights, flat_weights, options


class GRU(Varied, nn.GRU):
    """torch.nn.GRU, faster where that was measured: the same arguments, Parameters, state_dict and numbers.

    ``forward(input, hx=None)`` takes (T, B, I), (B, T, I) with ``batch_first``, unbatched (T, I) or a PackedSequence,
    and returns ``output, h_n``; shapes and errors are those of :func:`dlkern.functional.gru`. Gradients in
    eval mode and gradients of gradients work.

    Beyond torch.nn's arguments, by name: ``activation`` (of n), ``recurrent_activation`` (of r and z), ``layer_norm``
    (Parameters norm_ih_l{k} and norm_hh_l{k} (3 H,)), ``zoneout``, ``recurrent_dropout`` and ``memory_efficient``, as
    in :class:`dlkern.nn.LSTM`; :func:`dlkern.functional.gru` defines them.

    torch.compile runs a GRU eagerly, as it does torch.nn's, unless torch._dynamo.config.allow_rnn is set: then,
    and where functional.gru is called, it is one node of the graph for each layer and direction.
    """

    def __init__(
        self,
        *args: Any,
        activation: str = "tanh",
        recurrent_activation: str = "sigmoid",
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        memory_efficient: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._vary(
            "gru", activation=activation, recurrent_activation=recurrent_activation, layer_norm=layer_norm,
            zoneout=zoneout, recurrent_dropout=recurrent_dropout, memory_efficient=memory_efficient,
        )  # fmt: skip

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:  # type: ignore[override]
        """The output and h_n."""
        return functional.gru(input, flat_weights(self), hx, **options(self))


class GRUCell(Varied, nn.GRUCell):
    """torch.nn.GRUCell: the same arguments, Parameters, state_dict and numbers; see functional.gru_cell.

    Beyond torch.nn's arguments: ``activation``, ``recurrent_activation``, ``layer_norm``, ``zoneout`` and
    ``recurrent_dropout`` as in :class:`GRU`; what is random is drawn anew at each call.
    """

    def __init__(
        self,
        *args: Any,
        activation: str = "tanh",
        recurrent_activation: str = "sigmoid",
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._vary(
            "gru", activation=activation, recurrent_activation=recurrent_activation, layer_norm=layer_norm,
            zoneout=zoneout, recurrent_dropout=recurrent_dropout,
        )  # fmt: skip

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The new h from input (B, I) or (I,) and h."""
        return functional.gru_cell(input, hx, *cell_weights(self), **cell_options(self))
