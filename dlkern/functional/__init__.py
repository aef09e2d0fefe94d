"""Functions: they check their arguments, say clearly what is wrong, and hand on to :mod:`dlkern.ops`."""

from __future__ import annotations

from .attention import attention
from .attention_bias import RelativePositionBias, T5Bias
from .batch_norm_act import batch_norm_act
from .conv_bn_act import conv_act, conv_bn_act
from .dtypes import DTYPES, HALF_DTYPES

__all__ = [
    "DTYPES",
    "HALF_DTYPES",
    "RelativePositionBias",
    "T5Bias",
    "attention",
    "batch_norm_act",
    "conv_act",
    "conv_bn_act",
]
