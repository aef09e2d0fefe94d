"""Timing and memory: the one primitive behind the demo, the benchmarks and every ratio dlkern states."""

from __future__ import annotations

from .measure import Comparison, Ratio, Spread, compare, saved_bytes, stable_environment

__all__ = ["Comparison", "Ratio", "Spread", "compare", "saved_bytes", "stable_environment"]
