"""verify: the whole-model rule, and that it can fail."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import swap_models as models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkern


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_a_swapped_model_is_ok_and_nothing_is_left_behind(x: torch.Tensor) -> None:
    plain = models.Stack()
    plain[1].bn1.eval()
    model = dlkern.swap(copy.deepcopy(plain))
    x.requires_grad_()
    for m in (plain, model):
        m(x).sum().backward()
    kept = [
        ([p.grad.clone() for p in m.parameters()], copy.deepcopy(m.state_dict()), [k.training for k in m.modules()])
        for m in (plain, model)
    ]
    threads, rng = torch.get_num_threads(), torch.get_rng_state()
    report = dlkern.verify(plain, model, x)
    assert report.ok, report
    assert {row.kind for row in report.rows} == {"output", "gradient", "buffer"}
    gradients = [row.name for row in report.rows if row.kind == "gradient"]
    assert gradients == [*(n for n, _ in plain.named_parameters()), "input[0][0]"]
    assert report.variants[0] == "memory format"
    assert "ok:" in str(report)
    assert torch.equal(rng, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    for m, (grads, state, modes) in zip((plain, model), kept, strict=True):
        assert all(torch.equal(p.grad, g) for p, g in zip(m.parameters(), grads, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), state.values(), strict=True))
        assert [k.training for k in m.modules()] == modes
    assert not any(row.kind == "gradient" for row in dlkern.verify(plain, model, x, backward=False).rows)


@pytest.mark.parametrize("wrong", ["eps", "momentum", "slope", "weight"])
def test_a_wrong_model_is_not_ok(x: torch.Tensor, wrong: str) -> None:
    plain = models.Stack()
    model = copy.deepcopy(plain)
    if wrong == "eps":
        model[1].bn2.eps = 1e-3
    elif wrong == "momentum":
        model[2].bn1.momentum = 0.1001
    elif wrong == "slope":
        model[1].relu = nn.LeakyReLU(1e-3)
    else:
        with torch.no_grad():
            model[2].conv2.weight.mul_(1 + 1e-4)
    report = dlkern.verify(plain, model, x)
    assert not report.ok
    assert report.failed
    assert "NOT ok" in str(report)
    assert "!!" in str(report)
    if wrong == "momentum":
        assert {row.name for row in report.failed} == {"2.bn1.running_mean", "2.bn1.running_var"}


def test_a_nan_is_not_ok(x: torch.Tensor) -> None:
    class Poisoned(models.Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * torch.tensor([float("nan")] + [1.0] * 7)

    plain, model = models.Stack(), Poisoned()
    model.load_state_dict(plain.state_dict())
    assert not dlkern.verify(plain, model, x).ok


@dataclasses.dataclass
class Output:
    logits: Tensor
    note: str = "same"


class Returns(models.Stack):
    """Returns a dataclass; what is wrong with it is set from outside."""

    scale, note, write, cut = 1.0, "same", False, False

    def forward(self, x: Tensor) -> Output:
        if self.write:
            x.add_(1)
        return Output(super().forward(x.detach() if self.cut else x) * self.scale, self.note)


@pytest.mark.parametrize("wrong", [{}, {"scale": 100.0}, {"note": "other"}, {"cut": True}], ids=str)
def test_what_is_compared(x: Tensor, wrong: dict[str, object]) -> None:
    plain = Returns()
    model = copy.deepcopy(plain)
    model.__dict__.update(wrong)
    assert dlkern.verify(plain, model, x.requires_grad_()).ok is not bool(wrong)


def test_a_gradient_that_only_one_model_has(x: Tensor) -> None:
    plain = models.Stack()
    model = copy.deepcopy(plain)
    plain[1].conv1.forward = lambda h: F.conv2d(h, plain[1].conv1.weight.detach(), padding=1)
    report = dlkern.verify(plain, model, x)
    assert [row.name for row in report.failed if row.kind == "gradient"] == ["1.conv1.weight"]


def test_a_forward_that_writes_into_its_input(x: Tensor) -> None:
    plain = Returns()
    plain.write = True
    before = x.clone()
    assert dlkern.verify(plain, copy.deepcopy(plain), x).ok
    assert torch.equal(x, before)


def test_inputs_and_outputs_of_every_shape(x: torch.Tensor) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = models.Stack()

        def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, object]:
            y = self.body(x) * scale
            return {"logits": y, "aux": [y[0], (y * 2, None)]}

    plain = Many()
    model = dlkern.swap(copy.deepcopy(plain))
    report = dlkern.verify(plain, model, {"x": x, "scale": 2.0})
    assert report.ok, report
    assert sum(row.kind == "output" for row in report.rows) == 4  # and the None
    assert dlkern.verify(plain, model, (x, 3.0)).ok


def test_dropout_draws_the_same_numbers(x: torch.Tensor) -> None:
    plain = nn.Sequential(models.Stack(), nn.Dropout(0.5))
    assert dlkern.verify(plain, dlkern.swap(copy.deepcopy(plain)), x).ok


def test_bad_arguments(x: torch.Tensor) -> None:
    plain = models.Stack()
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        dlkern.verify(plain, 3, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected both in one mode, got training=True"):
        dlkern.verify(plain, copy.deepcopy(plain).eval(), x)
    with pytest.raises(ValueError, match="same parameters"):
        dlkern.verify(plain, models.ConvBN(), x)
    with pytest.raises(ValueError, match="got speed"):
        dlkern.verify(plain, plain, x, variants=("speed",))


def test_a_model_that_keeps_a_piece_of_its_graph() -> None:
    plain = models.CachesInEval().eval()
    model = copy.deepcopy(plain)
    assert dlkern.verify(plain, dlkern.swap(model), torch.randn(2, 8, 6, 6)).ok


class Summed(nn.Module):
    """A sum of many terms, one after the other or, ``exact``, in double."""

    def __init__(self, exact: bool) -> None:
        super().__init__()
        self.exact = exact
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.exact:
            return (x.double().sum(0) * self.scale).to(x.dtype)
        total = torch.zeros_like(x[0])
        for term in x:
            total = total + term
        return total * self.scale


@pytest.mark.parametrize(("factor", "ok"), [(1.0, True), (1.01, False)])
def test_pytorchs_own_error_counts_where_its_variants_share_it(factor: float, ok: bool) -> None:
    terms = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    model = Summed(exact=True)
    model.register_forward_hook(lambda module, args, output: output * factor)
    report = dlkern.verify(Summed(exact=False), model, terms, backward=False)
    assert report.variants[-1] == "float64"
    assert report.ok is ok
