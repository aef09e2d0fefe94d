"""Functions: they check their arguments, say clearly what is wrong, and hand on to :mod:`dlkern.ops`."""

from __future__ import annotations

from .atrous import ConvNorm, aspp, atrous_conv2d
from .attention import attention
from .attention_bias import RelativePositionBias, T5Bias
from .attention_varlen import attention_varlen
from .batch_norm_act import batch_norm_act
from .conv_bn_act import conv_act, conv_bn_act
from .depthwise import depthwise_conv2d, depthwise_separable_conv2d
from .dtypes import DTYPES, HALF_DTYPES
from .recurrent import gru, gru_cell, lstm, lstm_cell, rnn, rnn_cell
from .transposed import conv_transpose_act, conv_transpose_bn_act

__all__ = [
    "DTYPES",
    "HALF_DTYPES",
    "ConvNorm",
    "RelativePositionBias",
    "T5Bias",
    "aspp",
    "atrous_conv2d",
    "attention",
    "attention_varlen",
    "batch_norm_act",
    "conv_act",
    "conv_bn_act",
    "conv_transpose_act",
    "conv_transpose_bn_act",
    "depthwise_conv2d",
    "depthwise_separable_conv2d",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
]
