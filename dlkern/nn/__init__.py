"""Layers that mirror ``torch.nn``: same arguments, Parameters, state_dict keys."""

from __future__ import annotations

from .attention import Attention, MultiheadAttention
from .batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .conv_bn_act import ConvBNAct2d
from .depthwise import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConvBNAct2d, DepthwiseSeparableConv2d
from .gru import GRU, GRUCell
from .lstm import LSTM, LSTMCell
from .rnn import RNN, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Attention",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "ConvBNAct2d",
    "DepthwiseConv1d",
    "DepthwiseConv2d",
    "DepthwiseConvBNAct2d",
    "DepthwiseSeparableConv2d",
    "GRUCell",
    "LSTMCell",
    "MultiheadAttention",
    "RNNCell",
]
