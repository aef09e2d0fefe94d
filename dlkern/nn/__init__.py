"""Layers that mirror ``torch.nn``: same arguments, Parameters, state_dict keys."""

from __future__ import annotations

from .batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d

__all__ = ["BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d"]
