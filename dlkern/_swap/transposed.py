"""The rewrite of ConvTranspose2d in front of a norm or an activation; conv_bn_act.py finds these sites."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dlkern import dispatch
from dlkern.functional import DTYPES
from dlkern.kernels.activation import Activation
from dlkern.kernels.reference.transposed import Geometry
from dlkern.nn import conv_bn_act, transposed
from dlkern.nn.batch_norm_act import own
from dlkern.ops import library
from dlkern.ops import transposed as op

from . import runtime

KIND = "transposed"


def takes(conv: Any, norm: Any, x: Any, activation: Activation, residual: bool) -> bool:
    """Whether an implementation of the op runs this call of a transposed convolution with what follows it.

    Where not, the convolution is called as the module it is, with whatever has become of it.
    """
    if residual or type(x) is not Tensor or not runtime.unhooked(conv) or runtime.watched(x) or x.dim() != 4:
        return False
    weight, bias = conv._parameters.get("weight"), conv._parameters.get("bias")
    if weight is None or x.device != weight.device or x.dtype != weight.dtype or x.dtype not in DTYPES:
        return False
    if (isinstance(norm, nn.SyncBatchNorm) and norm.training) or x.size(1) != conv.in_channels:
        return False
    if library.autocasts(x.device.type):
        return False
    if norm is not None and conv._buffers.get(conv_bn_act.FOLDED_WEIGHT) is not None:
        return True
    asked = dispatch.forced(op.NAME) is not None or dispatch.weighs()
    saves = library.wants_gradient(x, weight, bias)
    like, kind = None, "none"
    if norm is not None:
        mean, gamma = own(norm, norm._buffers, "running_mean"), own(norm, norm._parameters, "weight")
        if norm.num_features != conv.out_channels:
            return False
        kind = "batch" if norm.training or mean is None else "running"
        like = mean if gamma is None else gamma
        if not runtime.agree(x, like):
            return False
        saves = saves or library.wants_gradient(gamma, own(norm, norm._parameters, "bias"))
    if (saves or kind == "batch") and not asked:
        return False  # training: PyTorch's own convolution
    geometry = Geometry(conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
    size = geometry.output_size(x, weight)
    if size[2] < 1 or size[3] < 1 or (kind == "batch" and size[0] * size[2] * size[3] == 1):
        return False  # refused by PyTorch in its own words
    request = op.request_of(x, weight, like, geometry, kind, saves, activation.name)
    return dispatch.recording() or dispatch.choose(op.NAME, request, x, weight).backend != "torch"


def fused(conv: Any, norm: Any, x: Tensor, activation: Activation) -> Tensor:
    """The rewritten site, convolution included."""
    return transposed.apply(conv, norm, x, activation)
