"""The only place with tolerances: what "the same numbers" means for an op, in the tests and the benchmarks.

Truth is the op in float64. The relative L2 error of a result may be at most twice that of PyTorch's
own path in the same dtype, plus a floor of ``ROUNDINGS * eps(dtype)`` times the norm of ``terms``:
elementwise the sum of the absolute values that were added and multiplied to make the result, so that a
result which is the small difference of large numbers is judged by the large numbers. float64 is held to
the floor alone, because there truth and result have the same precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: c of the floor, in units of eps (two unit roundoffs). The longest chain, x -> mean and invstd -> z -> act ->
#: dz -> dx, has about eight roundings of at most eps / 2 each, none larger than ``terms`` allows.
ROUNDINGS = 4.0


def error(result: Tensor, truth: Tensor) -> float:
    """Norm of the difference, in float64."""
    return float((result.detach().double().cpu() - truth.detach().double().cpu()).norm())


def bound(peer: Tensor | None, truth: Tensor, terms: Tensor, dtype: torch.dtype) -> float:
    """The largest permitted ``error``; ``peer`` is PyTorch's result in ``dtype``, unused for float64."""
    floor = ROUNDINGS * torch.finfo(dtype).eps * float(terms.detach().double().cpu().norm())
    if dtype == torch.float64 or peer is None:
        return floor
    return 2.0 * error(peer, truth) + floor


def assert_parity(
    name: str,
    result: Tensor,
    truth: Tensor,
    terms: Tensor,
    *,
    peer: Tensor | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Assert that ``result`` is as near to ``truth`` (float64) as the rule above asks.

    ``dtype`` is that of the data the result was made from (``result``'s own where None): the gradient of a
    float32 weight under bfloat16 activations is only as good as the activations.

    Raises:
        AssertionError: with the errors, the bound, and the worst element.
    """
    if result.shape != truth.shape:  # raised and not asserted: python -O must not make a red row green
        raise AssertionError(f"{name}: shape {tuple(result.shape)}, expected {tuple(truth.shape)}")
    dtype = result.dtype if dtype is None else dtype
    limit, seen = bound(peer, truth, terms, dtype), error(result, truth)
    if seen <= limit:  # False for a NaN
        return
    truth = truth.detach()
    norm = float(truth.norm()) or 1.0
    difference = (result.detach().double().cpu() - truth.cpu()).abs()
    worst = int(torch.where(difference.isnan(), math.inf, difference).argmax())
    peers = "not used" if peer is None or dtype == torch.float64 else f"{error(peer, truth) / norm:.3e}"
    raise AssertionError(
        f"{name} ({result.dtype}): relative L2 error {seen / norm:.3e} exceeds {limit / norm:.3e} "
        f"(PyTorch's own {peers}); worst at flat index {worst} of {truth.numel()}: "
        f"{result.detach().double().cpu().flatten()[worst].item():.9g}, expected {truth.flatten()[worst].item():.9g}"
    )


def assert_elementwise(name: str, result: Tensor, *truths: Tensor, dtype: torch.dtype) -> None:
    """Every element equals that of one of ``truths`` to the floor above; NaN and infinities exactly."""
    floor = ROUNDINGS * torch.finfo(dtype).eps
    result = result.detach().double().cpu()
    right = torch.zeros_like(result, dtype=torch.bool)
    for truth in truths:
        right |= torch.isclose(result, truth.detach().double().cpu(), rtol=floor, atol=floor, equal_nan=True)
    wrong = [(i, float(result[i]), [float(t[i]) for t in truths]) for i in (~right).nonzero().flatten().tolist()]
    if wrong:
        raise AssertionError(f"{name}: (index, seen, expected): {wrong}")
