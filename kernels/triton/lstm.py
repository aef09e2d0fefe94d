"""lstm in Triton; the contract is that of kernels/reference/lstm.py."""

from __future__ import annotations

import functools

from . import recurrent
from .recurrent import supports

__all__ = ["backward", "forward", "supports"]

forward = functools.partial(recurrent.forward, "lstm")
backward = functools.partial(recurrent.backward, "lstm")
