"""How the products of kernels/triton/implicit_gemm.py are launched: tiles, modes and precision."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.conv_bn_act import Convolution
from . import implicit_gemm as gemm
from . import interpreted, tiles
from .target import ALL_REGISTERS

_INT32_END = 2**31
#: More taps than these are not unrolled: 25 took half a minute to compile.
MAX_UNROLLED = 9
#: Fewer channels than a product's least depth are laid out with their taps.
_LEAST_DEPTH = 16
#: Elements of the partial sums of a weight gradient (256 MiB).
_MAX_PARTIAL = 2**26
_MAX_SPLITS = 128
#: Filters that reach over at least this share of an image (its inverse) look for taps to leave out.
_SKIPPED_FROM = 3


class Launch(NamedTuple):
    """A launch configuration; block_k is in elements of two bytes."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


#: Tensor cores (half types and TF32), float32 in full precision, and float64.
TENSOR = (
    Launch(128, 128, 64, 8, 3),
    Launch(128, 64, 64, 8, 3),
    Launch(64, 64, 64, 4, 3),
    Launch(64, 32, 64, 4, 3),
    Launch(64, 16, 64, 4, 3),
)
EXACT = (Launch(64, 64, 32, 8, 2), Launch(32, 32, 32, 4, 1))
DOUBLE = (Launch(16, 16, 64, 8, 1),)

#: Set by tests and tuning to run one configuration; None leaves the choice to the heuristic.
forced: Launch | None = None


def allows_tf32() -> bool:
    """Whether PyTorch's settings let a float32 convolution run in TF32."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    if conv is not None and hasattr(conv, "fp32_precision"):
        return conv.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def architecture(device: torch.device) -> int | None:
    """80, 90, 100 or 120 of an NVIDIA GPU by its compute capability; None of anything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)[0] * 10


def table(dtype: torch.dtype, mode: int, arch: int | None = None, *, skip: bool = False) -> tuple[Launch, ...]:
    """The configurations for a dtype and a mode under the present settings: on an architecture, or (None) all."""
    if dtype == torch.float64:
        return DOUBLE
    launches = EXACT if dtype == torch.float32 and precision(dtype) == "ieee" else TENSOR
    if launches is TENSOR and not (arch in (None, 90) or (arch == 100 and dtype != torch.float32 and not skip)):
        launches = TENSOR[1:]  # without wgmma the largest tile spills, on 100 in TF32 and where taps are skipped
    # (see there; flat addresses take many registers, too)
    if mode in (gemm.FLAT.value, gemm.TAP_LOOP.value, gemm.PHASES.value):
        return tuple(launch for launch in launches if launch.num_warps <= 4)
    return launches


def choose(
    rows: int,
    columns: int,
    products: int,
    dtype: torch.dtype,
    mode: int,
    device: torch.device,
    *,
    shared: bool = False,
    skip: bool = False,
) -> Launch:
    """The configuration for ``products`` products of rows x columns that should take the least time.

    The time of a tile counts its area and, for what it loads, its sides; few tiles leave the device idle, unless
    (``shared``) each is cut into shares.
    """
    candidates = table(dtype, mode, architecture(device), skip=skip)
    if forced is not None:
        if forced not in candidates:
            raise ValueError(f"{forced} is none of the configurations for {dtype} in mode {mode}")
        return forced
    slots = tiles._programs(device) // 2

    def time(launch: Launch) -> float:
        programs = triton.cdiv(rows, launch.block_m) * triton.cdiv(columns, launch.block_n) * products
        cost = launch.block_m * launch.block_n + 32 * (launch.block_m + launch.block_n)
        return (programs if shared else max(programs / slots, 1.0)) * cost

    return min(candidates, key=time)


def mode(weight: Tensor, convolution: Convolution, depth: int, *, phases: bool = False) -> int:
    """How taps and ``depth`` channels are summed (see implicit_gemm); ``phases`` in an input gradient."""
    taps = weight.size(2) * weight.size(3)
    if taps == 1 and convolution.stride == (1, 1) and convolution.padding == (0, 0):
        return gemm.POINTWISE.value
    if taps > 1 and depth < _LEAST_DEPTH:
        return gemm.FLAT.value
    if phases and convolution.stride != (1, 1):
        return gemm.PHASES.value if convolution.dilation == (1, 1) else gemm.TAP_LOOP.value
    return gemm.TAP_LOOP.value if taps > MAX_UNROLLED else gemm.TAPS.value


def skips(weight: Tensor, convolution: Convolution, mode: int, *sizes: int) -> bool:
    """Whether many taps lie outside of an image of (height, width): those of a dilated filter of about its size."""
    if mode not in (gemm.TAPS.value, gemm.TAP_LOOP.value):
        return False
    reach = [d * (k - 1) if d > 1 else 0 for d, k in zip(convolution.dilation, weight.shape[2:], strict=True)]
    return any(_SKIPPED_FROM * r >= size for r, size in zip(reach, sizes, strict=True))


def needs_int64(*tensors: Tensor) -> bool:
    """Whether an offset into one of the tensors, or of the last rows of a tile over it, passes 32 bits."""
    return any(t.numel() + 256 * (t.size(1) + 1) > _INT32_END for t in tensors)


def meta(
    launch: Launch,
    dtype: torch.dtype,
    kernel: tuple[int, int],
    mode: int,
    int64: bool,
    depth: int | None = None,
    *,
    skip: bool = False,
) -> dict[str, Any]:
    """The keyword arguments of a product over ``depth`` channels, or (None) over positions."""
    # In float64 a sum of products holds block_m x block_k x block_n of them.
    block_k = 16 if dtype == torch.float64 else launch.block_k * 2 // dtype.itemsize
    if mode == gemm.FLAT.value:  # an address for each element: few at a time
        block_k = _LEAST_DEPTH
    elif depth is not None:
        block_k = max(_LEAST_DEPTH, min(block_k, triton.next_power_of_2(depth)))
    return {
        "R": kernel[0],
        "S": kernel[1],
        "MODE": mode,
        "SKIP": skip,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": precision(dtype),
        "INT64": int64,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": block_k,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **ALL_REGISTERS,
    }


def splits(tiles_: int, steps: int, size: int, device: torch.device) -> int:
    """Into how many shares the positions of a weight gradient of ``size`` elements are cut."""
    wanted = triton.cdiv(tiles._programs(device), tiles_)
    least_steps = 1 if interpreted() else 8
    return max(1, min(wanted, triton.cdiv(steps, least_steps), _MAX_SPLITS, _MAX_PARTIAL // max(size, 1)))
