"""Runs CUDA C++ kernels on the CPU under AddressSanitizer: for tests, on a machine without a GPU.

``build(source, kernels)`` compiles a .cu with g++; ``Program.launch`` runs one kernel on CPU tensors, under several
orders of its threads. It raises :class:`ShimError` for an access out of bounds or misaligned (global, shared and
local memory), undefined behaviour, a barrier that some threads of a block do not reach, and results that depend on the
order: a barrier that is missing, or a read of shared memory that nothing has written.

What it cannot show: threads switch at barriers and warp collectives only, so a race that needs an interleaving between
two such points stays hidden, as does one whose outcome is the same in every order that was run; blocks run one after
another, and memory is sequentially consistent; local variables that nothing has written; floating point is the host's
(a * b + c is not contracted, math functions are the C library's).
"""

from __future__ import annotations

from .preprocess import Refused
from .program import Program, ShimError, Struct, build, missing

__all__ = ["Program", "Refused", "ShimError", "Struct", "build", "missing"]
