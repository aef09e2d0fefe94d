"""gru: one direction of one GRU layer over a sequence; see :mod:`.recurrent`."""

from __future__ import annotations

from dlkern.kernels.reference import gru as reference

from . import recurrent

OP = recurrent.family("gru", 3, False, reference)
GRUFunction = OP.function
