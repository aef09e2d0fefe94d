"""Variants of recurrent layers beyond torch.nn's: what they are made of, in plain PyTorch.

- Activations: of the candidate and, in an LSTM, of the cell on its way out (``activation``), and of the gates
  (``recurrent_activation``), as Keras names them.
- Layer norm: LN(x W_ih^T) + LN(h W_hh^T) + b in place of the sum, over all gates at once, and in an LSTM
  h' = o act(LN(c')). The input's norm is no part of an op: it comes normalised, with ``weight_ih`` None.
- Peephole: i and f see p c, o sees p c'.
- Zoneout: h' moves back to h by a share, drawn as 0 or 1 in training and its expectation in evaluation.
- Recurrent dropout: in the product h W_hh^T units of h are left out, the same ones at every step.

Sources: Ba, Kiros and Hinton, "Layer Normalization" (2016); Gers, Schraudolph and Schmidhuber, "Learning Precise
Timing with LSTM Recurrent Networks" (2002); Krueger et al., "Zoneout" (2016); Gal and Ghahramani, "A Theoretically
Grounded Application of Dropout in Recurrent Neural Networks" (2016).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import activation as activations
from . import activation as act
from .recurrent import Needs

#: What may stand for tanh and for sigmoid: the derivative is had from the output, which backward has anyway.
ACTIVATIONS = ("tanh", "relu", "sigmoid", "hardsigmoid", "leaky_relu", "elu", "identity")

#: Of layer norms; torch.nn.LayerNorm's default.
EPS = 1e-5


class Extras(NamedTuple):
    """The tensors of a variant; all None for torch.nn's layers. B, N, G, H and P as in :mod:`.recurrent`.

    ``peephole`` (3 H,) in the order i, f, o; ``norm_hh`` (G H,), ``norm_c`` and ``norm_c_bias`` (H,) are what layer
    norms multiply and add (an LSTM has the last two with the first, others have not). No gradient goes to ``zoneout``
    (N, P), the share of the step before that h keeps, and ``dropout`` (B, P), the factors of h in its product.
    """

    peephole: Tensor | None = None
    norm_hh: Tensor | None = None
    norm_c: Tensor | None = None
    norm_c_bias: Tensor | None = None
    zoneout: Tensor | None = None
    dropout: Tensor | None = None


PLAIN = Extras()


def activate(z: Tensor, name: str) -> Tensor:
    """act(z)."""
    return act.forward(z, activations.from_name(name))


def slope(y: Tensor, name: str) -> Tensor:
    """act'(z) of y = act(z)."""
    return act.derivative_from_output(y, activations.from_name(name))


def normalise(z: Tensor) -> tuple[Tensor, Tensor]:
    """(z - mean) / spread of each row, and 1 / spread (rows, 1)."""
    centred = z - z.mean(1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(1, keepdim=True) + EPS)
    return centred * inverse, inverse


def normalise_backward(grad: Tensor, normal: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of z from that of ``normal``, as ``normalise`` returned it."""
    along = (grad * normal).mean(1, keepdim=True)
    return inverse * (grad - grad.mean(1, keepdim=True) - normal * along)


class Recurrence:
    """h W_hh^T + b_hh with what the variant does to it, a step at a time."""

    def __init__(self, weight_hh: Tensor, bias_hh: Tensor | None, extras: Extras, dtype: torch.dtype) -> None:
        self.weight = weight_hh.to(dtype)
        self.bias = None if bias_hh is None else bias_hh.to(dtype)
        self.norm = None if extras.norm_hh is None else extras.norm_hh.to(dtype)
        self.zoneout = None if extras.zoneout is None else extras.zoneout.to(dtype)
        self.dropout = None if extras.dropout is None else extras.dropout.to(dtype)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The sums of h (rows, P), and with a layer norm the normalised product and its inverse spread."""
        sums = self.masked(h) @ self.weight.t()
        normal = inverse = None
        if self.norm is not None:
            normal, inverse = normalise(sums)
            sums = normal * self.norm
        return sums if self.bias is None else sums + self.bias, normal, inverse

    def backward(self, grad: Tensor, normal: Tensor | None, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradients of h and of the product, from that of the sums."""
        if self.norm is not None and normal is not None and inverse is not None:
            grad = normalise_backward(grad * self.norm, normal, inverse)
        return self.masked(grad @ self.weight), grad

    def masked(self, h: Tensor) -> Tensor:
        return h if self.dropout is None else h * self.dropout[: h.size(0)]

    def keep(self, new: Tensor, old: Tensor, rows: slice) -> Tensor:
        """h of the step after zoneout: exactly the old one where all of it stays."""
        return new if self.zoneout is None else (1 - self.zoneout[rows]) * new + self.zoneout[rows] * old

    def keep_backward(self, grad: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """The gradients of the new h and, with zoneout, of the old one."""
        if self.zoneout is None:
            return grad, None
        kept = grad * self.zoneout[rows]
        return grad - kept, kept


def dropped(h_before: Tensor, dropout: Tensor | None, sizes: list[int]) -> Tensor:
    """All rows of h (N, P) as they entered the product."""
    if dropout is None:
        return h_before
    factors = dropout.to(h_before.dtype)
    if len(sizes) * max(sizes) == h_before.size(0):
        return (h_before.view(len(sizes), -1, h_before.size(1)) * factors).flatten(0, 1)
    return h_before * torch.cat([factors[:size] for size in sizes])


def rows_of(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Some rows, of what may not be there."""
    return None if tensor is None else tensor[rows]


def gradients(
    grad_recurrent: Tensor,
    cells_before: Tensor | None,
    cells: Tensor | None,
    normal: Tensor | None,
    grad_normal: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of peephole, norm_hh, norm_c and norm_c_bias; ``grad_recurrent`` (N, G H) is the gradient of
    what a step adds to the input's projection, ``grad_normal`` (N, H) that of the normalised c."""
    peephole = norm_hh = norm_c = norm_c_bias = None
    if needs.peephole and cells_before is not None and cells is not None:
        i, f, _, o = grad_recurrent.chunk(4, 1)
        peephole = torch.cat([(i * cells_before).sum(0), (f * cells_before).sum(0), (o * cells).sum(0)])
    if needs.norm_hh and normal is not None:
        norm_hh = (grad_recurrent * normal).sum(0)
    if needs.norm_c and grad_normal is not None and cells is not None:
        norm_c = (grad_normal * normalise(cells)[0]).sum(0)
    if needs.norm_c_bias and grad_normal is not None:
        norm_c_bias = grad_normal.sum(0)
    return peephole, norm_hh, norm_c, norm_c_bias
