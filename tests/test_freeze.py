"""dlkern.freeze and unfreeze."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from unittest import mock

import pytest
import swap_models as models
import torch
from torch import nn

import dlkern
from dlkern.kernels.cpu import conv_bn_act as cpu


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def trained() -> nn.Module:
    """A model whose running statistics and parameters are not those of a new one."""
    torch.manual_seed(0)
    model = models.Stack()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
                m.weight.normal_(1, 0.3)
                m.bias.normal_()
    return model.eval()


def test_numbers_and_calls(x: torch.Tensor) -> None:
    plain = trained()
    model = copy.deepcopy(plain)
    assert dlkern.freeze(model) is model
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad(), dlkern.no_fallback(), mock.patch.object(cpu, "convolve", wraps=cpu.convolve) as convolve:
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
        assert convolve.call_count == 0  # convolutions this small are PyTorch's own, with the folded weights
        with dlkern.backend(conv_bn_act="cpu"):
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    assert convolve.call_count == 6
    verified = dlkern.verify(plain, model, x, backward=False)
    assert verified.ok, str(verified)


def test_gradients_of_the_input(x: torch.Tensor) -> None:
    plain = trained()
    model = dlkern.freeze(copy.deepcopy(plain))
    gradients = []
    for m in (model, plain):
        leaf = x.clone().requires_grad_()
        m(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    assert all(p.grad is None for name, p in model.named_parameters() if "conv" in name or "bn" in name)


def test_unfreeze_restores(x: torch.Tensor) -> None:
    model = dlkern.swap(trained())
    before = {path: dict(m.__dict__) for path, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    buffers = [name for name, _ in model.named_buffers()]
    out = model(x)
    dlkern.freeze(model)
    dlkern.unfreeze(model)
    assert [name for name, _ in model.named_buffers()] == buffers
    for path, m in model.named_modules():
        assert m.__dict__.keys() == before[path].keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), out)
    model.train()
    model(x).sum().backward()
    model.load_state_dict(state)


def test_refusals(x: torch.Tensor) -> None:
    model = trained()
    model[1].bn1.train()
    with pytest.raises(RuntimeError, match=r"expected a model in eval mode, but 1\.bn1 is in training mode"):
        dlkern.freeze(model)
    with pytest.raises(RuntimeError, match="no batch norm behind a convolution"):
        dlkern.freeze(nn.Sequential(nn.Linear(2, 2)).eval())
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
        dlkern.freeze([])
    model = trained()
    with pytest.raises(RuntimeError, match="not frozen"):
        dlkern.unfreeze(model)
    dlkern.freeze(model)
    for call in (model.train, model[1].train, model[1].bn1.train, lambda: dlkern.freeze(model),
                 lambda: dlkern.swap(model), lambda: dlkern.unswap(model),
                 lambda: model.load_state_dict(model.state_dict()),
                 lambda: model[1].load_state_dict(model[1].state_dict())):  # fmt: skip
        with pytest.raises(RuntimeError, match="frozen"):
            call()
    assert not any(m.training for m in model.modules())
    assert model.eval() is model
    model[1].bn1.training = True  # behind train()'s back
    with pytest.raises(RuntimeError, match="frozen batch norm is in training mode"), torch.no_grad():
        model(x)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_are_frozen_too(x: torch.Tensor, how: str) -> None:
    plain = trained()
    model = dlkern.freeze(copy.deepcopy(plain))
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with pytest.raises(RuntimeError, match="frozen"):
        other.train()
    spy = mock.patch.object(cpu, "convolve", wraps=cpu.convolve)
    with torch.no_grad(), dlkern.backend(conv_bn_act="cpu"), spy as convolve:
        torch.testing.assert_close(other(x), plain(x), rtol=1e-4, atol=1e-4)
    assert convolve.call_count == 6
    dlkern.unfreeze(other).train()
    assert other.training
    assert not model.training
    assert not any(m.training for m in model.modules())


def test_weights_in_an_order_of_onednn(x: torch.Tensor) -> None:
    """In channels_last the folded weight is arranged once, and let go with the model."""
    plain = trained().to(memory_format=torch.channels_last)
    model = dlkern.freeze(copy.deepcopy(plain))
    x = x.contiguous(memory_format=torch.channels_last)
    before = len(cpu._arranged)
    with torch.no_grad(), dlkern.backend(conv_bn_act="cpu"):
        for size in (16, 11):  # arranged for the first size, used for any
            ours, theirs = model(x[..., :size]), plain(x[..., :size])
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            assert ours.stride() == theirs.stride()
    assert len(cpu._arranged) == before + 6
    dlkern.unfreeze(model)
    gc.collect()
    assert len(cpu._arranged) == before


def test_follows_dtype_and_memory_format(x: torch.Tensor) -> None:
    plain = trained()
    model = dlkern.freeze(copy.deepcopy(plain)).double().to(memory_format=torch.channels_last)
    with torch.no_grad():
        ours = model(x.double().contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(ours, plain.double()(x.double()), rtol=1e-5, atol=1e-5)


def test_autocast_runs_the_unfolded_modules(x: torch.Tensor) -> None:
    plain = trained()
    model = dlkern.freeze(copy.deepcopy(plain))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), plain(x), rtol=5e-2, atol=5e-2)


def test_layer() -> None:
    torch.manual_seed(0)
    layer = dlkern.nn.ConvBNAct2d(3, 4).eval()
    layer.bn.running_mean.normal_()
    x, residual = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        before = layer(x, residual)
        dlkern.freeze(layer)
        layer.bn.running_mean.zero_()  # not looked at any more
        torch.testing.assert_close(layer(x, residual), before, rtol=1e-5, atol=1e-5)


def test_synchronised_norms_fold_too(x: torch.Tensor) -> None:
    plain = trained()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)).eval()
    dlkern.freeze(model)
    with torch.no_grad(), dlkern.no_fallback():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    assert {row.label.split("+")[0] for row in dlkern.report(model).swapped} == {"conv"}
