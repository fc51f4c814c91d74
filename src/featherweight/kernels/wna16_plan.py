"""How `csrc/wna16.cu` is launched for a matrix and a number of tokens: who takes which rows and columns, and memory.

Pure arithmetic on the limits of a device, so that every case can be checked without one. The preferences are what was
fastest on an H100 (bench/results): in a row of equal launches, and for the products of a block of Llama-3-8B at few
tokens in a token's own sequence, where the fastest alone are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import ceil

from featherweight.kernels.wna16_layout import COLUMNS, Layout

TOKENS = 32
"""The most that one launch takes."""
FIXED_RING = 3  # stages on GPUs without bulk copies: RING of the source
SMALL_BYTES, MEDIUM_BYTES, LARGE_BYTES = 28e6, 38e6, 80e6
MANY_BLOCKS, MANY_TILES = 32, 1000


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
class Choice:
    """What is chosen; the rest follows.

    Attributes:
        size: CTAs of a cluster, which split the columns.
        warps: at most, of a CTA. They take a tile each, in as few passes as can be and as many tiles in each; where
            there are fewer tiles than warps, several split a tile's columns further.
        stages: chunks in each warp's ring.
        divided: into how many fetches a chunk of the layout is divided.
        times: clusters for each that fits at once with all of the shared memory.
        shared: two CTAs have to fit on a multiprocessor, whose clusters need not all fit alone: `times` counts for as
            many as there are multiprocessors for.
        hold: the next launch may begin when a warp of each CTA has no more than so many chunks left to multiply; None:
            at once. Where the next one fits beside this, its fetches delay what this one has still to fetch; so two
            CTAs have to fit on a multiprocessor.
    """

    size: int
    warps: int
    stages: int
    divided: int = 1
    times: int = 1
    shared: bool = False
    hold: int | None = None

    @property
    def beside(self) -> bool:
        """Whether it is of use only where two CTAs fit on a multiprocessor."""
        return self.shared or self.hold is not None


@dataclass(frozen=True)
class Plan:
    """One launch.

    Attributes:
        tokens: in this launch; the kernel is compiled for `width` (8, 16, 24 or 32).
        size: CTAs of a cluster, which split the columns; clusters: how many share the tiles.
        row_warps, warp_splits: tiles that a cluster takes at once, and warps of a CTA that split the columns of one.
        stages: chunks in each warp's ring; chunk: blocks in one.
        own: whether a CTA's own sums stay in its rings, of which one pass has no more use.
        hold: as `Choice` has it.
        owned: half tiles of a pass that a CTA sums up; x_stride, part_bytes, at_*, bytes: shared memory, as the
            source's Params has it.
    """

    tokens: int
    size: int
    clusters: int
    row_warps: int
    warp_splits: int
    stages: int
    chunk: int
    own: bool
    hold: int | None
    owned: int
    x_stride: int
    part_bytes: int
    at_barriers: int
    at_x: int
    at_sums: int
    at_partials: int
    bytes: int

    @property
    def width(self) -> int:
        return -(-self.tokens // 8) * 8

    @property
    def warps(self) -> int:
        """Of a CTA."""
        return self.row_warps * self.warp_splits

    @property
    def parts(self) -> int:
        """Of the columns."""
        return self.size * self.warp_splits


def lay_out(tokens: int, tiles: int, blocks: int, layout: Layout, device: Device, choice: Choice) -> Plan:
    """The plan that follows from a choice, whether or not it fits."""
    size, stages = choice.size, choice.stages
    at_once = device.processors // size if choice.shared else dict(device.clusters)[size]
    clusters = min(at_once * choice.times, tiles)
    most = ceil(tiles / clusters)
    passes = ceil(most / choice.warps)
    row_warps = ceil(most / passes)
    warp_splits = choice.warps // row_warps
    chunk = max(1, layout.chunk // choice.divided)
    chunks, parts = ceil(blocks / chunk), size * warp_splits
    ends = [chunks * r // parts for r in range(0, parts + 1, warp_splits)]
    slice_blocks = max(end - start for start, end in pairwise(ends)) * chunk
    stride = slice_blocks * COLUMNS * 2 + 16  # eight rows of x fall on different banks
    owned = ceil(row_warps * 2 / size)
    warps = row_warps * warp_splits
    at_barriers = warps * stages * chunk * layout.block_bytes
    at_x = _aligned(at_barriers + (warps * stages + 2) * 8)
    at_sums = _aligned(at_x + tokens * stride)
    sums = 0 if layout.sparse else slice_blocks * layout.parts * -(-tokens // 8) * 64
    at_partials = at_sums + sums
    half_bytes = -(-tokens // 2) * 128
    own = device.has_clusters and passes == 1 and 2 * half_bytes <= stages * chunk * layout.block_bytes
    part_bytes, received = owned * half_bytes, parts - own * warp_splits
    return Plan(
        tokens, size, clusters, row_warps, warp_splits, stages, chunk, own, choice.hold, owned, stride, part_bytes,
        at_barriers, at_x, at_sums, at_partials, at_partials + received * part_bytes,
    )  # fmt: skip


def choices(tokens: int, tiles: int, blocks: int, layout: Layout, device: Device) -> Iterator[Choice]:
    """What to try, the best first: what was fastest on an H100 in the shapes of bench/results.

    With few tokens two CTAs are to fit on a multiprocessor: of a small matrix's the second is the next launch's, which
    fetches its weights while this one ends. More tokens need more CTAs a cluster, whose slices of x are smaller.
    """
    if not device.has_clusters:
        yield Choice(1, 4, FIXED_RING)
        return
    each, deep = ceil(tiles / dict(device.clusters)[2]), blocks > MANY_BLOCKS
    few = each <= 2  # tiles of a cluster of two
    nbytes = tiles * blocks * layout.block_bytes
    if layout.sparse:
        yield from _for_sparse(tokens, few, blocks, nbytes)
        return
    if tokens <= 8:
        yield from _for_few_tokens(each, blocks, nbytes, layout.bits)
        yield Choice(4, 12, 3)
    elif few and not (deep and tokens <= 16):
        if layout.bits == 4 and each == 2 and tokens <= 16:
            yield Choice(8, 9, 2, 2, hold=3)
        yield Choice(2, 8, 2, 2)
    elif layout.bits == 4 and each == 6 and not deep and tokens <= 16:
        yield Choice(8, 13, 2, 2)  # two passes of 13 tiles
    if tokens <= 16:
        if few and deep:
            yield Choice(8, 9, 3, 2)
        if layout.bits > 3 and deep and not few:
            yield from (Choice(8, 8, 2),) if tiles > MANY_TILES else (Choice(8, 12, 3), Choice(8, 12, 2))
        if layout.bits > 3 and nbytes > MEDIUM_BYTES:
            yield Choice(4, 16, 3)
        if layout.bits > 2:
            yield from (Choice(4, 16, 2), Choice(4, 16, 3, 2))
        yield from (Choice(4, 16, 2, 2), Choice(8, 12, 3, 2), Choice(8, 12, 2, 2))
    elif blocks <= MANY_BLOCKS:
        yield Choice(2, 8, 2)
    yield from (Choice(8, 8, 2, divided) for divided in (1, 2))
    yield Choice(8, 4, 2, 2)


def _for_few_tokens(each: int, blocks: int, bytes: int, bits: int) -> Iterator[Choice]:
    """For up to eight; `each`: tiles of a cluster of two. Deeper rings are slower: waiting fetches delay the first."""
    few = each <= 2
    if bits == 4 and blocks <= MANY_BLOCKS:
        if each == 3:  # halves would be two and one
            yield Choice(2, 12, 3)
        elif each > 12 and bytes <= LARGE_BYTES:
            yield Choice(4, 16, 6, 2)
    if few and blocks > MANY_BLOCKS:
        if bits == 4 and bytes > SMALL_BYTES:
            yield Choice(4, 16, 3)
        yield Choice(2, 12, 2)
    elif few:
        yield from (Choice(2, 8, stages, 2, shared=True) for stages in (6, 4, 3, 2))
    elif bytes > LARGE_BYTES:
        yield Choice(2, 16, 2, 2, times=2, shared=True, hold=2 if bits == 2 else None)
    elif bits == 2 and blocks > MANY_BLOCKS and 4 <= each <= 5 and bytes <= SMALL_BYTES:
        # one pass: of 7 to 9 tiles, or of five
        yield Choice(4, 11, 2, hold=2) if each == 4 else Choice(2, 10, 2, hold=2)
    elif bits > 3 and bytes > MEDIUM_BYTES and blocks > MANY_BLOCKS:
        yield Choice(2, 16, 3)
    if bits > 2 and not few and bytes <= LARGE_BYTES:
        depths = (4, 3, 2) if bytes > MEDIUM_BYTES else (2,)
        yield from (Choice(2, 12, stages, 2, times=2, shared=True) for stages in depths)
    if bits == 2 or bytes > LARGE_BYTES:
        yield Choice(2, 16, 2, 2)


def _for_sparse(tokens: int, few: bool, blocks: int, nbytes: int) -> Iterator[Choice]:
    """For 2:4 sparse weights, of which a block has fewer bytes."""
    if tokens <= 8:
        if few:
            rings = (Choice(2, 8, stages, 2, shared=True) for stages in (6, 4, 3, 2))
            yield from (Choice(2, 12, 2),) if blocks > MANY_BLOCKS else rings
        elif nbytes > LARGE_BYTES:
            yield from (Choice(2, 16, 2, 2, times=2, shared=True), Choice(2, 16, 2, 2))
        else:
            depths = (4, 3, 2) if nbytes > SMALL_BYTES else (2,)
            yield from (Choice(2, 12, stages, 2, times=2, shared=True) for stages in depths)
        yield Choice(4, 12, 3)
    elif few:
        yield Choice(2, 8, 2, 2)
    if tokens <= 16:
        if blocks > MANY_BLOCKS and not few:
            yield from (Choice(8, 12, 3), Choice(8, 12, 2))
        yield from (
            Choice(4, 16, 2),
            Choice(4, 16, 3, 2),
            Choice(4, 16, 2, 2),
            Choice(8, 12, 3, 2),
            Choice(8, 12, 2, 2),
        )
    elif blocks <= MANY_BLOCKS:
        yield Choice(2, 8, 2)
    yield from (Choice(8, 8, 2, divided) for divided in (1, 2))
    yield Choice(8, 4, 2, 2)


@cache
def choose(tokens: int, tiles: int, blocks: int, layout: Layout, device: Device) -> Plan | None:
    """The best plan, or None when `tokens` do not fit into shared memory at once."""
    for choice in choices(tokens, tiles, blocks, layout, device):
        if dict(device.clusters).get(choice.size):
            plan = lay_out(tokens, tiles, blocks, layout, device, choice)
            room = device.processor_bytes // 2 - 1024 if choice.beside else device.block_bytes
            if plan.bytes <= room:
                return plan
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
