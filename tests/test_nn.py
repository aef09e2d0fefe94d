"""dlkern.nn's layers against torch.nn's: arguments, state, modes, copies."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import parity
import pytest
import torch
from batch_norm_act_cases import every_target, spied
from torch import Tensor, nn

import dlkern
from dlkern import nn as dnn

PAIRS = [
    (dnn.BatchNormAct1d, nn.BatchNorm1d, (6, 5)),
    (dnn.BatchNormAct1d, nn.BatchNorm1d, (6, 5, 7)),
    (dnn.BatchNormAct2d, nn.BatchNorm2d, (3, 5, 6, 7)),
    (dnn.BatchNormAct3d, nn.BatchNorm3d, (2, 5, 3, 4, 5)),
]


def _x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _same_state(mine: nn.Module, theirs: nn.Module) -> None:
    a, b = mine.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        if a[name].dtype == torch.int64:
            assert torch.equal(a[name], b[name]), name
        else:
            parity.assert_parity(name, a[name], b[name].double(), b[name].double().abs() + 1, peer=None)


@every_target
@pytest.mark.parametrize(("layer", "stock", "shape"), PAIRS, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.3, "eps": 1e-2}],
    ids=str,
)
def test_steps_as_in_torch(
    options: dict, layer: type[nn.Module], stock: type[nn.Module], shape: tuple[int, ...], target: tuple[str, str]
) -> None:
    """Three training batches, then one in eval: outputs, and the whole state."""
    device, backend = target
    mine, theirs = layer(5, activation="relu", **options).to(device), stock(5, **options).to(device)
    assert isinstance(mine, stock)
    for step in range(4):
        if step == 3:
            mine.eval(), theirs.eval()
        x = _x(*shape, seed=step).to(device)
        residual = _x(*shape, seed=step + 10).to(device)
        with spied() as calls, dlkern.backend(backend):
            y = mine(x, residual)
        assert calls == [(backend, "forward")]
        z = theirs(x) + residual
        terms = z.abs().double() + x.abs().double() + 1
        parity.assert_parity(f"step {step}", y, torch.relu(z).double(), terms, peer=None)
        _same_state(mine, theirs)


def test_running_statistics_unused_in_training_stay() -> None:
    """track_running_stats switched off afterwards: buffers are there, and left alone in training."""
    mine, theirs = dnn.BatchNormAct2d(3), nn.BatchNorm2d(3)
    mine.track_running_stats = theirs.track_running_stats = False
    for layer in (mine, theirs):
        layer(_x(2, 3, 4, 4))
    _same_state(mine, theirs)
    assert torch.equal(mine.running_mean, torch.zeros(3))


def test_a_failed_call_counts_no_batch() -> None:
    layer = dnn.BatchNormAct2d(3)
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(_x(1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"\(4,\)|\(3,\)"):
        layer(_x(2, 4, 2, 2))
    assert int(layer.num_batches_tracked) == 0
    assert torch.equal(layer.running_mean, torch.zeros(3))


@pytest.mark.parametrize(("layer", "shape"), [(dnn.BatchNormAct1d, (2, 3, 4, 4)), (dnn.BatchNormAct2d, (2, 3, 4)),
                                              (dnn.BatchNormAct3d, (2, 3, 4, 4))])  # fmt: skip
def test_wrong_rank(layer: type[nn.Module], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"got {len(shape)}D"):
        layer(3)(_x(*shape))


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"'swish'.*relu6"):
        dnn.BatchNormAct2d(3, activation="swish")
    with pytest.raises(ValueError, match=r"PReLU.*Hardswish"):
        dnn.BatchNormAct2d(3, activation=nn.PReLU())


@pytest.mark.parametrize(
    "module",
    [nn.Identity(), nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(0.2), nn.SiLU(), nn.GELU(),
     nn.GELU(approximate="tanh"), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh(), nn.ELU(0.7)],
    ids=repr,
)  # fmt: skip
def test_activation_modules(module: nn.Module) -> None:
    x = _x(3, 4, 5, 5)
    mine, theirs = dnn.BatchNormAct2d(4, activation=module), nn.BatchNorm2d(4)
    want = module(theirs(x)).double()
    parity.assert_parity(repr(module), mine(x), want, want.abs() + x.abs().double() + 1, peer=None)
    assert not any(name.startswith("activation") for name in mine.state_dict())


def test_state_dict_both_ways() -> None:
    mine, theirs = dnn.BatchNormAct2d(3), nn.BatchNorm2d(3)
    theirs(_x(2, 3, 4, 4) * 3 + 1)
    nn.init.normal_(theirs.weight)
    assert str(mine.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    mine(_x(2, 3, 4, 4))
    assert str(theirs.load_state_dict(mine.state_dict())) == "<All keys matched successfully>"
    for name, value in mine.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("activation", ["silu", nn.LeakyReLU(0.3)], ids=str)
def test_copies(activation: str | nn.Module, how: str) -> None:
    layer = dnn.BatchNormAct2d(3, activation=activation, momentum=None)
    layer(_x(2, 3, 4, 4))
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    x = _x(2, 3, 4, 4, seed=1)
    assert torch.equal(layer(x), other(x))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
        assert value.data_ptr() != other.state_dict()[name].data_ptr()


def test_repr_shows_the_activation() -> None:
    assert "activation='silu'" in repr(dnn.BatchNormAct2d(3, activation="silu"))
    assert "LeakyReLU(negative_slope=0.3)" in repr(dnn.BatchNormAct2d(3, activation=nn.LeakyReLU(0.3)))


@pytest.mark.parametrize("backend", ["reference", "cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    """A convolution's half output meets float32 parameters; statistics and gradients of parameters stay float32."""
    torch.manual_seed(0)
    conv, mine, theirs = nn.Conv2d(3, 8, 3), dnn.BatchNormAct2d(8, activation="relu"), nn.BatchNorm2d(8)
    x = _x(2, 3, 9, 9)
    with torch.autocast("cpu", dtype=dtype), dlkern.backend(backend):
        h = conv(x)
        y = mine(h)
        want = torch.relu(theirs(h))
    assert (h.dtype, y.dtype, want.dtype) == (dtype, dtype, dtype)
    y.float().sum().backward()
    assert mine.weight.grad is not None
    assert mine.weight.grad.dtype == torch.float32
    assert mine.running_var.dtype == torch.float32
    truth = torch.relu(nn.BatchNorm2d(8).double()(h.detach().double()))
    parity.assert_parity("y", y, truth, truth.abs() + 1, peer=want)


def test_backward_twice_needs_retain_graph() -> None:
    layer = dnn.BatchNormAct2d(3)
    loss = layer(_x(2, 3, 4, 4)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_an_input_changed_in_place_is_an_error_in_backward() -> None:
    layer, x = dnn.BatchNormAct2d(3), _x(2, 3, 4, 4)
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpoint() -> None:
    """Recomputed under the backend chosen at the time; the same gradients, statistics moved twice as in torch."""
    layer, x = dnn.BatchNormAct2d(3), _x(2, 3, 4, 4).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    (want,) = torch.autograd.grad(dnn.BatchNormAct2d(3)(x).square().sum(), x)
    assert torch.equal(got, want)
    assert int(layer.num_batches_tracked) == 2
