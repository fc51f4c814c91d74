"""The Hopper kernel for many tokens without a GPU: operands and launches in emulation, what it compiles to, refusals.

Tests marked gpu run it.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from featherweight.kernels.w4a16_hopper_plan import Tile, lay_out
from featherweight.kernels.w4a16_layout import Layout, blocks_of, extent, pack
from w4a16_hopper_emulation import operands, pieces, place, sharers_of

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
PROCESSORS, BLOCK_BYTES = 132, 232448


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("layout", [Layout(128, HALF, False), Layout(32, FLOAT, True)], ids=str)
def test_operands_are_code_minus_zero_in_the_order_of_x(dtype: torch.dtype, layout: Layout) -> None:
    draw = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (32, 256), dtype=torch.uint8, generator=draw)
    scales = torch.rand(32, 256 // layout.group, generator=draw).to(layout.scales)
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    if layout.zeros:
        zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8, generator=draw)
    blocks_TKB = blocks_of(pack(codes, scales, zeros, layout), 32, 256, layout)
    want = codes.double() - zeros.double().repeat_interleave(layout.group, 1)
    for k in range(2):
        assert torch.equal(operands(blocks_TKB[0, k], layout, dtype), want[:, k * 128 : (k + 1) * 128])


CASES = [
    *product([Tile(64, 2), Tile(64, 4), Tile(128, 3), Tile(256, 2)], [(64, 4096, 4096), (4096, 57344, 8192), (33, 50, 320)]),
    (Tile(64, 4), (64, 12288, 4096)),
    (Tile(128, 2), (300, 10240, 8192)),
    (Tile(64, 2), (64, 1, 32)),
]  # fmt: skip


@pytest.mark.parametrize(("tile", "shape"), CASES, ids=str)
def test_every_column_of_every_tile_is_computed_once(tile: Tile, shape: tuple[int, int, int]) -> None:
    tokens, rows, columns = shape
    blocks = extent(rows, columns)[1]
    plan = lay_out(tile, tokens, rows, columns, Layout(128, HALF, False), PROCESSORS, BLOCK_BYTES)
    assert plan.bytes <= BLOCK_BYTES and plan.stages >= 2 and plan.grid <= PROCESSORS and plan.shared <= PROCESSORS
    owners: dict[tuple[int, int], int] = {}
    parts: dict[int, dict[int, int]] = {}
    for cta in range(plan.grid):
        slot = 0
        for index, first, end in pieces(plan, blocks, cta):
            for k in range(first, end):
                assert owners.setdefault((index, k), cta) == cta
            if (first, end) != (0, blocks):
                parts.setdefault(index, {})[cta] = slot
                slot += 1
        assert slot <= 2
    assert len(owners) == plan.row_tiles * plan.token_tiles * blocks
    for index, of in parts.items():
        ctas, slots = sharers_of(plan, blocks, index)
        assert dict(zip(ctas, slots, strict=True)) == of
    places = {place(plan, index) for index in range(plan.row_tiles * plan.token_tiles)}
    assert places == set(product(range(plan.row_tiles), range(plan.token_tiles)))


def test_lines_of_sixteen_rows_and_tokens_are_turned_without_loss() -> None:
    """`store_sixteen`: where the lanes put eights of rows, they are found again."""
    held = {}
    for lane in range(32):
        token, half = (lane >> 4) * 8 + (lane & 7), (lane >> 3 & 1) ^ (((lane >> 4) * 8 + (lane & 7)) >> 2 & 1)
        held[token * 32 + half * 16] = (token, lane >> 3 & 1)
    for lane in range(32):
        token, half = lane >> 1, lane & 1
        assert held[token * 32 + (half ^ (token >> 2 & 1)) * 16] == (token, half)
