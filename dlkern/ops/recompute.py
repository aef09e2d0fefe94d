"""Less memory kept for backward, for more time: ``memory_efficient=True``.

Two things are kept otherwise although they can be made again: the output of a batch norm + activation, which the
convolution behind it keeps as its input, and the output of a residual ReLU, of which the derivative needs a bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dlkern.kernels import layout
from dlkern.kernels.activation import Activation
from dlkern.kernels.reference import activation as reference_activation
from dlkern.kernels.reference import batch_norm_act as reference

from . import batch_norm_act, library

_BITS = 8


def pack(y: Tensor) -> Tensor:
    """Where a dense tensor is positive: one bit an element, in memory order; uint8."""
    bits = torch.as_strided(y, (y.numel(),), (1,)) > 0
    if bits.numel() % _BITS:
        bits = torch.cat([bits, bits.new_zeros(-bits.numel() % _BITS)])
    powers = torch.tensor([1 << i for i in range(_BITS)], dtype=torch.uint8, device=y.device)
    return (bits.view(-1, _BITS).to(torch.uint8) * powers).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """The tensor of ones and zeros that ``pack`` was given the signs of, with the strides of ``like`` (dense)."""
    shifts = torch.arange(_BITS, dtype=torch.uint8, device=bits.device)
    flat = ((bits[:, None] >> shifts) & 1).flatten()[: like.numel()]
    made = torch.empty_like(like)
    torch.as_strided(made, (made.numel(),), (1,)).copy_(flat)
    return made


class MemoryEfficientFunction(batch_norm_act.BatchNormActFunction):
    """BatchNormActFunction that keeps one bit an element of a residual ReLU, and can make its output again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        run = batch_norm_act.run_forward if library.unwatched(inputs[0]) else batch_norm_act.forward_op
        y, mean, invstd = run(*inputs)
        residual, activation = inputs[3], inputs[9]
        ctx.recomputable = residual is None
        ctx.packed = residual is not None and activation == "relu"
        batch_norm_act.save(ctx, inputs, pack(y) if ctx.packed else y, mean, invstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if ctx.packed and grad_y is not None:
            x, weight, bias, residual, bits, mean, invstd = saved
            saved = (x, weight, bias, residual, unpack(bits, layout.dense(x)), mean, invstd)
        return batch_norm_act.gradients(ctx, grad_y, saved)


def again(node: Any) -> Tensor:
    """The output of a MemoryEfficientFunction, made again from what its node keeps (checked for writes by autograd)."""
    x, weight, bias, _, _, mean, invstd = node.saved_tensors
    _, _, activation, param, _ = node.options
    with torch.no_grad():
        z = reference.preactivation(x, weight, bias, None, mean, invstd)
        y = torch.empty_like(x)
        return y.copy_(reference_activation.forward(z, Activation(activation, param)))


@contextlib.contextmanager
def forgetting(x: Tensor) -> Iterator[None]:
    """Inside, what autograd would keep of x is kept as the way to make it again, where x has one."""
    node, version = x.grad_fn, x._version
    if getattr(type(node), "_forward_cls", None) is not MemoryEfficientFunction or not node.recomputable or version:  # type: ignore[union-attr]
        yield
        return
    address, shape = x.data_ptr(), x.shape

    def keep(t: Tensor) -> Any:
        return node if t.data_ptr() == address and t.shape == shape and t._version == version else t

    def give(kept: Any) -> Tensor:
        return again(kept) if kept is node else kept

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield
