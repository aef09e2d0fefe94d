"""Which implementation runs: forcing, its scope, and the reasons given."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from batch_norm_act_cases import spied

import dlkern
from dlkern import dispatch
from dlkern.functional import batch_norm_act
from dlkern.kernels.reference.batch_norm_act import Request

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
REQUEST = Request("cpu", torch.float32, torch.float32, False, True, False, "relu")


def _ran() -> list[str]:
    with spied() as calls:
        batch_norm_act(X, None, None, training=True)
    return [name for name, _ in calls]


@pytest.fixture(autouse=True)
def _nothing_forced_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLKERN_BACKEND", raising=False)


def test_every_backend_says_whether_it_can_run() -> None:
    found = dlkern.available_backends()
    assert tuple(found) == dispatch.BACKENDS
    assert found["torch"] is None
    assert found["reference"] is None
    assert found["cpu"] is None, found["cpu"]  # the extension is part of what is tested
    for reason in found.values():
        assert reason is None or len(reason) > 10


def test_the_default_on_the_cpu_is_our_kernel_and_on_cuda_pytorch() -> None:
    assert _ran() == ["cpu"]
    assert dispatch.choose("batch_norm_act", REQUEST).backend == "cpu"
    assert dispatch.choose("batch_norm_act", REQUEST._replace(device="cuda")).backend == "torch"


def test_forcing_nests_and_ends() -> None:
    with dlkern.backend("reference"):
        assert _ran() == ["reference"]
        with dlkern.backend(batch_norm_act="torch"):
            assert _ran() == []
        with dlkern.backend("torch"):
            assert _ran() == []
        assert _ran() == ["reference"]
    assert _ran() == ["cpu"]


def test_forcing_ends_with_an_error() -> None:
    with pytest.raises(KeyError), dlkern.backend("reference"):
        raise KeyError
    assert dispatch.forced("batch_norm_act") is None


def test_an_inner_block_for_every_op_beats_an_outer_one_for_this_op() -> None:
    with dlkern.backend(batch_norm_act="reference"), dlkern.backend("torch"):
        assert dispatch.forced("batch_norm_act") == "torch"


def test_forcing_reaches_worker_threads() -> None:
    """As torch.backends' flags do: torch.nn.DataParallel's replicas run in threads of their own."""
    seen: list[str | None] = []
    with dlkern.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced("batch_norm_act")))
        thread.start()
        thread.join()
    assert seen == ["reference"]
    assert dispatch.forced("batch_norm_act") is None


def test_the_choice_of_forward_holds_in_backward() -> None:
    x = X.clone().requires_grad_()
    with spied() as calls:
        with dlkern.backend("reference"):
            y = batch_norm_act(x, None, None, training=True)
        with dlkern.backend("torch"):
            y.sum().backward()
    assert calls == [("reference", "forward"), ("reference", "backward")]


def test_torch_chosen_is_torch_alone() -> None:
    x = X.clone().requires_grad_()
    with dlkern.backend("torch"):
        y = batch_norm_act(x, None, None, training=True)
    assert type(y.grad_fn).__name__ == "ReluBackward0"


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLKERN_BACKEND", "reference")
    assert _ran() == ["reference"]
    monkeypatch.setenv("DLKERN_BACKEND", "batch_norm_act=torch")
    assert _ran() == []
    with dlkern.backend("reference"):  # a block wins over the environment
        assert _ran() == ["reference"]


@pytest.mark.parametrize("value", ["tritton", "batch_norm_act=tritton", "no_such_op=cpu", "conv_bn_act=numba"])
def test_a_wrong_environment_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLKERN_BACKEND", value)
    with pytest.raises(ValueError, match=f"DLKERN_BACKEND='{value}'"):
        _ran()


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        ((), {}, ValueError, "needs a backend"),
        (("cudnn",), {}, ValueError, "'cudnn'.*torch, reference, cpu, triton"),
        ((), {"batch_norm_act": "cudnn"}, ValueError, "'cudnn'.*torch, reference, cpu, triton"),
        ((), {"convolution": "cpu"}, ValueError, "'convolution'.*batch_norm_act"),
        ((), {"conv_bn_act": "numba"}, ValueError, "conv_bn_act has no 'numba'.*it has torch, reference"),
    ],
)
def test_a_wrong_name_is_an_error(args: tuple, kwargs: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words), dlkern.backend(*args, **kwargs):
        pass


def test_an_unavailable_backend_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "unavailable", lambda name: "no such machine" if name == "cuda" else None)
    with pytest.raises(RuntimeError, match=r"'cuda' is not available.*no such machine"), dlkern.backend("cuda"):
        pass


def test_a_forced_backend_that_cannot_is_an_error_and_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = dispatch.implementation("batch_norm_act", "reference")
    monkeypatch.setattr(reference, "supports", lambda request: f"activation {request.activation} is too much for it")
    monkeypatch.setattr(dispatch, "_choices", {})
    mean, var = torch.zeros(3), torch.ones(3)
    with (
        dlkern.backend("reference"),
        pytest.raises(RuntimeError, match=r"'reference' was forced for batch_norm_act.*relu is too much for it"),
    ):
        batch_norm_act(X, mean, var, training=True)
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))


def test_cpu_kernels_refuse_other_devices() -> None:
    with dlkern.backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was forced"):
        dispatch.choose("batch_norm_act", REQUEST._replace(device="cuda"))


def test_a_default_order_passes_over_what_cannot_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = dispatch.implementation("batch_norm_act", "cpu")
    monkeypatch.setattr(cpu, "supports", lambda request: "not on a Tuesday")
    monkeypatch.setattr(dispatch, "_choices", {})
    choice = dispatch.choose("batch_norm_act", REQUEST)
    assert choice.backend == "torch"
    assert "not cpu: not on a Tuesday" in choice.reason


def test_triton_without_interpreter_and_gpu_says_so() -> None:
    """In a fresh process, because the switch is read when triton is imported."""
    code = "import dlkern; print(dlkern.available_backends()['triton'])"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "TRITON_INTERPRET=1" in out.stdout
