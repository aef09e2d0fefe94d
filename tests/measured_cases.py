"""What the tests of measured swaps share."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dlkern.tuning import race

#: Of a race whose times decide nothing, or are seconds apart from each other.
SHORT = race.Effort(0.0, 5, 5)


def slowly(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
    """Let a function take that much longer."""
    original = getattr(owner, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)
