"""BatchNorm2d [+ residual] + ReLU on the shapes of ResNets."""

from __future__ import annotations

import torch
from torch import nn

import dlkern.nn

from .base import Case, Plain, dtype_name
from .terms import terms

#: Channels, height and width; and the ratio to reach in training on a CPU, without a residual and in NCHW.
NCHW_TARGETS = {(64, 56, 56): 1.8, (256, 28, 28): 1.7, (256, 56, 56): 2.0, (512, 7, 7): 1.6}
SHAPES = tuple(NCHW_TARGETS)
LAYOUTS = ("nchw", "channels_last")


def cases(device_type: str, batch: int, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """Every shape, layout and dtype, with and without a residual, in training and in inference."""
    return [
        _case(device_type, (batch, *shape), layout, residual, training, dtype, dtype == dtypes[0])
        for training in (True, False)
        for dtype in dtypes
        for layout in LAYOUTS
        for residual in (False, True)
        for shape in SHAPES
    ]


def _case(
    device_type: str,
    shape: tuple[int, int, int, int],
    layout: str,
    residual: bool,
    training: bool,
    dtype: torch.dtype,
    quick: bool,
) -> Case:
    # a quick suite: the layout that the device likes; all shapes once, and the first one in the other ways
    liked, first = layout == ("channels_last" if device_type == "cuda" else "nchw"), shape[1:] == SHAPES[0]
    return Case(
        op="batch_norm_act",
        label="x".join(map(str, shape)),
        shape=shape,
        out_shape=shape,
        format=layout,
        residual=residual,
        training=training,
        dtype=dtype,
        plain=lambda: Plain(norm(shape[1])),
        fused=_fused,
        terms=terms,
        target=_target(device_type, shape, layout, residual, training, dtype),
        quick=quick and ((liked and not residual and training) or (first and (liked or (training and not residual)))),
        facts={
            "shape": list(shape),
            "format": layout,
            "residual": residual,
            "training": training,
            "dtype": dtype_name(dtype),
        },
    )


def norm(channels: int) -> nn.BatchNorm2d:
    """A batch norm with parameters and statistics that are not trivial."""
    generator = torch.Generator().manual_seed(1)

    def randn() -> torch.Tensor:
        return torch.randn(channels, generator=generator)

    made = nn.BatchNorm2d(channels)
    assert made.running_mean is not None
    assert made.running_var is not None
    with torch.no_grad():
        made.weight.copy_(1 + 0.3 * randn())
        made.bias.copy_(0.4 * randn())
        made.running_mean.copy_(0.2 * randn())
        made.running_var.copy_(torch.exp(0.3 * randn()))
    return made


def _fused(plain: Plain) -> nn.Module:
    assert plain.bn is not None
    made = dlkern.nn.BatchNormAct2d(plain.bn.num_features, device=plain.bn.weight.device)
    made.load_state_dict(plain.bn.state_dict())
    return made


def _target(
    device_type: str, shape: tuple[int, ...], layout: str, residual: bool, training: bool, dtype: torch.dtype
) -> float | None:
    """The ratio that training must reach: in float32 on a CPU, in a half type in channels_last on a GPU."""
    if not training:
        return None
    if device_type == "cuda":
        wanted = {torch.float16: 1.6, torch.bfloat16: 2.0}
        return wanted.get(dtype) if layout == "channels_last" else None
    channels, height, width = shape[1:]
    wanted_nchw = NCHW_TARGETS.get((channels, height, width))
    if dtype != torch.float32 or wanted_nchw is None:
        return None
    if layout == "channels_last":
        return 1.5 if channels == 64 else 1.05
    return 1.6 if residual else wanted_nchw
