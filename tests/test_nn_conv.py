"""The layer dlkern.nn.ConvBNAct2d against torchvision's Conv2dNormActivation and torch.nn in a row."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import dlkern

ops = pytest.importorskip("torchvision.ops")

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"kernel_size": 1, "stride": 2, "bias": True},
    {"kernel_size": (3, 5), "dilation": (2, 1)},
    {"groups": 4, "activation_layer": nn.SiLU},
    {"norm_layer": None, "activation_layer": nn.Hardswish},
    {"activation_layer": None, "padding": 0},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_as_torchvisions(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs = ops.Conv2dNormActivation(8, 12, **arguments)
    torch.manual_seed(0)
    ours = dlkern.nn.ConvBNAct2d(8, 12, **arguments)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    x = torch.randn(2, 8, 9, 10)
    for training in (True, False):
        theirs.train(training), ours.train(training)
        torch.testing.assert_close(ours(x), theirs(x))
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x))
    for mine, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other)


def test_from_modules_shares_them() -> None:
    conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    layer = dlkern.nn.ConvBNAct2d.from_modules(conv, bn, nn.LeakyReLU(0.2))
    assert layer.conv is conv
    assert layer.bn is bn
    assert list(layer.state_dict()) == [f"conv.{k}" for k in conv.state_dict()] + [f"bn.{k}" for k in bn.state_dict()]
    x, residual = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 4, 4)
    plain = copy.deepcopy(bn)
    torch.testing.assert_close(
        layer(x, residual), nn.functional.leaky_relu(plain(conv(x)) + residual, 0.2), rtol=1e-5, atol=1e-5
    )
    assert bn.num_batches_tracked == 1
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer.eval())))
    torch.testing.assert_close(again(x), layer(x))


def test_refused_calls_do_not_count() -> None:
    layer = dlkern.nn.ConvBNAct2d(3, 4)
    with pytest.raises(ValueError, match="weight: expected 5 channels"):
        layer(torch.randn(2, 5, 6, 6))
    assert layer.bn.num_batches_tracked == 0


def test_wrong_parts() -> None:
    with pytest.raises(
        TypeError, match=r"bn: expected a torch\.nn\.BatchNorm2d, a SyncBatchNorm or None, got GroupNorm"
    ):
        dlkern.nn.ConvBNAct2d(3, 4, norm_layer=lambda n: nn.GroupNorm(1, n))
    with pytest.raises(ValueError, match="bn: expected 4 features like conv, got 5"):
        dlkern.nn.ConvBNAct2d.from_modules(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5))
    with pytest.raises(ValueError, match="unknown activation 'no'"):
        dlkern.nn.ConvBNAct2d(3, 4, activation_layer="no")


@pytest.mark.parametrize(
    "layer",
    [
        dlkern.nn.ConvBNAct2d(4, 8),
        dlkern.nn.DepthwiseConv2d(4, 3),
        dlkern.nn.DepthwiseConv1d(4, 3),
        dlkern.nn.DepthwiseConvBNAct2d(4),
        dlkern.nn.DepthwiseSeparableConv2d(4, 8, norm_layer=nn.BatchNorm2d),
        dlkern.nn.AtrousConv2d(4, 8, 3, dilation=2, padding=2),
        dlkern.nn.ASPP(4, [2, 3], 8),
        dlkern.nn.ConvTransposeBNAct2d(4, 8, 4, 2, 1),
        dlkern.nn.LSTM(4, 8),
        dlkern.swap(nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())),
        dlkern.swap(nn.Sequential(nn.ConvTranspose2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU())),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_on_the_meta_device(layer: nn.Module) -> None:
    x = torch.randn({"DepthwiseConv1d": (2, 4, 9), "LSTM": (9, 2, 4)}.get(type(layer).__name__, (2, 4, 9, 9)))
    for training in (True, False):
        want = copy.deepcopy(layer).train(training)(x)
        model = copy.deepcopy(layer).to("meta").train(training)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                got = model(x.to("meta"))
                pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
                assert all(
                    a.device.type == "meta" and a.shape == b.shape for a, b in pairs if isinstance(b, torch.Tensor)
                )
