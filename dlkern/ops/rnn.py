"""rnn: one direction of one Elman RNN layer over a sequence; see :mod:`.recurrent`."""

from __future__ import annotations

from dlkern.kernels.reference import rnn as reference

from . import recurrent

OP = recurrent.family("rnn", 1, False, reference)
RNNFunction = OP.function
