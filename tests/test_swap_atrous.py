"""Swapping of ASPP blocks and transposed convolutions: what is found, what runs, whole models verified."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batch_norm_act_cases import spied
from torch import Tensor, nn

import dlkern
from dlkern._swap import atrous
from dlkern.bench import segmentation

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")


def _aspp(separable: bool = False) -> nn.Module:
    torch.manual_seed(0)
    if separable:
        return segmentation.ASPP(6, (2, 3, 20), 4)
    return torchvision.models.segmentation.deeplabv3.ASPP(6, (2, 3, 20), 4)


def _same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Outputs, gradients and statistics."""
    found = []
    for m in (ours, theirs):
        torch.manual_seed(1)
        t = x.clone().requires_grad_()
        y = m(t)
        found.append([y, *torch.autograd.grad(y.square().sum(), [t, *m.parameters()]), *m.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_block(separable: bool, training: bool) -> None:
    plain = _aspp(separable).train(training)
    model = dlkern.swap(copy.deepcopy(plain))
    rows = {row.path: row for row in dlkern.report(model).swapped}
    assert (rows[""].kind, rows[""].label) == ("atrous", "aspp")
    assert Counter(row.label.split("+")[-1] for row in rows.values())["relu"] == 6  # the sites inside stay sites
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(3, 6, 9, 8)
    with dlkern.no_fallback():
        _same(model, plain, x)
    assert dlkern.report(model).calls == dlkern._swap.Calls(fused=1, fallback=0)
    with torch.no_grad(), dlkern.no_fallback():
        torch.manual_seed(1)
        ours = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(ours, plain(x), rtol=1e-4, atol=1e-4)
    dlkern.unswap(model)
    assert type(model) is type(plain)


def test_copies_and_pickles_stay_fused() -> None:
    model = dlkern.swap(_aspp()).eval()
    x = torch.randn(2, 6, 7, 7)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(again(x), model(x))
        assert dlkern.report(again).calls.fused == 1


@pytest.mark.parametrize("where", ["", "convs.1", "convs.1.0", "convs.4", "convs.4.0", "project", "project.2"])
def test_hooks_run(where: str) -> None:
    """The block's own forward runs where a hook wants to see a child; what is inside is fused as far as it goes."""
    plain = _aspp()
    model = dlkern.swap(copy.deepcopy(plain))
    seen: list[str] = []
    for m in (model, plain):
        m.get_submodule(where).register_forward_hook(lambda *_: seen.append(where))
    _same(model, plain, torch.randn(3, 6, 7, 8))
    assert len(seen) == 2
    calls = dlkern.report(model).calls
    assert (calls.fallback > 0) == bool(where)


def test_a_hook_forbidden_to_fall_back() -> None:
    model = dlkern.swap(_aspp())
    model.convs[1][0].register_forward_hook(lambda *_: None)
    with dlkern.no_fallback(), pytest.raises(RuntimeError, match="a Conv2d of it has hooks"):
        model(torch.randn(2, 6, 7, 7))


def test_changes_after_the_swap() -> None:
    """Another norm, activation or rate, and a frozen branch: what the modules say at the call."""
    x = torch.randn(3, 6, 9, 8)

    def sync(m: Any) -> None:
        m.convs[2][1] = nn.GroupNorm(2, 4)

    def activation(m: Any) -> None:
        m.convs[1][2] = nn.SiLU()

    def rate(m: Any) -> None:
        m.convs[3][0].dilation = m.convs[3][0].padding = (4, 4)

    def shrinks(m: Any) -> None:
        m.project[0].stride = (2, 2)

    def frozen(m: Any) -> None:
        m.convs[0].eval()

    def cumulative(m: Any) -> None:
        m.project[1].momentum = None

    for change in (sync, activation, rate, shrinks, frozen, cumulative):
        plain = _aspp()
        model = dlkern.swap(copy.deepcopy(plain))
        change(model), change(plain)
        _same(model, plain, x)


def test_refused_calls_are_refused_as_by_torch() -> None:
    model, plain = dlkern.swap(_aspp()), _aspp()
    for x in (torch.randn(1, 6, 5, 5), torch.randn(2, 5, 5, 5), torch.randn(2, 6, 5, 5).double()):
        with pytest.raises((RuntimeError, ValueError)) as ours:
            model(x)
        with pytest.raises(type(ours.value)) as theirs:
            plain(x)
        assert str(ours.value) == str(theirs.value)


def test_filter() -> None:
    model = _aspp()
    dlkern.swap(model, filter_fn=lambda m, path: not hasattr(m, "convs"))
    report = dlkern.report(model)
    assert len(report.swapped) == 6
    assert {row.path: (row.kind, row.reason) for row in report.skipped}[""] == ("atrous", "left out by filter_fn")
    dlkern.swap(model, filter_fn=lambda m, path: path != "convs.2.1")
    assert "atrous" not in {row.kind for row in dlkern.report(model).swapped}


class _Other(nn.Module):
    """As many children, another forward."""

    def __init__(self) -> None:
        super().__init__()
        block = _aspp()
        self.convs, self.project = block.convs, block.project

    def forward(self, x: Tensor) -> Tensor:
        res = []
        for conv in self.convs:
            res.append(conv(x) * 2)
        res = torch.cat(res, dim=1)
        return self.project(res)


def test_only_the_same_code_is_a_block() -> None:
    assert atrous.is_block(_aspp())
    assert atrous.is_block(_aspp(True))
    assert not atrous.is_block(_Other())
    plain = _Other()
    _same(dlkern.swap(copy.deepcopy(plain)), plain, torch.randn(3, 6, 7, 8))
    strange = _aspp()
    strange.convs[4].forward = strange.convs[4].forward  # on the instance
    assert dlkern.report(dlkern.swap(strange)).skipped


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_frozen(backend: str) -> None:
    for plain in (_aspp().eval(), segmentation.tiny().eval()):
        for m in plain.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(), m.running_var.uniform_(0.5, 1.5)
        model = dlkern.freeze(copy.deepcopy(plain))
        x = torch.randn(2, 6 if hasattr(plain, "convs") else 3, 33, 33)
        with torch.no_grad(), dlkern.no_fallback(), dlkern.backend(atrous=backend):
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------- transposed convolutions
def _generator(width: int = 8) -> nn.Module:
    """DCGAN's, of images of 16 x 16."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels, out, stride, padding in ((12, 4 * width, 1, 0), (4 * width, 2 * width, 2, 1)):
        conv = nn.ConvTranspose2d(channels, out, 4, stride, padding, bias=False)
        layers += [conv, nn.BatchNorm2d(out), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(2 * width, 3, 4, 2, 1, bias=False), nn.Tanh())


def _discriminator(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    second = [nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width)]
    return nn.Sequential(*first, *second, nn.LeakyReLU(0.2, True), nn.Conv2d(2 * width, 1, 4), nn.Sigmoid())


class Autoencoder(nn.Module):
    """Functional activations, output_padding, groups, a transposed convolution without a norm's activation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 6, 3, 2, 1, 1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.out, self.out_norm = nn.ConvTranspose2d(6, 3, 3, dilation=2, padding=2), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.up(F.relu(self.down(x)))))
        return self.out_norm(self.out(h)) + x


MODELS: dict[str, tuple[Any, tuple[int, ...], dict[str, int]]] = {
    "dcgan_generator": (_generator, (8, 12, 1, 1), {"transposed+bn+relu": 2, "transposed+tanh": 1}),
    "dcgan_discriminator": (
        _discriminator, (8, 3, 16, 16), {"conv+leaky_relu": 1, "conv+bn+leaky_relu": 1, "conv+sigmoid": 1}
    ),
    "autoencoder": (Autoencoder, (4, 3, 12, 12), {"conv+relu": 1, "transposed+bn+relu": 1, "transposed+bn": 1}),
    "deeplabv3plus": (segmentation.tiny, (2, 3, 65, 65), {"aspp": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    """Found, trained, run and folded, with the numbers of the plain model."""
    make, shape, labels = MODELS[name]
    torch.manual_seed(0)
    plain = make()
    model = dlkern.swap(copy.deepcopy(plain))
    found = Counter(row.label for row in dlkern.report(model).swapped)
    assert labels.items() <= found.items(), found
    if name != "deeplabv3plus":
        assert found == labels
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        plain.train(training), model.train(training)
        with dlkern.no_fallback():
            # a sum over pixels before a product and after it are equally near to float64, and not to each other
            verified = dlkern.verify(plain, model, x, variants=("memory_format", "threads", "ulp", "float64"))
        assert verified.ok, f"training={training}\n{verified}"
    with dlkern.no_fallback(), dlkern.backend(transposed="cpu"), spied() as calls, torch.no_grad():
        verified = dlkern.verify(plain, model, x, backward=False)  # each batch norm folded into its convolution
    assert verified.ok, str(verified)
    transposed = sum(n for label, n in labels.items() if label.startswith("transposed"))
    assert calls.count(("cpu", "forward")) >= transposed
    frozen = dlkern.freeze(copy.deepcopy(plain).eval())
    with torch.no_grad(), dlkern.no_fallback():
        torch.testing.assert_close(frozen(x), plain.eval()(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="frozen"):
        frozen.train()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_forced_backend_takes_the_convolution_in_training_too(backend: str) -> None:
    plain = _generator()
    model = dlkern.swap(copy.deepcopy(plain))
    x = torch.randn(4, 12, 1, 1)
    with dlkern.backend(transposed=backend), spied() as calls:
        _same(model, plain, x)
    assert calls.count((backend, "forward")) >= 3
    assert calls.count((backend, "backward")) >= 3


def test_a_transposed_convolution_with_hooks_or_output_size_is_called() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.ConvTranspose2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.conv(x, output_size=[8, 8])))

    plain = Sized().eval()
    model = dlkern.swap(copy.deepcopy(plain))
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
    assert model(x).shape == (2, 4, 8, 8)
    generator = dlkern.swap(_generator()).eval()
    seen: list[int] = []
    generator[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        generator(torch.randn(2, 12, 1, 1))
    assert seen == [1]


def test_segmentation_models_pytorch() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed")
    torch.manual_seed(0)
    plain = smp.DeepLabV3Plus("resnet18", encoder_weights=None)
    model = dlkern.swap(copy.deepcopy(plain))
    assert Counter(row.label for row in dlkern.report(model).swapped)["aspp"] == 1
    x = torch.randn(2, 3, 64, 64)
    for training in (True, False):
        plain.train(training), model.train(training)
        with dlkern.no_fallback():
            verified = dlkern.verify(plain, model, x, variants=("memory_format", "ulp"))
        assert verified.ok, f"training={training}\n{verified}"
