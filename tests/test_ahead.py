"""What a launch is told of the next one: the order of a step's products, and which bytes are brought near."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch

from featherweight.kernels import ahead, nvrtc
from featherweight.kernels.ahead import NEAR_BYTES, NOTHING, PIECE, Order, behind, first_bytes, gap


def a_step(matrices: list[torch.Tensor], gaps: tuple[int, ...]) -> list[ahead.Ahead]:
    """What each product is told, with memory idle behind some."""
    told = []
    for at, each in enumerate(matrices):
        told.append(behind(each, at + 2, stages=3))
        if at in gaps:
            gap()
    return told


def some(count: int) -> list[torch.Tensor]:
    return [torch.zeros(1 << 16, dtype=torch.uint8) for _ in range(count)]


def test_a_launch_before_a_gap_is_told_of_the_next() -> None:
    matrices, order = some(4), Order()
    with order.step():
        assert a_step(matrices, (1, 3)) == [NOTHING] * 4
    for _ in range(2):
        with order.step():
            told = a_step(matrices, (1, 3))
        assert [each.address for each in told] == [None, matrices[2].data_ptr(), None, None]
        assert told[1].places == 4 and told[1].left == 3
    assert a_step(matrices, (1, 3)) == [NOTHING] * 4, "outside of a step"


def test_a_step_that_goes_another_way_has_nothing_brought_near() -> None:
    first, second, other = some(3)
    order = Order()
    with order.step():
        a_step([first, second], (0,))
    with order.step():
        assert a_step([other, second, first], (0,)) == [NOTHING] * 3


def test_a_step_that_fails_is_noted_again() -> None:
    matrices, order = some(2), Order()
    with pytest.raises(ZeroDivisionError), order.step():
        a_step(matrices[1:], (0,))
        raise ZeroDivisionError
    for _ in range(2):
        with order.step():
            told = a_step(matrices, (0,))
    assert told[0].address == matrices[1].data_ptr() and told[1] == NOTHING


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
