"""Atrous convolutions, alone, separable, and in parallel as atrous spatial pyramid pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlkern import activations, functional
from dlkern.functional.atrous import ConvNorm, combined
from dlkern.kernels.activation import Activation
from dlkern.kernels.reference import activation as reference_activation
from dlkern.ops import library

from . import batch_norm_act, conv_bn_act
from .batch_norm_act import own
from .conv_bn_act import FOLDED_BIAS, FOLDED_WEIGHT
from .depthwise import DepthwiseSeparableConv2d


class AtrousConv2d(nn.Conv2d):
    """A torch.nn.Conv2d with a ``dilation``, the rate of an atrous convolution; x (N, C, H, W) or (C, H, W).

    Arguments, Parameters and state_dict keys are torch.nn.Conv2d's, ``dilation`` may be of any size, also beyond the
    image's. With kernels of 3 ``padding=dilation`` keeps the size of the image.

    Raises:
        ValueError: a dilation or stride below 1, or an input that does not fit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("stride", "dilation"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, self.padding_mode), 0
        return functional.atrous_conv2d(
            input, weight, bias, dilation=self.dilation, stride=self.stride, padding=padding, groups=self.groups
        )


class AtrousSeparableConv2d(DepthwiseSeparableConv2d):
    """A dilated depthwise convolution and the 1 x 1 convolution that mixes its channels.

    A :class:`DepthwiseSeparableConv2d` (which has the arguments, the children and the checkpoints that it takes) under
    the name that DeepLabV3+ has for it, with ``dilation``, the rate, as the third argument. Without ``padding`` an
    image keeps its size.

    Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation" (2018).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dilation: int | tuple[int, int],
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, **kwargs)


# ---------------------------------------------------------------------------------- the block
def _branch(convolutions: list[nn.Module], channels: int) -> nn.Sequential:
    return nn.Sequential(*convolutions, nn.BatchNorm2d(channels), nn.ReLU())


class _Pooling(nn.Sequential):
    """The pooled branch by itself: the mean over each image, in every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        return super().forward(x).expand(-1, -1, *size)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: x (N, C, H, W) to (N, out_channels, H, W).

    The children are those of torchvision's ASPP, ``convs`` and ``project`` (with its dropout), with the same
    state_dict keys; a separable block has those of the usual DeepLabV3+ (``convs.1.0.0.weight`` the depthwise,
    ``convs.1.0.1.weight`` the pointwise convolution). The block runs as one: see :func:`dlkern.functional.aspp`. Where
    a child has hooks or was replaced, the children are called one by one.

    Args:
        in_channels: C.
        atrous_rates: one or more; each a dilation of a 3 x 3 convolution, of any size.
        out_channels: of each branch and of the block.
        separable: a depthwise 3 x 3 and a 1 x 1 convolution in each branch that has a rate.
        dropout: the share of values that the projection's dropout drops in training.

    Raises:
        ValueError: no rate, a rate below 1, or an input that does not fit.

    Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation" (2017).
    """

    def __init__(
        self,
        in_channels: int,
        atrous_rates: Sequence[int],
        out_channels: int = 256,
        *,
        separable: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if not isinstance(atrous_rates, Iterable):
            raise ValueError(f"atrous_rates: expected one or more ints of at least 1, got {atrous_rates!r}")
        rates = tuple(atrous_rates)
        if not rates:
            raise ValueError("atrous_rates: expected at least one rate, got none")
        for rate in rates:
            if not isinstance(rate, int) or rate < 1:
                raise ValueError(f"atrous_rates: expected ints of at least 1, got {rate!r}")

        def conv(size: int, rate: int = 1, depthwise: bool = False) -> nn.Conv2d:
            out, groups = (in_channels, in_channels) if depthwise else (out_channels, 1)
            padding = size // 2 * rate
            return nn.Conv2d(in_channels, out, size, padding=padding, dilation=rate, groups=groups, bias=False)

        modules = [_branch([conv(1)], out_channels)]
        for rate in rates:
            first = nn.Sequential(conv(3, rate, True), conv(1)) if separable else conv(3, rate)
            modules.append(_branch([first], out_channels))
        modules.append(_Pooling(nn.AdaptiveAvgPool2d(1), *_branch([conv(1)], out_channels)))
        self.convs = nn.ModuleList(modules)
        self.project = nn.Sequential(
            nn.Conv2d(len(modules) * out_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block; shapes as in the class's description."""
        parts = parts_of(self)
        if isinstance(parts, str):
            return self.project(torch.cat([conv(x) for conv in self.convs], 1))
        return apply(parts, x)


class Part(NamedTuple):
    """The modules of one branch, or of the projection."""

    depthwise: nn.Conv2d | None
    conv: nn.Conv2d
    norm: nn.modules.batchnorm._BatchNorm
    activation: nn.Module


class Parts(NamedTuple):
    """The modules of a block, as :func:`parts_of` found them."""

    branches: tuple[Part, ...]
    pooled: Part
    projection: Part
    dropout: nn.Module


class _Unknown(Exception):
    """Why a block is not one that can run as one."""


def parts_of(block: nn.Module, is_module: Callable[[nn.Module, type[nn.Module]], bool] | None = None) -> Parts | str:
    """The modules of a block with the children of torchvision's ASPP; or why it cannot run as one, in words.

    ``is_module(module, kind)`` tells whether a module may be bypassed for one of ``kind``; by default where it is of
    that very type and has no hooks.
    """
    is_module = is_module or _is_plain
    try:
        convs: Any = block.convs
        project: Any = block.project
        branches, last = list(convs), list(project)
        if len(branches) < 2 or len(last) != 4 or not is_module(project, nn.Sequential):
            raise _Unknown("its children are not those of torchvision's ASPP")
        found = tuple(_part(list(branch), branch, is_module) for branch in branches[:-1])
        pool, *pooled = list(branches[-1])
        _expect(pool, nn.AdaptiveAvgPool2d, is_module)
        if pool.output_size not in (1, (1, 1)):
            raise _Unknown("its last branch does not pool to one pixel")
        parts = Parts(
            found,
            _part(pooled, branches[-1], is_module),
            _part(last[:3], project, is_module),
            last[3],
        )
    except (AttributeError, TypeError, ValueError):  # no such children, or not so many
        return "its children are not those of torchvision's ASPP"
    except _Unknown as reason:
        return str(reason)
    for conv in (parts.pooled.conv, parts.projection.conv):
        if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding != (0, 0):
            return "its pooled branch or its projection is not a 1 x 1 convolution"
    return parts


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooked or "forward" in module.__dict__:
        return False
    kinds = (kind, *((_Pooling,) if kind is nn.Sequential else (nn.SyncBatchNorm,) if kind is nn.BatchNorm2d else ()))
    cls = type(module)  # by name: a swapped module's class has that of the one it was made from
    return any((cls.__module__, cls.__qualname__) == (k.__module__, k.__qualname__) for k in kinds)


def _expect(module: nn.Module, kind: type[nn.Module], is_module: Callable[[nn.Module, type[nn.Module]], bool]) -> None:
    if not is_module(module, kind):
        raise _Unknown(f"a {type(module).__name__} of it has hooks, or stands where a {kind.__name__} is expected")


def _part(modules: list[nn.Module], branch: nn.Module, is_module: Callable[[nn.Module, type[nn.Module]], bool]) -> Part:
    first, norm, activation = modules
    _expect(branch, nn.Sequential, is_module)
    depthwise: Any = None
    conv: Any = first
    if not isinstance(first, nn.Conv2d):
        _expect(first, nn.Sequential, is_module)
        depthwise, conv = list(first)  # type: ignore[call-overload]
        _expect(depthwise, nn.Conv2d, is_module)
        if depthwise.groups != depthwise.in_channels or depthwise.bias is not None or conv.kernel_size != (1, 1):
            raise _Unknown("a branch is neither one convolution nor a depthwise and a 1 x 1 convolution")
    _expect(conv, nn.Conv2d, is_module)
    _expect(norm, nn.BatchNorm2d, is_module)
    if activations.from_module(activation) is None or not is_module(activation, type(activation)):
        raise _Unknown(f"its activation {type(activation).__name__} is not fused")
    for each in (conv, depthwise):
        if each is not None and not _keeps_size(each):
            raise _Unknown("a convolution of it does not keep the size of the image")
    if conv.groups != 1:
        raise _Unknown("a convolution of it has groups")
    return Part(depthwise, conv, norm, activation)  # type: ignore[arg-type]


def _keeps_size(conv: nn.Conv2d) -> bool:
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros" or conv.stride != (1, 1):
        return False
    sizes = zip(conv.kernel_size, conv.dilation, conv.padding, strict=True)
    return all(k % 2 == 1 and p == d * (k // 2) for k, d, p in sizes)


def apply(parts: Parts, x: Tensor) -> Tensor:
    """What the block computes, by the fused op. Everything is read from the modules at the call."""
    every = (*parts.branches, parts.pooled, parts.projection)
    if any(batch_norm_act.sync_group(part.norm) is not None for part in every):
        return _synchronised(parts, x)
    frozen = all(part.conv._buffers.get(FOLDED_WEIGHT) is not None for part in every)
    if frozen and not library.autocasts(x.device.type):
        return _frozen(parts, x)
    states = []
    try:
        arguments = []
        for part in every:
            states.append(batch_norm_act.begin(part.norm))
            arguments.append(_argument(part, states[-1]))
        *branches, pooled, projection = arguments
        y = functional.aspp(x, branches, pooled, projection)
    except (TypeError, ValueError, RuntimeError):  # refused: nothing ran
        for state in states:
            state.refused()
        raise
    return parts.dropout(y)


def _argument(part: Part, state: batch_norm_act.State) -> ConvNorm:
    conv, depthwise = part.conv, part.depthwise
    return ConvNorm(
        own(conv, conv._parameters, "weight"),
        state.running_mean,
        state.running_var,
        state.weight,
        state.bias,
        own(conv, conv._parameters, "bias"),
        (conv if depthwise is None else depthwise).dilation,
        None if depthwise is None else own(depthwise, depthwise._parameters, "weight"),
        state.training,
        state.momentum,
        part.norm.eps,
        _activation(part),
    )


def _one_by_one(parts: Parts, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """What the branches make, each by its own op, and the pooled branch (N, C, 1, 1)."""
    made = []
    for part in parts.branches:
        h = x if part.depthwise is None else _separate(part.depthwise, x)
        made.append(conv_bn_act.apply(part.conv, part.norm, h, _activation(part)))
    pooled = parts.pooled
    return made, conv_bn_act.apply(pooled.conv, pooled.norm, x.mean((2, 3), keepdim=True), _activation(pooled))


def _synchronised(parts: Parts, x: Tensor) -> Tensor:
    """The block where statistics are shared with other ranks: part by part, in the order of the children."""
    made, pool = _one_by_one(parts, x)
    whole = torch.cat([*made, pool.expand(-1, -1, *x.shape[2:])], 1)
    last = parts.projection
    return parts.dropout(conv_bn_act.apply(last.conv, last.norm, whole, _activation(last)))


def _activation(part: Part) -> Activation:
    return activations.resolve(part.activation)


def _separate(depthwise: nn.Conv2d, x: Tensor) -> Tensor:
    weight = own(depthwise, depthwise._parameters, "weight")
    return functional.depthwise_conv2d(x, weight, padding=depthwise.padding, dilation=depthwise.dilation)


def _frozen(parts: Parts, x: Tensor) -> Tensor:
    """The block with every batch norm folded into its convolution."""
    made, pool = _one_by_one(parts, x)
    last, whole = parts.projection, torch.cat(made, 1)
    made.clear()
    if last.norm.training:
        raise RuntimeError("a frozen batch norm is in training mode; call dlkern.unfreeze(model) before training")
    weight, bias = last.conv._buffers[FOLDED_WEIGHT], last.conv._buffers[FOLDED_BIAS]
    assert weight is not None
    return parts.dropout(reference_activation.forward(combined(whole, pool, weight, bias), _activation(last)))
