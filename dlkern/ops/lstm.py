"""lstm: one direction of one LSTM layer over a sequence; see :mod:`.recurrent`."""

from __future__ import annotations

from dlkern.kernels.reference import lstm as reference

from . import recurrent

OP = recurrent.family("lstm", 4, True, reference)
LSTMFunction = OP.function
