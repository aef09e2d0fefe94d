"""Depthwise convolutions, alone, with BatchNorm and activation, and with the pointwise convolution behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch.nn.functional as F
from torch import Tensor, nn

from dlkern import activations, functional

from . import conv_bn_act
from .conv_bn_act import ConvBNAct2d

Size = int | tuple[int, ...]


def convolve(conv: nn.Conv1d | nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a depthwise convolution's ``_conv_forward`` computes, by the op.

    The geometry is read from the module at the call. A convolution over one dimension is one over an image of
    height 1; either takes an input without a batch dimension.
    """
    stride, padding, dilation = conv.stride, conv.padding, conv.dilation
    flat = len(stride) == 1
    if x.dim() not in (len(stride) + 1, len(stride) + 2):
        ranks = "(N, C, L) or (C, L)" if flat else "(N, C, H, W) or (C, H, W)"
        raise ValueError(f"x: expected {ranks}, got shape {tuple(x.shape)}")
    if conv.padding_mode != "zeros":
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode), (0,) * len(stride)
    if not flat:
        return functional.depthwise_conv2d(x, weight, bias, stride=stride, padding=padding, dilation=dilation)
    if not isinstance(padding, str):
        padding = (0, *padding)
    y = functional.depthwise_conv2d(
        x.unsqueeze(-2), weight.unsqueeze(-2), bias, stride=(1, *stride), padding=padding, dilation=(1, *dilation)
    )
    return y.squeeze(-2)


def _torch_arguments(
    in_channels: int,
    kernel_size: Size,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    depth_multiplier: int = 1,
    bias: bool = True,
    padding_mode: str = "zeros",
    device: Any = None,
    dtype: Any = None,
    *,
    out_channels: int | None = None,
) -> dict[str, Any]:
    """torch.nn's arguments, from those of a depthwise layer."""
    if not isinstance(depth_multiplier, int) or depth_multiplier < 1:
        raise ValueError(f"depth_multiplier: expected a positive int, got {depth_multiplier!r}")
    if bias is not None and not isinstance(bias, bool):
        raise ValueError(f"bias: expected a bool, got {bias!r} (in torch.nn's order of arguments groups is a keyword)")
    if out_channels is None:
        out_channels = in_channels * depth_multiplier
    elif depth_multiplier not in (1, out_channels // in_channels):
        raise ValueError(f"out_channels: expected {in_channels * depth_multiplier}, got {out_channels}")
    return {
        "in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size, "stride": stride,
        "padding": padding, "dilation": dilation, "groups": in_channels, "bias": bias, "padding_mode": padding_mode,
        "device": device, "dtype": dtype,
    }  # fmt: skip


class _Depthwise(nn.modules.conv._ConvNd):
    """The common part; see :class:`DepthwiseConv2d`."""

    @overload
    def __init__(
        self,
        in_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        depth_multiplier: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        out_channels: int | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        *,
        groups: int,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None: ...

    def __init__(self, in_channels: int, *args: Any, groups: int | None = None, **kwargs: Any) -> None:
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f"in_channels: expected a positive int, got {in_channels!r}")
        if groups is None:
            super().__init__(**_torch_arguments(in_channels, *args, **kwargs))
        else:
            super().__init__(in_channels, *args, groups=groups, **kwargs)  # type: ignore[misc]
        check(self)

    @classmethod
    def from_module(cls, conv: nn.Module) -> Any:
        """The layer with a torch.nn convolution's arguments, mode and very Parameters (shared, not copied).

        Raises:
            TypeError: something other than a plain convolution of this rank.
            ValueError: a convolution that is not depthwise, or that has hooks.
        """
        kind = nn.Conv1d if issubclass(cls, nn.Conv1d) else nn.Conv2d
        if type(conv) is not kind:
            raise TypeError(f"conv: expected a torch.nn.{kind.__name__}, got {type(conv).__name__}")
        check(conv)
        if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks:
            raise ValueError("conv: has hooks, which a layer made of it would lose")
        made = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            groups=conv.groups, bias=conv.bias is not None, padding_mode=conv.padding_mode, device="meta",
        )  # type: ignore[arg-type]  # fmt: skip
        made.weight, made.bias = conv.weight, conv.bias
        return made.train(conv.training)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(self, input, weight, bias)  # type: ignore[arg-type]


class DepthwiseConv2d(_Depthwise, nn.Conv2d):  # type: ignore[misc]  # one signature for both orders of arguments
    """A torch.nn.Conv2d with ``groups = in_channels``; x (N, C, H, W) or (C, H, W).

    Parameters, state_dict keys and initialisation are those of torch.nn.Conv2d. Arguments: ``in_channels,
    kernel_size, stride=1, padding=0, dilation=1, depth_multiplier=1, bias=True, padding_mode="zeros", device,
    dtype``, with ``in_channels * depth_multiplier`` output channels (or, by keyword, ``out_channels``). Where
    ``groups`` is given, by keyword, the arguments are in torch.nn.Conv2d's order: ``in_channels, out_channels,
    kernel_size, ...``.

    Raises:
        ValueError: groups other than in_channels, output channels that in_channels does not divide, or a stride,
            dilation or padding that is no convolution's; in ``forward``, an input that does not fit.
    """


class DepthwiseConv1d(_Depthwise, nn.Conv1d):  # type: ignore[misc]
    """A torch.nn.Conv1d with ``groups = in_channels``; x (N, C, L) or (C, L). See :class:`DepthwiseConv2d`.

    ``padding`` is an int, "same" (the odd one goes to the right) or "valid".
    """


def check(conv: nn.Module) -> None:
    """ValueError where a convolution is not depthwise, or cannot be computed."""
    channels, groups, out = conv.in_channels, conv.groups, conv.out_channels
    if groups != channels:
        raise ValueError(f"groups: expected in_channels, {channels}, for a depthwise convolution, got {groups}")
    if out < 1 or out % channels:  # type: ignore[operator]
        raise ValueError(f"out_channels: expected a multiple of in_channels, {channels}, got {out}")
    for name in ("kernel_size", "stride", "dilation"):
        value = getattr(conv, name)
        if min(value) < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not isinstance(conv.padding, str) and min(conv.padding) < 0:  # type: ignore[type-var,arg-type]
        raise ValueError(f"padding: expected at least 0, got {conv.padding}")


class DepthwiseConvBNAct2d(ConvBNAct2d):
    """``activation(bn(conv(x)) + residual)`` with a depthwise convolution; x (N, C, H, W) or (C, H, W).

    The children are ``conv``, a :class:`DepthwiseConv2d`, and ``bn``, as in :class:`ConvBNAct2d`, of which all
    arguments but ``out_channels`` and ``groups`` are taken; there are ``in_channels * depth_multiplier`` output
    channels. In inference without gradients the batch norm is folded into the convolution and the activation is part
    of its kernel; in training the convolution's kernel takes the statistics along where that is supported.

    Raises:
        ValueError: an unknown activation, or an input that does not fit.
        TypeError: a norm_layer that makes something other than a BatchNorm2d or SyncBatchNorm.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        depth_multiplier: int = 1,
        *,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        activation_layer: Callable[..., nn.Module] | str | None = nn.ReLU,
        bias: bool | None = None,
        padding_mode: str = "zeros",
        memory_efficient: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels,
            _torch_arguments(in_channels, kernel_size, depth_multiplier=depth_multiplier)["out_channels"],
            kernel_size,
            stride,
            padding,
            in_channels,
            norm_layer,
            activation_layer,
            dilation,
            bias=bias,
            padding_mode=padding_mode,
            memory_efficient=memory_efficient,
            device=device,
            dtype=dtype,
        )

    def _take(self, conv: nn.Conv2d, norm: Any, activation: Any, memory_efficient: bool) -> None:
        if type(conv) is nn.Conv2d:
            conv = DepthwiseConv2d.from_module(conv)
        else:
            check(conv)
        super()._take(conv, norm, activation, memory_efficient)


#: How a depthwise-separable convolution's parts are called in others' checkpoints: (depthwise, its norm, pointwise,
#: its norm). Keras-style and torchvision-style names, Xception's, timm's, and plain torch.nn.Sequentials.
SPELLINGS = (
    ("depthwise", "depthwise_norm", "pointwise", "pointwise_norm"),
    ("depthwise", "bn1", "pointwise", "bn2"),
    ("depthwise_conv", "depthwise_bn", "pointwise_conv", "pointwise_bn"),
    ("depth_conv", "depth_norm", "point_conv", "point_norm"),
    ("conv1", "bn1", "pointwise", "bn2"),
    ("conv1", "bn1", "conv2", "bn2"),
    ("conv_dw", "bn_dw", "conv_pw", "bn_pw"),
    ("conv_dw", "bn1", "conv_pw", "bn2"),
    ("dw", "bn_dw", "pw", "bn_pw"),
    ("dw_conv", "dw_norm", "pw_conv", "pw_norm"),
    ("0", "-", "1", "-"),
    ("0", "-", "1", "2"),
    ("0", "1", "2", "3"),
    ("0", "1", "3", "4"),
    ("0.0", "-", "0.1", "1"),
    ("0.0", "0.1", "1.0", "1.1"),
    ("0.conv", "0.bn", "1.conv", "1.bn"),
)


class DepthwiseSeparableConv2d(nn.Module):
    """A depthwise convolution and the 1 x 1 convolution that mixes its channels; x (N, C, H, W) or (C, H, W).

    The children are ``depthwise`` (a :class:`DepthwiseConv2d`), ``depthwise_norm``, ``pointwise`` (a torch.nn.Conv2d)
    and ``pointwise_norm``; a norm that is not asked for is None. ``load_state_dict`` also takes the checkpoints of
    the usual two-module layers, as long as all keys of the layer follow one of :data:`SPELLINGS`: for example
    ``conv1.weight`` and ``pointwise.weight``, ``conv_dw.weight`` and ``conv_pw.weight``, or ``0.weight`` and
    ``1.weight`` of a torch.nn.Sequential.

    Args:
        in_channels, out_channels: C and K.
        kernel_size, stride, dilation, padding_mode: the depthwise convolution's.
        padding: likewise; None for half of the kernel's reach, so that stride 1 keeps the size of odd kernels.
        depth_multiplier: the depthwise convolution has C * depth_multiplier output channels.
        bias: both convolutions'; None for a bias where no norm follows.
        depthwise_norm_layer, norm_layer: what makes the norm behind either convolution (torch.nn.BatchNorm2d), or None.
        depthwise_activation_layer, activation_layer: what makes the activation behind either (torch.nn.ReLU), its
            name, or None.

    Raises:
        ValueError: an unknown activation, or an input that does not fit.
        TypeError: a norm layer that makes something other than a BatchNorm2d or SyncBatchNorm.

    Source: Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions" (2017).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        depth_multiplier: int = 1,
        bias: bool | None = None,
        padding_mode: str = "zeros",
        *,
        depthwise_norm_layer: Callable[..., nn.Module] | None = None,
        depthwise_activation_layer: Callable[..., nn.Module] | str | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        activation_layer: Callable[..., nn.Module] | str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        first = DepthwiseConvBNAct2d(
            in_channels, kernel_size, stride, padding, dilation, depth_multiplier,
            norm_layer=depthwise_norm_layer, activation_layer=depthwise_activation_layer, bias=bias,
            padding_mode=padding_mode, device=device, dtype=dtype,
        )  # fmt: skip
        second = ConvBNAct2d(
            first.conv.out_channels, out_channels, 1, norm_layer=norm_layer, activation_layer=activation_layer,
            bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        self.depthwise, self.depthwise_norm, self.depthwise_activation = first.conv, first.bn, first.activation
        self.pointwise, self.pointwise_norm, self.activation = second.conv, second.bn, second.activation

    def forward(self, x: Tensor) -> Tensor:
        """``activation(norm(pointwise(activation(norm(depthwise(x))))))``; shapes as in the class's description."""
        h = conv_bn_act.apply(self.depthwise, self.depthwise_norm, x, activations.resolve(self.depthwise_activation))
        return conv_bn_act.apply(self.pointwise, self.pointwise_norm, h, activations.resolve(self.activation))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _rename(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        named = (("depthwise_activation", self.depthwise_activation), ("activation", self.activation))
        return ", ".join(f"{k}={v!r}" for k, v in named if isinstance(v, str) and v != "identity")


_COUNTERS = ("depthwise_norm.num_batches_tracked", "pointwise_norm.num_batches_tracked")


def _rename(state_dict: dict[str, Any], prefix: str, layer: nn.Module) -> None:
    """Give the keys of a checkpoint that follows one of SPELLINGS this layer's names, in place.

    A spelling is the checkpoint's if it has a key for every parameter and running statistic of the layer, and
    the checkpoint has no other key.
    """
    found = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
    expected = {name for name, _ in (*layer.named_parameters(), *layer.named_buffers()) if name not in _COUNTERS}
    if expected <= found:
        return
    for spelling in SPELLINGS[1:]:
        names = dict(zip(SPELLINGS[0], spelling, strict=True))
        theirs = {}  # their key -> ours
        for name in (*expected, *_COUNTERS):
            child, _, rest = name.partition(".")
            theirs[f"{names.get(child, child)}.{rest}"] = name
        if found <= theirs.keys() and expected <= {theirs[name] for name in found}:
            for name in found:
                state_dict[prefix + theirs[name]] = state_dict.pop(prefix + name)
            return
