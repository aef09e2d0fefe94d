"""``freeze`` and ``unfreeze``: batch norms folded into their convolutions once, for a model that only serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dlkern.kernels.cpu import transposed as transposed_kernels
from dlkern.kernels.cpu.conv_bn_act import fold
from dlkern.nn.atrous import ASPP, parts_of
from dlkern.nn.conv_bn_act import FOLDED_BIAS, FOLDED_WEIGHT, ConvBNAct2d
from dlkern.nn.depthwise import DepthwiseConv2d, DepthwiseSeparableConv2d
from dlkern.nn.transposed import ConvTransposeBNAct2d

from ._swap import check, swap
from ._swap.classes import plan_of
from ._swap.find import join

Convolution = nn.Conv2d | nn.ConvTranspose2d


def freeze(model: nn.Module) -> nn.Module:
    """Fold every batch norm behind a convolution into it, for inference.

    The model is swapped first if it is not. Each site then keeps a folded weight and bias beside its
    own parameters (buffers that are not part of the state_dict, and follow ``.to()``, copies and
    pickles), and runs a convolution with its activation, without a batch norm. Under autocast the
    unfolded modules run. While a model is frozen its parameters get no gradients from such sites,
    ``train()`` and ``load_state_dict()`` raise, and writes to parameters are not seen.

    Args:
        model: a module in eval mode.

    Returns:
        The same object.

    Raises:
        TypeError: model is no torch.nn.Module.
        RuntimeError: a module is in training mode, the model is frozen already, or it holds nothing to
            fold. The model is as it was then.
    """
    check(model)
    training = [path for path, m in model.named_modules() if m.training]
    if training:
        raise RuntimeError(
            f"freeze: expected a model in eval mode, but {training[0] or 'the model'} is in training mode; "
            "call model.eval() first"
        )
    if is_frozen(model):
        raise RuntimeError("freeze: the model is frozen already")
    if not any(plan_of(m) is not None for m in model.modules()):
        swap(model)
    pairs = list(_pairs(model))
    if not pairs:
        raise RuntimeError("freeze: the model has no batch norm behind a convolution that could be folded")
    folded = [(conv, *_folded(conv, norm)) for conv, norm in pairs]
    inside = {id(m) for pair in pairs for m in pair}
    for conv, weight, bias in folded:
        conv.register_buffer(FOLDED_WEIGHT, weight, persistent=False)
        conv.register_buffer(FOLDED_BIAS, bias, persistent=False)
    for module in model.modules():
        if any(id(m) in inside for m in module.modules()):
            module.__dict__["train"] = _RefusesTraining(module)
            module.register_load_state_dict_pre_hook(_refuse_loading)
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Take the folded weights away again: the model is what it was before ``freeze`` (but stays swapped).

    Raises:
        TypeError: model is no torch.nn.Module.
        RuntimeError: the model is not frozen.
    """
    check(model)
    if not is_frozen(model):
        raise RuntimeError("unfreeze: the model is not frozen")
    for module in model.modules():
        for name in (FOLDED_WEIGHT, FOLDED_BIAS):
            if name in module._buffers:
                delattr(module, name)
        if isinstance(module.__dict__.get("train"), _RefusesTraining):
            del module.__dict__["train"]
        hooks = module._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _refuse_loading]:
            del hooks[key]
    return model


def is_frozen(model: nn.Module) -> bool:
    """Whether a module, or one inside it, is frozen."""
    return any(FOLDED_WEIGHT in m._buffers for m in model.modules())


def _pairs(model: nn.Module) -> Iterator[tuple[Convolution, nn.modules.batchnorm._BatchNorm]]:
    """Each convolution with the batch norm behind it, of swapped sites and of dlkern.nn's layers."""
    modules = dict(model.named_modules())
    seen = set()
    for path, module in modules.items():
        found: list[tuple[Any, Any]] = []
        if isinstance(module, (ConvBNAct2d, ConvTransposeBNAct2d)):
            found.append((module.conv, module.bn))
        elif isinstance(module, DepthwiseSeparableConv2d):
            found += [(module.depthwise, module.depthwise_norm), (module.pointwise, module.pointwise_norm)]
        elif isinstance(module, ASPP) and not isinstance(parts := parts_of(module), str):
            found += [(part.conv, part.norm) for part in (*parts.branches, parts.pooled, parts.projection)]
        plan = plan_of(module)
        for site in () if plan is None else plan[1].sites:
            if site.conv is not None:
                found.append((modules.get(join(path, site.conv)), modules.get(join(path, site.path))))
        for conv, norm in found:
            if (
                type(conv) in (nn.Conv2d, nn.ConvTranspose2d, DepthwiseConv2d)
                and isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
                and norm.running_mean is not None
                and id(conv) not in seen
            ):
                seen.add(id(conv))
                yield conv, norm


@torch.no_grad()
def _folded(conv: Convolution, norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the folded convolution, in the convolution's dtype (made in float64)."""

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().double()

    tensors: Any = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    inputs: Any = (*map(wide, tensors), norm.eps)
    if isinstance(conv, nn.ConvTranspose2d):
        weight, bias = transposed_kernels.fold(*inputs, conv.groups)
    else:
        weight, bias = fold(*inputs)
    dtype = conv.weight.dtype
    return torch.empty_like(conv.weight).copy_(weight), bias.to(dtype)


class _RefusesTraining:
    """Stands for ``train`` on a frozen module: a plain object, so that it is copied and pickled with it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        if mode:
            raise RuntimeError("train: the model is frozen (dlkern.freeze); call dlkern.unfreeze(model) first")
        return type(self.module).train(self.module, False)


def _refuse_loading(*_: Any) -> None:
    raise RuntimeError(
        "load_state_dict: the model is frozen (dlkern.freeze), and would go on with the old weights; call "
        "dlkern.unfreeze(model) first"
    )
