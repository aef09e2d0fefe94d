"""Timing, memory and parity: what ``dlkern bench``, the demo and every ratio dlkern states are made with."""

from __future__ import annotations

from .measure import Comparison, Ratio, Spread, compare, saved_bytes, stable_environment

__all__ = ["Comparison", "Ratio", "Spread", "compare", "saved_bytes", "stable_environment"]
