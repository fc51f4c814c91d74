"""How `csrc/w4a16.cu` is launched for a matrix and a number of tokens: who takes which rows and columns, and memory.

Pure arithmetic on the limits of a device, so that every case can be checked without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from featherweight.kernels.w4a16_layout import CHUNK, COLUMNS, ROWS, Layout

WARPS = 8
TOKENS = 32
"""The most that one launch takes."""
FIXED_RING = 6  # stages on GPUs without bulk copies: RING of the source
STAGES = range(2, 9)  # fewer cannot cover the latency of memory, more have not been seen to help


@dataclass(frozen=True)
class Device:
    """What a launch must know of a GPU.

    Attributes:
        processors: streaming multiprocessors.
        block_bytes: shared memory that one CTA may take.
        processor_bytes: shared memory of one multiprocessor, of which each CTA also takes 1024 bytes for itself.
        clusters: CTAs of a cluster -> clusters that can run at once; {1: processors} before Hopper.
    """

    processors: int
    block_bytes: int
    processor_bytes: int
    clusters: tuple[tuple[int, int], ...]

    @property
    def has_clusters(self) -> bool:
        return len(self.clusters) > 1


@dataclass(frozen=True)
class Plan:
    """One launch.

    Attributes:
        tokens: in this launch; the kernel is compiled for `width` (8, 16, 24 or 32).
        size: CTAs of a cluster, which split the columns; warp_splits: warps of a CTA that split them further.
        clusters: how many share the tiles.
        stages: chunks in each warp's ring; chunk: blocks in one.
        x_stride, at_*, partials_bytes, bytes: shared memory, as the source's Params has it.
    """

    tokens: int
    size: int
    warp_splits: int
    clusters: int
    stages: int
    chunk: int
    x_stride: int
    at_barriers: int
    at_x: int
    at_partials: int
    partials_bytes: int
    bytes: int

    @property
    def width(self) -> int:
        return -(-self.tokens // 8) * 8

    @property
    def owned_log2(self) -> int:
        """Of the rows of a pass, those that one CTA sums up."""
        return (WARPS // self.warp_splits * ROWS // self.size).bit_length() - 1


def splits(device: Device) -> list[tuple[int, int]]:
    """CTAs of a cluster and warps of a CTA that may split the columns, the best first."""
    pairs = [(1, WARPS), (2, WARPS // 2), (4, WARPS // 4), (8, WARPS // 8)]
    return [(size, warps) for size, warps in pairs if dict(device.clusters).get(size)]


def lay_out(
    tokens: int, tiles: int, blocks: int, layout: Layout, device: Device, size: int, warp_splits: int, stages: int, chunk: int = CHUNK
) -> Plan:
    """The plan with these splits and stages, whether or not it fits."""
    row_warps, splits = WARPS // warp_splits, size * warp_splits
    clusters = min(dict(device.clusters)[size], tiles)
    passes = -(-(-(-tiles // clusters)) // row_warps)
    chunks = -(-blocks // chunk)
    ends = [chunks * r // splits for r in range(0, splits + 1, warp_splits)]
    slice_blocks = max(end - start for start, end in zip(ends, ends[1:], strict=False)) * chunk
    stride = slice_blocks * COLUMNS * 2 + 64  # 64: rows of x fall on different banks
    owned = row_warps * ROWS // size
    at_barriers = WARPS * stages * chunk * layout.block_bytes
    at_x = _aligned(at_barriers + (WARPS * stages + 3) * 8)
    at_partials = _aligned(at_x + tokens * stride)
    partials = splits * tokens * (owned + 4) * 4
    total = at_partials + min(passes, 2) * partials
    return Plan(
        tokens, size, warp_splits, clusters, stages, chunk, stride, at_barriers, at_x, at_partials, partials, total
    )


@cache
def choose(tokens: int, tiles: int, blocks: int, layout: Layout, device: Device) -> Plan | None:
    """The best plan, or None when `tokens` do not fit into shared memory at once.

    Two CTAs are to fit on a multiprocessor if they can: then the next kernel fetches its weights while this one ends.
    """
    stages = STAGES if device.has_clusters else range(FIXED_RING, FIXED_RING + 1)
    for size, warp_splits in splits(device):
        plans = [lay_out(tokens, tiles, blocks, layout, device, size, warp_splits, n) for n in stages]
        pair = [plan for plan in plans if 2 * (plan.bytes + 1024) <= device.processor_bytes]
        alone = [plan for plan in plans if plan.bytes <= device.block_bytes]
        if pair or alone:
            return (pair or alone)[-1]
    return None


@cache
def most_tokens(tiles: int, blocks: int, layout: Layout, device: Device) -> int:
    """The most tokens of one launch; 0 when not even one fits."""
    fits = (t for t in range(TOKENS, 0, -1) if choose(t, tiles, blocks, layout, device) is not None)
    return next(fits, 0)


def _aligned(at: int) -> int:
    return -(-at // 128) * 128
