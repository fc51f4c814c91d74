"""What a launch is told of the next one: the order of a step's products, and which bytes are brought near."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch

from featherweight.kernels import ahead, nvrtc
from featherweight.kernels.ahead import NEAR_BYTES, NOTHING, PIECE, Order, behind, first_bytes


def test_each_launch_is_told_of_the_next_and_the_last_of_none() -> None:
    matrices = [torch.zeros(size, dtype=torch.uint8) for size in (1 << 16, 3 << 16, 1 << 20)]
    places, order = (12, 2, 8), Order()
    with order.step():
        assert [behind(each, n, 2) for each, n in zip(matrices, places, strict=True)] == [NOTHING] * 3
    for _ in range(2):
        with order.step():
            told = [behind(each, n, 2) for each, n in zip(matrices, places, strict=True)]
        assert [each.address for each in told] == [matrices[1].data_ptr(), matrices[2].data_ptr(), None]
        assert [each.places for each in told[:2]] == [2, 8] and told[0].left == 2
    assert behind(matrices[0], 12, 2) == NOTHING, "outside of a step"


def test_a_step_that_goes_another_way_has_nothing_brought_near() -> None:
    first, second, other = (torch.zeros(1 << 16, dtype=torch.uint8) for _ in range(3))
    order = Order()
    with order.step():
        behind(first, 2, 2), behind(second, 2, 2)
    with order.step():
        assert behind(other, 2, 2) == NOTHING
        assert behind(second, 2, 2) == NOTHING and behind(first, 2, 2) == NOTHING


def test_a_step_that_fails_is_noted_again() -> None:
    first, second = (torch.zeros(1 << 16, dtype=torch.uint8) for _ in range(2))
    order = Order()
    with pytest.raises(ZeroDivisionError), order.step():
        behind(first, 2, 2)
        raise ZeroDivisionError
    for _ in range(2):
        with order.step():
            told = behind(first, 2, 2), behind(second, 2, 2)
    assert told[0].address == second.data_ptr() and told[1] == NOTHING


def test_what_is_brought_near_lies_within_the_matrix() -> None:
    for nbytes, places in product((2112, 1184 * 7, 128 * 32 * 2112, 896 * 32 * 2112), (1, 2, 12, 16)):
        weights = torch.empty(nbytes, dtype=torch.uint8)
        near = first_bytes(weights, places, 2)
        assert near.apart % 16 == 0 and near.pieces * PIECE <= near.apart
        assert (near.places - 1) * near.apart + near.pieces * PIECE <= nbytes
        assert near.places * near.pieces * PIECE <= NEAR_BYTES
    assert near.pieces > 0


def test_a_piece_is_what_the_source_says() -> None:
    assert re.findall(r"constexpr u32 PIECE = (\d+);", nvrtc.source("wna16")) == [str(ahead.PIECE)]
