"""The parity rule of an op, for the tests. It lives in the package: ``dlkern bench`` holds its rows to it as well."""

from __future__ import annotations

from dlkern.bench.parity import ROUNDINGS, assert_elementwise, assert_parity, bound, error

__all__ = ["ROUNDINGS", "assert_elementwise", "assert_parity", "bound", "error"]
