"""Real models: every site found, the numbers those of the plain model by the whole-model rule."""

from __future__ import annotations

import copy
from collections import Counter
from unittest import mock

import pytest
import torch
from batch_norm_act_cases import spied
from torch import nn

import dlkern
from dlkern import dispatch

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed")

#: Sites by label, as counted by hand in the models' code; image size; batch. The images are large enough for the last
#: layers to hold dozens of values a channel: with fewer, one ReLU flipped by rounding moves a gradient by percents.
MODELS = {
    "torchvision:resnet18": ({"conv+bn+relu": 9, "conv+bn+add+relu": 8, "conv+bn": 3}, 96, 8),
    "torchvision:resnet50": ({"conv+bn+relu": 33, "conv+bn+add+relu": 16, "conv+bn": 4}, 96, 8),
    "torchvision:densenet121": ({"conv+bn+relu": 59, "bn+relu": 62}, 96, 8),
    "torchvision:inception_v3": ({"conv+bn+relu": 96}, 299, 4),
    "torchvision:mobilenet_v2": ({"conv+bn+relu6": 18, "depthwise+bn+relu6": 17, "conv+bn": 17}, 112, 8),
    "torchvision:mobilenet_v3_large": (
        {"conv+bn": 15, "conv+bn+relu": 5, "conv+bn+hardswish": 11, "depthwise+bn+relu": 6,
         "depthwise+bn+hardswish": 9, "conv+relu": 8, "conv+hardsigmoid": 8}, 112, 4
    ),
    "torchvision:shufflenet_v2_x1_0": ({"conv+bn+relu": 37, "depthwise+bn": 19}, 96, 4),
    "torchvision:convnext_tiny": ({"depthwise": 18}, 64, 2),
    "torchvision:deeplabv3_resnet50": ({"conv+bn+relu": 41, "conv+bn+add+relu": 16, "conv+bn": 4, "aspp": 1}, 96, 2),
    "torchvision:lraspp_mobilenet_v3_large": (
        {"conv+bn": 15, "conv+bn+relu": 6, "conv+bn+hardswish": 11, "depthwise+bn+relu": 6,
         "depthwise+bn+hardswish": 9, "conv+relu": 8, "conv+hardsigmoid": 8, "conv+sigmoid": 1}, 96, 2
    ),
    "torchvision:efficientnet_b0": (
        {"conv+bn+silu": 17, "depthwise+bn+silu": 16, "conv+bn": 16, "conv+silu": 16, "conv+sigmoid": 16}, 112, 8
    ),
    "torchvision:vgg16_bn": ({"conv+bn+relu": 13}, 64, 4),
    "timm:repvgg_a0": ({"conv+bn+add+relu": 5, "bn+add+relu": 17, "conv+bn": 39}, 64, 4),
    "timm:hrnet_w18_small": ({"conv+bn+relu": 43, "conv+bn+add+relu": 24, "conv+bn": 24}, 96, 4),
    "timm:xception41": (
        {"conv+bn+relu": 27, "depthwise+bn+relu": 3, "bn+relu": 2, "conv+bn": 16, "depthwise+bn": 36}, 96, 4
    ),
}  # fmt: skip

#: Depthwise convolutions that a pointwise one follows, with nothing but a norm and an activation in between.
SEPARABLE = {
    "torchvision:mobilenet_v2": 17,
    "torchvision:mobilenet_v3_large": 7,
    "torchvision:lraspp_mobilenet_v3_large": 7,
    "torchvision:shufflenet_v2_x1_0": 19,
    "timm:xception41": 39,
}


def build(name: str) -> nn.Module:
    library, _, function = name.partition(":")
    torch.manual_seed(0)
    if library == "timm":
        return timm.create_model(function)
    if function in ("deeplabv3_resnet50", "lraspp_mobilenet_v3_large"):
        aux = {"aux_loss": True} if "deeplab" in function else {}
        build = getattr(torchvision.models.segmentation, function)
        return build(weights=None, weights_backbone=None, num_classes=5, **aux)
    if function == "vgg16_bn":  # without the classifier: 124 million parameters of no interest here
        return nn.Sequential(torchvision.models.vgg16_bn().features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    kwargs = {"init_weights": False} if function == "inception_v3" else {}
    return getattr(torchvision.models, function)(weights=None, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    counts, size, batch = MODELS[name]
    plain = build(name)
    model = dlkern.swap(copy.deepcopy(plain))
    report = dlkern.report(model)
    assert Counter(row.label for row in report.swapped) == counts
    assert Counter(row.kind for row in report.swapped)["separable"] == SEPARABLE.get(name, 0)
    with_norm = sum(n for label, n in counts.items() if "bn" in label.split("+"))
    # with gradients a convolution without a norm is PyTorch's, but for ConvNeXt's depthwise ones, whose permutations
    # leave every image channels_last
    alone = counts.get("depthwise", 0)
    blocks = counts.get("aspp", 0)  # each runs as one, and the six sites inside of it do not run
    folded = sum(counts.values()) - with_norm - alone - blocks
    norms = {path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {row.backend for row in report.swapped if row.path in norms} == ({"cpu"} if norms else set())
    assert norms <= {row.path for row in report.swapped + report.skipped}
    assert len(norms & {row.path for row in report.swapped}) == with_norm
    assert all(row.reason for row in report.skipped)
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        for m in (plain, model):
            m.train(training)
        # torch 2.14's CPU convolution aborts where repvgg trains in channels_last: float64 stands in for that variant
        aborts = "repvgg" in name and training
        variants = ("threads", "ulp", "float64") if aborts else ("memory_format", "threads", "ulp")
        before = dlkern.report(model).calls
        fused, fallback = before.fused, before.fallback
        with dlkern.no_fallback():
            verified = dlkern.verify(plain, model, x, variants=variants)
        assert verified.ok, f"training={training}\n{verified}"
        after = dlkern.report(model).calls
        expected = with_norm + alone - 5 * blocks
        if "inception" in name and not training:
            expected -= 2  # the auxiliary head runs in training only
        assert (after.fused - fused, after.fallback - fallback) == (expected, 0)
    fused = after.fused
    # inference, every site folded
    with dlkern.no_fallback(), spied() as calls, torch.no_grad(), dlkern.backend(conv_bn_act="cpu", depthwise="cpu"):
        verified = dlkern.verify(plain, model, x, backward=False, variants=variants)
    assert verified.ok, f"inference\n{verified}"
    assert dlkern.report(model).calls.fused - fused == expected + folded
    # a block's seven convolutions, four branches written side by side, and the projection's batch norm
    assert calls.count(("cpu", "forward")) == expected + folded + 11 * blocks


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "shufflenet_v2_x1_0"]
)
def test_depthwise_convolutions_in_channels_last(name: str) -> None:
    """By our kernels everywhere: the numbers of training, and of inference with batch norms folded."""
    name = f"torchvision:{name}"
    counts, size, batch = MODELS[name]
    size, batch = min(size, 64), min(batch, 4)
    depthwise = sum(n for label, n in counts.items() if label.startswith("depthwise"))
    plain = build(name).to(memory_format=torch.channels_last)
    model = dlkern.swap(copy.deepcopy(plain))
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    implementation = dispatch.implementation("depthwise", "cpu")
    for training in (True, False):
        for m in (plain, model):
            m.train(training)
        with (
            dlkern.no_fallback(),
            dlkern.backend(depthwise="cpu"),
            mock.patch.object(implementation, "forward", wraps=implementation.forward) as forward,
            mock.patch.object(implementation, "backward", wraps=implementation.backward) as back,
        ):
            verified = dlkern.verify(plain, model, x, backward=training, variants=("memory_format", "ulp"))
        assert verified.ok, f"training={training}\n{verified}"
        assert (forward.call_count, back.call_count) == (depthwise, depthwise if training else 0)


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
