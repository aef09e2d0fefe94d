"""dlkern: faster layers for PyTorch models, without changing the models.

``dlkern.swap(model)`` rewrites a model's sites in place; ``dlkern.nn`` has the layers and
``dlkern.functional`` the functions. Importing this package imports nothing: names load on first use.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from ._version import __version__

_HERE = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_HERE, "kernels")) and os.path.isfile(
    os.path.join(_HERE, os.pardir, "kernels", "activation.py")
):
    # Imported from a clone, where dlkern.kernels lies beside this folder instead of inside it.
    __path__.append(os.path.dirname(_HERE))

if TYPE_CHECKING:
    from . import bench, functional, nn, ops
    from ._swap import explain, no_fallback, report, swap, unswap
    from .dispatch import available_backends, backend
    from .freezing import freeze, unfreeze
    from .verification import VerifyReport, verify

_LAZY = {
    "available_backends": "dispatch",
    "backend": "dispatch",
    "explain": "_swap",
    "freeze": "freezing",
    "no_fallback": "_swap",
    "report": "_swap",
    "swap": "_swap",
    "unfreeze": "freezing",
    "unswap": "_swap",
    "verify": "verification",
    "VerifyReport": "verification",
}
_SUBMODULES = ("bench", "functional", "nn", "ops")

__all__ = [
    "VerifyReport",
    "__version__",
    "available_backends",
    "backend",
    "bench",
    "explain",
    "freeze",
    "functional",
    "nn",
    "no_fallback",
    "ops",
    "report",
    "swap",
    "unfreeze",
    "unswap",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
