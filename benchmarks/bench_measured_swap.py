"""Whole models after a measured swap, plain against swapped: a training step and an inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from . import model_rows

MODELS = (
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "torchvision:deeplabv3_resnet50",
    "torchvision:convnext_tiny",
    "torchvision:swin_t",
    "dlkern.bench.sequences:lstm",
    "dlkern.bench.sequences:gru",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("spec", metafunc.config.getoption("--model") or MODELS)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_measured_swap(
    spec: str, training: bool, benchmark: Any, record: Any, device: torch.device,
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("DLKERN_CACHE_DIR", str(tmp_path))  # nothing that was measured before counts
    monkeypatch.setenv("DLKERN_TABLES", "0")
    model_rows.run(spec, training, "nchw", ["measured"], benchmark, record, device, request)
