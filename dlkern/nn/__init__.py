"""Layers that mirror ``torch.nn``: same arguments, Parameters, state_dict keys."""

from __future__ import annotations

from .atrous import ASPP, AtrousConv2d, AtrousSeparableConv2d
from .attention import Attention, MultiheadAttention
from .batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .conv_bn_act import ConvBNAct2d
from .depthwise import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConvBNAct2d, DepthwiseSeparableConv2d
from .gru import GRU, GRUCell
from .lstm import LSTM, LayerNormLSTM, LSTMCell
from .rnn import RNN, RNNCell
from .transposed import ConvTransposeBNAct2d

__all__ = [
    "ASPP",
    "GRU",
    "LSTM",
    "RNN",
    "AtrousConv2d",
    "AtrousSeparableConv2d",
    "Attention",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "ConvBNAct2d",
    "ConvTransposeBNAct2d",
    "DepthwiseConv1d",
    "DepthwiseConv2d",
    "DepthwiseConvBNAct2d",
    "DepthwiseSeparableConv2d",
    "GRUCell",
    "LSTMCell",
    "LayerNormLSTM",
    "MultiheadAttention",
    "RNNCell",
]
