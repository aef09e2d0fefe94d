"""GRU and GRUCell."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dlkern import functional

from .recurrent import cell_weights, flat_weights, options


class GRU(nn.GRU):
    """torch.nn.GRU, faster where that was measured: the same arguments, Parameters, state_dict and numbers.

    ``forward(input, hx=None)`` takes (T, B, I), (B, T, I) with ``batch_first``, unbatched (T, I) or a PackedSequence,
    and returns ``output, h_n``; shapes and errors are those of :func:`dlkern.functional.gru`. Gradients in
    eval mode and gradients of gradients work.

    torch.compile runs a GRU eagerly, as it does torch.nn's, unless torch._dynamo.config.allow_rnn is set: then,
    and where functional.gru is called, it is one node of the graph for each layer and direction.
    """

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:  # type: ignore[override]
        """The output and h_n."""
        return functional.gru(input, flat_weights(self), hx, **options(self))


class GRUCell(nn.GRUCell):
    """torch.nn.GRUCell: the same arguments, Parameters, state_dict and numbers; see functional.gru_cell."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The new h from input (B, I) or (I,) and h."""
        return functional.gru_cell(input, hx, *cell_weights(self))
