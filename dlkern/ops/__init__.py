"""The ops: ``torch.library`` definitions, autograd Functions and each op's table of implementations."""

from __future__ import annotations

from . import atrous, attention, batch_norm_act, conv_bn_act, depthwise, gru, lstm, rnn, transposed

__all__ = [
    "atrous",
    "attention",
    "batch_norm_act",
    "conv_bn_act",
    "depthwise",
    "gru",
    "lstm",
    "rnn",
    "transposed",
]
