"""How `csrc/w4a16_hopper.cu` is launched for a matrix and a number of tokens: tiles, who computes which, memory.

Pure arithmetic on the limits of a device, so that every case can be checked without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

from featherweight.kernels.wna16_layout import COLUMNS, ROWS, Layout, extent

STAGING_BYTES = 1024  # of a warp
RESERVED_BYTES = 1024  # of shared memory, that each CTA takes for itself
MOST_STAGES = 8
LEAST_BLOCKS = 2
"""Of a CTA's stretch of the shared tiles: fewer are not worth the sums that they add."""
OWNED = 0.99
"""Of what equal stretches should take: owners and clusters, whose costs are the less certain, only where they should
take less."""
BESIDE, ROOM = 1.5, 0.91
"""Microseconds that the next launch gains where it can begin beside this one: of two CTAs a multiprocessor, if no more
than so many of the places are taken; timed with one tile of tokens."""
LEFT = 2.6
"""Microseconds that the next launch gains where clusters leave half of the places to it."""
EVEN = 0.9
"""Of the multiprocessors: so many tiles are better computed whole, side by side through the same columns of x."""


@dataclass(frozen=True)
class Tile:
    """Of y: 64 rows (outputs) for each warpgroup x `tokens`.

    Attributes:
        sums: whether scales multiply the sums of groups, and not weights, which rounds those to the dtype of x.
        ctas: of a multiprocessor; with two the next launch can begin while this one ends.
        meet: CTAs that share each tile and are a cluster: their sums meet in each other's memory.
    """

    tokens: int
    warpgroups: int
    sums: bool = False
    ctas: int = 1
    meet: int = 1

    @property
    def rows(self) -> int:
        return 64 * self.warpgroups

    @property
    def meeting_bytes(self) -> int:
        """Of shared memory, where the sums of a tile that a cluster shares meet."""
        sixteens = self.tokens // 16
        return (self.meet - 1) * -(-sixteens // self.meet) * 32 * 128 * self.warpgroups

    @property
    def threads(self) -> int:
        """Of a CTA: one more warpgroup, which copies."""
        return 128 * (self.warpgroups + 1)


@dataclass(frozen=True)
class Cost:
    """Microseconds: of a launch, of a block of columns of a tile, of summing up a shared tile, of storing one."""

    launch: float
    block: float
    sum: float
    tile: float


COSTS = {
    Tile(64, 2): Cost(2.6, 0.550, 3.2, 0),
    Tile(64, 2, ctas=2): Cost(0.7, 1.015, 3.9, 1.3),
    Tile(64, 3): Cost(3.0, 0.798, 4.4, 0.3),
    Tile(64, 4): Cost(0.2, 1.000, 3.9, 2.4),
    Tile(128, 3): Cost(2.2, 1.167, 5.2, 0),
    Tile(128, 4): Cost(2.3, 1.590, 5.8, 1.3),
    Tile(256, 2): Cost(0, 1.530, 9.5, 0),
    Tile(64, 2, meet=2): Cost(1.2, 0.530, 2.0, 0),
    Tile(64, 3, meet=2): Cost(2.5, 0.630, 2.5, 0),
    Tile(128, 2, meet=2): Cost(1.8, 0.720, 2.0, 0),
    Tile(64, 2, True): Cost(3.3, 0.510, 3.4, 1.0),
    Tile(64, 3, True): Cost(1.6, 0.690, 4.9, 1.2),
    Tile(64, 4, True): Cost(0, 0.934, 6.9, 0),
    Tile(128, 2, True): Cost(0, 0.820, 4.1, 1.1),
    Tile(64, 2, True, meet=2): Cost(2.1, 0.505, 2.0, 0),
    Tile(64, 3, True, meet=2): Cost(2.8, 0.675, 2.0, 0),
    Tile(128, 2, True, meet=2): Cost(1.5, 0.770, 2.0, 0),
}
"""Fitted on an H100 with errors of 3 to 10 per cent: tiles of 64 tokens without sums to some 60 launches of 64 and 256
tokens (bench/results/2026-11-23-h100-w4a16-hopper.md), of 128 and 256 to some 160 (2026-11-22), the last of them to
4096 tokens too; those that meet to eight launches (2026-11-23), one of them of 128 tokens; those with sums to 76, in
bfloat16, of 64 and 256 tokens (2026-11-23)."""


@dataclass(frozen=True)
class Owned:
    """Microseconds of a part that a helper leaves, and of an owner's adding them; `blocks` of the rows that gain."""

    part: float
    added: float
    blocks: int


OWNERS = {
    Tile(64, 2, ctas=2): Owned(2.6, 2.4, 16),
    Tile(64, 4): Owned(4.9, 1.0, 64),
    Tile(128, 3): Owned(4.7, 3.1, 40),
}
"""Tiles that gain by owners, of those that were timed with them (bench/results/2026-11-23-h100-w4a16-hopper.md)."""
SPARSE_COSTS = {
    Tile(64, 2): Cost(0, 0.499, 3.9, 1.1),
    Tile(64, 4): Cost(0.9, 0.735, 4.3, 1.8),
    Tile(128, 2): Cost(1.3, 0.589, 5.3, 0.7),
    Tile(128, 4): Cost(0.1, 0.995, 7.5, 2.7),
    Tile(256, 2): Cost(0, 0.960, 11, 0),
    Tile(64, 4, True): Cost(4.0, 0.688, 4.0, 0.6),
    Tile(128, 2, True): Cost(0, 0.640, 8.5, 0),
}
"""Of 2:4 sparse weights: fitted to some 270 launches (bench/results/2026-11-22-h100-sparse24.md); what they choose was
at most 6 per cent slower than the best tile there."""
EXACT_TOKENS, SPARSE_EXACT_TOKENS = 256, 128
"""Of bfloat16: up to so many tokens sums are scaled; beyond, weights are rounded to it, as where they are made floats
for a dense product, and launches take a quarter less."""
ROUNDED = (Tile(128, 3), Tile(128, 4), Tile(256, 2))
"""Tiles without sums that bfloat16 has for many tokens, if they are not sparse."""
DENSE_GBPS, DENSE_GFLOPS = 2350.0, 690e3
"""Of making weights floats (bytes read and written), and of cuBLAS, on an H100 that many products have made hot."""


@dataclass(frozen=True)
class Plan:
    """One launch.

    Attributes:
        tile: what the kernel is compiled for.
        grid: CTAs, all of which run at once unless they meet: no cluster waits for another.
        row_tiles, token_tiles: of y.
        band: token tiles between which weights are reused before the next rows.
        whole: tiles that each CTA computes alone; shared: tiles that come after those, cut up between `sharers` CTAs.
        helped: blocks of columns of a shared tile that its owner, the CTA of its number, leaves to those that own none;
            0: no tile has an owner, and all who share compute equal stretches of them.
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
    helped: int
    stages: int
    at_weights: int
    at_staging: int
    at_meeting: int
    at_barriers: int
    bytes: int

    @property
    def partials_bytes(self) -> int:
        """Device memory for the parts of shared tiles: two a CTA, or two a tile that has an owner."""
        held = 0 if self.tile.meet > 1 else self.shared if self.helped else self.sharers
        return held * 2 * self.tile.rows * self.tile.tokens * 4


class Shares(NamedTuple):
    """Who computes how many tiles, as `Plan` has it."""

    grid: int
    whole: int
    shared: int
    sharers: int
    helped: int


def costs_of(layout: Layout) -> dict[Tile, Cost]:
    return SPARSE_COSTS if layout.sparse else COSTS


def tiles(dtype: torch.dtype, layout: Layout) -> tuple[Tile, ...]:
    """Those that there are for activations of this dtype; sums take registers, and leave fewer for the tile.

    float16 keeps 11 bits of a weight, which is exact enough where it has the range of the scales; bfloat16 keeps 8, and
    is let do so for many tokens alone. Scales of groups of 32 take registers too, which four
    warpgroups do not have beside sums or those of 128 tokens (unless they are sparse), nor two CTAs a multiprocessor.
    """
    if layout.sparse:
        sums = {torch.float16: (False,), torch.bfloat16: (True, False)}[dtype] if dtype == layout.scales else (True,)
        return tuple(tile for tile in SPARSE_COSTS if tile.sums in sums and _worth(tile, sums))
    fits = [tile for tile in COSTS if tile.sums != (dtype == layout.scales == torch.float16)]
    if dtype == layout.scales == torch.bfloat16:
        fits += ROUNDED
    full = (Tile(128, 4), Tile(64, 4, True), Tile(64, 2, ctas=2)) if layout.group == 32 else ()
    return tuple(tile for tile in fits if tile not in full)


def _worth(tile: Tile, sums: tuple[bool, ...]) -> bool:
    """Beside tiles with sums, those without serve more tokens than they."""
    return tile.sums or len(sums) == 1 or tile.tokens * tile.rows > 128 * 128


@cache
def lay_out(
    tile: Tile, tokens: int, rows: int, columns: int, layout: Layout, processors: int, block_bytes: int
) -> Plan:
    """The launch with tiles of this shape, on so many multiprocessors with so much shared memory."""
    blocks = extent(rows, columns)[1]
    room = (block_bytes + RESERVED_BYTES) // tile.ctas - RESERVED_BYTES
    row_tiles, token_tiles = -(-rows // tile.rows), -(-tokens // tile.tokens)
    shares = _share(tile, row_tiles, token_tiles, blocks, layout, processors)[0]
    weights_bytes, x_bytes = tile.rows // ROWS * layout.block_bytes, tile.tokens * COLUMNS * 2
    staging = tile.warpgroups * 4 * STAGING_BYTES
    fixed = staging + tile.meeting_bytes + (tile.meet > 1) * 32 * tile.warpgroups
    stages = min(MOST_STAGES, (room - fixed - 128) // (weights_bytes + x_bytes + 16))
    at_weights = stages * x_bytes
    at_staging = -(-(at_weights + stages * weights_bytes) // 128) * 128
    at_meeting = at_staging + staging
    at_barriers = at_meeting + tile.meeting_bytes
    return Plan(
        tile, shares.grid, row_tiles, token_tiles, _band(tile, token_tiles, processors * tile.ctas), *shares[1:],
        stages, at_weights, at_staging, at_meeting, at_barriers,
        at_barriers + stages * 16 + (tile.meet > 1) * 32 * tile.warpgroups,
    )  # fmt: skip


@cache
def choose(tokens: int, rows: int, columns: int, dtype: torch.dtype, layout: Layout, processors: int) -> Tile | None:
    """The tile that should be fastest, or None where a dense product should be."""
    blocks = extent(rows, columns)[1]

    def estimate(tile: Tile) -> float:
        return _share(tile, -(-rows // tile.rows), -(-tokens // tile.tokens), blocks, layout, processors)[1]

    exact = dtype == torch.bfloat16 and tokens <= (SPARSE_EXACT_TOKENS if layout.sparse else EXACT_TOKENS)
    best = min((tile for tile in tiles(dtype, layout) if tile.sums or not exact), key=estimate)
    dense_us = rows * columns * (2.5 / DENSE_GBPS + 2 * tokens / DENSE_GFLOPS) / 1e3
    return best if estimate(best) <= dense_us else None


def _share(
    tile: Tile, row_tiles: int, token_tiles: int, blocks: int, layout: Layout, processors: int
) -> tuple[Shares, float]:
    """Who computes which of so many tiles, and the microseconds that it should take."""
    cost, ctas, count = costs_of(layout)[tile], processors * tile.ctas, row_tiles * token_tiles
    if tile.meet > 1:
        return Shares(count * tile.meet, 0, count, count * tile.meet, 0), _meeting_us(tile, cost, count, blocks, ctas)
    whole, shared = divmod(count, ctas)
    if not shared:
        return Shares(ctas, whole, 0, 0, 0), _estimate_us(cost, blocks, whole, 0, 0)
    even = list(range(shared, min(ctas, shared * max(1, blocks // LEAST_BLOCKS)) + 1, shared))
    all_of_them = [min(ctas, max(shared, shared * blocks // LEAST_BLOCKS))] if shared < EVEN * ctas else []
    room = ROOM * ctas if tile.ctas == 2 and token_tiles == 1 and not whole else 0
    us, sharers = min(
        (_estimate_us(cost, blocks, whole, shared, n) - (BESIDE if n <= room else 0), n) for n in even + all_of_them
    )
    best = Shares(ctas if whole else sharers, whole, shared, sharers, 0), us
    in_step = tile.ctas == 1 and sharers > shared and sharers % shared == 0  # equal parts of tiles, side by side in x
    if layout.sparse or tile not in OWNERS or in_step:
        return best
    return min([best, *_owned(tile, count, blocks, processors)], key=lambda found: found[1])


def _owned(tile: Tile, count: int, blocks: int, processors: int) -> Iterator[tuple[Shares, float]]:
    """What tiles with owners should take, one CTA on each multiprocessor; over OWNED."""
    cost, owned = COSTS[replace(tile, ctas=1)], OWNERS[tile]
    whole, shared = divmod(count, processors)
    helpers = processors - shared
    if shared < helpers or blocks < owned.blocks:  # a helper of less than a tile leaves three parts of one
        return
    parts = shared / helpers + 1
    for helped in range(1, blocks // 2):
        owner = (blocks - helped) * cost.block + owned.added + cost.tile
        helper = helped * shared / helpers * cost.block + parts * owned.part
        us = cost.launch + whole * (blocks * cost.block + cost.tile) + max(owner, helper)
        yield Shares(processors, whole, shared, processors, helped), us / OWNED


def _meeting_us(tile: Tile, cost: Cost, count: int, blocks: int, ctas: int) -> float:
    """What clusters should take that share a tile each, over OWNED; those that do not fit at once were not timed."""
    if count * tile.meet > ctas or blocks < LEAST_BLOCKS * tile.meet:
        return float("inf")
    us = cost.launch + -(-blocks // tile.meet) * cost.block + cost.sum + cost.tile
    return (us - (LEFT if count * tile.meet <= ctas // 2 else 0)) / OWNED


def _estimate_us(cost: Cost, blocks: int, whole: int, shared: int, sharers: int) -> float:
    """What the last CTA takes."""
    stretch = -(-shared * blocks // sharers) if shared else 0
    sums = 0 if sharers == shared else 1 if sharers % shared == 0 else 2
    stored = whole + (shared > 0)
    return cost.launch + (whole * blocks + stretch) * cost.block + sums * cost.sum + stored * cost.tile


def _band(tile: Tile, token_tiles: int, ctas: int) -> int:
    """Token tiles side by side: so many that a wave reads the fewest bytes, x two bytes and weights half of one."""
    ideal = (ctas * tile.rows / (tile.tokens * 4)) ** 0.5
    bands = max(1, round(token_tiles / ideal))
    return -(-token_tiles // bands)
