"""How the ops are known to PyTorch: one ``torch.library`` fragment, and when it can be stepped round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("dlkern", "FRAGMENT")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define ``dlkern::<schema>`` for CPU and CUDA tensors, with its fake; returns the callable op."""
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"dlkern::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.dlkern, name).default


def unwatched(x: Tensor) -> bool:
    """Whether an op's implementation may be called without going through PyTorch's dispatcher.

    True where nothing looks at the ops that run: no compiler, no dispatch mode, no torch.jit.trace, no
    tensor subclass. It
    saves 5 us a call.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; the meta device has none, and PyTorch raises when asked."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def transformed() -> bool:
    """Whether a torch.func transform or forward mode is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def no_transforms(op: str, backend: str) -> RuntimeError:
    """What is raised where a backend was forced that has neither transforms nor forward mode."""
    return RuntimeError(
        f"{op}: the {backend} backend has no torch.func transforms and no forward-mode gradients; "
        f"use dlkern.backend({op}='torch')"
    )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will want the gradient of one of these."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def plainly(condition: bool) -> bool:
    """A bool of which the compiler has made up its mind: of symbolic sizes a guard, not a value."""
    found = False
    if condition:
        found = True
    return found
