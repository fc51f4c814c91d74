"""The order in which `csrc/w4a16.cu` reads 4-bit weights: blocks of 32 rows (a tile) by 128 columns.

In memory lie the first two blocks of all tiles, then their next two, and so on; an odd last one alone.

A block is bytes: 2048 of codes, then its scales, then (where zeros differ from 8) its zeros. A word of codes is what
one lane (g = lane / 4, t = lane % 4) feeds into one m16n8k16 product: rows g and g + 8 of a half tile, four columns
from k0 = 64u + 32i + 8t + 4j. From its lowest nibble: (g, k0), (g+8, k0), (g, k0+2), (g+8, k0+2), then the same
four one column on. Words lie in the order half tile, u, g, t, i, j: a warp reads 16 bytes a lane without conflicts.

Scales, and zeros as bytes, lie in the order group, g, half tile, (row g, row g + 8).

Shapes: R rows, C columns, G groups of a row, T tiles, K blocks of a tile, B bytes of a block; weights are flat bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

ROWS, COLUMNS = 32, 128
CODE_BYTES = ROWS * COLUMNS // 2
GROUPS = (32, 64, 128)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIDDLE = 8
CHUNK = 2
# Axes of codes split as (T, half, odd row, g, K, u, i, t, j, k2, k1) in the order of memory, nibbles last.
ORDER = (0, 4, 1, 5, 3, 7, 6, 8, 10, 9, 2)


@dataclass(frozen=True)
class Layout:
    """What a block holds.

    Attributes:
        group: columns that share a scale: 32, 64 or 128.
        scales: dtype of the stored scales.
        zeros: whether zeros are stored; else every zero is 8.
    """

    group: int
    scales: torch.dtype
    zeros: bool

    @property
    def parts(self) -> int:
        """Groups of a block's row."""
        return COLUMNS // self.group

    @property
    def scale_bytes(self) -> int:
        return self.parts * ROWS * self.scales.itemsize

    @property
    def block_bytes(self) -> int:
        return CODE_BYTES + self.scale_bytes + (self.parts * ROWS if self.zeros else 0)


def pack(codes_RC: Tensor, scales_RG: Tensor, zeros_RG: Tensor, layout: Layout) -> Tensor:
    """The bytes of all blocks; rows and columns are padded to whole blocks by weights of scale zero."""
    (rows, columns), groups = codes_RC.shape, scales_RG.shape[1]
    assert columns == groups * layout.group, "groups disagree with the layout"
    more_rows, more_columns = -rows % ROWS, -columns % COLUMNS
    codes_RC = functional.pad(codes_RC, (0, more_columns, 0, more_rows))
    pad = (0, more_columns // layout.group, 0, more_rows)
    tiles, blocks = codes_RC.shape[0] // ROWS, codes_RC.shape[1] // COLUMNS
    split = codes_RC.view(tiles, 2, 2, 8, blocks, 2, 2, 4, 2, 2, 2).permute(ORDER).reshape(tiles, blocks, CODE_BYTES, 2)
    parts = [split[..., 0] | split[..., 1] << 4, _by_group(functional.pad(scales_RG, pad), layout).view(torch.uint8)]
    if layout.zeros:
        parts.append(_by_group(functional.pad(zeros_RG, pad), layout))
    blocks_TKB = torch.cat(parts, dim=-1)
    return torch.cat([chunk.flatten() for chunk in blocks_TKB.split(CHUNK, dim=1)])


def extent(rows: int, columns: int) -> tuple[int, int]:
    """Tiles, and blocks of a tile, of a matrix."""
    return -(-rows // ROWS), -(-columns // COLUMNS)


def blocks_of(weights: Tensor, rows: int, columns: int, layout: Layout) -> Tensor:
    """The blocks [T, K, B] in the bytes that `pack` made."""
    tiles, blocks = extent(rows, columns)
    widths = [min(CHUNK, blocks - k) for k in range(0, blocks, CHUNK)]
    chunks = weights.split([tiles * width * layout.block_bytes for width in widths])
    return torch.cat([chunk.view(tiles, width, -1) for chunk, width in zip(chunks, widths, strict=True)], dim=1)


def unpack(weights: Tensor, rows: int, columns: int, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """codes_RC, scales_RG, zeros_RG: what `pack` was given."""
    blocks_TKB = blocks_of(weights, rows, columns, layout)
    tiles, blocks = blocks_TKB.shape[:2]
    at_zeros = CODE_BYTES + layout.scale_bytes
    packed = blocks_TKB[..., :CODE_BYTES]
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).view(tiles, blocks, 2, 2, 8, 4, 2, 2, 2, 2, 2)
    inverse = sorted(range(len(ORDER)), key=ORDER.__getitem__)
    codes_RC = codes.permute(inverse).reshape(tiles * ROWS, blocks * COLUMNS)[:rows, :columns]
    scales_RG = _by_row(blocks_TKB[..., CODE_BYTES:at_zeros].contiguous().view(layout.scales), layout)
    scales_RG = scales_RG[:rows, : columns // layout.group]
    if not layout.zeros:
        return codes_RC, scales_RG, torch.full_like(scales_RG, MIDDLE, dtype=torch.uint8)
    return codes_RC, scales_RG, _by_row(blocks_TKB[..., at_zeros:], layout)[:rows, : columns // layout.group]


def _by_group(each_RG: Tensor, layout: Layout) -> Tensor:
    """One value a row and group as a block holds them: [T, K, values of a block]."""
    tiles, blocks = each_RG.shape[0] // ROWS, each_RG.shape[1] // layout.parts
    split = each_RG.view(tiles, 2, 2, 8, blocks, layout.parts).permute(0, 4, 5, 3, 1, 2)
    return split.reshape(tiles, blocks, layout.parts * ROWS)


def _by_row(values: Tensor, layout: Layout) -> Tensor:
    """The inverse of `_by_group`."""
    tiles, blocks = values.shape[:2]
    split = values.reshape(tiles, blocks, layout.parts, 8, 2, 2).permute(0, 4, 5, 3, 1, 2)
    return split.reshape(tiles * ROWS, blocks * layout.parts)
