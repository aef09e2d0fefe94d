"""Every launch configuration of the Triton kernels: right against float64 (tests/aot compiles them for GPUs)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from batch_norm_act_cases import Case, check
from conftest import HAS_CUDA

from dlkern.kernels import layout
from dlkern.kernels.triton import tiles
from dlkern.kernels.triton.tiles import PLANES, ROWS, Launch

TARGET = ("cuda" if HAS_CUDA else "cpu", "triton")

#: Several tiles in each direction, the last of them partial.
_SHAPES = {
    "rows": Case((5, 37, 9, 7), layout="channels_last", residual="channels_last", activation="silu"),
    "planes": Case((11, 3, 17, 19), residual="contiguous", activation="silu"),
}


def _launches() -> list[tuple[str, Launch]]:
    return [(kind, launch) for kind, launches in (("rows", ROWS), ("planes", PLANES)) for launch in launches]


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[Launch], None]:
    """Sets the launch configuration of every kernel whose grid covers a tensor."""
    return lambda launch: monkeypatch.setattr(tiles, "forced", launch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "launch"), _launches(), ids=str)
def test_every_configuration(kind: str, launch: Launch, dtype: torch.dtype, force: Callable[[Launch], None]) -> None:
    """The interpreter knows no warps, but no two configurations differ in them alone."""
    force(launch)
    check(_SHAPES[kind]._replace(dtype=dtype), TARGET)


def test_configurations_are_few_and_distinct() -> None:
    assert len(ROWS) + len(PLANES) <= 8
    for launches in (ROWS, PLANES):
        assert len({(c.block_r, c.block_k) for c in launches}) == len(launches)


@pytest.mark.parametrize("kind", _SHAPES)
def test_offsets_in_int64(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_INT32_END", 0)
    assert tiles.plan(torch.empty(_SHAPES[kind].shape), reduction=False).int64
    check(_SHAPES[kind], TARGET)


def test_int64_begins_at_2_to_the_31_elements() -> None:
    assert not tiles.plan(torch.empty(1, 1, 2**30, device="meta"), reduction=False).int64
    assert tiles.plan(torch.empty(2, 1, 2**30, device="meta"), reduction=False).int64
    assert tiles.plan(torch.empty(2**26, 33, device="meta"), reduction=False).int64


@pytest.mark.parametrize("programs", [1, 4, 33, 528])
@pytest.mark.parametrize("reduction", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, 1), (1, 1, 1, 2), (7, 130), (256, 64, 56, 56), (3, 1, 2048, 2049), (512, 3, 5, 1)], ids=str
)
def test_shares_cover_every_tile_once(
    shape: tuple[int, ...], reduction: bool, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_programs", lambda device: programs)
    for memory_format in (torch.contiguous_format, torch.channels_last)[: 2 if len(shape) == 4 else 1]:
        x = torch.empty(shape, device="meta").contiguous(memory_format=memory_format)
        plan = tiles.plan(x, reduction=reduction)
        outer, channels, inner, n_tiles, tiles_k, per_split = plan.sizes
        assert outer * channels * inner == x.numel()
        assert (plan.splits - 1) * per_split < n_tiles <= plan.splits * per_split
        assert plan.splits <= (tiles.MAX_SPLITS if reduction else 65535)
        block_r, block_k, _ = plan.launch
        assert (n_tiles // tiles_k) * block_r >= outer
        assert (plan.channel_blocks if plan.channels_last else tiles_k) * block_k >= (
            channels if plan.channels_last else inner
        )


def test_few_channels_are_split_and_many_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_programs", lambda device: 528)
    few = tiles.plan(torch.empty(64, 3, 224, 224, device="meta"), reduction=True)
    assert few.channel_blocks * few.splits >= 3 * tiles.MAX_SPLITS * 0.9
    many = tiles.plan(torch.empty(64, 2048, 7, 7, device="meta"), reduction=True)
    assert many.splits == 1


def test_the_heuristic_wastes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the shapes of ResNet-50 and MobileNetV2 at most a third of a tile's elements lie outside."""
    for channels, side in ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7), (24, 56), (144, 28)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.empty(32, channels, side, side, device="meta").contiguous(memory_format=memory_format)
            plan = tiles.plan(x, reduction=False)
            covered = plan.channel_blocks * plan.sizes[3] * plan.launch.block_r * plan.launch.block_k
            assert x.numel() / covered >= 2 / 3, (channels, side, memory_format, plan.launch, layout.of(x))
