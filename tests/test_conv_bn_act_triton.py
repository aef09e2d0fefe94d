"""The Triton kernels of conv_bn_act: right in every launch configuration.

Without a GPU they run in Triton's interpreter, which computes TF32 in float32 and bfloat16 wrongly: bfloat16 is only
compiled, ahead of time (tests/aot), and everything else of it waits for a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from batch_norm_act_cases import spied
from conftest import HAS_CUDA
from conv_bn_act_cases import Case, check, data
from guard import guarded
from torch import Tensor

import dlkern
from dlkern.functional import conv_act, conv_bn_act
from dlkern.kernels.activation import NAMES, from_name
from dlkern.kernels.reference.conv_bn_act import Convolution, Needs, Request
from dlkern.kernels.triton import conv_bn_act as triton_op
from dlkern.kernels.triton import gemm_plan, tiles
from dlkern.kernels.triton import implicit_gemm as gemm
from dlkern.kernels.triton.gemm_plan import DOUBLE, EXACT, TENSOR, Launch

DEVICE = "cuda" if HAS_CUDA else "cpu"
TARGET = (DEVICE, "triton")

#: By mode of the products: rows, columns and depth of several tiles each, the last of them partial.
_SHAPES = {
    "pointwise": Case((2, 67, 9, 8), 35, (1, 1), padding=(0, 0), layout="channels_last", activation="silu"),
    "taps": Case((2, 35, 9, 8), 34, padding=(1, 2), dilation=(1, 2), layout="channels_last", activation="silu"),
    "tap_loop": Case((1, 17, 11, 9), 18, (7, 4), (2, 2), (3, 1), layout="channels_last", activation="silu"),
    "flat": Case((2, 3, 16, 11), 6, (5, 3), (1, 2), (2, 1), layout="channels_last", activation="silu"),
}
#: The same for tiles of at most 32 x 32, of which there would be too many.
_SMALLER = {
    **_SHAPES,
    "pointwise": _SHAPES["pointwise"]._replace(shape=(2, 35, 6, 3), out=33),
    "taps": _SHAPES["taps"]._replace(shape=(1, 17, 6, 7), out=33, kernel=(3, 2)),
    "tap_loop": _SHAPES["tap_loop"]._replace(shape=(1, 17, 5, 9)),
}
_CODES = {
    "pointwise": gemm.POINTWISE.value,
    "taps": gemm.TAPS.value,
    "tap_loop": gemm.TAP_LOOP.value,
    "flat": gemm.FLAT.value,
}


def _allow_tf32(monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    monkeypatch.setattr(gemm_plan, "allows_tf32", lambda: allowed)


def _launches() -> Iterator[tuple[str, torch.dtype, Launch]]:
    """Every configuration of every mode; half types and TF32 share theirs, and take turns."""
    halves = itertools.cycle((torch.float32, torch.float16))
    for mode in _SHAPES:
        small = mode in ("tap_loop", "flat")
        for launch in (*TENSOR, *EXACT, *DOUBLE):
            if small and launch.num_warps > 4 and launch not in DOUBLE:
                continue
            if launch == TENSOR[0]:
                yield mode, torch.float16, launch
            else:
                yield (
                    mode,
                    torch.float64 if launch in DOUBLE else torch.float32 if launch in EXACT else next(halves),
                    launch,
                )


@pytest.mark.parametrize(("mode", "dtype", "launch"), list(_launches()), ids=str)
def test_every_configuration(mode: str, dtype: torch.dtype, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, input gradient and weight gradient in one mode."""
    _allow_tf32(monkeypatch, launch in TENSOR)
    assert launch in gemm_plan.table(dtype, _CODES[mode])
    monkeypatch.setattr(gemm_plan, "forced", launch)
    modes = []
    original = gemm_plan.mode
    monkeypatch.setattr(gemm_plan, "mode", lambda *a, **k: modes.append(original(*a, **k)) or modes[-1])
    shapes, norm = (_SHAPES, "batch") if launch.block_m > 32 else (_SMALLER, "running")
    check(shapes[mode]._replace(dtype=dtype, norm=norm), TARGET)
    of_gradient = gemm.PHASES.value if mode == "tap_loop" else _CODES[mode]  # (its case has a stride)
    assert modes == [_CODES[mode], of_gradient, _CODES[mode]]


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "launch"), [(mode, i) for mode, _, i in _launches() if i in TENSOR], ids=str)
def test_bfloat16(mode: str, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_plan, "forced", launch)
    check(_SHAPES[mode]._replace(dtype=torch.bfloat16, param_dtype=torch.float32), TARGET)


def test_the_configurations_above_are_all_there_are() -> None:
    assert len(TENSOR) + len(EXACT) + len(DOUBLE) <= 8
    assert len({*TENSOR, *EXACT, *DOUBLE}) == len(TENSOR) + len(EXACT) + len(DOUBLE)
    seen = {(mode, launch) for mode, _, launch in _launches()}
    for mode, code in _CODES.items():
        for dtype, tf32 in (
            (torch.float16, True),
            (torch.float32, True),
            (torch.float32, False),
            (torch.float64, True),
        ):
            with pytest.MonkeyPatch.context() as patch:
                _allow_tf32(patch, tf32)
                assert gemm_plan.table(dtype, gemm.PHASES.value) == gemm_plan.table(dtype, gemm.TAP_LOOP.value)
                for launch in gemm_plan.table(dtype, code):
                    assert (mode, launch) in seen
                    # a loop over taps and channels, and one over taps, were not seen right with 8 warps
                    assert launch.num_warps <= 4 or code in (0, 1) or dtype == torch.float64


CASES = [
    # the stem of a network, an odd image
    Case((2, 3, 19, 18), 9, (7, 7), (2, 2), (3, 3), layout="channels_last"),
    Case((2, 19, 9, 8), 21, (3, 3), (2, 2), (1, 1), residual=True, activation="relu", layout="channels_last"),
    Case((2, 24, 9, 8), 18, (2, 3), (3, 1), (1, 0), (2, 3), groups=2, bias=True, norm="running", residual=True),
    # strides without taps in most phases, and larger than the kernel
    Case((1, 18, 9, 10), 17, (1, 1), (2, 3), (0, 0), norm="none", bias=True, layout="channels_last"),
    # depthwise, with a multiplier; groups of four
    Case((2, 6, 8, 7), 12, groups=6, activation="hardswish", layout="channels_last"),
    Case((2, 12, 8, 7), 8, (3, 3), (1, 2), (1, 1), groups=4, norm="none", residual=True, activation="silu"),
    Case((2, 32, 5, 5), 34, (1, 1), padding=(0, 0), groups=2, norm="running", activation="gelu", residual=True),
    # padding beyond the kernel: windows that see nothing but zeros
    Case((1, 2, 3, 3), 3, (2, 2), (1, 1), (3, 3), norm="none", bias=True, activation="sigmoid"),
    # as small as can be
    Case((1, 1, 1, 1), 1, (1, 1), padding=(0, 0), norm="none", bias=True, activation="tanh"),
    Case((2, 1, 1, 2), 1, (3, 3), activation="identity", affine=False),
    Case((2, 17, 1, 1), 18, (1, 1), padding=(0, 0), norm="running", activation="elu", layout="channels_last"),
    # float32 parameters beside half data; float64
    Case((2, 5, 9, 8), 7, dtype=torch.float16, param_dtype=torch.float32, residual=True, layout="channels_last"),
    Case((2, 5, 6, 6), 7, dtype=torch.float64, bias=True, residual=True, activation="tanh"),
    # a mean far from 0: the statistics must not cancel
    Case((2, 5, 9, 8), 7, (1, 1), padding=(0, 0), mean=300.0, activation="relu"),
    # tensors with strides of their own
    Case((2, 5, 6, 6), 7, layout="transposed", residual=True, activation="silu"),
    Case((2, 5, 6, 6), 7, layout="sliced", norm="running", activation="silu"),
    Case((2, 5, 6, 6), 7, layout="offset", norm="none", activation="silu"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: Case) -> None:
    check(case, TARGET)


@pytest.mark.parametrize("activation", NAMES)
def test_every_activation(activation: str) -> None:
    """Of the epilogue, and of the gradient from what it kept."""
    check(Case((2, 3, 6, 5), 5, norm="running", residual=True, activation=activation), TARGET)


@pytest.mark.parametrize("norm", ["running", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_y_does_not_depend_on_what_is_kept(norm: str, dtype: torch.dtype) -> None:
    case = Case((2, 5, 6, 6), 7, norm=norm, residual=True, bias=True, dtype=dtype, activation="gelu")
    y, c, *_ = _forward(case, saves=True)
    alone, none, *_ = _forward(case, saves=False)
    assert torch.equal(y, alone)
    assert none is None
    d = data(case, DEVICE)
    torch.testing.assert_close(c, F.conv2d(d.x, d.weight, d.bias, **case.geometry))


def _forward(case: Case, *, saves: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    with guarded():
        return triton_op.forward(
            *data(case, DEVICE)[:8], convolution=Convolution(**case.geometry), norm=case.norm, momentum=case.momentum,
            eps=1e-5, activation=case.act, saves=saves,
        )  # fmt: skip


@pytest.mark.parametrize("norm", ["batch", "running", "none"])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck(norm: str, groups: int) -> None:
    torch.manual_seed(0)
    shapes = (2, 2, 4, 3), (4, 2 // groups, 2, 3), (4,), (4,), (4,), (2, 4, 2, 3)
    x, weight, bias, gamma, beta, residual = (
        torch.randn(s, dtype=torch.float64, device=DEVICE, requires_grad=True) for s in shapes
    )
    mean, var = torch.zeros(4, dtype=torch.float64, device=DEVICE), torch.ones(4, dtype=torch.float64, device=DEVICE)
    geometry = {"padding": (0, 1), "stride": (2, 1), "groups": groups}

    def run(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        with dlkern.backend(conv_bn_act="triton"):
            if norm == "none":
                return conv_act(x, weight, bias, **geometry, activation="silu", residual=rest[-1])
            return conv_bn_act(
                x, weight, bias, mean.clone(), var.clone(), *rest[:2], **geometry, training=norm == "batch",
                activation="silu", residual=rest[2],
            )  # fmt: skip

    inputs = (x, weight, bias, residual) if norm == "none" else (x, weight, bias, gamma, beta, residual)
    with spied() as calls:
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert {("triton", "forward"), ("triton", "backward")} <= set(calls)


@pytest.mark.parametrize("mode", _SHAPES)
def test_offsets_in_int64(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_plan, "_INT32_END", 0)
    assert gemm_plan.needs_int64(torch.empty(1, 1, 1, 1))
    check(_SMALLER[mode], TARGET)


def test_int64_begins_at_2_to_the_31_elements() -> None:
    def needs(*shape: int) -> bool:
        return gemm_plan.needs_int64(torch.empty(shape, device="meta"))

    assert not needs(1, 64, 2**12, 2**12)
    assert needs(2, 64, 2**12, 2**12)
    assert needs(2**24 - 1, 128, 1, 1)  # the last tile's rows lie beyond
    small, large = torch.empty(1, 1, 1, 1, device="meta"), torch.empty(2, 64, 2**12, 2**12, device="meta")
    assert gemm_plan.needs_int64(small, large)


@pytest.mark.parametrize("most", [1, 3, tiles.MAX_SPLITS])
def test_statistics_of_more_tiles_than_one_program_merges(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """130 tiles of 64 rows, the last of one row; condensed to ``most`` shares."""
    monkeypatch.setattr(tiles, "MAX_SPLITS", most)
    monkeypatch.setattr(gemm_plan, "forced", Launch(64, 16, 64, 4, 3))
    calls = []
    original = triton_op._merge_statistics
    monkeypatch.setattr(triton_op, "_merge_statistics", lambda p, *a: calls.append(p.size(1)) or original(p, *a))
    case = Case((1, 1, 8257, 1), 3, (1, 1), padding=(0, 0), mean=30.0, activation="silu", layout="channels_last")
    check(case, TARGET, gradients=False)
    assert calls == [130]


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_shares_of_a_weight_gradient(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its positions in one share (written directly) and in several, of which the last may have less."""
    monkeypatch.setattr(gemm_plan, "splits", lambda *_: splits)
    monkeypatch.setattr(gemm_plan, "forced", Launch(64, 16, 64, 4, 3))
    check(Case((3, 5, 11, 9), 7, (1, 1), padding=(0, 0), norm="none", activation="silu"), TARGET)


@pytest.mark.parametrize("programs", [1, 4, 528])
@pytest.mark.parametrize(("tiles_", "steps", "size"), [(1, 1, 1), (3, 1000, 50), (9, 7, 2**25), (5000, 100, 2**27)])
def test_the_number_of_shares(
    tiles_: int, steps: int, size: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_programs", lambda device: programs)
    splits = gemm_plan.splits(tiles_, steps, size, torch.device("cpu"))
    assert 1 <= splits <= max(1, min(steps, 128))
    assert splits == 1 or splits * size <= 2**26
    if size == 50:
        assert splits >= min(programs // tiles_, 100)


_FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "weight_shape"),
    [
        ((2, 4, 5, 6), (3, 4, 3, 3)),
        ((2, 4, 5, 6), (3, 4, 1, 1)),
        ((2, 1, 5, 6), (3, 1, 3, 3)),
        ((2, 4, 3, 3), (3, 4, 3, 3)),
        ((2, 4, 5, 6), (1, 4, 3, 3)),
        ((2, 4, 1, 1), (1, 4, 1, 1)),
        ((1, 4, 1, 1), (3, 4, 1, 1)),
    ],
    ids=str,
)
def test_memory_formats_are_pytorchs(shape: tuple[int, ...], weight_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of y and c as of F.conv2d; gradients have the strides of what they belong to."""
    for of_x, of_weight in itertools.product(_FORMATS, _FORMATS):
        x = torch.randn(shape, dtype=dtype, device=DEVICE).to(memory_format=of_x)
        weight = torch.randn(weight_shape, dtype=dtype, device=DEVICE).to(memory_format=of_weight)
        options = {"convolution": Convolution(), "norm": "none", "activation": from_name("relu")}
        y, c, _, _ = triton_op.forward(x, weight, *[None] * 6, momentum=0.1, eps=1e-5, saves=True, **options)
        like = F.conv2d(x, weight)
        assert y.stride() == c.stride() == like.stride()
        grad = torch.randn_like(y).transpose(2, 3).contiguous().transpose(2, 3)
        needs = Needs(True, True, False, False, True)
        dx, dweight, *_, dresidual = triton_op.backward(
            grad, x, weight, None, None, None, torch.zeros_like(y), None, c, None, None, needs=needs, **options
        )  # fmt: skip
        assert dx.stride() == torch.empty_like(x).stride()
        assert dweight.stride() == torch.empty_like(weight).stride()
        assert dresidual.stride() == torch.empty_like(c).stride()
        torch.testing.assert_close(dresidual, torch.where(like > 0, grad, 0.0))


@pytest.mark.parametrize("of_x", _FORMATS, ids=str)
@pytest.mark.parametrize("of_weight", _FORMATS, ids=str)
def test_opcheck(of_x: torch.memory_format, of_weight: torch.memory_format) -> None:
    """Shapes, strides and what is written, against what torch.compile is told."""
    x, weight, bias, gamma, beta, residual, mean = (
        torch.randn(size, device=DEVICE) for size in ((2, 4, 5, 6), (3, 4, 3, 3), 3, 3, 3, (2, 3, 5, 6), 3)
    )
    x, weight = x.to(memory_format=of_x), weight.to(memory_format=of_weight)
    geometry, tests = ([1, 1], [1, 1], [1, 1], 1), ("test_schema", "test_faketensor")
    inputs = (x, weight, bias, gamma, beta, residual)
    running = mean, torch.ones_like(mean)
    args = (*inputs, *running, *geometry, "batch", 0.1, 1e-5, "silu", 0.0, True, "triton")
    torch.library.opcheck(torch.ops.dlkern.conv_bn_act.default, args, test_utils=tests)
    y, *kept = torch.ops.dlkern.conv_bn_act(*args)
    args = (torch.randn_like(y), *inputs, None, *kept, *geometry, "batch", "silu", 0.0, [True] * 5, "triton")
    torch.library.opcheck(torch.ops.dlkern.conv_bn_act_backward.default, args, test_utils=tests)


@pytest.mark.parametrize("mode", ["pointwise", "flat"])
def test_bit_for_bit_repeatable(mode: str) -> None:
    case = _SMALLER[mode]
    d, options = data(case, DEVICE), {"convolution": Convolution(**case.geometry), "activation": case.act}

    def run() -> list[Tensor | None]:
        y, c, mean, invstd = _forward(case, saves=True)
        needs = Needs(True, True, False, True, False)
        kept = c, mean, invstd
        return [y, *kept, *triton_op.backward(d.grad, *d[:6], None, *kept, norm="batch", needs=needs, **options)]

    for first, again in zip(run(), run(), strict=True):
        assert (first is None and again is None) or torch.equal(first, again)


@pytest.mark.parametrize("norm", ["batch", "running", "none"])
def test_only_what_is_needed(norm: str) -> None:
    """Each gradient alone is what it is among all of them, and the others are None."""
    case = Case((2, 5, 6, 6), 7, norm=norm, residual=True, bias=True, activation="silu")
    d = data(case, DEVICE)
    _, c, mean, invstd = _forward(case, saves=True)
    options = {"convolution": Convolution(**case.geometry), "norm": norm, "activation": case.act}

    def run(needs: Needs) -> tuple[Tensor | None, ...]:
        return triton_op.backward(d.grad, *d[:6], None, c, mean, invstd, needs=needs, **options)

    normed = norm != "none"
    everything = run(Needs(True, True, True, normed, True))
    fields = [(0,), (1,), (2,), *([(3, 4)] if normed else []), (5,)]
    for field, made in zip([0, 1, 2, *([3] if normed else []), 4], fields, strict=True):
        found = run(Needs(*(i == field for i in range(5))))
        for i, (one, of_all) in enumerate(zip(found, everything, strict=True)):
            assert (one is not None) == (i in made)
            assert one is None or torch.equal(one, of_all)


def test_an_expanded_gradient() -> None:
    """Of y.sum(): one element for all."""
    x, weight = torch.randn(2, 3, 5, 5, device=DEVICE), torch.randn(4, 3, 3, 3, device=DEVICE)
    for activation in ("identity", "silu"):
        values = [v.clone().requires_grad_() for v in (x, weight)]
        with dlkern.backend(conv_bn_act="triton"):
            conv_act(*values, padding=1, activation=activation).sum().backward()
        like = [v.clone().requires_grad_() for v in (x, weight)]
        z = F.conv2d(*like, padding=1)
        (z if activation == "identity" else F.silu(z)).sum().backward()
        for mine, theirs in zip(values, like, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_running_statistics_with_strides() -> None:
    x, weight = torch.randn(2, 3, 5, 5, device=DEVICE), torch.randn(4, 3, 3, 3, device=DEVICE)
    both = torch.tensor([[0.0, 1.0]] * 4, device=DEVICE)
    triton_op.forward(
        x, weight, None, None, None, None, both[:, 0], both[:, 1], convolution=Convolution(), norm="batch",
        momentum=1.0, eps=1e-5, activation=from_name("relu"), saves=False,
    )  # fmt: skip
    c = F.conv2d(x, weight)
    torch.testing.assert_close(both, torch.stack([c.mean((0, 2, 3)), c.var((0, 2, 3))], 1))


def test_negated_views() -> None:
    z = torch.view_as_complex(torch.randn(2, 3, 4, 4, 2)).to(DEVICE).conj()
    x, weight = z.imag, torch.randn(2, 3, 1, 1, device=DEVICE)
    assert x.is_neg()
    y, *_ = triton_op.forward(
        x, weight, *[None] * 6, convolution=Convolution(), norm="none", momentum=0.1, eps=1e-5,
        activation=from_name("identity"), saves=False,
    )  # fmt: skip
    torch.testing.assert_close(y, F.conv2d(x.resolve_neg(), weight))


def _request(**changes: object) -> Request:
    request = Request(
        DEVICE, torch.float32, torch.float32, True, (1, 1), (0, 0), (1, 1), 1, (3, 3), 8, 8, 64, "batch", True, False,
        "relu",
    )  # fmt: skip
    return request._replace(**changes)


def test_supports() -> None:
    assert triton_op.supports(_request()) is None
    assert "cuda" in triton_op.supports(_request(device="mps")).lower()
    assert "complex64" in triton_op.supports(_request(dtype=torch.complex64))
    assert "2**31" in triton_op.supports(_request(in_channels=2**16, out_channels=2**15))
    assert triton_op.supports(_request(in_channels=2**16, out_channels=2**15, groups=2**10)) is None
    if not HAS_CUDA:
        assert "bfloat16" in triton_op.supports(_request(dtype=torch.bfloat16))


def test_bad_calls() -> None:
    x, weight = torch.randn(2, 3, 5, 5, device=DEVICE), torch.randn(4, 3, 3, 3, device=DEVICE)
    options = {"convolution": Convolution(), "momentum": 0.1, "eps": 1e-5, "activation": from_name("relu")}
    with pytest.raises(ValueError, match="unknown norm 'layer'"):
        triton_op.forward(x, weight, *[None] * 6, norm="layer", saves=True, **options)
    with pytest.raises(ValueError, match="running statistics"):
        triton_op.forward(x, weight, *[None] * 6, norm="running", saves=True, **options)
    with pytest.raises(ValueError, match="nothing to convolve"):
        triton_op.forward(x[:0], weight, *[None] * 6, norm="none", saves=True, **options)


def test_a_forced_configuration_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_plan, "forced", DOUBLE[0])
    with pytest.raises(ValueError, match="none of the configurations"):
        gemm_plan.choose(1, 1, 1, torch.float16, 0, torch.device("cpu"))


@pytest.fixture
def _conv_precision() -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.usefixtures("_conv_precision")
def test_tf32_as_pytorch_allows() -> None:
    for setting, wanted, launches in (("tf32", "tf32", TENSOR), ("ieee", "ieee", EXACT)):
        torch.backends.cudnn.conv.fp32_precision = setting
        assert gemm_plan.precision(torch.float32) == wanted
        assert gemm_plan.precision(torch.float16) == "ieee"
        assert gemm_plan.table(torch.float32, gemm.TAPS.value) == launches


def test_the_heuristic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tiles where they fill the device, narrow ones for few channels, and small ones for small problems."""
    monkeypatch.setattr(tiles, "_programs", lambda device: 528)

    def choose(rows: int, columns: int, mode: int = 1, shared: bool = False) -> tuple[int, int]:
        return gemm_plan.choose(rows, columns, 1, torch.float16, mode, torch.device("cpu"), shared=shared)[:2]

    assert choose(256 * 56 * 56, 256) == (128, 128)
    assert choose(256 * 56 * 56, 64) == (128, 64)
    assert choose(256 * 112 * 112, 16) == (64, 16)
    assert choose(8 * 7 * 7, 512)[0] * choose(8 * 7 * 7, 512)[1] < 128 * 64
    assert choose(256 * 112 * 112, 64, gemm.FLAT.value) == (64, 64)
    assert choose(64, 64) == (64, 16)
    assert choose(64, 64, shared=True) == (64, 64)  # a weight gradient: its positions fill the device
