"""LSTM and LSTMCell."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dlkern import functional

from .recurrent import cell_weights, flat_weights, options


class LSTM(nn.LSTM):
    """torch.nn.LSTM, faster where that was measured: the same arguments, Parameters, state_dict and numbers.

    ``forward(input, hx=None)`` takes (T, B, I), (B, T, I) with ``batch_first``, unbatched (T, I) or a PackedSequence,
    and returns ``output, (h_n, c_n)``; shapes and errors are those of :func:`dlkern.functional.lstm`. Gradients in
    eval mode and gradients of gradients work.

    torch.compile runs an LSTM eagerly, as it does torch.nn's, unless torch._dynamo.config.allow_rnn is set: then,
    and where functional.lstm is called, it is one node of the graph for each layer and direction.
    """

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:  # type: ignore[override]
        """The output and (h_n, c_n)."""
        return functional.lstm(input, flat_weights(self), hx, **options(self))


class LSTMCell(nn.LSTMCell):
    """torch.nn.LSTMCell: the same arguments, Parameters, state_dict and numbers; see functional.lstm_cell."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The new (h, c) from input (B, I) or (I,) and hx = (h, c)."""
        return functional.lstm_cell(input, hx, *cell_weights(self))
