"""The order in which `csrc/wna16.cu` reads weights of 2, 3, 4 or 8 bits: blocks of 32 rows (a tile) by 128 columns.

In memory lie the first `chunk` blocks of all tiles, then their next, and so on; the last chunk may be short.

A block is bytes: its codes, then its scales, then (where they differ from the middle code) its zeros. One lane of a
warp (g = lane / 4, t = lane % 4) feeds into one product of 16 columns (an m16n8k16, or its part of a warpgroup's) eight
codes: rows g and g + 8 of a half tile, columns k0, k0+1, k0+8 and k0+9 from k0 = 64u + 32i + 16j + 2t. At four bits
they are one word, from its lowest nibble (g, k0), (g+8, k0), (g, k0+8), (g+8, k0+8), then the same four one column on.
At two bits one word holds two products, j = 0 in the lower
half of each nibble. At three bits the lower two bits lie as at two, and a plane of third bits after them, where bit
e = 2i + j of a nibble belongs to that product. At eight bits a product has two words of bytes (g, k), (g+8, k),
(g, k+1), (g+8, k+1). Words lie so that a warp reads 16 bytes a lane without conflicts.

Scales, and zeros as bytes, lie in the order group, g, half tile, (row g, row g + 8); zeros of two- and three-bit codes
are nibbles in that order.

Of 2:4 sparse weights (four bits) two of four are stored, and behind everything else which. A lane's word is one
m16n8k32 sparse product, a unit: rows g and g + 8, the two kept of columns 4t .. 4t + 3 and of those 16 further on. A
lane's word of places is, for the half tile t / 2 and a unit, 16 columns from 16 (t % 2) on of row g, two bits for each
that is kept, then those of row g + 8.

Behind all blocks of symmetric four-bit weights with scales in float16 lies a byte for each row (of whole tiles): the
highest power of two by which all of the row's scales can be raised and stay finite.

Shapes: R rows, C columns, G groups of a row, T tiles, K blocks of a tile, B bytes of a block; weights are flat bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.kernels import two_of_four

ROWS, COLUMNS = 32, 128
WIDTHS = (2, 3, 4, 8)
GROUPS = (32, 64, 128)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# The axes of codes that are split as AXES say, by number; for each plane of bits its lowest bit, its bits and the axes
# in the order of memory, codes of a byte last (the lowest first).
AXES = (2, 2, 8, 2, 2, 2, 2, 4, 2)  # half tile, odd row, g, u, i (the unit of 32 columns), j, k2, t, k1
HALF, ODD, G, U, UNIT, J, K2, T, K1 = range(1, 10)  # the axis before them counts blocks
TWO_BITS = (HALF, G, T, U, UNIT, K1, K2, ODD, J)
Plane = tuple[int, int, tuple[int, ...]]
PLANES: dict[int, tuple[Plane, ...]] = {
    2: ((0, 2, TWO_BITS),),
    3: ((0, 2, TWO_BITS), (2, 1, (G, T, HALF, U, K1, K2, ODD, UNIT, J))),
    4: ((0, 4, (HALF, U, G, T, UNIT, J, K1, K2, ODD)),),
    8: ((0, 8, (HALF, U, UNIT, G, T, J, K2, K1, ODD)),),
}
# The same of what is kept of 2:4 sparse weights: axes half tile, odd row, g, unit, k2, t, k1.
KEPT_AXES = (2, 2, 8, 4, 2, 4, 2)
KEPT_PLANES: tuple[Plane, ...] = ((0, 4, (1, 3, 6, 4, 7, 5, 2)),)
PLACES: Plane = (0, 2, (3, 1, 5, 4, 2, 6, 7))


@dataclass(frozen=True)
class Layout:
    """What a block holds.

    Attributes:
        bits: of a code: 2, 3, 4 or 8.
        group: columns that share a scale: 32, 64 or 128.
        scales: dtype of the stored scales.
        zeros: whether zeros are stored; else every zero is the middle code.
        sparse: whether of four neighbouring codes two are stored, and which; at four bits alone.
    """

    bits: int
    group: int
    scales: torch.dtype
    zeros: bool
    sparse: bool = False

    def __post_init__(self) -> None:
        assert self.bits == 4 or not self.sparse

    @property
    def chunk(self) -> int:
        """Blocks of a tile that lie together: about four thousand bytes, fetched at a time."""
        return {2: 4, 3: 2, 4: 2, 8: 1}[self.bits]

    @property
    def middle(self) -> int:
        """The code that stands for zero where zeros are not stored."""
        return 1 << (self.bits - 1)

    @property
    def parts(self) -> int:
        """Groups of a block's row."""
        return COLUMNS // self.group

    @property
    def code_bytes(self) -> int:
        return ROWS * self.stored_columns * self.bits // 8

    @property
    def raised(self) -> bool:
        """Whether each row's power of two is stored."""
        return self.bits == 4 and self.scales == torch.float16 and not self.zeros

    @property
    def stored_columns(self) -> int:
        """Codes of a block's row."""
        return COLUMNS // 2 if self.sparse else COLUMNS

    @property
    def place_bytes(self) -> int:
        return ROWS * COLUMNS // 8 if self.sparse else 0

    @property
    def axes(self) -> tuple[int, ...]:
        """Of the stored codes of a block."""
        return KEPT_AXES if self.sparse else AXES

    @property
    def planes(self) -> tuple[Plane, ...]:
        return KEPT_PLANES if self.sparse else PLANES[self.bits]

    @property
    def scale_bytes(self) -> int:
        return self.parts * ROWS * self.scales.itemsize

    @property
    def zero_bytes(self) -> int:
        return self.parts * ROWS // (2 if self.bits < 4 else 1) if self.zeros else 0

    @property
    def block_bytes(self) -> int:
        return self.code_bytes + self.scale_bytes + self.zero_bytes + self.place_bytes


def pack(
    codes_RC: Tensor, scales_RG: Tensor, zeros_RG: Tensor, layout: Layout, keep_RC: Tensor | None = None
) -> Tensor:
    """The bytes of all blocks; rows and columns are padded to whole blocks by weights of scale zero.

    `keep_RC` says of a sparse layout which codes are stored; without it those that do not stand for zero are.

    Raises RequestError for a sparse layout of codes of which more than two in four do not stand for zero.
    """
    (rows, columns), groups = codes_RC.shape, scales_RG.shape[1]
    assert columns == groups * layout.group, "groups disagree with the layout"
    more_rows, more_columns = -rows % ROWS, -columns % COLUMNS
    codes_RC = functional.pad(codes_RC, (0, more_columns, 0, more_rows))
    if keep_RC is not None:
        keep_RC = functional.pad(keep_RC, (0, more_columns, 0, more_rows))
    pad = (0, more_columns // layout.group, 0, more_rows)
    scales_RG, zeros_RG = functional.pad(scales_RG, pad), functional.pad(zeros_RG, pad)
    tiles, blocks = codes_RC.shape[0] // ROWS, codes_RC.shape[1] // COLUMNS
    stored, places = two_of_four.gather(codes_RC, zeros_RG, keep_RC) if layout.sparse else (codes_RC, None)
    each = _by_block(stored, tiles, layout)
    parts = [_pack_plane(each >> low & (1 << bits) - 1, bits, order) for low, bits, order in layout.planes]
    parts.append(_by_group(scales_RG, layout).view(torch.uint8))
    if layout.zeros:
        zeros = _by_group(zeros_RG, layout)
        parts.append(zeros[..., ::2] | zeros[..., 1::2] << 4 if layout.bits < 4 else zeros)
    if places is not None:
        parts.append(_pack_plane(_by_block(places, tiles, layout), *PLACES[1:]))
    blocks_TKB = torch.cat([part.view(tiles, blocks, -1) for part in parts], dim=-1)
    powers = [_powers(scales_RG)] if layout.raised else []
    return torch.cat([*(chunk.flatten() for chunk in blocks_TKB.split(layout.chunk, dim=1)), *powers])


def extent(rows: int, columns: int) -> tuple[int, int]:
    """Tiles, and blocks of a tile, of a matrix."""
    return -(-rows // ROWS), -(-columns // COLUMNS)


def blocks_of(weights: Tensor, rows: int, columns: int, layout: Layout) -> Tensor:
    """The blocks [T, K, B] in the bytes that `pack` made."""
    tiles, blocks = extent(rows, columns)
    widths = [min(layout.chunk, blocks - k) for k in range(0, blocks, layout.chunk)]
    chunks = weights[: tiles * blocks * layout.block_bytes].split(
        [tiles * width * layout.block_bytes for width in widths]
    )
    return torch.cat([chunk.view(tiles, width, -1) for chunk, width in zip(chunks, widths, strict=True)], dim=1)


def unpack(weights: Tensor, rows: int, columns: int, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """codes_RC, scales_RG, zeros_RG: what `pack` was given."""
    blocks_TKB = blocks_of(weights, rows, columns, layout)
    groups = columns // layout.group
    stored = _by_column(blocks_TKB[..., : layout.code_bytes], layout.planes, layout)
    at, end = layout.code_bytes, layout.code_bytes + layout.scale_bytes
    scales_RG = _by_row(blocks_TKB[..., at:end].contiguous().view(layout.scales), layout)
    zeros_RG = torch.full_like(scales_RG, layout.middle, dtype=torch.uint8)
    if layout.zeros:
        zeros = blocks_TKB[..., end : end + layout.zero_bytes]
        if layout.bits < 4:
            zeros = torch.stack((zeros & 15, zeros >> 4), dim=-1).flatten(-2)
        zeros_RG = _by_row(zeros, layout)
    if layout.sparse:
        stored = two_of_four.scatter(stored, _places(blocks_TKB, layout), zeros_RG)
    return stored[:rows, :columns], scales_RG[:rows, :groups], zeros_RG[:rows, :groups]


def kept(weights: Tensor, rows: int, columns: int, layout: Layout) -> Tensor:
    """keep_RC, bool: which codes a sparse layout stores."""
    places_RK = _places(blocks_of(weights, rows, columns, layout), layout)
    zeros_RG = places_RK.new_zeros(len(places_RK), 1)
    return two_of_four.scatter(torch.ones_like(places_RK), places_RK, zeros_RG)[:rows, :columns].bool()


def _places(blocks_TKB: Tensor, layout: Layout) -> Tensor:
    """Of the codes that a sparse layout stores, in their runs of four."""
    return _by_column(blocks_TKB[..., -layout.place_bytes :], (PLACES,), layout)


def _by_block(stored: Tensor, tiles: int, layout: Layout) -> Tensor:
    """[rows, columns] of whole blocks as [blocks, *axes]."""
    split = stored.view(tiles, ROWS, -1, layout.stored_columns).transpose(1, 2)
    return split.reshape(-1, *layout.axes)


def _by_column(packed: Tensor, planes: tuple[Plane, ...], layout: Layout) -> Tensor:
    """The inverse of `_by_block` and `_pack_plane` for the bytes [T, K, bytes] of these planes."""
    tiles, blocks = packed.shape[:2]
    each = torch.zeros(tiles * blocks, *layout.axes, dtype=torch.uint8, device=packed.device)
    at = 0
    for low, bits, order in planes:
        end = at + each[0].numel() * bits // 8
        each |= _unpack_plane(packed[..., at:end].flatten(0, 1), bits, order, layout.axes) << low
        at = end
    split = each.view(tiles, blocks, ROWS, layout.stored_columns).transpose(1, 2)
    return split.reshape(tiles * ROWS, -1)


def _pack_plane(each: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """Fields of so many bits, [blocks, *axes], as bytes [blocks, bytes]."""
    fields = each.permute(0, *order).reshape(len(each), -1, 8 // bits)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=each.device)
    return (fields << shifts).sum(-1, dtype=torch.uint8)


def _unpack_plane(packed: Tensor, bits: int, order: tuple[int, ...], axes: tuple[int, ...]) -> Tensor:
    """The inverse of `_pack_plane`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    fields = (packed.unsqueeze(-1) >> shifts & (1 << bits) - 1).reshape(-1, *(axes[axis - 1] for axis in order))
    return fields.permute(0, *(order.index(axis) + 1 for axis in range(1, len(axes) + 1)))


def _powers(scales_RG: Tensor) -> Tensor:
    """Of each row, the power of two that brings its largest scale just below 2^16, where float16 ends; uint8."""
    exponent_R = torch.frexp(scales_RG.float().abs().amax(1)).exponent
    return torch.where(scales_RG.ne(0).any(1), 16 - exponent_R, 0).to(torch.uint8)


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
