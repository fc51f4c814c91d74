"""How `csrc/w4a16.cu` is launched for a matrix and a number of tokens: who takes which rows and columns, and memory.

Pure arithmetic on the limits of a device, so that every case can be checked without one. The preferences are what was
fastest on an H100 (bench/results).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import ceil

from featherweight.kernels.w4a16_layout import CHUNK, COLUMNS, ROWS, Layout

TOKENS = 32
"""The most that one launch takes."""
NARROW = 8
"""Tokens up to which a launch is kept small enough for two CTAs on a multiprocessor."""
FIXED_RING = 3  # stages on GPUs without bulk copies: RING of the source
SMALL_BYTES = 30e6
PAIRED, ALONE = (3, 2), (6, 5, 4, 3, 2)
"""Stages to try, for two CTAs on a multiprocessor and for one. More fetches than memory can serve delay the first."""


@dataclass(frozen=True)
class Device:
    """What a launch must know of a GPU.

    Attributes:
        processors: streaming multiprocessors.
        block_bytes: shared memory that one CTA may take.
        processor_bytes: shared memory of one multiprocessor, of which each CTA also takes 1024 bytes for itself.
        clusters: CTAs of a cluster -> clusters that can run at once; 1 -> processors before Hopper.
    """

    processors: int
    block_bytes: int
    processor_bytes: int
    clusters: tuple[tuple[int, int], ...]

    @property
    def has_clusters(self) -> bool:
        return len(self.clusters) > 1


@dataclass(frozen=True)
class Split:
    """Who takes what: warps of a CTA, CTAs of a cluster (which split the columns), warps that split them further."""

    warps: int
    size: int
    warp_splits: int

    @property
    def row_warps(self) -> int:
        """Tiles that a cluster takes at once."""
        return self.warps // self.warp_splits

    @property
    def parts(self) -> int:
        """Of the columns."""
        return self.size * self.warp_splits


@dataclass(frozen=True)
class Plan:
    """One launch.

    Attributes:
        tokens: in this launch; the kernel is compiled for `width` (8, 16, 24 or 32).
        clusters: how many share the tiles.
        stages: chunks in each warp's ring; chunk: blocks in one.
        x_stride, at_*, partials_bytes, bytes: shared memory, as the source's Params has it.
    """

    tokens: int
    split: Split
    clusters: int
    stages: int
    chunk: int
    x_stride: int
    at_barriers: int
    at_x: int
    at_sums: int
    at_partials: int
    partials_bytes: int
    bytes: int

    @property
    def width(self) -> int:
        return -(-self.tokens // 8) * 8

    @property
    def owned_log2(self) -> int:
        """Of the rows of a pass, those that one CTA sums up."""
        return (self.split.row_warps * ROWS // self.split.size).bit_length() - 1


@dataclass(frozen=True)
class Option:
    """A split, the blocks of a chunk, and the stages without which another option is better."""

    split: Split
    chunk: int = CHUNK
    least: int = 2


def options(tokens: int, tiles: int, device: Device) -> Iterator[Option]:
    """What to try, the best first.

    A tile for every warp, with the columns split as little as that needs; for more tokens more CTAs a cluster, whose
    slices of x are smaller, and more warps, which hide each other's latency.
    """
    if not device.has_clusters:
        yield Option(Split(4, 1, 4), least=FIXED_RING)
        return
    parts = 1
    while parts < 8 and tiles * parts * 2 <= device.processors * 8:
        parts *= 2
    size = min(parts, 2)
    wide = [Option(Split(8, 8, 1)), Option(Split(4, 8, 1), chunk=1)]
    if tokens <= NARROW:
        found = [Option(Split(8, size, parts // size), least=4), Option(Split(8, 4, 1), least=4), *wide]
    elif tokens <= 16:
        deep = [Option(Split(8, 2, 4), least=4), Option(Split(16, 8, 1))] if parts == 8 else []
        found = [*deep, Option(Split(16, 4, 1)), Option(Split(16, 4, 1), chunk=1), *wide]
    else:
        found = [Option(Split(8, 4, 1)), *wide]
    yield from (option for option in found if dict(device.clusters).get(option.split.size))


def lay_out(
    tokens: int, tiles: int, blocks: int, layout: Layout, device: Device, split: Split, stages: int, chunk: int = CHUNK
) -> Plan:
    """The plan with this split and so many stages, whether or not it fits."""
    clusters = min(dict(device.clusters)[split.size], tiles)
    passes = ceil(tiles / clusters / split.row_warps)
    chunks = -(-blocks // chunk)
    ends = [chunks * r // split.parts for r in range(0, split.parts + 1, split.warp_splits)]
    slice_blocks = max(end - start for start, end in pairwise(ends)) * chunk
    stride = slice_blocks * COLUMNS * 2 + 64  # 64: rows of x fall on different banks
    at_barriers = split.warps * stages * chunk * layout.block_bytes
    at_x = _aligned(at_barriers + (split.warps * stages + 3) * 8)
    at_sums = _aligned(at_x + tokens * stride)
    at_partials = at_sums + slice_blocks * layout.parts * -(-tokens // 8) * 64
    partials = split.parts * tokens * (split.row_warps * ROWS // split.size + 4) * 4
    total = at_partials + min(passes, 2) * partials
    return Plan(
        tokens, split, clusters, stages, chunk, stride, at_barriers, at_x, at_sums, at_partials, partials, total
    )


@cache
def choose(tokens: int, tiles: int, blocks: int, layout: Layout, device: Device) -> Plan | None:
    """The best plan, or None when `tokens` do not fit into shared memory at once.

    For small matrices two CTAs are to fit on a multiprocessor if they can: then the next kernel fetches its weights
    while this one ends. Large ones gain more from memory.
    """
    small = tiles * blocks * layout.block_bytes <= SMALL_BYTES
    for option in options(tokens, tiles, device):

        def plan(stages: int, option: Option = option) -> Plan:
            return lay_out(tokens, tiles, blocks, layout, device, option.split, stages, option.chunk)

        pairs = PAIRED if device.has_clusters and small and tokens <= NARROW else ()
        alone = [stages for stages in ALONE if stages >= option.least] if device.has_clusters else [FIXED_RING]
        fits = [n for n in pairs if 2 * (plan(n).bytes + 1024) <= device.processor_bytes]
        fits += [n for n in alone if plan(n).bytes <= device.block_bytes]
        if fits:
            return plan(fits[0])
    return None


@cache
def most_tokens(tiles: int, blocks: int, layout: Layout, device: Device) -> int:
    """The most tokens of one launch; 0 when not even one fits."""
    fits = (t for t in range(TOKENS, 0, -1) if choose(t, tiles, blocks, layout, device) is not None)
    return next(fits, 0)


def shares(tokens: int, most: int) -> list[int]:
    """The tokens of each launch: as few launches as can be, as equal as can be."""
    launches = -(-tokens // most)
    return [tokens * (i + 1) // launches - tokens * i // launches for i in range(launches)]


def _aligned(at: int) -> int:
    return -(-at // 128) * 128
