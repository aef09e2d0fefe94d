"""Situations in which a rewrite could silently compute something else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import swap_models as models
import torch
import torch.nn.functional as F
from test_swap import assert_same, calls
from torch import nn

import dlkern


@pytest.fixture
def h() -> torch.Tensor:
    return torch.randn(4, 8, 10, 10, generator=torch.Generator().manual_seed(1))


def test_an_optional_argument(h: torch.Tensor) -> None:
    model, plain = models.pair(models.Masked())
    dlkern.swap(model)
    assert_same(model, plain, h)
    assert calls(model) == (1, 0)
    mask = (torch.arange(10) < 4).float()
    assert_same(model, plain, h, mask)
    assert calls(model) == (1, 1)
    with dlkern.no_fallback(), pytest.raises(RuntimeError, match="argument mask is not as it was when traced"):
        model(h, mask)


@pytest.mark.parametrize("change", ["scale", "extra", "act"])
def test_an_attribute_changed_after_the_swap(h: torch.Tensor, change: str) -> None:
    model, plain = models.pair(models.Switched())
    dlkern.swap(model)
    assert_same(model, plain, h)
    assert calls(model) == (1, 0)
    value = {"scale": 3.0, "extra": nn.Tanh(), "act": F.silu}[change]
    for m in (model, plain):
        setattr(m, change, value)
    assert_same(model, plain, h)
    assert calls(model) == (1, 1)
    with dlkern.no_fallback(), pytest.raises(RuntimeError, match=f"attribute {change} changed"):
        model(h)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (models.InPlaceResidual, "added in place to a residual that others may see"),
        (models.Noisy, "calls rand on none of its inputs"),
        (models.StopsGradient, "changes grad mode, autocast"),
        (models.AutocastRegion, "changes grad mode, autocast"),
        (models.SavedTensorsRegion, "saved-tensor hooks"),
        (models.AsksGradMode, "asks torch.is_grad_enabled()"),
        (models.Remembers, "writes attributes of itself"),
        (models.BranchesOnType, "isinstance"),
        (models.NormTwice, "called 2 times in one forward"),
        (models.WritesBetween, "zero_ may write to its input before the activation"),
    ],
)
def test_what_cannot_be_rewritten_is_left_with_a_reason(
    h: torch.Tensor, build: Callable[[], nn.Module], reason: str
) -> None:
    model, plain = models.pair(build())
    before = [dict(m.__dict__) for m in model.modules()]
    state = torch.get_rng_state()
    dlkern.swap(model)
    assert torch.equal(state, torch.get_rng_state())
    assert [dict(m.__dict__) for m in model.modules()] == before  # counters, lists, features: as they were
    report = dlkern.report(model)
    assert report.swapped == []
    assert [row.path for row in report.skipped] == ["bn"]
    assert reason in report.skipped[0].reason
    results = []
    for m in (model, plain):
        torch.manual_seed(3)
        with torch.no_grad():
            results.append(m(h.clone()))
    assert torch.equal(*results)


@pytest.mark.parametrize("build", [models.CallersResidual, models.LaterWrite])
def test_an_unsafe_addition_leaves_conv_and_norm(h: torch.Tensor, build: Callable[[], nn.Module]) -> None:
    model, plain = models.pair(build())
    dlkern.swap(model)
    assert [(row.path, row.label) for row in dlkern.report(model).swapped] == [("bn", "conv+bn")]
    leaves = [h.clone().requires_grad_() for _ in range(2)]
    results = [m(leaf * 1) for m, leaf in zip((model, plain), leaves, strict=True)]
    torch.testing.assert_close(*results)
    for result in results:
        result.square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-4)


def test_gradients_stop_where_they_did(h: torch.Tensor) -> None:
    model = dlkern.swap(models.StopsGradient())
    model(h).sum().backward()
    assert model.conv.weight.grad is None
    assert model.bn.weight.grad is not None


def test_counters_go_on_counting(h: torch.Tensor) -> None:
    model = dlkern.swap(models.Remembers())
    model(h)
    model(h)
    assert (model.count, model.history) == (2, [1, 2])
    assert isinstance(model.feat, torch.Tensor)


def test_children_of_an_untraceable_forward_are_swapped(h: torch.Tensor) -> None:
    model, plain = models.pair(models.BranchesOnValue())
    dlkern.swap(model)
    assert [row.path for row in dlkern.report(model).swapped] == ["inner.bn"]
    assert_same(model, plain, h)
    assert calls(model) == (1, 0)


def test_lists_as_arguments_and_results(h: torch.Tensor) -> None:
    model, plain = models.pair(models.ListOwner())
    dlkern.swap(model)
    assert [row.path for row in dlkern.report(model).swapped] == ["inner.norm", "inner.a.bn", "inner.b.bn"]
    with dlkern.no_fallback():
        assert_same(model, plain, h)  # ListOwner reads the list that the inner module wrote into
    assert calls(model) == (3, 0)
    ys = model.inner([h, h])
    assert len(ys) == 2
    with pytest.raises(IndexError, match=r"."):
        model.inner([h])


def test_sites_across_containers(h: torch.Tensor) -> None:
    model, plain = models.pair(models.AcrossContainers())
    dlkern.swap(model)
    report = dlkern.report(model)
    assert {row.path: row.owner for row in report.swapped} == {
        "features.1": "", "features.4": "", "features.0.bn": "features.0",
    }  # fmt: skip
    with dlkern.no_fallback():
        assert_same(model, plain, h)
    assert calls(model) == (3, 0)
    for m in (model, plain):  # a container grows: the owner no longer knows what it holds
        m.features.append(nn.AvgPool2d(1))
    assert_same(model, plain, h)
    with dlkern.no_fallback(), pytest.raises(RuntimeError, match="children of features changed"):
        model(h)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_residual_of_another_dtype_or_shape(h: torch.Tensor, in_place: bool) -> None:
    model, plain = models.pair(models.PromotesResidual(in_place))
    dlkern.swap(model)
    for residual in (h.double(), h[:1], h[:, :1], torch.tensor(2.0)):
        ours, theirs = model(h, residual), plain(h, residual)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert calls(model) == (0, 4)
    with dlkern.no_fallback(), pytest.raises(RuntimeError, match="bn cannot take this input"):
        model(h, h[:1])
    assert_same(model, plain, h, h)
    assert calls(model)[0] == 1


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_residual_unlike_the_output_of_a_convolution_that_is_taken_too(
    h: torch.Tensor, in_place: bool, frozen: bool
) -> None:
    model, plain = (m.eval() for m in models.pair(models.PromotesResidual(in_place)))
    dlkern.freeze(model) if frozen else dlkern.swap(model)
    residuals = (h[:1], h[:, :1], h.mean((2, 3), keepdim=True), h.double(), torch.tensor(2.0))
    with torch.no_grad(), dlkern.backend(conv_bn_act="reference"):
        for residual in residuals:
            ours, theirs = model(h, residual), plain(h, residual)
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs)
        assert calls(model) == (0, len(residuals))
        torch.testing.assert_close(model(h, h), plain(h, h))
        assert calls(model) == (1, len(residuals))


@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_the_size_of_a_residual_is_the_convolutions(h: torch.Tensor, padding: int | str) -> None:
    block = models.PromotesResidual(False)
    block.conv = nn.Conv2d(8, 8, (3, 2), padding=padding, dilation=(1, 2))
    model, plain = (m.eval() for m in models.pair(block))
    dlkern.freeze(model)
    with torch.no_grad():
        y = plain.conv(h)
        torch.testing.assert_close(model(h, y), plain(h, y))
        assert calls(model) == (1, 0)
        torch.testing.assert_close(model(h, y[..., :1]), plain(h, y[..., :1]))
        assert calls(model) == (1, 1)


@pytest.mark.parametrize("where", ["bn", "relu", "bn backward", "instance forward", "global"])
def test_hooks_on_bypassed_modules_run(h: torch.Tensor, where: str) -> None:
    model = dlkern.swap(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()))
    seen: list[str] = []
    handle = None
    if where == "bn":
        handle = model[1].register_forward_hook(lambda *_: seen.append("bn"))
    elif where == "relu":
        handle = model[2].register_forward_pre_hook(lambda *_: seen.append("relu"))
    elif where == "bn backward":
        handle = model[1].register_full_backward_hook(lambda *_: seen.append("bn"))
    elif where == "instance forward":
        model[2].forward = lambda t: (seen.append("forward"), torch.relu(t))[1]
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append("any"))
    try:
        model(h).sum().backward()
    finally:
        if handle is not None:
            handle.remove()
    assert seen
    assert calls(model) == (0, 1)
    model[2].__dict__.pop("forward", None)
    model(h)
    assert calls(model) == (1, 1)


def test_pruning_and_weight_norm_on_the_norm_fall_back(h: torch.Tensor) -> None:
    from torch.nn.utils import prune

    model, plain = models.pair(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()))
    dlkern.swap(model)
    for m in (model, plain):
        prune.random_unstructured(m[0], "weight", amount=0.5) if m is model else None
        prune.l1_unstructured(m[1], "weight", amount=0.5)
    plain[0].weight = nn.Parameter(model[0].weight.detach().clone())
    torch.testing.assert_close(model(h), plain(h))
    assert calls(model) == (0, 1)


def test_layers_replaced_after_the_swap(h: torch.Tensor) -> None:
    x = torch.randn(4, 3, 10, 10)
    for replace in (_to_sync_batch_norm, _to_group_norm, _fold):
        model, plain = models.pair(models.Stack().eval())
        dlkern.swap(model)
        model, plain = replace(model), replace(plain)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
        fused, fallback = calls(model)
        assert fused < 6
        assert fallback > 0


def _to_sync_batch_norm(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _to_group_norm(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(2, child.num_features))
    return model


def _fold(model: nn.Module) -> nn.Module:
    block = model[1]
    block.conv1 = torch.nn.utils.fuse_conv_bn_eval(block.conv1, block.bn1)
    block.bn1 = nn.Identity()
    return model


def test_quantization_aware_training_after_the_swap(h: torch.Tensor) -> None:
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    model, plain = models.pair(models.Stack().train())
    dlkern.swap(model)
    x = torch.randn(4, 3, 10, 10)
    outputs = []
    for m in (model, plain):
        m.qconfig = get_default_qat_qconfig("x86")
        outputs.append(prepare_qat(m)(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


def test_an_activations_slope_changed_after_the_swap(h: torch.Tensor) -> None:
    model, plain = models.pair(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1)))
    dlkern.swap(model)
    assert_same(model, plain, h)
    for m in (model, plain):
        m[2].negative_slope = 0.5
    assert_same(model, plain, h)
    assert calls(model) == (1, 1)


def test_an_in_place_op_after_a_fused_relu_fails_as_it_does_in_pytorch(h: torch.Tensor) -> None:
    class Twice(models.ConvBN):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.relu(self.bn(self.conv(x)) + x)
            y += 1
            return y

    model, plain = models.pair(Twice())
    dlkern.swap(model)
    assert len(dlkern.report(model).swapped) == 1
    for m in (model, plain):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            m(h).sum().backward()


def test_a_module_that_cannot_be_traced_must_return_a_tensor(h: torch.Tensor) -> None:
    model, plain = models.pair(models.UsesOptional(answer=True))
    dlkern.swap(model)
    assert_same(model, plain, h)
    assert calls(model) == (1, 0)
    model.inner.answer = False
    with pytest.raises(RuntimeError, match="inner returned a NoneType where the swapped forward"):
        model(h)


def test_an_owner_whose_default_changed_class_or_mode(h: torch.Tensor) -> None:
    model, plain = models.pair(models.AcrossContainers())
    dlkern.swap(model)
    for m in (model, plain):
        m.features.training = False  # an inlined container in another mode than its owner
    assert_same(model, plain, h)
    with dlkern.no_fallback(), pytest.raises(RuntimeError, match=r"features\.training differs"):
        model(h)


def test_pickling_a_model_whose_child_is_swapped_too() -> None:
    model = dlkern.swap(models.AcrossContainers())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert len(dlkern.report(twin).swapped) == 3


def test_a_frozen_batch_is_not_counted(h: torch.Tensor) -> None:
    """num_batches_tracked and the cumulative average, as in PyTorch."""
    model, plain = models.pair(nn.Sequential(nn.BatchNorm2d(8, momentum=None), nn.ReLU()))
    dlkern.swap(model)
    for _ in range(3):
        assert_same(model, plain, h + torch.randn(1))
    assert int(model[0].num_batches_tracked) == 3
    assert calls(model) == (3, 0)


def test_two_threads_may_swap_and_run(h: torch.Tensor) -> None:
    import threading

    swapped = [models.Stack() for _ in range(4)]
    errors: list[BaseException] = []

    def work(model: nn.Module) -> None:
        try:
            dlkern.swap(model)
            model(torch.randn(2, 3, 8, 8))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(m,)) for m in swapped]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    assert [calls(m) for m in swapped] == [(6, 0)] * 4


def test_a_residual_that_another_module_made(h: torch.Tensor) -> None:
    model, plain = models.pair(models.GatedBlock())
    dlkern.swap(model)
    assert [row.path for row in dlkern.report(model).swapped] == ["bn1", "bn2", "shortcut.1", "gate.conv"]
    with dlkern.no_fallback():
        assert_same(model, plain, h)


def test_a_convolution_output_that_somebody_keeps_is_not_overwritten(h: torch.Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    plain = copy.deepcopy(model)
    dlkern.swap(model)
    kept: list[torch.Tensor] = []
    with torch.inference_mode():
        want, c = plain(h), plain[0](h)
        handle = model[0].register_forward_hook(lambda *found: kept.append(found[2]))
        torch.testing.assert_close(model(h), want, rtol=2e-5, atol=2e-5)
        handle.remove()
        assert torch.equal(kept[0], c)
        torch.testing.assert_close(model(h), want, rtol=2e-5, atol=2e-5)
        assert torch.equal(kept[0], c)
    assert dlkern.report(model).calls.fused == 2
