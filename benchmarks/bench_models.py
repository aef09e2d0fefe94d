"""A whole training step and an inference, plain against swapped: time in turn, and memory kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dlkern.bench import models

from . import model_rows


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    specs = metafunc.config.getoption("--model") or ["torchvision:resnet50"]
    metafunc.parametrize("spec", specs)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_model(
    spec: str, training: bool, layout: str, benchmark: Any, record: Any, device: torch.device,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    names = models.candidate_names(training, compiled=False)
    first = model_rows.run(spec, training, layout, names, benchmark, record, device, request)
    if training:
        assert first.kept["swapped"] <= first.kept["plain"]
