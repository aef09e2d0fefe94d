"""Transposed convolution, BatchNorm and activation in one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dlkern import activations, functional
from dlkern.kernels.activation import Activation
from dlkern.ops import library

from . import batch_norm_act
from .batch_norm_act import own
from .conv_bn_act import FOLDED_BIAS, FOLDED_WEIGHT


def apply(
    conv: nn.ConvTranspose2d, norm: nn.modules.batchnorm._BatchNorm | None, x: Tensor, activation: Activation
) -> Tensor:
    """What ``activation(norm(conv(x)))`` computes, by the fused op; ``norm`` None stands for none.

    Everything is read from the modules at the call.
    """
    geometry: dict[str, Any] = {
        "stride": conv.stride,
        "padding": conv.padding,
        "output_padding": conv.output_padding,
        "groups": conv.groups,
        "dilation": conv.dilation,
        "activation": activation,
    }
    weight, bias = own(conv, conv._parameters, "weight"), own(conv, conv._parameters, "bias")
    folded = conv._buffers.get(FOLDED_WEIGHT)
    if folded is not None and norm is not None and not library.autocasts(x.device.type):
        if norm.training:
            raise RuntimeError("a frozen batch norm is in training mode; call dlkern.unfreeze(model) before training")
        return functional.conv_transpose_act(x, folded, conv._buffers[FOLDED_BIAS], **geometry)
    if norm is None:
        return functional.conv_transpose_act(x, weight, bias, **geometry)
    if batch_norm_act.sync_group(norm) is not None:
        return batch_norm_act.apply(norm, conv(x), activation)
    state = batch_norm_act.begin(norm)
    try:
        return functional.conv_transpose_bn_act(
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
            **geometry,
        )
    except (TypeError, ValueError, RuntimeError):  # refused: nothing ran
        state.refused()
        raise


class ConvTransposeBNAct2d(nn.Module):
    """``activation(bn(conv(x)))`` with a transposed convolution, as one fused op; x (N, C, H, W) or (C, H, W).

    The arguments up to ``dilation`` are torch.nn.ConvTranspose2d's; the children are ``conv``, a
    torch.nn.ConvTranspose2d, and ``bn``, a torch.nn.BatchNorm2d or None. ``dlkern.freeze`` folds the batch norm into
    the convolution.

    Args:
        bias: None for a bias where there is no norm.
        norm_layer: torch.nn.BatchNorm2d, a subclass or function that makes one, SyncBatchNorm, or None.
        activation_layer: what makes the activation (torch.nn.ReLU), its name ("relu"), or None.

    Raises:
        ValueError: an unknown activation, an output_padding that is not smaller than stride or dilation, or an input
            that does not fit.
        TypeError: a norm_layer that makes something other than a BatchNorm2d or SyncBatchNorm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool | None = None,
        dilation: int | tuple[int, int] = 1,
        *,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        activation_layer: Callable[..., nn.Module] | str | None = nn.ReLU,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        conv = nn.ConvTranspose2d(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups,
            norm_layer is None if bias is None else bias, dilation, device=device, dtype=dtype,
        )  # fmt: skip
        _check_output_padding(conv)
        norm = None if norm_layer is None else norm_layer(out_channels)
        activation = activation_layer
        if activation_layer is not None and not isinstance(activation_layer, str):
            activation = activation_layer()
        self._take(conv, norm, "identity" if activation is None else activation)
        if norm is not None and (device is not None or dtype is not None):
            norm.to(device=device, dtype=dtype)

    @classmethod
    def from_modules(
        cls, conv: nn.ConvTranspose2d, bn: nn.BatchNorm2d | None, activation: str | nn.Module = "identity"
    ) -> ConvTransposeBNAct2d:
        """The layer made of these very modules (their parameters are shared, not copied), in conv's mode."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._take(conv, bn, activation)
        made.training = conv.training
        return made

    def _take(self, conv: nn.ConvTranspose2d, norm: Any, activation: Any) -> None:
        if type(conv).forward is not nn.ConvTranspose2d.forward:
            raise TypeError(f"conv: expected a torch.nn.ConvTranspose2d, got {type(conv).__name__}")
        plain = isinstance(norm, nn.BatchNorm2d) and type(norm).forward is nn.modules.batchnorm._BatchNorm.forward
        if norm is not None and not plain and type(norm) is not nn.SyncBatchNorm:
            raise TypeError(f"bn: expected a torch.nn.BatchNorm2d, a SyncBatchNorm or None, got {type(norm).__name__}")
        if norm is not None and norm.num_features != conv.out_channels:
            raise ValueError(f"bn: expected {conv.out_channels} features like conv, got {norm.num_features}")
        activations.resolve(activation)
        self.conv, self.bn, self.activation = conv, norm, activation

    def forward(self, x: Tensor) -> Tensor:
        """``activation(bn(conv(x)))``; shapes as in the class's description."""
        return apply(self.conv, self.bn, x, activations.resolve(self.activation))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}" if isinstance(self.activation, str) else ""


def _check_output_padding(conv: nn.ConvTranspose2d) -> None:
    for extra, step, spread in zip(conv.output_padding, conv.stride, conv.dilation, strict=True):
        if not 0 <= extra < max(step, spread):
            raise ValueError(
                f"output_padding: expected less than stride {conv.stride} or dilation {conv.dilation}, got "
                f"{conv.output_padding}"
            )
