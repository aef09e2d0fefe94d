"""The layers of dlkern.nn.depthwise against torch.nn's: numbers, arguments, state_dict keys, checkpoints."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from batch_norm_act_cases import spied
from torch import Tensor, nn

import dlkern
from dlkern.nn import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConvBNAct2d, DepthwiseSeparableConv2d

every_backend = pytest.mark.parametrize("backend", ["torch", "reference"])

#: Of torch.nn.Conv2d, without channels and groups.
ARGUMENTS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 4), "dilation": (1, 2), "bias": False},
    {"kernel_size": (4, 3), "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "dilation": 2},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect", "stride": 2},
    {"kernel_size": (4, 3), "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"},
]


def _compare(ours: nn.Module, theirs: nn.Module, x: Tensor, backend: str) -> None:
    """Outputs and gradients; ``ours`` under a forced backend, which is seen to run."""
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    with dlkern.backend(depthwise=backend), spied() as calls:
        y = ours(leaves[0])
        mine = torch.autograd.grad(y.square().sum(), [leaves[0], *ours.parameters()])
    want = theirs(leaves[1])
    other = torch.autograd.grad(want.square().sum(), [leaves[1], *theirs.parameters()])
    assert calls == ([] if backend == "torch" else [(backend, "forward"), (backend, "backward")])
    torch.testing.assert_close(y, want)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b)


@every_backend
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_as_conv2d(arguments: dict[str, Any], multiplier: int, backend: str) -> None:
    torch.manual_seed(0)
    ours = DepthwiseConv2d(4, depth_multiplier=multiplier, **arguments, dtype=torch.float64)
    torch.manual_seed(0)
    theirs = nn.Conv2d(4, 4 * multiplier, groups=4, **arguments, dtype=torch.float64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    _compare(ours, theirs, x, backend)
    _compare(ours, theirs, x[0], backend)
    _compare(ours, theirs, x.contiguous(memory_format=torch.channels_last), backend)


@every_backend
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3},
        {"kernel_size": 4, "stride": 2, "padding": 3, "dilation": 2, "bias": False},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 3, "padding": "valid"},
        {"kernel_size": 5, "padding": 2, "padding_mode": "reflect"},
        {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    ],
    ids=str,
)
def test_as_conv1d(arguments: dict[str, Any], backend: str) -> None:
    torch.manual_seed(0)
    ours = DepthwiseConv1d(4, depth_multiplier=2, **arguments, dtype=torch.float64)
    theirs = nn.Conv1d(4, 8, groups=4, **arguments, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 17, dtype=torch.float64)
    _compare(ours, theirs, x, backend)
    _compare(ours, theirs, x[0], backend)
    _compare(ours, theirs, torch.randn(2, 17, 4, dtype=torch.float64).transpose(1, 2), backend)


def test_both_orders_of_arguments() -> None:
    for made in (
        DepthwiseConv2d(4, 3, 2, 1, 1, 2),
        DepthwiseConv2d(4, 8, 3, 2, 1, groups=4),
        DepthwiseConv2d(in_channels=4, out_channels=8, kernel_size=3, stride=2, padding=1, groups=4),
        DepthwiseConv2d(4, kernel_size=3, stride=2, padding=1, out_channels=8),
    ):
        assert isinstance(made, nn.Conv2d)
        assert (made.in_channels, made.out_channels, made.groups) == (4, 8, 4)
        assert (made.kernel_size, made.stride, made.padding) == ((3, 3), (2, 2), (1, 1))
    assert "groups=4" in repr(made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0, "kernel_size": 3}, "in_channels: expected a positive int, got 0"),
        ({"in_channels": 4, "kernel_size": 3, "depth_multiplier": 0}, "depth_multiplier: .* got 0"),
        ({"in_channels": 4, "kernel_size": 3, "out_channels": 6}, "out_channels: expected a multiple .* got 6|divis"),
        ({"in_channels": 4, "kernel_size": 3, "out_channels": 8, "depth_multiplier": 3}, "expected 12, got 8"),
        ({"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 2}, "groups: expected in_channels, 4, .* 2"),
        ({"in_channels": 4, "kernel_size": 3, "stride": 0}, "stride: expected at least 1"),
        ({"in_channels": 4, "kernel_size": 3, "dilation": 0}, "dilation: expected at least 1"),
        ({"in_channels": 4, "kernel_size": 0}, "kernel_size: expected at least 1"),
        ({"in_channels": 4, "kernel_size": 3, "padding": -1}, "padding: expected at least 0"),
        ({"in_channels": 4, "kernel_size": 3, "padding": "same", "stride": 2}, "padding='same'"),
        ({"in_channels": 4, "kernel_size": 3, "padding_mode": "mirror"}, "padding_mode"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DepthwiseConv2d(**arguments)


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match=r"expected \(N, C, L\) or \(C, L\), got shape \(1, 4, 5, 5\)"):
        DepthwiseConv1d(4, 3)(torch.randn(1, 4, 5, 5))
    with pytest.raises(ValueError, match=r"expected \(N, C, H, W\) or \(C, H, W\), got shape \(4, 5\)"):
        DepthwiseConv2d(4, 3)(torch.randn(4, 5))
    with pytest.raises(ValueError, match="multiple of x's 5 channels"):
        DepthwiseConv2d(4, 3)(torch.randn(1, 5, 5, 5))


def test_from_module() -> None:
    conv = nn.Conv2d(4, 8, (3, 5), 2, "valid", groups=4, bias=False, padding_mode="reflect").eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    made = DepthwiseConv2d.from_module(conv)
    assert torch.equal(torch.get_rng_state(), state)
    assert made.weight is conv.weight
    assert made.bias is None
    assert not made.training
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(made(x), conv(x))
    line = nn.Conv1d(4, 4, 3, groups=4)
    assert DepthwiseConv1d.from_module(line).bias is line.bias
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Conv1d, got Conv2d"):
        DepthwiseConv1d.from_module(conv)
    with pytest.raises(ValueError, match=r"groups: expected in_channels, 4, .* got 2"):
        DepthwiseConv2d.from_module(nn.Conv2d(4, 4, 3, groups=2))
    conv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has hooks"):
        DepthwiseConv2d.from_module(conv)


def test_copies_and_parametrizations() -> None:
    layer = DepthwiseConv2d(4, 3, depth_multiplier=2)
    x = torch.randn(1, 4, 6, 6)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    want = nn.functional.conv2d(x, 2 * layer.weight, layer.bias, groups=4)

    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    nn.utils.parametrize.register_parametrization(layer, "weight", Double())
    with dlkern.backend(depthwise="reference"):
        torch.testing.assert_close(layer(x), want)


# ------------------------------------------------------------------------------ with norm and activation
@every_backend
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("arguments", [
    {}, {"activation_layer": nn.SiLU, "kernel_size": 5, "stride": 2, "depth_multiplier": 2},
    {"norm_layer": None, "activation_layer": "hardswish"}, {"activation_layer": None, "padding": "same", "bias": True},
], ids=str)  # fmt: skip
def test_conv_bn_act(arguments: dict[str, Any], channels_last: bool, backend: str) -> None:
    torch.manual_seed(0)
    layer = DepthwiseConvBNAct2d(6, **arguments).double()
    if layer.bn is not None:
        layer.bn.weight.data.normal_(1, 0.3)
        layer.bn.bias.data.normal_()
    conv = nn.Conv2d(
        6, layer.conv.out_channels, layer.conv.kernel_size, layer.conv.stride, layer.conv.padding, groups=6,
        bias=layer.conv.bias is not None, dtype=torch.float64,
    )  # fmt: skip
    conv.load_state_dict(layer.conv.state_dict())
    act = {None: nn.Identity(), "hardswish": nn.Hardswish()}.get(arguments.get("activation_layer", nn.ReLU))
    act = act or arguments.get("activation_layer", nn.ReLU)()
    plain = nn.Sequential(conv, copy.deepcopy(layer.bn) or nn.Identity(), act)
    x = torch.randn(3, 6, 15, 14, dtype=torch.float64)  # large enough that folding pays
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for training in (True, False):
        layer.train(training), plain.train(training)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        with dlkern.backend(depthwise=backend), spied() as calls:
            y = layer(leaves[0])
            mine = torch.autograd.grad(y.square().sum(), [leaves[0], *layer.parameters()])
        want = plain(leaves[1])
        other = torch.autograd.grad(want.square().sum(), [leaves[1], *plain.parameters()])
        for a, b in zip((y, *mine, *layer.buffers()), (want, *other, *plain.buffers()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        assert (backend != "torch") == (("reference", "forward") in calls)
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    with torch.no_grad(), dlkern.backend(depthwise=backend), spied() as calls:
        torch.testing.assert_close(layer(x), plain(x))
    if backend != "torch":
        assert calls == [("reference", "forward")]  # batch norm and activation are part of it


@pytest.mark.parametrize("epilogue", [True, False])
def test_gradients_of_the_training_chain(epilogue: bool) -> None:
    """With the statistics of the convolution's kernel (channels_last) and without: gradcheck, twice."""
    torch.manual_seed(0)
    layer = DepthwiseConvBNAct2d(2, 3, activation_layer="silu", bias=True).double()
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last if epilogue else torch.contiguous_format).requires_grad_()
    residual = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, residual: Tensor, *values: Tensor) -> Tensor:
        with dlkern.backend(depthwise="reference"):
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, residual))

    name = type(run(x, residual, *parameters).grad_fn).__name__
    assert (name == "DepthwiseBNActFunctionBackward") == epilogue
    assert torch.autograd.gradcheck(run, (x, residual, *parameters))
    assert torch.autograd.gradgradcheck(run, (x, residual, *parameters))


def test_running_statistics_of_the_epilogue() -> None:
    """Momentum, also the cumulative average's, the unbiased variance, a mean far from zero, a norm without tracking."""
    torch.manual_seed(0)
    x = (torch.randn(4, 6, 7, 7, dtype=torch.float64) + 1000).contiguous(memory_format=torch.channels_last)
    for options in ({}, {"momentum": None}, {"momentum": 0.4, "affine": False}, {"track_running_stats": False}):
        layer = DepthwiseConvBNAct2d(6, norm_layer=lambda c, o=options: nn.BatchNorm2d(c, **o)).double()
        plain = nn.Sequential(copy.deepcopy(layer.conv), copy.deepcopy(layer.bn), nn.ReLU())
        for _ in range(2):
            with dlkern.backend(depthwise="reference"):
                y = layer(x)
            assert "DepthwiseBNAct" in type(y.grad_fn).__name__
            torch.testing.assert_close(y, plain(x), rtol=1e-7, atol=1e-7)
            for a, b in zip(layer.buffers(), plain.buffers(), strict=True):
                torch.testing.assert_close(a, b)
        with torch.no_grad(), dlkern.backend(depthwise="reference"):
            layer(x)  # statistics without gradients
            plain(x)
        for a, b in zip(layer.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_compile_fullgraph(training: bool, channels_last: bool) -> None:
    torch._dynamo.reset()
    layer = DepthwiseConvBNAct2d(4, 3, depth_multiplier=2).train(training)
    other = copy.deepcopy(layer)
    x = torch.randn(2, 4, 8, 8)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with dlkern.backend(depthwise="reference"):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            ours, theirs = compiled(x), other(x)
            torch.testing.assert_close(ours, theirs)
            ours.square().sum().backward(), theirs.square().sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), other(x))
    for a, b in zip(layer.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_memory_efficient() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(DepthwiseConvBNAct2d(4), DepthwiseConvBNAct2d(4, 5)).double()
    lean = copy.deepcopy(plain)
    for layer in lean:
        layer.memory_efficient = True
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    gradients = []
    for model in (plain, lean):
        with dlkern.backend(depthwise="reference"):
            y = model(x)
        assert ("MemoryEfficient" in type(y.grad_fn).__name__) == (model is lean)
        gradients.append(torch.autograd.grad(y.square().sum(), list(model.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_layers() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(
        DepthwiseConvBNAct2d(4, activation_layer="silu"),
        DepthwiseSeparableConv2d(4, 6, depthwise_norm_layer=nn.BatchNorm2d, norm_layer=nn.BatchNorm2d),
    )
    with torch.no_grad():
        for b in layer.buffers():
            b.copy_(torch.rand(b.shape) + 0.5)
    layer.eval()
    x = torch.randn(2, 4, 8, 8)
    for backend in ("torch", "reference"):
        with torch.no_grad(), dlkern.backend(depthwise=backend):
            want = layer(x)
            dlkern.freeze(layer)
            assert sum("folded_weight" in name for name, _ in layer.named_buffers()) == 3
            with spied() as calls:
                torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
            assert calls.count(("reference", "forward")) == (0 if backend == "torch" else 2)
        dlkern.unfreeze(layer)


# -------------------------------------------------------------------------------------- separable
def _checkpoints(norms: bool) -> dict[str, nn.Module]:
    """The same layer as others write it."""

    def dw() -> nn.Module:
        return nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=not norms)

    def pw() -> nn.Module:
        return nn.Conv2d(4, 6, 1, bias=not norms)

    def named(*names: str) -> nn.Module:
        parts = (dw(), nn.BatchNorm2d(4), pw(), nn.BatchNorm2d(6)) if norms else (dw(), pw())
        return nn.Sequential(OrderedDict(zip(names, parts, strict=True)))

    if norms:
        return {
            "timm": named("conv_dw", "bn_dw", "conv_pw", "bn_pw"),
            "numbered": named("conv1", "bn1", "conv2", "bn2"),
            "sequential": named("0", "1", "2", "3"),
            "with activations": nn.Sequential(dw(), nn.BatchNorm2d(4), nn.ReLU(), pw(), nn.BatchNorm2d(6), nn.ReLU()),
            "own": named("depthwise", "depthwise_norm", "pointwise", "pointwise_norm"),
        }
    return {
        "own": named("depthwise", "pointwise"),
        "xception": named("conv1", "pointwise"),
        "sequential": nn.Sequential(dw(), pw()),
        "timm": named("conv_dw", "conv_pw"),
        "conv": named("depthwise_conv", "pointwise_conv"),
        "short": named("dw", "pw"),
    }


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_checkpoints(norms: bool, nested: bool) -> None:
    x = torch.randn(2, 4, 7, 7)
    for name, other in _checkpoints(norms).items():
        norm = nn.BatchNorm2d if norms else None
        layer: nn.Module = DepthwiseSeparableConv2d(4, 6, depthwise_norm_layer=norm, norm_layer=norm)
        plain = nn.Sequential(*(m for m in other if not isinstance(m, nn.ReLU))).eval()
        if nested:
            layer, other = nn.Sequential(nn.ReLU(), layer), nn.Sequential(nn.ReLU(), other)
            plain = nn.Sequential(nn.ReLU(), plain)
        keys = list(other.state_dict())
        state = other.state_dict()
        result = layer.load_state_dict(state)
        assert not result.missing_keys, name
        assert list(state) == keys  # the checkpoint itself is not written to
        torch.testing.assert_close(layer.eval()(x), plain(x))
        layer.load_state_dict(layer.state_dict())


def test_other_checkpoints_are_errors() -> None:
    layer = DepthwiseSeparableConv2d(4, 6, bias=False)
    with pytest.raises(RuntimeError, match=r"Missing key.*depthwise\.weight"):
        layer.load_state_dict({"a.weight": layer.depthwise.weight, "b.weight": layer.pointwise.weight})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*2\.weight"):
        layer.load_state_dict(
            {"0.weight": layer.depthwise.weight, "1.weight": layer.pointwise.weight, "2.weight": torch.ones(6)}
        )


@every_backend
def test_separable_as_two_modules(backend: str) -> None:
    torch.manual_seed(0)
    ours = DepthwiseSeparableConv2d(
        4, 6, 5, 2, dilation=2, depth_multiplier=2, depthwise_norm_layer=nn.BatchNorm2d, norm_layer=nn.BatchNorm2d,
        depthwise_activation_layer="relu6", activation_layer=nn.SiLU,
    ).double()  # fmt: skip
    plain = nn.Sequential(
        nn.Conv2d(4, 8, 5, 2, 4, 2, groups=4, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.SiLU(),
    ).double()  # fmt: skip
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 12, 12, dtype=torch.float64)
    for training in (True, False):
        ours.train(training), plain.train(training)
        with dlkern.backend(depthwise=backend):
            y = ours(x)
        want = plain(x)
        torch.testing.assert_close(y, want)
        grads = [torch.autograd.grad(t.square().sum(), list(m.parameters())) for t, m in ((y, ours), (want, plain))]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert "relu6" in repr(ours)


@pytest.mark.parametrize("kind", ["torchvision", "dlkern", "separable first"])
def test_checkpoints_of_blocks_in_a_sequential(kind: str) -> None:
    relu, norm = nn.ReLU, nn.BatchNorm2d

    def block(out: int, size: int, groups: int) -> nn.Module:
        if kind == "dlkern":
            return dlkern.nn.ConvBNAct2d(4, out, size, groups=groups)
        return nn.Sequential(nn.Conv2d(4, out, size, padding=size // 2, groups=groups, bias=False), norm(out), relu())

    options = {"norm_layer": norm, "activation_layer": relu, "bias": False}
    if kind == "separable first":
        first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.Conv2d(4, 6, 1, bias=False))
        theirs = nn.Sequential(first, norm(6), relu())
    else:
        options |= {"depthwise_norm_layer": norm, "depthwise_activation_layer": relu}
        theirs = nn.Sequential(block(4, 3, 4), block(6, 1, 1))
    x = torch.randn(2, 4, 7, 8)
    theirs(x)  # moves the running statistics
    ours = dlkern.nn.DepthwiseSeparableConv2d(4, 6, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs.eval()(x))


def test_torchs_order_of_arguments_by_position() -> None:
    with pytest.raises(ValueError, match=r"bias: expected a bool, got 4 .*groups is a keyword"):
        dlkern.nn.DepthwiseConv2d(4, 8, 3, 1, 1, 1, 4)
