"""Depthwise convolution by each implementation: numbers, gradients, memory, determinism."""

from __future__ import annotations

import pytest
import torch
from depthwise_cases import SMALL, Case, check, data, every_target, expected, implementation, request, run
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dlkern.kernels import layout
from dlkern.kernels.activation import NAMES
from dlkern.kernels.cpu import unavailable
from dlkern.kernels.reference import depthwise as reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LAST, PLANES = "channels_last", "contiguous"
LAYOUTS = [LAST, PLANES]


def both(*cases: Case) -> list[Case]:
    return [case._replace(layout=name) for case in cases for name in LAYOUTS]


CASES = [
    # kernels with their own code: several tiles of columns, tails of channels and of columns, edges of all kinds
    *both(
        Case((2, 19, 15, 30), statistics=True, bias=True),
        Case((2, 19, 15, 31), stride=(2, 2), statistics=True),
        Case((2, 9, 13, 18), (5, 5), padding=(2, 2, 2, 2)),
        Case((1, 9, 14, 19), (5, 5), (2, 2), (2, 2, 2, 2)),
        Case((2, 9, 13, 17), (7, 7), padding=(3, 3, 3, 3), bias=True),
        Case((1, 9, 15, 20), (7, 7), (2, 2), (3, 3, 3, 3)),
        Case((2, 17, 7, 7)),
        Case((2, 5, 3, 3)),
        Case((3, 7, 1, 1)),
        Case((2, 5, 9, 16), padding=(0, 0, 0, 0)),
        # 'same' of an even kernel, asymmetric and one-sided padding
        Case((2, 5, 9, 8), (4, 2), padding=(1, 2, 0, 1)),
        Case((2, 5, 9, 8), padding=(0, 2, 3, 0), stride=(2, 1)),
        # padding of the kernel's size and more: outputs with no tap inside
        Case((2, 5, 3, 4), padding=(3, 4, 5, 6), bias=True, statistics=True),
        Case((1, 3, 2, 2), (2, 2), padding=(9, 0, 0, 9), stride=(3, 4)),
        # dilation: taps next to none of which another is inside
        Case((2, 9, 21, 22), padding=(2, 2, 2, 2), dilation=(2, 2), statistics=True),
        Case((1, 9, 17, 33), padding=(12, 12, 12, 12), dilation=(12, 12), bias=True),
        Case((1, 5, 6, 7), padding=(18, 18, 18, 18), dilation=(18, 18)),
        Case((1, 4, 12, 13), (5, 3), (2, 3), (4, 4, 3, 3), (2, 3)),
        Case((1, 4, 12, 13), stride=(2, 2), padding=(2, 2, 2, 2), dilation=(2, 2)),
        # ... and pixels so far apart that rows are copied
        Case((2, 128, 11, 17), padding=(3, 3, 3, 3), dilation=(3, 3), bias=True, statistics=True),
        Case((1, 128, 12, 13), stride=(2, 2), padding=(4, 4, 4, 4), dilation=(4, 4)),
        Case((1, 128, 9, 14), (5, 4), (1, 3), (4, 4, 3, 3), (2, 2)),
        Case((1, 64, 9, 14), multiplier=2, padding=(2, 2, 2, 2), dilation=(2, 2)),
        Case((1, 64, 9, 14), padding=(2, 2, 2, 2), dilation=(2, 2), dtype=F64),
        Case((1, 256, 9, 14), padding=(2, 2, 2, 2), dilation=(2, 2), dtype=BF16),
        # large and rectangular kernels
        Case((1, 3, 33, 35), (31, 31), padding=(15, 15, 15, 15)),
        Case((1, 3, 9, 40), (1, 31), padding=(0, 0, 15, 15)),
        Case((1, 3, 40, 5), (13, 1), padding=(6, 6, 0, 0)),
        Case((2, 5, 1, 50), (1, 3), padding=(0, 0, 1, 1), stride=(1, 2)),
        Case((2, 5, 6, 7), (1, 1), padding=(0, 0, 0, 0), stride=(2, 2)),
        # depth multipliers
        Case((2, 5, 9, 8), multiplier=2, bias=True, statistics=True),
        Case((2, 3, 9, 12), (5, 4), (2, 3), multiplier=4),
        Case((2, 1, 9, 8), multiplier=9),
        # the mean of y is far larger than its deviation
        Case((4, 3, 16, 16), padding=(0, 0, 0, 0), mean=1e4, statistics=True),
        Case((4, 3, 16, 16), mean=-1e4, statistics=True),
        # strides of grad_y, x and weight
        *(Case((2, 9, 8, 9), bias=True, grad=grad) for grad in ("expanded", "sliced", "transposed", PLANES, LAST)),
        Case((2, 9, 8, 9), grad="offset"),
        Case((2, 9, 8, 9), weight="sliced"),
        Case((2, 8, 8, 9), dtype=BF16, weight="transposed", grad="sliced"),
    ),
    *(Case((2, 5, 8, 9), layout=name, statistics=True) for name in ("sliced", "transposed", "offset")),
    # one plane in several bands of rows
    Case((1, 2, 150, 260), layout=PLANES, statistics=True, bias=True),
    Case((1, 1, 300, 150), (5, 3), (2, 2), (2, 2, 1, 1), layout=PLANES),
    Case((1, 1, 190, 200), padding=(20, 20, 20, 20), dilation=(20, 20), layout=PLANES),
    Case((1, 1, 150, 260), multiplier=2, layout=PLANES),
    # large enough for stores past the caches, and for many partial results
    Case((2, 64, 96, 96), statistics=True, bias=True),
    Case((2, 64, 96, 96), (5, 5), (2, 2), (2, 2, 2, 2)),
    Case((1, 208, 72, 72), (7, 7), padding=(3, 3, 3, 3)),
    Case((1, 256, 66, 66), padding=(2, 2, 2, 2), dilation=(2, 2)),
    Case((1, 40, 120, 120), dtype=F64),
    Case((1, 96, 150, 150), dtype=BF16, statistics=True),
    Case((1, 96, 150, 150), (3, 3), (2, 2), dtype=F16, activation="relu", bias=True),
    *(case._replace(dtype=dtype, statistics=True) for dtype in (F64, BF16, F16) for case in both(
        Case((2, 19, 9, 17), bias=True), Case((2, 9, 9, 17), (7, 7), (2, 2), (3, 3, 3, 3)),
        Case((1, 5, 9, 10), (4, 3), (1, 3), (2, 3, 4, 0), (2, 2), multiplier=3),
    )),
    *both(*(Case((2, 11, 6, 9), bias=True, activation=name) for name in NAMES if name != "identity")),
    *both(*(Case((2, 11, 6, 9), activation=name, param=-0.5) for name in ("leaky_relu", "elu"))),
    *both(*(Case((2, 5, 6, 9), bias=True, activation="silu", dtype=dtype) for dtype in (F64, BF16, F16))),
    *both(Case((2, 5, 6, 9), bias=True, multiplier=2, activation="gelu")),
]  # fmt: skip

needs_cpu_kernels = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@every_target
@pytest.mark.parametrize("case", [*SMALL, *CASES], ids=str)
def test_parity(case: Case, target: tuple[str, str]) -> None:
    check(case, target)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size = st.integers(1, 31) if draw(st.integers(0, 9)) == 0 else st.sampled_from([1, 2, 3, 3, 4, 5, 7])
    kernel = (draw(size), draw(size))
    stride = (draw(st.integers(1, 4)), draw(st.integers(1, 4))) if draw(st.booleans()) else (1, 1)
    spread = st.sampled_from([1, 1, 2, 3, 7])
    dilation = (draw(spread), draw(spread))
    pad_h, pad_w = (min(12, dilation[i] * kernel[i]) for i in range(2))
    padding = tuple(draw(st.integers(0, pad)) for pad in (pad_h, pad_h, pad_w, pad_w))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.integers(1, 14)), draw(st.integers(1, 24)))
    strides = ["sliced", "transposed", "offset", LAST, PLANES]
    activation = draw(st.sampled_from(NAMES)) if draw(st.integers(0, 4)) == 0 else "identity"
    case = Case(
        shape,
        kernel,
        stride,
        padding,  # type: ignore[arg-type]
        dilation,
        multiplier=draw(st.sampled_from([1, 1, 1, 2, 3])),
        bias=draw(st.booleans()),
        statistics=activation == "identity" and draw(st.booleans()),
        activation=activation,
        dtype=draw(st.sampled_from([F32, F32, F64, BF16, F16])),
        layout=draw(st.sampled_from([LAST, LAST, PLANES, PLANES, "sliced", "offset"])),
        weight=draw(st.sampled_from([PLANES, PLANES, "sliced", "transposed"])),
        grad=draw(st.sampled_from(["like", "like", "expanded", *strides])),
        seed=draw(st.integers(0, 3)),
    )
    assume(min(case.output) >= 1)
    return case


@needs_cpu_kernels
@settings(max_examples=220, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_geometry(case: Case) -> None:
    check(case, ("cpu", "cpu"))


# ------------------------------------------------------------------- instruction sets and threads
_TELLING = both(
    Case((3, 21, 17, 30), bias=True, statistics=True),
    Case((3, 21, 17, 30), stride=(2, 2), statistics=True),
    Case((2, 70, 9, 10), (7, 7), padding=(3, 3, 3, 3), statistics=True),
    Case((2, 21, 17, 30), padding=(4, 4, 4, 4), dilation=(4, 4), statistics=True),
    Case((2, 128, 11, 17), padding=(4, 4, 4, 4), dilation=(4, 4), statistics=True),
    Case((2, 9, 17, 30), (3, 6), (1, 3), multiplier=2, bias=True, statistics=True),
    Case((3, 21, 17, 30), dtype=BF16, bias=True, statistics=True),
    Case((3, 21, 17, 30), dtype=F16, statistics=True),
    Case((2, 9, 17, 30), dtype=F64, bias=True),
)


@needs_cpu_kernels
@pytest.mark.parametrize("case", [*_TELLING, Case((2, 11, 6, 9), bias=True, activation="gelu")], ids=str)
def test_portable_instruction_set(case: Case) -> None:
    from dlkern import _C

    best = _C.build_info()["cpu_isa_active"]
    _C.set_isa("portable")
    try:
        check(case, ("cpu", "cpu"))
    finally:
        _C.set_isa(best)


@needs_cpu_kernels
@pytest.mark.parametrize("case", _TELLING, ids=str)
def test_the_same_bits_on_any_number_of_threads(case: Case) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(case, ("cpu", "cpu")))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert (one is None) == (two is None)
            assert one is None or torch.equal(one, two)


# ------------------------------------------------------------------------------- the contract
@every_target
@pytest.mark.parametrize("case", both(Case((2, 5, 6, 7), bias=True), Case((2, 3, 6, 7), multiplier=2)), ids=str)
def test_only_the_gradients_that_are_needed(case: Case, target: tuple[str, str]) -> None:
    device, backend = target
    op, d = implementation(backend), data(case, device)
    x = d.x.contiguous(memory_format=torch.channels_last) if case.layout == LAST else d.x
    names = ("needs_x", "needs_weight", "needs_bias")
    whole = op.backward(d.grad, x, d.weight, **case.geometry, **dict.fromkeys(names, True))
    for mask in range(8):
        wanted = [bool(mask >> i & 1) for i in range(3)]
        found = op.backward(d.grad, x, d.weight, **case.geometry, **dict(zip(names, wanted, strict=True)))
        for one, all_of_them, want in zip(found, whole, wanted, strict=True):
            assert (one is not None) == want
            assert one is None or torch.equal(one, all_of_them)


@every_target
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_infinities_and_nan_stay_under_their_taps(layout_name: str, target: tuple[str, str]) -> None:
    case = Case((1, 9, 9, 20), stride=(1, 2), layout=layout_name)
    device, backend = target
    op, d = implementation(backend), data(case, device)
    x, grad = d.x.clone(), d.grad.clone()
    x[0, 2, 4, 19], x[0, 3, 0, 0] = float("inf"), float("nan")  # column 19 is the last that an output reads
    x = x.contiguous(memory_format=torch.channels_last) if layout_name == LAST else x
    y, _, _ = op.forward(x, d.weight, None, **case.geometry, activation=case.act, statistics=False)
    want = torch.nn.functional.conv2d(x, d.weight, None, case.stride, 1, groups=9)
    assert torch.equal(y.isfinite(), want.isfinite())
    _, dweight, _ = op.backward(
        grad, x, d.weight, **case.geometry, needs_x=True, needs_weight=True, needs_bias=False
    )  # fmt: skip
    clean = [c for c in range(9) if c not in (2, 3)]
    assert dweight[clean].isfinite().all()


@needs_cpu_kernels
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_columns_that_no_tap_reads_do_not_matter(layout_name: str) -> None:
    """Column 7 of 8 is read by none of the outputs at stride 3 without padding."""
    case = Case((2, 9, 7, 8), stride=(1, 3), padding=(0, 0, 0, 0), kernel=(3, 1), layout=layout_name)
    op, d = implementation("cpu"), data(case, "cpu")
    x = d.x.clone()
    x[:, :, :, 7] = float("nan")
    x = x.contiguous(memory_format=torch.channels_last) if layout_name == LAST else x
    y, _, _ = op.forward(x, d.weight, None, **case.geometry, activation=case.act, statistics=False)
    assert y.isfinite().all()
    dx, dweight, _ = op.backward(
        d.grad, x, d.weight, **case.geometry, needs_x=True, needs_weight=True, needs_bias=False
    )  # fmt: skip
    assert dweight.isfinite().all()
    assert torch.equal(dx[:, :, :, 7], torch.zeros_like(dx[:, :, :, 7]))


def test_reference_gradients_are_those_of_its_forward() -> None:
    case = Case((2, 3, 6, 7), (3, 2), (2, 1), (2, 0, 1, 3), (1, 2), multiplier=2, bias=True, dtype=F64)
    d = data(case, "cpu")
    inputs = [v.clone().requires_grad_() for v in (d.x, d.weight, d.bias) if v is not None]
    y, _, _ = reference.forward(*inputs, **case.geometry, activation=case.act, statistics=False)
    wanted = torch.autograd.grad(y, inputs, d.grad)
    found = reference.backward(
        d.grad, d.x, d.weight, **case.geometry, needs_x=True, needs_weight=True, needs_bias=True
    )  # fmt: skip
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda *v: reference.forward(*v, **case.geometry, activation=case.act, statistics=True), inputs
    )


def test_reference_is_pytorch() -> None:
    case = Case((2, 4, 7, 6), (3, 4), (2, 1), (1, 1, 2, 2), (1, 2), multiplier=2, bias=True)
    d = data(case, "cpu")
    y, _, _ = reference.forward(d.x, d.weight, d.bias, **case.geometry, activation=case.act, statistics=False)
    torch.testing.assert_close(y, expected(case, "cpu", None).y)


def test_layout_of_the_output() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert not reference.channels_last(x)
    assert reference.channels_last(x.contiguous(memory_format=torch.channels_last))
    assert not reference.channels_last(torch.randn(2, 3, 1, 1).contiguous(memory_format=torch.channels_last))
    assert reference.channels_last(layout.dense(x.contiguous(memory_format=torch.channels_last)))


def test_reasons() -> None:
    op, good = implementation("cpu"), request(Case((1, 1, 3, 3)), "cpu")
    assert "on the CPU" in str(op.supports(good._replace(device="cuda")))
    if unavailable() is None:
        assert op.supports(good) is None
        assert "int8" in str(op.supports(good._replace(dtype=torch.int8)))
        assert "31 x 31" in str(op.supports(good._replace(kernel=(3, 33))))
        assert "softplus" in str(op.supports(good._replace(activation="softplus")))
