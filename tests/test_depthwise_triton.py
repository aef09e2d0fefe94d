"""The Triton kernels of depthwise: right in every launch configuration, and compiled for GPUs without one."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import HAS_CUDA
from depthwise_cases import SMALL, Case, Results, check, data, judge, request, run
from guard import guarded
from parity import assert_parity

from dlkern.kernels import layout
from dlkern.kernels.activation import NAMES, from_name
from dlkern.kernels.reference import depthwise as reference
from dlkern.kernels.triton import depthwise as triton_op
from dlkern.kernels.triton import depthwise_kernels, tiles
from dlkern.kernels.triton import depthwise_plan as planning
from dlkern.kernels.triton.depthwise_plan import PLANES, ROWS, Geometry, Launch

DEVICE = "cuda" if HAS_CUDA else "cpu"
TARGET = (DEVICE, "triton")

#: (elements that a thread holds, dtype, kernel of a window) such that all three kernels agree on the elements.
_WINDOWS = (
    (8, torch.float16, (2, 2)),
    (4, torch.float32, (3, 2)),
    (2, torch.float64, (2, 2)),
    (1, torch.float64, (4, 7)),
)
_CONFIGURATIONS = [
    (window, held, dtype, kernel, launch)
    for held, dtype, kernel in _WINDOWS
    for window in (True, False)
    for launch in (*ROWS[held], *PLANES.get(held, ()))
    if window or held > 1  # (a loop holds no more than one tap: a thread has two elements at least)
]


def _judge_statistics(results: Results) -> None:
    """By two passes over y: float64's own ``var`` is a few roundings off."""
    y = results.y.double()
    mean = y.mean((0, 2, 3))
    var = (y - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
    assert_parity("mean", results.mean, mean, y.abs().mean((0, 2, 3)), peer=None)
    assert_parity("var", results.var, var, var, peer=None)


@pytest.mark.parametrize(("window", "held", "dtype", "kernel", "launch"), _CONFIGURATIONS, ids=str)
def test_every_configuration(
    window: bool,
    held: int,
    dtype: torch.dtype,
    kernel: tuple[int, int],
    launch: Launch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two tiles of positions and two of channels, the second of each partial."""
    last = launch.block_c > 1
    height, size, padding, dilation = 2, kernel, (1, 1, kernel[1] - 2, 1), (1, 1)
    if not window:
        size, padding, dilation = (2, 2), (2, 1, 0, 1), (2, 1)
    columns = launch.block_p + 3 if window else launch.block_p // 2
    case = Case(
        (1, launch.block_c + 3 if last else 2, height, columns), size, padding=padding, dilation=dilation, bias=True,
        statistics=True, dtype=dtype, layout="channels_last" if last else "contiguous",
    )  # fmt: skip
    monkeypatch.setattr(planning, "forced", launch)
    seen = []
    original = planning.choose
    monkeypatch.setattr(planning, "choose", lambda *a: seen.append(original(*a)) or seen[-1])
    results = run(case, TARGET)
    judge(case, DEVICE, results._replace(mean=None, var=None))
    _judge_statistics(results)
    assert seen == [launch] * 3
    assert planning.elements(kernel[0] * kernel[1] + 1 if window else 2, dtype.itemsize, last) == held


def test_the_configurations_above_are_all_there_are() -> None:
    every = [launch for table in (ROWS, PLANES) for launches in table.values() for launch in launches]
    assert len(set(every)) == len(every)
    assert {launch for *_, launch in _CONFIGURATIONS} == set(every)
    assert all(launch.num_warps <= 4 for launch in every)
    assert all(len(launches) <= 8 for table in (ROWS, PLANES) for launches in table.values())
    for last, table in ((True, ROWS), (False, PLANES)):
        for held, launches in table.items():
            assert all(c.block_p * c.block_c == 32 * c.num_warps * held for c in launches)
        for taps, itemsize in itertools.product((1, 2, 8, 9, 10, 25, 49, 50), (2, 4, 8)):
            assert planning.elements(taps, itemsize, last) in table


CASES = [
    # strides of 2 in one direction or both, and larger than the kernel
    Case((1, 5, 9, 8), (3, 3), (2, 1), (1, 1, 0, 3)),
    Case((1, 3, 8, 9), (4, 5), (2, 2), (3, 0, 1, 2), layout="contiguous", bias=True),
    Case((1, 3, 7, 9), (1, 1), (2, 3), (0, 0, 0, 0)),
    Case((1, 3, 9, 10), (2, 3), (3, 3), (1, 0, 1, 1), layout="contiguous", statistics=True),
    # dilations of rows (a loop) and of columns alone (a window)
    Case((1, 3, 9, 8), (3, 3), (1, 1), (6, 6, 6, 6), (6, 6), statistics=True),
    Case((1, 3, 5, 9), (3, 3), (1, 2), (1, 1, 3, 2), (1, 3), layout="contiguous"),
    # windows that see nothing but zeros
    Case((1, 2, 3, 3), (2, 2), (1, 1), (3, 4, 5, 3), bias=True),
    Case((1, 2, 3, 3), (2, 2), (2, 2), (6, 3, 3, 4), layout="contiguous"),
    Case((1, 2, 2, 3), (2, 2), (1, 1), (9, 9, 1, 2), (7, 1)),
    # kernels that are larger than a window: rows of taps in several programs
    Case((1, 3, 5, 6), (9, 3), (1, 1), (4, 4, 1, 1), bias=True),
    Case((1, 2, 1, 21), (2, 19), (1, 2), (1, 0, 9, 9), layout="contiguous"),
    Case((1, 2, 4, 4), (8, 2), (2, 1), (7, 7, 0, 1), multiplier=2, bias=True),
    # several output channels of one
    Case((1, 3, 5, 6), multiplier=2, stride=(2, 2), statistics=True),
    Case((1, 1, 3, 6), (2, 2), multiplier=5, layout="contiguous", bias=True),
    # as small as can be
    Case((1, 1, 1, 1), (1, 1), padding=(0, 0, 0, 0), bias=True, statistics=True),
    Case((2, 5, 1, 1), (3, 3)),
    Case((2, 1, 1, 5), (1, 3), padding=(0, 0, 1, 1)),
    # strides of gradients, inputs and weights
    Case((2, 3, 3, 4), grad="expanded"),
    Case((2, 2, 3, 4), (2, 3), grad="sliced", layout="contiguous"),
    Case((1, 2, 3, 4), (2, 2), grad="contiguous"),
    Case((1, 2, 3, 4), (2, 2), grad="channels_last", layout="contiguous"),
    Case((2, 2, 3, 5), grad="transposed", weight="sliced", layout="transposed", bias=True),
    Case((2, 2, 3, 4), (3, 2), weight="channels_last", layout="offset"),
    # a mean far from 0: the statistics must not cancel
    Case((2, 3, 6, 5), (1, 2), padding=(0, 0, 0, 0), mean=3000.0, statistics=True),
    Case((2, 3, 6, 5), (1, 2), padding=(0, 0, 0, 0), mean=3000.0, statistics=True, layout="contiguous"),
]


@pytest.mark.parametrize("case", [*SMALL, *CASES], ids=str)
def test_parity(case: Case) -> None:
    check(case, TARGET)


#: bfloat16 takes no statistics in the interpreter (see supports).
_BFLOAT16 = [
    Case((1, 5, 6, 5), dtype=torch.bfloat16, bias=True),
    Case((1, 3, 6, 5), (2, 3), (2, 1), (1, 1, 1, 1), (2, 1), dtype=torch.bfloat16, layout="contiguous"),
]


@pytest.mark.parametrize("case", _BFLOAT16, ids=str)
def test_bfloat16(case: Case) -> None:
    check(case, TARGET)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(3, 3), (7, 7), (9, 9)], ids=str)
def test_bfloat16_with_statistics(size: tuple[int, int]) -> None:
    half = size[0] // 2
    check(Case((3, 70, 19, 18), size, padding=(half,) * 4, dtype=torch.bfloat16, statistics=True), TARGET)


@pytest.mark.parametrize("activation", NAMES)
def test_every_activation(activation: str) -> None:
    check(Case((1, 3, 3, 4), (2, 2), padding=(0, 1, 1, 0), bias=True, activation=activation), TARGET)


@pytest.mark.parametrize("memory", ["channels_last", "contiguous"])
def test_strips(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several strips of an image, the last of them shorter, in each kernel; with strides in the input's gradient."""
    monkeypatch.setattr(planning, "_LEAST_STRIP", 2)
    plans, heights = [], []
    original = planning.plan

    def spy(launch: Launch, batch: int, rows: int, *sizes: object, **options: object) -> planning.Plan:
        plans.append(original(launch, batch, rows, *sizes, **options))
        heights.append(rows)
        return plans[-1]

    monkeypatch.setattr(planning, "plan", spy)
    shape = (1, 3, 10, 5) if memory == "channels_last" else (1, 1, 10, 5)
    for stride in ((1, 1), (2, 2)):
        case = Case(shape, (3, 2), stride, (2, 1, 0, 1), layout=memory, statistics=True, bias=True)
        check(case, TARGET)
    assert len(plans) == 6
    assert all(plan.strips > 1 for plan in plans)
    for kernel in range(3):
        assert any(
            plan.strips * plan.rows > rows for plan, rows in zip(plans[kernel::3], heights[kernel::3], strict=True)
        )


@pytest.mark.parametrize("case", [SMALL[0], CASES[1], CASES[4], CASES[9]], ids=str)
def test_offsets_in_int64(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_INT32_END", 0)
    metas = []
    original = planning.meta
    monkeypatch.setattr(planning, "meta", lambda *a: metas.append(original(*a)) or metas[-1])
    check(case, TARGET)
    assert [m["INT64"] for m in metas] == [True] * 3


def test_int64_begins_near_2_to_the_31_elements() -> None:
    g = Geometry((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)

    def needs(*shape: int, geometry: Geometry = g) -> bool:
        return planning.needs_int64(geometry, ROWS[8][0], torch.empty(shape, device="meta"))

    assert not needs(1, 64, 2**12, 2**12)
    assert needs(2, 64, 2**12, 2**12)
    assert needs(1, 2**20, 2**6, 2**5 - 1)  # the first taps of the first row lie before the image
    assert needs(1, 2**14, 2**7, 2**7, geometry=g._replace(padding=(2**10, 0, 0, 0)))
    small, large = torch.empty(1, 1, 1, 1, device="meta"), torch.empty(2, 64, 2**12, 2**12, device="meta")
    assert planning.needs_int64(g, ROWS[8][0], small, large)


@pytest.mark.parametrize("programs", [1, 4, 528])
@pytest.mark.parametrize("launch", [ROWS[8][1], ROWS[2][2], PLANES[4][0]], ids=str)
@pytest.mark.parametrize(
    ("batch", "rows", "columns", "channels"),
    [(1, 1, 1, 1), (2, 56, 56, 96), (3, 11, 1, 17), (1, 1023, 7, 3), (64, 7, 7, 960), (1, 9, 4097, 2)],
)
def test_a_plan_covers_every_element_once(
    batch: int, rows: int, columns: int, channels: int, launch: Launch, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_programs", lambda device: programs)
    for window, reduction in itertools.product((True, False), (0, 10 * channels)):
        plan = planning.plan(
            launch, batch, rows, columns, channels, torch.device("cpu"), window=window, reduction=reduction
        )  # fmt: skip
        assert (plan.strips - 1) * plan.rows < rows <= plan.strips * plan.rows
        assert plan.rows == 1 or window
        assert plan.strips == 1 or not window or plan.rows >= 4  # the last window's rows are no larger part
        assert plan.size == batch * plan.strips * columns
        assert (plan.n_tiles - 1) * launch.block_p < plan.size <= plan.n_tiles * launch.block_p
        assert (plan.splits - 1) * plan.tiles_per_split < plan.n_tiles <= plan.splits * plan.tiles_per_split
        assert (plan.channel_blocks - 1) * launch.block_c < channels <= plan.channel_blocks * launch.block_c
        assert plan.splits <= 65535
        assert not reduction or plan.splits == 1 or plan.splits * reduction <= 2**24


def test_strips_and_shares_fill_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long strips where there are images enough, short ones for a single image."""
    monkeypatch.setattr(tiles, "_programs", lambda device: 528)
    monkeypatch.setattr(planning, "interpreted", lambda: False)

    def plan(batch: int, channels: int, side: int) -> planning.Plan:
        launch = planning.choose(channels, 9, 2, True)
        return planning.plan(launch, batch, side, side, channels, torch.device("cpu"), window=True)

    assert plan(256, 32, 112).rows == 112
    assert plan(256, 576, 14).rows == 14
    assert plan(1, 96, 56).rows <= 14
    for shape in ((256, 32, 112), (256, 144, 56), (256, 576, 14), (128, 96, 56)):
        found = plan(*shape)
        assert found.channel_blocks * found.splits >= 528


def test_the_heuristic_wastes_few_channels() -> None:
    for channels in (16, 24, 32, 40, 64, 72, 96, 120, 144, 192, 240, 384, 576, 768, 960):
        for taps, itemsize in itertools.product((9, 25, 49), (2, 4)):
            launch = planning.choose(channels, taps, itemsize, True)
            assert channels / (-(-channels // launch.block_c) * launch.block_c) >= 3 / 4
    assert planning.choose(64, 9, 2, True).block_c == 64
    assert planning.choose(96, 9, 2, True).block_c == 32
    assert planning.choose(16, 9, 2, True).block_c == 16


def test_small_kernels_stay_in_registers() -> None:
    g = Geometry((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    for size, stride, dilation, multiplier, window, gradient in (
        ((3, 3), (2, 2), (1, 1), 1, True, True),
        ((7, 7), (1, 1), (1, 1), 1, True, True),
        ((3, 3), (1, 1), (1, 2), 1, True, False),
        ((3, 3), (1, 3), (1, 1), 1, True, False),
        ((3, 3), (1, 1), (1, 1), 2, True, False),
        ((3, 3), (3, 1), (1, 1), 1, False, False),
        ((3, 3), (1, 1), (2, 1), 1, False, False),
        ((1, 8), (1, 1), (1, 1), 1, False, False),
    ):
        found = g._replace(kernel=size, stride=stride, dilation=dilation, multiplier=multiplier)
        assert (found.window, found.gradient_window) == (window, gradient), found


@pytest.mark.parametrize("most", [1, 2, 128])
def test_statistics_of_more_shares_than_one_program_merges(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MAX_SPLITS", most)
    monkeypatch.setattr(tiles, "_programs", lambda device: 5)
    monkeypatch.setattr(planning, "forced", PLANES[4][0])
    shares = []
    original = triton_op.merge_statistics
    monkeypatch.setattr(triton_op, "merge_statistics", lambda p: shares.append(p.size(1)) or original(p))
    case = Case((3, 1, 1, 800), (1, 1), padding=(0, 0, 0, 0), mean=30.0, statistics=True, layout="contiguous")
    check(case, TARGET)
    assert shares == [5]


@pytest.mark.parametrize(("size", "programs", "shares"), [((2, 2), 1, 1), ((2, 2), 5, 5), ((1, 9), 3, 3)], ids=str)
def test_shares_of_a_weight_gradient(
    size: tuple[int, int], programs: int, shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the merging kernel takes at once, in a window and in a loop (whose taps are two programs)."""
    monkeypatch.setattr(tiles, "_programs", lambda device: programs if size == (2, 2) else 2 * programs)
    monkeypatch.setattr(triton_op, "_MERGE_SHARES", 2)
    splits = []
    original = planning.shares
    monkeypatch.setattr(planning, "shares", lambda *a: splits.append(original(*a)) or splits[-1])
    check(Case((3, 2, 2, 67), size, padding=(0, 0, 0, 0)), TARGET)
    assert splits[-1] == shares


@pytest.mark.parametrize("case", [SMALL[0], CASES[4]], ids=str)
def test_bit_for_bit_repeatable(case: Case) -> None:
    for first, again in zip(check(case, TARGET), check(case, TARGET), strict=True):
        assert (first is None and again is None) or torch.equal(first, again)


@pytest.mark.parametrize("case", [SMALL[1], CASES[4]._replace(bias=True)], ids=str)
def test_only_what_is_needed(case: Case) -> None:
    """Gradients of x and weight alone are what they are among all; y does not depend on its statistics."""
    d = data(case, DEVICE)
    x = d.x.contiguous(memory_format=torch.channels_last)

    def run(*needs: bool) -> tuple[torch.Tensor | None, ...]:
        options = dict(zip(("needs_x", "needs_weight", "needs_bias"), needs, strict=True))
        return triton_op.backward(d.grad, x, d.weight, **case.geometry, **options)

    everything = run(True, True, True)
    for i in range(3):
        found = run(*(i == j for j in range(3)))
        assert [v is not None for v in found] == [i == j for j in range(3)]
        if i < 2:
            assert torch.equal(found[i], everything[i])
        else:
            torch.testing.assert_close(found[i], everything[i])
    with guarded():
        ys = [
            triton_op.forward(x, d.weight, d.bias, **case.geometry, activation=case.act, statistics=statistics)[0]
            for statistics in (True, False)
        ]
    assert torch.equal(*ys)


def test_infinities_and_nans() -> None:
    """Of x, and only where a tap reads them; padding is zeros whatever lies beside it in memory."""
    x = torch.randn(1, 2, 5, 5, device=DEVICE)
    x[0, 0, 2, 2], x[0, 1, 0, 4] = float("nan"), float("inf")
    weight = torch.rand(2, 1, 3, 3, device=DEVICE) + 0.5
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y, _, _ = triton_op.forward(
            x.contiguous(memory_format=memory_format), weight, None, stride=(1, 1), padding=(1, 1, 1, 1),
            dilation=(1, 1), activation=from_name("relu"), statistics=False,
        )  # fmt: skip
        want = torch.nn.functional.conv2d(x, weight, padding=1, groups=2).relu()
        torch.testing.assert_close(y, want, equal_nan=True)


def test_negated_views() -> None:
    z = torch.view_as_complex(torch.randn(2, 3, 4, 4, 2)).to(DEVICE).conj()
    x, weight = z.imag, torch.randn(3, 1, 1, 1, device=DEVICE)
    assert x.is_neg()
    options = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1)}
    y, _, _ = triton_op.forward(x, weight, None, **options, activation=from_name("identity"), statistics=False)
    torch.testing.assert_close(y, x.resolve_neg() * weight.view(1, 3, 1, 1))
    needs = {"needs_x": True, "needs_weight": False, "needs_bias": False}
    dx, _, _ = triton_op.backward(x, layout.dense(x), weight, **options, **needs)
    torch.testing.assert_close(dx, x.resolve_neg() * weight.view(1, 3, 1, 1))


def test_supports() -> None:
    case = Case((1, 1, 1, 1))
    assert triton_op.supports(request(case, DEVICE)) is None
    assert "cuda" in triton_op.supports(request(case, "mps")).lower()
    assert "complex64" in triton_op.supports(request(case, DEVICE)._replace(dtype=torch.complex64))
    assert "relu" in triton_op.supports(request(case._replace(activation="relu", statistics=True), DEVICE))
    half = request(case._replace(dtype=torch.bfloat16), DEVICE)
    assert triton_op.supports(half) is None
    if not HAS_CUDA:
        assert "bfloat16" in triton_op.supports(half._replace(statistics=True))


def test_bad_calls() -> None:
    x, weight = torch.randn(2, 3, 5, 5, device=DEVICE), torch.randn(3, 1, 3, 3, device=DEVICE)
    options = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1)}
    with pytest.raises(ValueError, match="'identity', not 'relu'"):
        triton_op.forward(x, weight, None, **options, activation=from_name("relu"), statistics=True)
    for image in (x[:0], x[..., :2]):
        with pytest.raises(ValueError, match="nothing to convolve"):
            triton_op.forward(image, weight, None, **options, activation=from_name("relu"), statistics=False)


def test_a_forced_configuration_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "forced", ROWS[8][0])
    with pytest.raises(ValueError, match="none of the configurations"):
        planning.choose(64, 49, 2, True)


def test_the_memory_format_is_kept() -> None:
    """No kernel is given a copy of x: it reads x's own memory."""
    seen = []
    original = depthwise_kernels.forward_kernel.run
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(1, 3, 4, 4, device=DEVICE).contiguous(memory_format=memory_format)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                depthwise_kernels.forward_kernel, "run",
                lambda *a, **k: seen.append(a[0].data_ptr()) or original(*a, **k),
            )  # fmt: skip
            y, _, _ = triton_op.forward(
                x, torch.randn(3, 1, 3, 3, device=DEVICE), None, stride=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1),
                activation=from_name("identity"), statistics=False,
            )  # fmt: skip
        assert seen[-1] == x.data_ptr()
        assert y.is_contiguous(memory_format=reference.memory_format(x))
    assert len(seen) == 2
