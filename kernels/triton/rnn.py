"""rnn in Triton; the contract is that of kernels/reference/rnn.py."""

from __future__ import annotations

import functools

from . import recurrent
from .recurrent import supports

__all__ = ["backward", "forward", "supports"]

forward = functools.partial(recurrent.forward, "rnn")
backward = functools.partial(recurrent.backward, "rnn")
