"""The rewrite of conv -> bn -> act, conv -> bn -> add -> act, conv -> bn and conv -> act.

It extends the sites of batch_norm_act by the convolution in front of them, and finds what has no activation or
no batch norm. In training the convolution stays a module call where it stands and the site is batch_norm_act's;
where ``takes`` finds at a call that an implementation of the op conv_bn_act runs it (in inference, or forced; a
depthwise one in training, too), the convolution's modules are handed over to it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from dlkern import dispatch
from dlkern.functional import DTYPES
from dlkern.kernels.activation import Activation
from dlkern.kernels.reference.conv_bn_act import Convolution
from dlkern.nn import conv_bn_act as layer
from dlkern.nn.batch_norm_act import own
from dlkern.ops import conv_bn_act as op
from dlkern.ops import library

from . import batch_norm_act, depthwise, runtime, transposed
from .batch_norm_act import Matcher, NotASite, Site
from .trace import Trace
from .witness import has_hooks

KIND = "conv_bn_act"
IDENTITY = Activation("identity")
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def match(
    trace: Trace,
    prefix: str = "",
    proven: frozenset[str] = frozenset(),
    convs: frozenset[str] | None = None,
    conv_only: frozenset[str] = frozenset(),
) -> tuple[list[Site], dict[str, str]]:
    """Every site in a trace's graph, and the reason for each norm that is none.

    A trace through all modules shows what is safe; a local one, with its children closed, is told:
    ``proven`` are its sites of norm and activation, ``convs`` those with a convolution (None for the
    trace through all modules itself), ``conv_only`` those without norm or without activation.
    """
    matcher = Matcher(trace, prefix, proven)
    sites, reasons = matcher.run()
    sites = [site for site in sites if site.path not in conv_only]
    found = _Convolutions(matcher, convs)
    for site in sites:
        found.extend(site)
    taken = {site.path for site in sites}
    for node in list(matcher.order):
        more = found.site(node, taken)
        if more is not None:
            sites.append(more)
            taken.add(more.path)
            reasons.pop(more.path, None)
    return sorted(sites, key=lambda s: matcher.order[s.span[0]]), reasons


class _Convolutions:
    """Finds the convolutions in front of sites, and sites that are there for the convolution's sake."""

    def __init__(self, matcher: Matcher, convs: frozenset[str] | None) -> None:
        self.matcher = matcher
        self.convs = convs
        calls: dict[str, int] = {}
        for node in matcher.order:
            if node.op == "call_module":
                calls[str(node.target)] = calls.get(str(node.target), 0) + 1
        self.calls = calls

    def _is_convolution(self, node: Any) -> bool:
        if not isinstance(node, fx.Node) or node.op != "call_module" or node.kwargs or len(node.args) != 1:
            return False
        module = self.matcher.module(node)
        return (
            type(module) in CONVOLUTIONS
            and isinstance(node.args[0], fx.Node)
            and len(node.users) == 1
            and not has_hooks(module)
            and self.calls[str(node.target)] == 1
        )

    def extend(self, site: Site) -> None:
        """Give a site the convolution whose output it takes."""
        if not self._is_convolution(site.source) or not isinstance(self.matcher.module(site.span[0]), NORMS):
            return
        if len(site.span) == 1 or not self._unwritten(site.path, site.source, site.span[-1]):
            return
        site.conv, site.kind, site.label = site.source, KIND, f"conv+{site.label}"

    def _unwritten(self, path: str, conv: fx.Node, last: fx.Node) -> bool:
        """Whether nothing writes to the convolution's input before the site's last node, where it is read."""
        if self.convs is not None:
            return path in self.convs
        try:
            self.matcher.refuse_mutations(conv.all_input_nodes[0], None, [conv, last])
        except NotASite:
            return False
        return True

    def site(self, node: fx.Node, taken: set[str]) -> Site | None:
        """conv -> bn or conv -> act that begins with this node, if it is not part of another site."""
        if not self._is_convolution(node):
            return None
        (user,) = node.users
        target = str(user.target)
        if user.op == "call_module" and batch_norm_act.is_norm(self.matcher.module(user)):
            norm = self.matcher.module(user)
            if (
                target in taken
                or self.calls[target] != 1
                or not isinstance(norm, NORMS)
                or not _is_linear(norm)
                or has_hooks(norm)
                or len(user.args) != 1
                or user.kwargs
                or not self._unwritten(target, node, user)
            ):
                return None
            bypassed = [target]
            if batch_norm_act.is_timm_norm(norm):
                bypassed += [f"{target}.drop", f"{target}.act"]
            return Site(target, "conv+bn", [user], node, None, IDENTITY, bypassed, [], KIND, target, node)
        span: list[fx.Node] = []
        bypassed = []
        try:
            end = self.matcher.next(node, span, bypassed)
        except NotASite:
            return None
        activation = self.matcher.activation(end)
        if activation is None or activation.name == "identity":
            return None
        attributes: list[tuple[str, str, Any]] = []
        if end.op == "call_module":
            module = self.matcher.module(end)
            if has_hooks(module):
                return None
            bypassed.append(str(end.target))
            attributes = batch_norm_act.attributes_of(str(end.target), module)
        path = str(node.target)
        if not self._unwritten(path, node, end):
            return None
        label = f"conv+{activation.name}"
        return Site(path, label, [*span, end], node, None, activation, bypassed, attributes, KIND, None, node)


def _is_linear(norm: Any) -> bool:
    """Whether a norm is a batch norm and nothing else: timm's may have an activation inside."""
    if not batch_norm_act.is_timm_norm(norm):
        return True
    try:
        return batch_norm_act.timm_activation(norm).name == "identity"
    except NotASite:
        return False


# --------------------------------------------------------------------------------------- runtime
def takes(conv: Any, norm: Any, x: Any, activation: Activation, residual: bool) -> bool:
    """Whether an implementation of conv_bn_act runs this call, convolution included.

    Where not, the convolution is called as the module it is, with whatever has become of it.
    """
    if type(conv) is nn.ConvTranspose2d:
        return transposed.takes(conv, norm, x, activation, residual)
    if type(x) is not Tensor or type(conv) is not nn.Conv2d or not runtime.unhooked(conv):
        return False
    if 1 < conv.groups == conv.in_channels and depthwise.takes(conv, norm, x, activation, residual):
        return True
    if runtime.watched(x) or x.dim() != 4 or (isinstance(norm, nn.SyncBatchNorm) and norm.training):
        return False  # other ranks' statistics are batch_norm_act's business
    parameters = conv._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or library.autocasts(x.device.type):
        return False
    if norm is not None and conv._buffers.get(layer.FOLDED_WEIGHT) is not None:
        return True
    # in training PyTorch's own convolution runs, unless another was forced or measured to be faster
    asked = dispatch.forced(op.NAME) is not None or dispatch.weighs()
    saves = library.wants_gradient(x, weight, bias)
    if saves and not asked:
        return False
    dtype, device = x.dtype, x.device
    if weight.dtype != dtype or dtype not in DTYPES or weight.device != device or x.size(1) != conv.in_channels:
        return False
    like, kind = None, "none"
    if norm is not None:
        mean = own(norm, norm._buffers, "running_mean")
        gamma = own(norm, norm._parameters, "weight")
        if norm.num_features != conv.out_channels:
            return False
        kind = "batch" if norm.training or mean is None else "running"
        if kind == "batch" and not asked:
            return False
        like = mean if gamma is None else gamma
        if not runtime.agree(x, like):
            return False
        saves = saves or library.wants_gradient(gamma, own(norm, norm._parameters, "bias"))
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    convolution = Convolution(conv.stride, conv.padding, conv.dilation, conv.groups)
    size = convolution.output_size(x, weight)
    if size[2] < 1 or size[3] < 1:
        return False  # refused by PyTorch in its own words
    request = op.request_of(x, weight, like, convolution, size, kind, saves, residual, activation.name)
    choice = dispatch.choose(op.NAME, request, x, weight)
    return dispatch.recording() or choice.backend != "torch"


def alike(conv: Any, x: Tensor, residual: Any) -> bool:
    """Whether a residual is a tensor like the convolution's output: the op neither broadcasts nor promotes.

    Where it is not, the convolution is called after all, and PyTorch's own addition follows.
    """
    if type(residual) is not Tensor or residual.dtype != x.dtype or residual.device != x.device:
        return False
    padding = conv.padding
    if padding == "same":
        return residual.shape == (x.size(0), conv.out_channels, *x.shape[2:])
    border = (0, 0) if padding == "valid" else padding
    convolution = Convolution(conv.stride, border, conv.dilation, conv.groups)
    return residual.shape == convolution.output_size(x, conv._parameters["weight"])


def fused(conv: Any, norm: Any, x: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
    """The rewritten site, convolution included."""
    if type(conv) is nn.ConvTranspose2d:
        return transposed.fused(conv, norm, x, activation)
    return layer.apply(conv, norm, x, activation, residual)
