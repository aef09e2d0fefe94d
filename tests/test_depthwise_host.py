"""The CUDA C++ kernels of depthwise with their own launcher, on the CPU: the host shim in place of a device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from unittest import mock

import cuda_host
import host_shim
import pytest
import torch
from cuda_host import HostRuntime
from depthwise_cases import SMALL, Case, check, request, run
from host_shim import ShimError
from torch import Tensor

import dlkern
from dlkern.functional import depthwise_conv2d
from dlkern.kernels import cuda
from dlkern.kernels.activation import NAMES
from dlkern.kernels.cuda import depthwise, depthwise_plan, plan
from dlkern.kernels.cuda.plan import Launch

if host_shim.missing() is not None:
    pytest.skip(str(host_shim.missing()), allow_module_level=True)

runtime = pytest.fixture(cuda_host.forced, name="runtime")
TARGET = ("cpu", "cuda")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LAST, PLANES = "channels_last", "contiguous"


def both(*cases: Case) -> list[Case]:
    return [case._replace(layout=name) for case in cases for name in (LAST, PLANES)]


CASES = [
    # unrolled kernels: several tiles of columns, strips and shares, edges of all kinds
    Case((2, 8, 15, 30), bias=True, statistics=True),
    Case((1, 20, 13, 18), (5, 5), padding=(2, 2, 2, 2), statistics=True),
    Case((1, 8, 9, 12), (7, 7), padding=(3, 3, 3, 3), bias=True),
    Case((2, 4, 11, 9), stride=(2, 2), statistics=True),
    Case((2, 4, 10, 8), stride=(2, 2), padding=(0, 1, 0, 1)),
    Case((1, 8, 14, 11), (5, 5), (2, 2), (2, 1, 0, 4)),
    Case((1, 8, 9, 13), (7, 7), (2, 2), (3, 3, 2, 5), statistics=True),
    Case((1, 4, 90, 3), padding=(2, 0, 1, 1)),
    # the same for one column, one row, and less than a kernel
    Case((2, 4, 1, 1)),
    Case((1, 4, 2, 9), (7, 7), (2, 2), (3, 3, 3, 3)),
    # kernels of each size from 1 to 7, in either memory format
    *both(
        *(Case((1, 4, 8, 9), (k, k), padding=(k // 2,) * 4, statistics=k % 2 == 0) for k in range(1, 8)),
        # rectangular and large, several strides, 'same' of an even kernel, one-sided padding
        Case((1, 4, 9, 10), (3, 5), (2, 1), (0, 1, 2, 3), bias=True),
        Case((1, 4, 9, 10), (4, 2), (1, 3), (1, 2, 0, 1), statistics=True),
        Case((1, 3, 5, 40), (1, 31), padding=(0, 0, 15, 15)),
        Case((1, 2, 33, 6), (31, 3), padding=(15, 15, 1, 1), statistics=True),
        Case((1, 2, 18, 20), (31, 31), padding=(15, 15, 15, 15)),
        Case((1, 2, 40, 41), (31, 31), (2, 3), (9, 15, 15, 1)),
        Case((1, 4, 23, 9), (2, 3), (7, 5), (0, 0, 1, 1), bias=True, statistics=True),
        # dilation: with and without strides that share a factor with it
        Case((1, 4, 12, 13), padding=(2, 2, 2, 2), dilation=(2, 2), statistics=True),
        Case((1, 4, 9, 30), padding=(12, 12, 12, 12), dilation=(12, 12)),
        Case((1, 4, 3, 4), padding=(18, 18, 18, 18), dilation=(18, 18)),
        Case((1, 3, 14, 15), (5, 3), (2, 3), (4, 4, 3, 3), (2, 3)),
        Case((1, 3, 14, 15), (3, 3), (6, 4), (5, 4, 3, 3), (4, 6), statistics=True),
        # depth multipliers
        Case((1, 5, 8, 7), multiplier=2, bias=True, statistics=True),
        Case((1, 3, 9, 8), (5, 4), (2, 3), multiplier=3),
        # the mean of y is far larger than its deviation
        Case((2, 4, 12, 12), padding=(0, 0, 0, 0), mean=1e4, statistics=True),
        # strides and alignment
        *(Case((1, 8, 6, 7), bias=True, grad=grad) for grad in ("expanded", "sliced", "transposed", "offset")),
        Case((1, 8, 6, 7), weight="sliced"),
    ),
    *(Case((1, 8, 6, 7), layout=name, statistics=True) for name in ("sliced", "transposed", "offset")),
    # more channels than a block has side by side, and channels that are no whole number of packs
    Case((1, 300, 4, 3), statistics=True),
    Case((1, 67, 4, 3), (5, 5), padding=(2, 2, 2, 2), statistics=True),
    *both(*(Case((1, 4, 5, 6), bias=True, activation=name) for name in NAMES if name != "identity")),
    *both(*(Case((1, 8, 5, 6), activation="silu", dtype=dtype) for dtype in (F64, BF16, F16))),
    *both(*(Case((1, 8, 5, 6), activation="elu", param=-0.5, multiplier=m) for m in (1, 2))),
]  # fmt: skip


@pytest.mark.parametrize("case", [*SMALL, *CASES], ids=str)
def test_parity(case: Case, runtime: HostRuntime) -> None:
    check(case, TARGET)
    assert ("merge_statistics" in runtime.names) == case.statistics
    assert ("merge_weight_gradient" in runtime.names) == (case.activation == "identity")


@pytest.mark.parametrize("dtype", plan.TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_kernel(dtype: torch.dtype, runtime: HostRuntime) -> None:
    """Each kernel of a dtype runs, and is right."""
    shape = (1, 16, 9, 10)
    for statistics in (False, True):
        for stride in ((1, 1), (2, 2)):
            for size in (3, 5, 7):
                padding = (size // 2,) * 4
                check(Case(shape, (size, size), stride, padding, statistics=statistics, dtype=dtype), TARGET)
        for name in (LAST, PLANES):
            check(Case(shape, (2, 3), (2, 1), statistics=statistics, layout=name, dtype=dtype), TARGET)
    assert {launch.kernel for launch in runtime.ran} == set(depthwise_plan.kernels(dtype))


def test_shares_strips_and_tiles(runtime: HostRuntime) -> None:
    """Several blocks have part of a channel, in rows, columns and images, and each several parts."""
    few = mock.patch.object(depthwise_plan, "_THREADS_PER_MULTIPROCESSOR", 256)
    with few, mock.patch.object(runtime, "multiprocessors", return_value=1):
        check(Case((4, 8, 24, 40), statistics=True), TARGET)
        check(Case((4, 8, 24, 40), stride=(2, 2), statistics=True), TARGET)
        for launch in runtime.ran:
            if "merge" in launch.kernel:
                continue
            assert launch.grid[1] > 2, launch.kernel
            assert launch.fields["items"] > launch.grid[1], launch.kernel
            assert launch.fields["tiles"] > 1, launch.kernel
        assert runtime.names >= {"forward", "input_gradient_unrolled", "weight_gradient"}
        runtime.ran.clear()
        check(Case((1, 4, 150, 5), statistics=True), TARGET)
        assert all(launch.fields["segments"] > 1 for launch in runtime.ran)


def test_any_problem_has_tiles() -> None:
    """Shared memory, threads and grids stay within their limits, whatever the geometry."""
    for dtype in plan.TYPES:
        for kernel in ((1, 1), (3, 3), (5, 5), (7, 7), (31, 31), (31, 1), (1, 31), (13, 31)):
            for stride, dilation in (((1, 1), (1, 1)), ((2, 2), (1, 1)), ((97, 101), (1, 1)), ((3, 1), (64, 35))):
                size = tuple(dilation[i] * (kernel[i] - 1) + 200 for i in range(2))
                for channels_last, width in ((True, plan.TYPES[dtype].width), (True, 1), (False, 1)):
                    out = tuple(199 // stride[i] + 1 for i in range(2))
                    p = depthwise_plan.Problem(
                        dtype, width, channels_last, 64, 48, 1, *size, *out, kernel, stride, dilation, (0, 0)
                    )
                    steps = [*depthwise_plan.forward(p, 132, {}, statistics=True)[0]]
                    steps += [*depthwise_plan.input_gradient(p, 132), *depthwise_plan.weight_gradient(p, 132)[0]]
                    for step in steps:
                        assert step.kernel in depthwise_plan.kernels(dtype)
                        assert step.shared_bytes <= plan.MAX_SHARED, step
                        assert 1 <= step.threads <= plan.MAX_THREADS, step
                        assert 1 <= step.grid[1] <= plan.MAX_GRID_Y, step
                        if p.unrolled[0] and "merge" not in step.kernel:
                            rows = 2 if stride == (2, 2) else 4  # of a thread: an unrolled kernel has all of them
                            assert step.numbers["tile_rows"] % rows == 0, step


def test_infinities_and_nan_stay_under_their_taps(runtime: HostRuntime) -> None:
    """A pixel that no tap reads may be anything; one that is read changes its own channel alone."""
    for name in (LAST, PLANES):
        for kernel, stride in (((3, 3), (2, 2)), ((2, 2), (3, 3))):
            x = torch.randn(1, 8, 10, 12)
            x[:, :, -1], x[:, :, :, -1] = float("nan"), float("nan")
            x[0, 2, 2, 2] = float("inf")
            if name == LAST:
                x = x.contiguous(memory_format=torch.channels_last)
            weight = torch.randn(8, 1, *kernel)
            geometry = {"stride": stride, "padding": (0, 0, 0, 0), "dilation": (1, 1)}
            case = Case((1, 8, 10, 12))
            y, _, _ = depthwise.forward(x, weight, None, **geometry, activation=case.act, statistics=False)
            want = torch.nn.functional.conv2d(x, weight, stride=stride, groups=8)
            assert want.isfinite()[:, 3:].all()
            assert torch.equal(y.isfinite(), want.isfinite())
            grad = torch.randn_like(y)
            dx, dweight, _ = depthwise.backward(
                grad, x, weight, **geometry, needs_x=True, needs_weight=True, needs_bias=False
            )
            assert dx is not None
            assert dx.isfinite().all()
            want = torch.nn.grad.conv2d_weight(x, weight.shape, grad, stride, groups=8)
            assert dweight is not None
            assert torch.equal(dweight.isfinite(), want.isfinite())


@pytest.mark.parametrize("name", [LAST, PLANES])
def test_only_the_gradients_that_are_needed(name: str, runtime: HostRuntime) -> None:
    x, weight = torch.randn(2, 8, 6, 7), torch.randn(8, 1, 3, 3)
    if name == LAST:
        x = x.contiguous(memory_format=torch.channels_last)
    options = {"stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1)}
    names = ("needs_x", "needs_weight", "needs_bias")
    whole = depthwise.backward(x, x, weight, **options, **dict.fromkeys(names, True))
    for mask in range(8):
        wanted = [bool(mask >> i & 1) for i in range(3)]
        runtime.ran.clear()
        found = depthwise.backward(x, x, weight, **options, **dict(zip(names, wanted, strict=True)))
        assert len(runtime.ran) == wanted[0] + 2 * (wanted[1] or wanted[2])
        for one, all_of_them, want in zip(found, whole, wanted, strict=True):
            assert (one is not None) == want
            assert one is None or torch.equal(one, all_of_them)


@pytest.mark.parametrize("name", [LAST, PLANES])
def test_gradcheck_through_the_op(name: str, runtime: HostRuntime) -> None:
    """Forced, the op runs these kernels and no others, forward and backward."""
    x, weight, bias = (torch.randn(size, dtype=F64) for size in ((1, 2, 4, 3), (2, 1, 3, 2), (2,)))
    if name == LAST:
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = [v.requires_grad_() for v in (x, weight, bias)]
    for stride in (1, 2):
        runtime.ran.clear()
        with dlkern.backend(depthwise="cuda"):
            assert torch.autograd.gradcheck(
                lambda *v, s=stride: depthwise_conv2d(*v, stride=s, padding=1), inputs, fast_mode=True
            )
        assert runtime.names == {
            "forward", "weight_gradient", "merge_weight_gradient", *(("input_gradient",) if stride == 2 else ())
        }  # fmt: skip


def test_batch_norm_takes_the_statistics_of_the_convolution(runtime: HostRuntime) -> None:
    layer = dlkern.nn.DepthwiseConvBNAct2d(8, 3)
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    with dlkern.backend("torch"):
        wanted = layer(x)
    with dlkern.backend(depthwise="cuda", batch_norm_act="cuda"):
        found = layer(x)
    torch.testing.assert_close(found, wanted)
    assert "merge_statistics" in runtime.names  # the convolution's
    assert "statistics" not in runtime.names  # batch norm reads nothing for them


def test_supports_says_why_not(runtime: HostRuntime) -> None:
    good = request(Case((1, 1, 3, 3)), "cuda")
    assert depthwise.supports(good) is None
    assert "int8" in str(depthwise.supports(good._replace(dtype=torch.int8)))
    assert "softplus" in str(depthwise.supports(good._replace(activation="softplus")))
    assert "31 x 31, not of (3, 33)" in str(depthwise.supports(good._replace(kernel=(3, 33))))
    assert "'relu'" in str(depthwise.supports(good._replace(activation="relu", statistics=True)))
    with mock.patch.object(cuda, "forced", None):
        assert "not on 'cpu'" in str(depthwise.supports(good._replace(device="cpu")))


def test_bad_calls(runtime: HostRuntime) -> None:
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(3, 1, 3, 3)
    options = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1)}
    relu = Case((1, 1, 1, 1), activation="relu").act
    with pytest.raises(ValueError, match="'identity', not 'relu'"):
        depthwise.forward(x, weight, None, **options, activation=relu, statistics=True)
    for image in (x[:0], x[..., :2]):
        with pytest.raises(ValueError, match="nothing to convolve"):
            depthwise.forward(image, weight, None, **options, activation=relu, statistics=False)
    assert runtime.ran == []


def test_a_tensor_that_is_too_small_is_reported(runtime: HostRuntime) -> None:
    """The sanitizer looks at the launcher's own tensors: one element less than a kernel writes is an error."""

    def shortened(launches: Sequence[Launch], device: torch.device) -> None:
        first, *others = launches
        y = first.fields["y"]
        assert isinstance(y, Tensor)
        host.run([first._replace(fields={**first.fields, "y": y.permute(0, 2, 3, 1).flatten()[:-1]}), *others], device)

    host = HostRuntime()
    message = r"forward<float, 4, 3, 1, false>: (.|\n)*heap-buffer-overflow(.|\n)*WRITE of size"
    with mock.patch.object(runtime, "run", shortened), pytest.raises(ShimError, match=message):
        run(Case((2, 8, 5, 7)), TARGET)


def test_a_barrier_that_is_missing_is_reported(runtime: HostRuntime) -> None:
    """Each kernel that shares memory, without its barriers, while the others have theirs."""
    broken = HostRuntime(edits=(("__syncthreads();", ";"),))

    def run_some(only: str, launches: Sequence[Launch], device: torch.device) -> None:
        for launch in launches:
            (broken if f"::{only}<" in launch.kernel else runtime).run([launch], device)

    original = HostRuntime()
    cases = {
        "forward": Case((1, 8, 30, 16)),
        "merge_statistics": Case((4, 8, 40, 16), statistics=True),
        "input_gradient_unrolled": Case((1, 8, 30, 16), stride=(2, 2)),
        "weight_gradient": Case((1, 8, 30, 16)),
        "merge_weight_gradient": Case((4, 8, 40, 16)),
    }
    for kernel, case in cases.items():
        some = mock.Mock(run=functools.partial(run_some, kernel), multiprocessors=original.multiprocessors)
        with mock.patch.object(cuda, "forced", some), pytest.raises(ShimError, match=f"{kernel}<.*race: "):
            run(case, TARGET)
