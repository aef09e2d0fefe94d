"""The rewrite of depthwise convolutions: in front of a site's norm or activation, and wherever else they stand.

A site of conv_bn_act.py whose convolution is depthwise (groups = in_channels) runs it by the op ``depthwise``, in
training, too. Any other depthwise convolution gets a generated subclass as its own class. Where the op's dispatcher
chooses PyTorch's kernels for a call, the module is called as it stands.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from dlkern import dispatch
from dlkern.functional import DTYPES, HALF_DTYPES
from dlkern.functional.depthwise import geometry_of
from dlkern.kernels.activation import Activation
from dlkern.nn import depthwise as layer
from dlkern.nn.batch_norm_act import own
from dlkern.ops import depthwise as op
from dlkern.ops import depthwise_bn_act as chain
from dlkern.ops import library

from . import runtime
from .batch_norm_act import Site
from .trace import TENSOR, Trace
from .witness import has_hooks

KIND = "depthwise"
#: A depthwise convolution (with norm and activation) that a pointwise convolution follows.
SEPARABLE = "separable"
IDENTITY = Activation("identity")


def is_depthwise(module: Any) -> bool:
    """Whether a module is torch.nn's own convolution with one input channel per group (and more than one group)."""
    return type(module) in (nn.Conv1d, nn.Conv2d) and module.groups == module.in_channels > 1


def _is_pointwise(module: Any) -> bool:
    return type(module) is nn.Conv2d and module.groups == 1 and module.kernel_size == (1, 1)


# ------------------------------------------------------------------------------------------ sites
def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every depthwise convolution with its path; nothing inside of GraphModules and ScriptModules."""
    closed: list[str] = []
    for path, module in model.named_modules():
        if any(not c or path.startswith(f"{c}.") for c in closed):
            continue
        if isinstance(module, (fx.GraphModule, torch.jit.ScriptModule)):
            closed.append(path)
        elif is_depthwise(module):
            yield path, module


def refusal(conv: nn.Module) -> str | None:
    """Why a convolution keeps its class, if it does."""
    if "forward" in conv.__dict__:
        return "its forward is an instance attribute"
    return "has hooks" if has_hooks(conv) else None


def leaf_trace(conv: nn.Module) -> tuple[Trace, list[Site]]:
    """A convolution as the owner of itself: one site, whose stock form is its own forward."""
    graph = fx.Graph()
    x = graph.placeholder("input")
    call = graph.create_node("call_module", "", (x,))  # the module itself
    graph.output(call)
    trace = Trace(graph, conv, arguments={x: "input"}, parameters={"input": TENSOR})
    return trace, [Site("", KIND, [call], x, None, IDENTITY, [], [], KIND)]


def separable(trace: Trace, sites: list[Site]) -> set[str]:
    """The depthwise convolutions of a trace whose output, or their site's, one pointwise convolution takes alone."""
    modules = dict(trace.root.named_modules())
    ends = {site.conv: site.span[-1] for site in sites if site.conv is not None}
    found = set()
    for node in trace.graph.nodes:
        if node.op != "call_module" or not is_depthwise(modules.get(str(node.target))):
            continue
        end = ends.get(node, node)
        while len(end.users) == 1:
            (end,) = end.users
            if end.op != "call_module" or type(modules.get(str(end.target))) is not nn.Identity:
                break
        else:
            continue
        if end.op == "call_module" and _is_pointwise(modules.get(str(end.target))):
            found.add(str(node.target))
    return found


def described(conv: Any) -> tuple[str, str]:
    """The backend that a swapped convolution of this device and dtype gets by default, and whether it always does.

    Raises:
        RuntimeError: a backend was forced that cannot run it.
    """
    if not isinstance(conv, (nn.Conv1d, nn.Conv2d)) or conv.groups != conv.in_channels:
        return "torch", f"replaced by a {type(conv).__name__} after the swap"
    flat = (1,) if isinstance(conv, nn.Conv1d) else ()
    chosen = []
    for channels_last, gradients, plane in itertools.product((True, False), (True, False), (1 << 6, 1 << 14)):
        request = op.Request(
            conv.weight.device.type, conv.weight.dtype, channels_last, flat + conv.kernel_size, flat + conv.stride,
            flat + conv.dilation, conv.out_channels // conv.in_channels, "identity", False, gradients, plane,
        )  # type: ignore[arg-type]  # fmt: skip
        chosen.append(dispatch.choose(op.NAME, request))
    ours = [choice for choice in chosen if choice.backend != "torch"]
    if not ours or len(ours) == len(chosen):
        return chosen[0].backend, chosen[0].reason
    return ours[0].backend, f"{ours[0].reason}; torch for layouts, sizes and passes in which that is faster"


# ---------------------------------------------------------------------------------------- runtime
def _dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype that a convolution of these computes in, autocast considered; None where they do not fit."""
    dtype = x.dtype
    if dtype not in DTYPES or weight.device != x.device:
        return None
    if not library.autocasts(x.device.type):
        return dtype if weight.dtype == dtype else None
    if torch.float64 in (dtype, weight.dtype):
        return dtype if weight.dtype == dtype else None
    return torch.get_autocast_dtype(x.device.type) if weight.dtype in DTYPES else None


def _fitting(conv: Any, x: Any, rank: int) -> tuple[Tensor, torch.dtype] | None:
    """The weight and the dtype of a call that the op can run; None where PyTorch is to run it (or refuse it)."""
    if type(x) is not Tensor or runtime.watched(x) or x.dim() != rank or x.size(1) != conv.in_channels:
        return None
    weight = own(conv, conv._parameters, "weight")
    if type(weight) not in (Tensor, nn.Parameter) or weight.shape[:2] != (conv.out_channels, 1):
        return None
    bias = own(conv, conv._parameters, "bias")
    if bias is not None and (bias.dtype != weight.dtype or bias.device != weight.device):
        return None
    dtype = _dtype(x, weight)
    return None if dtype is None else (weight, dtype)


def takes(conv: Any, norm: Any, x: Any, activation: Activation, residual: bool) -> bool:
    """Whether the op runs this call of a depthwise convolution with the norm and the activation behind it.

    A residual is not known yet when the convolution is called, and other ranks' statistics are batch_norm_act's
    business: the convolution is then called alone (``call``).
    """
    if residual or (isinstance(norm, nn.SyncBatchNorm) and norm.training):
        return False
    if type(conv) is not nn.Conv2d or not runtime.unhooked(conv) or conv.groups != conv.in_channels:
        return False
    fitting = _fitting(conv, x, 4)
    if fitting is None:
        return False
    weight, dtype = fitting
    saves = library.wants_gradient(x, weight, conv._parameters.get("bias"))
    kind = "none"
    if norm is not None:
        mean = own(norm, norm._buffers, "running_mean")
        gamma = own(norm, norm._parameters, "weight")
        like = mean if gamma is None else gamma
        if norm.num_features != conv.out_channels or not _agrees(like, x, dtype):
            return False
        kind = "batch" if norm.training or mean is None else "running"
        saves = saves or library.wants_gradient(gamma, own(norm, norm._parameters, "bias"))
    geometry = _geometry(conv, weight)
    if geometry is None:
        return False
    size = geometry.output_size(x, weight)
    if size[2] < 1 or size[3] < 1 or (kind == "batch" and size[0] * size[2] * size[3] == 1):
        return False  # refused by PyTorch in its own words
    return dispatch.recording() or chain.choose(x, weight, geometry, kind, saves, False, activation, dtype) != "torch"


def _agrees(parameter: Tensor | None, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a batch norm's parameter, if any, fits the convolution's output."""
    if parameter is None:
        return True
    fits = parameter.dtype == dtype or (parameter.dtype == torch.float32 and dtype in HALF_DTYPES)
    return fits and parameter.device == x.device


def _geometry(conv: Any, weight: Tensor) -> op.Geometry | None:
    try:
        return geometry_of(weight, conv.stride, conv.padding, conv.dilation)
    except ValueError:  # somebody wrote to the attributes: PyTorch says it in its own words
        return None


def takes_alone(conv: Any, x: Any) -> bool:
    """Whether the op runs this call of a convolution, of one or two dimensions, by itself."""
    flat = isinstance(conv, nn.Conv1d)
    if conv.groups != conv.in_channels:
        return False
    fitting = _fitting(conv, x, 3 if flat else 4)
    if fitting is None:
        return False
    weight, dtype = fitting
    stride, padding, dilation = conv.stride, conv.padding, conv.dilation
    if flat:
        x, weight, stride, dilation = x.unsqueeze(2), weight.unsqueeze(2), (1, *stride), (1, *dilation)
        padding = padding if isinstance(padding, str) else (0, *padding)
    try:
        geometry = geometry_of(weight, stride, padding, dilation)
    except ValueError:
        return False
    size = geometry.output_size(x, weight)
    if size[2] < 1 or size[3] < 1:
        return False
    gradients = library.transformed() or library.wants_gradient(x, weight, conv._parameters.get("bias"))
    return dispatch.recording() or op.choose(x, weight, geometry, "identity", gradients, dtype) != "torch"


def fused_alone(conv: Any, x: Tensor) -> Tensor:
    """The rewritten convolution."""
    return layer.convolve(conv, x, own(conv, conv._parameters, "weight"), own(conv, conv._parameters, "bias"))


def call(conv: Any, x: Any) -> Tensor:
    """A site's convolution where the site does not take it: by the op, or as the module that it is."""
    if type(conv) is nn.Conv2d and runtime.unhooked(conv) and takes_alone(conv, x):
        return fused_alone(conv, x)
    return conv(x)
