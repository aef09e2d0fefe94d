"""Convolution, BatchNorm and activation in one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dlkern import activations, functional
from dlkern.kernels.activation import Activation
from dlkern.ops import library

from . import batch_norm_act
from .batch_norm_act import own

#: Buffers of a convolution that dlkern.freeze has folded the batch norm behind it into.
FOLDED_WEIGHT, FOLDED_BIAS = "_dlkern_folded_weight", "_dlkern_folded_bias"


def apply(
    conv: nn.Conv2d,
    norm: nn.modules.batchnorm._BatchNorm | None,
    x: Tensor,
    activation: Activation,
    residual: Tensor | None = None,
    memory_efficient: bool = False,
) -> Tensor:
    """What ``activation(norm(conv(x)) + residual)`` computes, by the fused op; ``norm`` None stands for none.

    Everything is read from the modules at the call.
    """
    geometry: dict[str, Any] = {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "padding_mode": conv.padding_mode,
        "activation": activation,
        "residual": residual,
    }
    weight, bias = own(conv, conv._parameters, "weight"), own(conv, conv._parameters, "bias")
    folded = conv._buffers.get(FOLDED_WEIGHT)
    if folded is not None and norm is not None and not library.autocasts(x.device.type):
        if norm.training:
            raise RuntimeError("a frozen batch norm is in training mode; call dlkern.unfreeze(model) before training")
        return functional.conv_act(x, folded, conv._buffers[FOLDED_BIAS], **geometry, constant_weight=True)
    if norm is None:
        return functional.conv_act(x, weight, bias, **geometry)
    if batch_norm_act.sync_group(norm) is not None:
        return batch_norm_act.apply(norm, conv(x), activation, residual)
    state = batch_norm_act.begin(norm)
    try:
        return functional.conv_bn_act(
            x,
            weight,
            bias,
            state.running_mean,
            state.running_var,
            state.weight,
            state.bias,
            training=state.training,
            momentum=state.momentum,
            eps=norm.eps,
            memory_efficient=memory_efficient,
            **geometry,
        )
    except (TypeError, ValueError, RuntimeError):  # refused: nothing ran
        state.refused()
        raise


class ConvBNAct2d(nn.Module):
    """``activation(bn(conv(x)) + residual)`` as one fused op.

    Arguments are those of torchvision.ops.Conv2dNormActivation; the children are ``conv``, a
    torch.nn.Conv2d, and ``bn``, a torch.nn.BatchNorm2d or None. x is (N, C, H, W) or (C, H, W) of the
    parameters' dtype; ``forward(x, residual=None)`` adds ``residual``, a tensor like the output,
    before the activation. In inference without gradients the batch norm is folded into the
    convolution where that is faster.

    Args:
        padding: None for half of the kernel's reach, so that stride 1 keeps the size of odd kernels.
        norm_layer: torch.nn.BatchNorm2d, a subclass or function that makes one, SyncBatchNorm, or None.
        activation_layer: what makes the activation (torch.nn.ReLU), its name ("relu"), or None.
        inplace: taken for torchvision's sake; nothing is written in place.
        bias: None for a bias where there is no norm.
        memory_efficient: keep less for backward: see :func:`dlkern.functional.conv_bn_act`.

    Raises:
        ValueError: an unknown activation, or an input that does not fit.
        TypeError: a norm_layer that makes something other than a BatchNorm2d or SyncBatchNorm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        activation_layer: Callable[..., nn.Module] | str | None = nn.ReLU,
        dilation: int | tuple[int, int] = 1,
        inplace: bool | None = True,
        bias: bool | None = None,
        *,
        padding_mode: str = "zeros",
        memory_efficient: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        del inplace
        if padding is None:
            kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
            spread = (dilation, dilation) if isinstance(dilation, int) else dilation
            padding = ((kernel[0] - 1) // 2 * spread[0], (kernel[1] - 1) // 2 * spread[1])
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            norm_layer is None if bias is None else bias,
            padding_mode,  # type: ignore[arg-type]  # torch checks it
            device=device,
            dtype=dtype,
        )
        norm = None if norm_layer is None else norm_layer(out_channels)
        activation = activation_layer
        if activation_layer is not None and not isinstance(activation_layer, str):
            activation = activation_layer()
        self._take(conv, norm, "identity" if activation is None else activation, memory_efficient)
        if norm is not None and (device is not None or dtype is not None):
            norm.to(device=device, dtype=dtype)

    @classmethod
    def from_modules(
        cls,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        activation: str | nn.Module = "identity",
        *,
        memory_efficient: bool = False,
    ) -> ConvBNAct2d:
        """The layer made of these very modules (their parameters are shared, not copied), in conv's mode."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._take(conv, bn, activation, memory_efficient)
        made.training = conv.training
        return made

    def _take(self, conv: nn.Conv2d, norm: Any, activation: Any, memory_efficient: bool) -> None:
        if type(conv).forward is not nn.Conv2d.forward:
            raise TypeError(f"conv: expected a torch.nn.Conv2d, got {type(conv).__name__}")
        plain = isinstance(norm, nn.BatchNorm2d) and type(norm).forward is nn.modules.batchnorm._BatchNorm.forward
        if norm is not None and not plain and type(norm) is not nn.SyncBatchNorm:
            raise TypeError(f"bn: expected a torch.nn.BatchNorm2d, a SyncBatchNorm or None, got {type(norm).__name__}")
        if norm is not None and norm.num_features != conv.out_channels:
            raise ValueError(f"bn: expected {conv.out_channels} features like conv, got {norm.num_features}")
        activations.resolve(activation)
        self.conv, self.bn, self.activation = conv, norm, activation
        self.memory_efficient = memory_efficient

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(bn(conv(x)) + residual)``; shapes as in the class's description."""
        return apply(self.conv, self.bn, x, activations.resolve(self.activation), residual, self.memory_efficient)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}" if isinstance(self.activation, str) else ""
