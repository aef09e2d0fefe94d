"""The cuda backend's launchers: when they run, what they launch, and how a tensor is walked. None needs a GPU."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import types
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import HAS_CUDA
from hypothesis import given
from hypothesis import strategies as st
from test_cuda_build import ALL_KERNELS, DTYPES, KERNELS, ROOT, extension

import dlkern
from dlkern.kernels import cuda
from dlkern.kernels.activation import Activation
from dlkern.kernels.cuda import batch_norm_act, batch_norm_act_plan, nvrtc, plan
from dlkern.kernels.layout import Layout
from dlkern.kernels.reference.batch_norm_act import Request


# ------------------------------------------------------------------------------------------ availability
def _request(**changes: Any) -> Request:
    wanted = Request("cuda", torch.float32, torch.float32, False, True, False, "relu")
    return wanted._replace(**changes)


def test_supports_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "takes tensors on CUDA devices, not on 'cpu'" in (batch_norm_act.supports(_request(device="cpu")) or "")
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "8.0 or later, this device has 7.5" in (batch_norm_act.supports(_request()) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert batch_norm_act.supports(_request()) is None
    assert "no kernels for torch.int32" in (batch_norm_act.supports(_request(dtype=torch.int32)) or "")
    assert "no activation 'softmax'" in (batch_norm_act.supports(_request(activation="softmax")) or "")


def test_unavailable_names_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    unavailable = cuda._unavailable.__wrapped__
    if not HAS_CUDA:
        assert unavailable() == "no CUDA device (torch.cuda.is_available() is False)"
        with (
            pytest.raises(RuntimeError, match="backend 'cuda' is not available: no CUDA device"),
            dlkern.backend("cuda"),
        ):
            pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda, "_built_problem", lambda: "dlkern._C was built without CUDA kernels")
    monkeypatch.setattr(cuda, "_cupy_problem", lambda: None)
    assert unavailable() is None
    monkeypatch.setattr(cuda, "_cupy_problem", lambda: "cupy is not installed")
    reason = unavailable()
    assert "built without CUDA kernels, and cupy is not installed" in reason
    assert re.search(r"nvcc .* on the path, or pip install 'dlkern\[cuda1[23]\]'", reason)
    monkeypatch.setattr(cuda, "_built_problem", lambda: None)
    assert unavailable() is None


def test_a_machine_without_cuda_is_left_alone() -> None:
    program = (
        "import json, sys, dlkern; early = [n for n in ('cupy', 'cuda', 'dlkern._C') if n in sys.modules]; "
        "backends = dlkern.available_backends(); late = [n for n in ('cupy',) if n in sys.modules]; "
        "print(json.dumps([early, late, backends['cuda'], backends['torch']]))"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    early, late, reason, torch_reason = json.loads(done.stdout)
    assert (early, late, torch_reason) == ([], [], None)
    assert "no CUDA device" in reason


# ---------------------------------------------------------------------------------------------- launches
@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda's state as a launcher sees it, without a device."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=77))


def _launches() -> list[plan.Launch]:
    """A training forward's, on CPU tensors that nothing reads."""
    x, vector = torch.empty(64, 16), torch.empty(16)
    kept: list[plan.Launch] = []
    keeper = types.SimpleNamespace(multiprocessors=lambda device: 2, run=lambda launches, device: kept.extend(launches))
    with mock.patch.object(cuda, "forced", keeper):
        batch_norm_act.forward(
            x, vector, vector, None, vector, vector,
            batch_stats=True, momentum=0.1, eps=1e-5, activation=Activation("relu"),
        )  # fmt: skip
    names = [launch.kernel.removeprefix(batch_norm_act_plan.NAMESPACE) for launch in kept]
    assert names == ["statistics<float, 4, true>", "merge_statistics<float>", "forward<float, 4, true>"]
    assert all(launch.args == batch_norm_act_plan.ARGS.pack(launch.fields) for launch in kept)
    return kept


def test_cupy_is_given_the_launches(no_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    modules: list[dict[str, Any]] = []
    seen: list[tuple[Any, ...]] = []
    places: list[tuple[Any, ...]] = []

    class Module:
        def __init__(self, **arguments: Any) -> None:
            modules.append(arguments)

        def get_function(self, name: str) -> Any:
            def kernel(grid: Any, block: Any, args: Any, *, shared_mem: int) -> None:
                (argument,) = args
                assert argument.size == 1  # what cupy passes by value
                seen.append((name, grid, block, shared_mem, argument.tobytes()))

            return kernel

    def place(*arguments: Any) -> Any:
        places.append(arguments)
        return contextlib.nullcontext()

    fake = types.SimpleNamespace(RawModule=Module, cuda=types.SimpleNamespace(Device=place, ExternalStream=place))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(nvrtc, "options", lambda: ("-an-option",))
    launches = _launches()
    runtime = nvrtc.Nvrtc()
    for _ in range(2):
        runtime.run(launches, torch.device("cuda", 1))
    assert seen == 2 * [(n.kernel, n.grid, (n.threads,), n.shared_bytes, n.args) for n in launches]
    assert places == 2 * [(1,), (77, 1)]
    assert [module["name_expressions"] for module in modules] == [
        batch_norm_act_plan.group(n.kernel) for n in launches[:2]
    ]
    assert {module["options"] for module in modules} == {("-an-option",)}


def test_the_extension_is_given_the_launches(no_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    extension()
    from dlkern.kernels.cuda import built

    seen: list[tuple[Any, ...]] = []
    fake = types.SimpleNamespace(
        cuda_kernels=lambda: ALL_KERNELS, cuda_launch=lambda *arguments: seen.append(arguments)
    )
    monkeypatch.setattr(built, "_C", fake)
    launches = _launches()
    built.Built().run(launches, torch.device("cuda", 1))
    assert seen == [(ALL_KERNELS.index(n.kernel), *n.grid, n.threads, n.shared_bytes, 1, 77, n.args) for n in launches]


# -------------------------------------------------------------------------------------------------- plan
@given(
    rows=st.booleans(),
    outer=st.integers(1, 5000),
    channels=st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 1000, 2048])),
    inner=st.sampled_from([2, 3, 16, 49, 56 * 56, 512 * 512 + 1]),
    dtype=st.sampled_from(DTYPES),
    aligned=st.booleans(),
    reduction=st.booleans(),
    multiprocessors=st.sampled_from([1, 16, 132]),
)
def test_a_walk_covers_the_tensor_within_the_limits(
    rows: bool, outer: int, channels: int, inner: int, dtype: torch.dtype, aligned: bool, reduction: bool,
    multiprocessors: int,
) -> None:  # fmt: skip
    view = Layout(rows, outer, channels, 1 if rows else inner)
    walk = batch_norm_act_plan.walk(view, dtype, aligned=aligned, multiprocessors=multiprocessors, reduction=reduction)
    assert walk.kernel("forward") in KERNELS["batch_norm_act"]
    assert walk.width == 1 or (aligned and walk.width * plan.TYPES[dtype].size == 16)
    assert (view.channels if rows else view.inner) % walk.width == 0
    # the kernels reduce by halves, and divide a block into columns
    for power in (walk.threads, walk.threads_c):
        assert power & (power - 1) == 0
    assert walk.threads_c <= walk.threads <= plan.MAX_THREADS
    assert walk.grid[0] * walk.threads_c * walk.width >= channels if rows else walk.grid[0] == channels
    length = view.outer if rows else view.outer * (view.inner // walk.width)
    assert (walk.splits - 1) * walk.share < length <= walk.splits * walk.share  # no share is empty
    assert walk.share_elements == walk.share * (1 if rows else walk.width)
    assert walk.splits <= (batch_norm_act_plan.MAX_SPLITS if reduction else 65535)
    assert walk.step("statistics", {}, 1).shared_bytes <= 48 * 1024
