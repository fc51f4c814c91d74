"""How `csrc/w4a16_hopper.cu` is launched for a matrix and a number of tokens: tiles, who computes which, memory.

Pure arithmetic on the limits of a device, so that every case can be checked without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from featherweight.kernels.w4a16_layout import COLUMNS, ROWS, Layout, extent

STAGING_BYTES = 1024  # of a warp
MOST_STAGES = 8
LEAST_BLOCKS = 2
"""Of a CTA's stretch of the shared tiles: fewer are not worth the sums that they add."""


@dataclass(frozen=True)
class Tile:
    """Of y: 64 rows (outputs) for each warpgroup x `tokens`."""

    tokens: int
    warpgroups: int

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups

    @property
    def threads(self) -> int:
        """Of a CTA: one more warpgroup, which copies."""
        return 128 * (self.warpgroups + 1)


@dataclass(frozen=True)
class Plan:
    """One launch.

    Attributes:
        tile: what the kernel is compiled for.
        grid: CTAs, all of which run at once.
        row_tiles, token_tiles: of y.
        band: token tiles between which weights are reused before the next rows.
        whole: tiles that each CTA computes alone; shared: tiles that come after those, cut up between `sharers` CTAs.
        stages, at_*, bytes: shared memory, as the source's Params has it.
    """

    tile: Tile
    grid: int
    row_tiles: int
    token_tiles: int
    band: int
    whole: int
    shared: int
    sharers: int
    stages: int
    at_weights: int
    at_staging: int
    at_barriers: int
    bytes: int

    @property
    def partials_bytes(self) -> int:
        """Device memory for the parts of shared tiles: two a CTA."""
        return self.sharers * 2 * self.tile.rows * self.tile.tokens * 4


def sums(half: bool, layout: Layout) -> bool:
    """Whether groups' sums are scaled, rather than weights: where weights rounded to the dtype would not be exact enough.

    bfloat16 keeps 8 bits of a weight; float16 keeps 11, but not the range of wider scales.
    """
    return not (half and layout.scales.itemsize == 2 and str(layout.scales) == "torch.float16")


def tiles(sums: bool) -> tuple[Tile, ...]:
    """Those that the registers allow: sums need two sets of them."""
    if sums:
        return Tile(64, 2), Tile(64, 3), Tile(64, 4), Tile(128, 2)
    return Tile(64, 2), Tile(64, 3), Tile(64, 4), Tile(128, 3), Tile(128, 4), Tile(256, 2)


@cache
def lay_out(tile: Tile, tokens: int, rows: int, columns: int, layout: Layout, processors: int, block_bytes: int) -> Plan:
    """The launch with tiles of this shape, on so many multiprocessors with so much shared memory."""
    blocks = extent(rows, columns)[1]
    row_tiles, token_tiles = -(-rows // tile.rows), -(-tokens // tile.tokens)
    whole, shared = divmod(row_tiles * token_tiles, processors)
    sharers = min(_options(shared, blocks, processors), key=lambda n: _shared_us(tile, shared, blocks, n))
    weights_bytes, x_bytes = tile.rows // ROWS * layout.block_bytes, tile.tokens * COLUMNS * 2
    staging = tile.warpgroups * 4 * STAGING_BYTES
    stages = min(MOST_STAGES, (block_bytes - staging - 128) // (weights_bytes + x_bytes + 16))
    at_weights = stages * x_bytes
    at_staging = -(-(at_weights + stages * weights_bytes) // 128) * 128
    at_barriers = at_staging + staging
    return Plan(
        tile, processors if whole else sharers, row_tiles, token_tiles, _band(tile, token_tiles, processors),
        whole, shared, sharers, stages, at_weights, at_staging, at_barriers, at_barriers + stages * 16,
    )  # fmt: skip


def _options(shared: int, blocks: int, processors: int) -> list[int]:
    """How many CTAs might share so many tiles: as many for each tile, or all, with stretches that end inside tiles."""
    if not shared:
        return [0]
    most = max(shared, min(processors, shared * blocks // LEAST_BLOCKS))
    return [*range(shared, most + 1, shared), most]


def _shared_us(tile: Tile, shared: int, blocks: int, sharers: int) -> float:
    """Estimate of the time that the shared tiles take."""
    if not sharers:
        return 0.0
    sums = 0 if sharers == shared else 1 if sharers % shared == 0 else 2
    return -(-shared * blocks // sharers) * BLOCK_US[tile] + sums * SUM_US


def _band(tile: Tile, token_tiles: int, processors: int) -> int:
    """Token tiles side by side: so many that a wave reads the fewest bytes, x two bytes and weights half of one."""
    ideal = (processors * tile.rows / (tile.tokens * 4)) ** 0.5
    bands = max(1, round(token_tiles / ideal))
    return -(-token_tiles // bands)


BLOCK_US = {
    Tile(64, 2): 0.6, Tile(64, 3): 0.65, Tile(64, 4): 0.7, Tile(128, 2): 0.85, Tile(128, 3): 1.1, Tile(128, 4): 1.4,
    Tile(256, 2): 1.5,
}  # fmt: skip
"""Microseconds that a CTA takes for a block of columns of its tile."""
SUM_US = 2.0
"""Of summing up a shared tile."""


@cache
def choose(tokens: int, rows: int, columns: int, sums: bool, processors: int) -> Tile | None:
    """The fastest tile, or None where a dense product is faster."""
    return Tile(64, 4) if tokens <= 64 else Tile(128, 2)
