"""The tests' own instruments: a planted fault is seen."""

from __future__ import annotations

import parity
import pytest
import torch
from guard import guarded


@pytest.mark.parametrize("index", [-1, 12])
def test_a_write_out_of_bounds_is_caught(index: int) -> None:
    def write() -> None:
        with guarded():
            x = torch.empty(3, 4)
            torch.as_strided(x, (1,), (1,), x.storage_offset() + index).fill_(1.0)

    with pytest.raises(AssertionError, match="out of bounds: 4 bytes"):
        write()


def test_a_write_round_an_input_is_caught() -> None:
    def write() -> None:
        with guarded() as guards:
            x = guards.place(torch.ones(3, 4, dtype=torch.bfloat16), offset=1)
            torch.as_strided(x, (1,), (1,), x.storage_offset() - 1).fill_(1.0)

    with pytest.raises(AssertionError, match="out of bounds: 2 bytes before"):
        write()


def test_allocations_are_poisoned_and_keep_their_strides() -> None:
    like = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    with guarded():
        made = torch.empty_like(like), torch.empty(2, 3, 4, 5), like.new_empty(3), torch.empty((2, 3), dtype=torch.half)
    assert made[0].stride() == like.stride()
    assert [m.dtype for m in made] == [torch.float32] * 3 + [torch.float16]
    assert all(m.isnan().all() for m in made)


def test_parity_sees_a_wrong_element_and_a_nan() -> None:
    truth = torch.randn(100, dtype=torch.float64)
    right = truth.float()
    parity.assert_parity("right", right, truth, truth.abs(), peer=right)
    for wrong in (1e-4, float("nan")):
        bad = right.clone()
        bad[17] += wrong
        with pytest.raises(AssertionError, match="flat index 17"):
            parity.assert_parity("bad", bad, truth, truth.abs(), peer=right)
