"""What ``import dlkern`` costs, and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys

BUDGET_MS = 50.0
ROUNDS = 4

_TIMED = """
import time, torch
begun = time.perf_counter()
{statement}
print((time.perf_counter() - begun) * 1e3)
"""


def _milliseconds(statement: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _TIMED.format(statement=statement)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def test_import_costs_nothing_beside_torch() -> None:
    """The least of several fresh processes, in turn with processes that import a module Python has already."""
    seconds: dict[str, list[float]] = {"import dlkern": [], "import os": []}
    for _ in range(ROUNDS):
        for statement, found in seconds.items():
            found.append(_milliseconds(statement))
    cost = min(seconds["import dlkern"]) - min(seconds["import os"])
    assert cost <= BUDGET_MS, f"import dlkern takes {cost:.1f} ms beyond import torch; the budget is {BUDGET_MS:.0f} ms"


def test_import_loads_no_backend_and_no_library() -> None:
    program = (
        "import json, sys, torch; before = set(sys.modules); import dlkern; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert "dlkern" in loaded
    heavy = (
        "triton",
        "torchvision",
        "timm",
        "numpy",
        "matplotlib",
        "rich",
        "dlkern._C",
        "dlkern.ops",
        "dlkern.kernels",
    )
    found = [name for name in loaded if name in heavy or name.startswith(tuple(f"{h}." for h in heavy))]
    assert found == []


def test_every_public_name_resolves() -> None:
    import dlkern

    for name in dlkern.__all__:
        assert getattr(dlkern, name) is not None, name
    assert set(dlkern.__all__) <= set(dir(dlkern))
