"""The host shim: CUDA C++ on the CPU. What is right runs, and each planted error is reported."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import host_shim
import pytest
import torch
from host_shim import Refused, ShimError, Struct
from torch import Tensor

_SHIM = Path(host_shim.__file__).resolve().parent
_KERNELS, _CSRC = _SHIM / "kernels", _SHIM.parents[1] / "csrc"

if host_shim.missing() is not None:
    pytest.skip(str(host_shim.missing()), allow_module_level=True)


def basics() -> host_shim.Program:
    return host_shim.build(_KERNELS / "basics.cu", ("round_trip<__half>", "round_trip<__nv_bfloat16>"))


def planted() -> host_shim.Program:
    return host_shim.build(_KERNELS / "planted.cu")


def zeros(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(n, dtype=dtype)


# ------------------------------------------------------------------------------------------------- what is covered
@pytest.mark.parametrize(("kernel", "shared"), [("block_sum", 4 * 128), ("shuffle_sum", 0)])
def test_reductions(kernel: str, shared: int) -> None:
    x, out = torch.arange(-300, 600, dtype=torch.int32), zeros(8, torch.int32)
    basics().launch(kernel, (8,), (128,), [x, out, 900], shared=shared)
    assert out.tolist() == [int(part.sum()) for part in x.split(128)]


def test_shuffles() -> None:
    out = torch.zeros(64, 5)
    basics().launch("shuffles", (1,), (64,), [out])
    for thread in range(64):
        lane, warp = thread % 32, thread // 32 * 32
        up = lane - 3 if lane >= 3 else lane
        down = lane + 5 if lane % 16 + 5 < 16 else lane
        xor = lane ^ 9 if (lane ^ 9) < (lane | 7) + 1 else lane
        expected = [1.5 * (warp + source) for source in (lane, up, down, xor, lane // 16 * 16 + 7)]
        assert out[thread].tolist() == expected, thread


def test_votes_of_parts_of_a_warp() -> None:
    out = torch.zeros(64, 6, dtype=torch.uint32)
    basics().launch("votes", (1,), (64,), [out])
    for thread in range(64):
        low = thread % 32 < 16
        ballot = 0xAAAA if low else 0xC0000000
        assert out[thread].tolist() == [ballot, int(not low), int(low), 22, 0, 1], thread


def test_atomics() -> None:
    x = torch.randint(-1000, 1000, (256,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    out, big = zeros(5, torch.int32), zeros(1, torch.uint64)
    basics().launch("atomics", (4,), (64,), [x, out, big])
    assert out.tolist() == [int(x.sum()), int(x.max()), int(x.min()), 7, 1]
    assert big.item() == 256 << 33


def test_indices_in_three_dimensions_and_scalars() -> None:
    out = torch.zeros(4, 6, 10, 4, dtype=torch.int32)  # z, y, x
    basics().launch("indices", (5, 2, 1), (2, 3, 4), [out, ctypes.c_int(3), 2.5])
    z, y, x = torch.meshgrid(torch.arange(4), torch.arange(6), torch.arange(10), indexing="ij")
    assert torch.equal(out.long(), torch.stack([x, y, z, torch.full_like(x, 7)], dim=-1))


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "__half"), (torch.bfloat16, "__nv_bfloat16")])
def test_16_bit_types_round_as_torch_does(dtype: torch.dtype, name: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    every = every[every.isfinite()].sort().values
    ties = (every[1:].double() + every[:-1].double()) / 2  # exact in float32
    near = torch.cat([every, ties.float(), ties.float().nextafter(every[1:]), ties.float().nextafter(every[:-1])])
    edge = torch.finfo(dtype).max * torch.tensor(
        [1.0, 1.0 + 2**-12, 1.0 + 2**-8, 2.0, float("inf")], dtype=torch.float64
    )
    bits = torch.randint(-(2**31), 2**31 - 1, (20000,), generator=torch.Generator().manual_seed(0)).int()
    x = torch.cat([near, edge.float(), -edge.float(), bits.view(torch.float32), torch.tensor([float("nan"), -0.0])])
    narrow, wide = torch.empty(x.numel(), dtype=dtype), torch.empty(x.numel())
    basics().launch(f"round_trip<{name}>", (1,), (64,), [x, narrow, wide, x.numel()], schedules=["forward"])
    expected = x.to(dtype)
    numbers = ~x.isnan()
    assert torch.equal(narrow[numbers].view(torch.int16), expected[numbers].view(torch.int16))
    assert torch.equal(wide[numbers], expected[numbers].float())
    assert bool(narrow[~numbers].isnan().all())
    assert bool(wide[~numbers].isnan().all())


def axpb(x: Tensor, y: Tensor, packs: int) -> None:
    data = struct.pack("@2Q2fi4x", 0, 0, 2.0, -1.0, packs)
    basics().launch("axpb", (2,), (32,), [Struct(data, {0: x, 8: y})])


def test_structure_of_pointers_and_packs() -> None:
    x, y = torch.arange(160.0), torch.zeros(160)
    axpb(x, y, 40)
    assert torch.equal(y, 2 * x - 1)
    with pytest.raises(ShimError, match=r"axpb: (.|\n)*heap-buffer-overflow"):
        axpb(x, y, 41)
    with pytest.raises(ShimError, match="misaligned address"):
        axpb(torch.arange(161.0)[1:], y, 40)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "__half"), (torch.bfloat16, "__nv_bfloat16")])
def test_mma_tile(dtype: torch.dtype, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, n, generator=generator).to(dtype) for n in (16, 8))
    c, d = torch.randn(16, 8, generator=generator), torch.zeros(16, 8)
    program = host_shim.build(_KERNELS / "mma.cu", ("mma<__half>", "mma<__nv_bfloat16>"))
    program.launch(f"mma<{name}>", (1,), (32,), [a, b, c, d])
    assert torch.equal(d, (a.double() @ b.double() + c.double()).float())
    with pytest.raises(ShimError, match="all 32 must"):
        program.launch(f"mma<{name}>", (1,), (31,), [a, b, c, d])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: the device form of mma_tile is not compiled")
def test_mma_tile_for_the_device(tmp_path: Path) -> None:
    source = tmp_path / "device.cu"
    kernels = "".join(
        f"template __global__ void mma<{t}>(const {t}*, const {t}*, const float*, float*);\n"
        for t in ("__half", "__nv_bfloat16")
    )
    source.write_text((_KERNELS / "mma.cu").read_text() + kernels)
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-ptx", f"-I{_CSRC}", str(source), "-o", str(tmp_path / "out.ptx")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    ptx = (tmp_path / "out.ptx").read_text()
    for kind in ("f16", "bf16"):
        assert ptx.count(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32") == 1


def test_the_schedule_is_the_order_of_threads() -> None:
    """A kernel whose last writer wins shows which order ran."""
    for schedule, last in (("forward", 6), ("reverse", 0)):
        out = zeros(1, torch.int32)
        planted().launch("race_of_blocks", (7,), (1,), [out], schedules=[schedule])
        assert out.item() == last


# ------------------------------------------------------------------------------------------------- planted errors
_X = torch.arange(64.0) ** 2

PLANTED = [
    # kernel, grid, block, arguments, shared bytes, what the report says
    ("write_past_the_end", 3, 32, [_X.clone(), 64], 0, r"WRITE of size 4(.|\n)*buffer 0, 256 bytes from its start"),
    ("read_before_the_start", 1, 64, [_X.clone(), zeros(64)], 0, r"READ of size 4(.|\n)*buffer 0, -4 bytes"),
    ("write_before_the_start", 1, 1, [zeros(8, torch.float16)], 0, "WRITE of size 2"),
    ("write_before_the_start", 1, 1, [zeros(8, torch.float16)[1:]], 0, "2 bytes before the start of buffer 0"),
    ("misaligned", 1, 1, [_X[1:].clone(), _X[1:]], 0, r"misaligned address .* 'struct float4'"),
    ("past_shared", 1, 32, [zeros(32), 1], 0, r"out of bounds for type 'float \[32\]'"),
    ("past_shared_by_pointer", 1, 32, [zeros(32), 1], 0, r"global-buffer-overflow(.|\n)*thread \(31, 0, 0\)"),
    ("past_dynamic_shared", 1, 32, [zeros(32), 1], 128, r"heap-buffer-overflow(.|\n)*thread \(31, 0, 0\)"),
    ("past_local", 1, 1, [zeros(8), 5], 0, r"out of bounds for type 'float \[4\]'"),
    ("overflow", 1, 1, [zeros(1, torch.int32), 70000], 0, "signed integer overflow"),
    ("unwritten_shared", 1, 64, [zeros(64)], 0, "race: .*buffer 0 .*memory is read that nothing has written"),
    ("missing_barrier", 1, 64, [_X, zeros(64)], 0, "race: .*buffer 1 .*a barrier is missing"),
    ("missing_second_barrier", 1, 64, [_X, zeros(64), 3], 0, "race: .*buffer 1 .*a barrier is missing"),
    ("missing_syncwarp", 1, 32, [_X, zeros(32)], 0, "race: .*buffer 1 .*a barrier is missing"),
    ("race_of_blocks", 2, 1, [zeros(1, torch.int32)], 0, "race: .*buffer 0"),
    ("barrier_after_return", 2, 64, [zeros(64), 10], 0,
     r"block \(0, 0, 0\)\n.*divergent barrier: of 64 threads: 10 at __syncthreads .*planted.cu:\d+\); 54 returned"),
    ("two_barriers", 1, 64, [zeros(64)], 0, r"divergent barrier: of 64 threads: 32 at .*:\d+\); 32 at __syncthreads"),
    ("shuffle_in_a_branch", 1, 32, [zeros(32, torch.int32)], 0, "7 at __shfl_down_sync .*25 at __syncthreads"),
    ("shuffle_of_a_short_warp", 1, 20, [zeros(20, torch.int32)], 0, "__shfl_down_sync .* reads lane 20"),
    ("mask_without_caller", 1, 32, [zeros(32, torch.uint32)], 0, "lane 4 is not in its mask 0xf"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "grid", "block", "arguments", "shared", "report"), PLANTED, ids=[row[0] for row in PLANTED]
)
def test_planted_error(kernel: str, grid: int, block: int, arguments: list[Any], shared: int, report: str) -> None:
    before = [v.clone() if isinstance(v, Tensor) else v for v in arguments]
    with pytest.raises(ShimError, match=f"^{kernel}: (.|\n)*{report}"):
        planted().launch(kernel, (grid,), (block,), arguments, shared=shared)
    for value, copy in zip(arguments, before, strict=True):
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(copy)), "written after an error"


def test_a_planted_race_needs_more_than_one_schedule() -> None:
    """What one order shows is a result: the comparison of orders is what finds the race."""
    planted().launch("missing_barrier", (1,), (64,), [_X, zeros(64)], schedules=["reverse"])


def test_endless_kernel() -> None:
    with pytest.raises(ShimError, match="no end within 2 seconds"):
        planted().launch("forever", (1,), (1,), [zeros(1, torch.int32)], timeout=2)


# -------------------------------------------------------------------------------------------------------- refusals
WRAPPED = '#include "cuda/cuda_prelude.h"\nextern "C" __global__ void kernel(int* out) {{\n  {}\n}}\n'

REFUSED = [
    ('asm volatile("bar.sync 0;");', r"refused.cu:3: the host shim does not run inline assembly: asm volatile"),
    ("kernel<<<1, 1>>>(out);", "a launch from device code"),
    ("auto g = cooperative_groups::this_thread_block();", "cooperative groups"),
    ("*out = tex2D<int>(0, 1, 2);", "textures"),
    ("*out = __activemask();", "__activemask"),
    ("*out = __shfl(1, 2);", "without _sync"),
    ('printf("%d", *out);', "printf"),
    ("__shared__ int a = 1;", "initialiser"),
    ("*out = __nv_some_intrinsic(1);", "cannot compile(.|\n)*host_shim.h(.|\n)*__nv_some_intrinsic"),
    ("__shared__ int a[20000]; a[0] = 1; *out = a[0];", None),
]


@pytest.mark.parametrize(("body", "reason"), REFUSED, ids=[body.split("(")[0][:20] for body, _ in REFUSED])
def test_refused_by_name(body: str, reason: str | None, tmp_path: Path) -> None:
    source = tmp_path / "refused.cu"
    source.write_text(WRAPPED.format(body))
    if reason is None:  # known at run time only
        with pytest.raises(ShimError, match="80000 bytes of static __shared__ memory; 48 KiB"):
            host_shim.build(source).launch("kernel", (1,), (1,), [zeros(1, torch.int32)])
        return
    with pytest.raises(Refused, match=reason):
        host_shim.build(source)


def test_a_missing_header_is_refused_by_name(tmp_path: Path) -> None:
    source = tmp_path / "refused.cu"
    source.write_text("#include <cooperative_groups.h>\n" + WRAPPED.format("*out = 1;"))
    with pytest.raises(Refused, match=r"cooperative_groups.h(.|\n)*No such file"):
        host_shim.build(source)


def test_arguments_that_do_not_fit() -> None:
    x, out = zeros(8, torch.int32), zeros(8, torch.int32)
    launch = basics().launch
    with pytest.raises(ShimError, match="takes 3 arguments, given 2"):
        launch("block_sum", (1,), (32,), [x, out], shared=128)
    with pytest.raises(ShimError, match=r"argument 0 is .*pointer to int32, the tensor float32"):
        launch("block_sum", (1,), (32,), [x.float(), out, 8], shared=128)
    with pytest.raises(ShimError, match="cannot hold 4294967296"):
        launch("block_sum", (1,), (32,), [x, out, 2**32], shared=128)
    with pytest.raises(ShimError, match="of 4 bytes, given 8"):
        launch("block_sum", (1,), (32,), [x, out, ctypes.c_longlong(8)], shared=128)
    with pytest.raises(ShimError, match="a block of 1025 x 1 x 1 threads"):
        launch("block_sum", (1,), (1025,), [x, out, 8], shared=128)
    with pytest.raises(ShimError, match="262144 bytes of shared memory"):
        launch("block_sum", (1,), (32,), [x, out, 8], shared=2**18)
    with pytest.raises(ShimError, match="no schedule 'sideways'"):
        launch("block_sum", (1,), (32,), [x, out, 8], shared=128, schedules=["sideways"])
    with pytest.raises(ShimError, match="no kernel nothing in this build"):
        launch("nothing", (1,), (1,), [x])
    with pytest.raises(ValueError, match="overlap"):
        launch("block_sum", (1,), (32,), [x, x[1:], 8], shared=128)
    with pytest.raises(TypeError, match="not 'eight'"):
        launch("block_sum", (1,), (32,), [x, out, "eight"], shared=128)
