"""gru on the CPU; the contract is that of kernels/reference/gru.py."""

from __future__ import annotations

import functools

from . import recurrent
from .recurrent import supports

__all__ = ["backward", "forward", "supports"]

forward = functools.partial(recurrent.forward, "gru")
backward = functools.partial(recurrent.backward, "gru")
