"""Real models: every site found, the numbers those of the plain model by the whole-model rule."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import dlkern

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed")

#: Sites by label, as counted by hand in the models' code; image size; batch. The images are large enough for the last
#: layers to hold dozens of values a channel: with fewer, one ReLU flipped by rounding moves a gradient by percents.
MODELS = {
    "torchvision:resnet18": ({"bn+relu": 9, "bn+add+relu": 8}, 96, 8),
    "torchvision:resnet50": ({"bn+relu": 33, "bn+add+relu": 16}, 96, 8),
    "torchvision:densenet121": ({"bn+relu": 121}, 96, 8),
    "torchvision:inception_v3": ({"bn+relu": 96}, 299, 4),
    "torchvision:mobilenet_v2": ({"bn+relu6": 35}, 112, 8),
    "timm:repvgg_a0": ({"bn+add+relu": 22}, 64, 4),
    "timm:hrnet_w18_small": ({"bn+relu": 43, "bn+add+relu": 24}, 96, 4),
    "timm:xception41": ({"bn+relu": 32}, 96, 4),
}


def build(name: str) -> nn.Module:
    library, _, function = name.partition(":")
    torch.manual_seed(0)
    if library == "timm":
        return timm.create_model(function)
    kwargs = {"init_weights": False} if function == "inception_v3" else {}
    return getattr(torchvision.models, function)(weights=None, **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    counts, size, batch = MODELS[name]
    plain = build(name)
    model = dlkern.swap(copy.deepcopy(plain))
    report = dlkern.report(model)
    assert Counter(row.label for row in report.swapped) == counts
    assert {row.backend for row in report.swapped} == {"cpu"}
    norms = [path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(norms) == sorted(row.path for row in report.swapped + report.skipped)
    assert all(row.reason for row in report.skipped)
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    # torch 2.14's CPU convolution aborts where repvgg trains in channels_last, so float64 stands in for that variant
    variants = ("threads", "ulp", "float64") if "repvgg" in name else ("memory_format", "threads", "ulp")
    for training in (True, False):
        for m in (plain, model):
            m.train(training)
        before = dlkern.report(model).calls
        fused, fallback = before.fused, before.fallback
        with dlkern.no_fallback():
            verified = dlkern.verify(plain, model, x, variants=variants)
        assert verified.ok, f"training={training}\n{verified}"
        after = dlkern.report(model).calls
        expected = sum(counts.values())
        if "inception" in name and not training:
            expected -= 2  # the auxiliary head runs in training only
        assert (after.fused - fused, after.fallback - fallback) == (expected, 0)


def test_timm_layers_outside_of_a_trace() -> None:
    from timm.layers import BatchNormAct2d

    norm = BatchNormAct2d(8)
    x = torch.randn(4, 8, 5, 5)
    plain = copy.deepcopy(norm)
    dlkern.swap(norm)
    assert [(row.path, row.label) for row in dlkern.report(norm).swapped] == [("", "bn+relu")]
    torch.testing.assert_close(norm(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var, plain.running_var)
    assert dlkern.report(norm).calls.fused == 1
    dlkern.unswap(norm)
    assert type(norm) is BatchNormAct2d


def test_feature_extraction_from_a_swapped_model() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    plain = build("torchvision:resnet18").eval()
    model = dlkern.swap(copy.deepcopy(plain))
    x = torch.randn(1, 3, 64, 64)
    nodes = ["layer1", "layer3.0.relu", "flatten"]
    ours, theirs = (create_feature_extractor(m, nodes)(x) for m in (model, plain))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
