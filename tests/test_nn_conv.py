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
