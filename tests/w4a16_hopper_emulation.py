"""csrc/w4a16_hopper.cu in NumPy: bytes to operands as its lanes make them, and who computes which columns of a tile.

Names and formulas are the source's, so that one can be read beside the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from featherweight.kernels.w4a16_hopper_plan import Plan, Tile
from featherweight.kernels.wna16_layout import Layout

Words = np.ndarray


def registers(w: Words, dtype: torch.dtype, zeros: tuple[Words, Words]) -> list[torch.Tensor]:
    """The four registers of `to_floats` before scales: pairs of code minus zero in the last axis, in `dtype`."""
    found = []
    for i in range(2):
        v = w >> 8 * i
        if dtype == torch.bfloat16:
            found.append(pairs(v & 0x000F000F | 0x43004300, dtype) - number(0x4300 | zeros[0], dtype))
            found.append(pairs(v >> 4 & 0x000F000F | 0x43004300, dtype) - number(0x4300 | zeros[1], dtype))
        else:
            found.append(pairs(v & 0x000F000F | 0x64006400, dtype) - number(0x6400 | zeros[0], dtype))
            product = pairs(v & 0x00F000F0 | 0x64006400, dtype).double() * number(np.asarray(0x2C00), dtype).double()
            found.append((product + number(0xD400 | zeros[1] << 4, dtype).double()).to(dtype))  # one rounding
    return found


def raised(w: Words, scales: tuple[Words, Words], powers: tuple[Words, Words]) -> list[torch.Tensor]:
    """The four registers of `to_floats` where rows' scales are raised: pairs of weights times 2^(power - 24)."""
    found = []
    for i in range(2):
        for odd, mask in enumerate((0x000F000F, 0x00F000F0)):
            scale = torch.from_numpy(np.ldexp(scales[odd].astype(np.float32), powers[odd] - 4 * odd)).half()
            middle = (scale.float() * -(2.0 ** (4 * odd - 21))).half()
            product = pairs(w >> 8 * i & mask, torch.float16).double() * scale.double()[..., None]
            found.append((product + middle.double()[..., None]).half())  # one rounding
    return found


def pairs(words: Words, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(words.astype(np.uint32).view(np.int32)[..., None].copy()).view(torch.int16).view(dtype)


def number(bits: Words, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.asarray(bits, dtype=np.uint16).view(np.int16)[..., None].copy()).view(dtype)


def operands(
    block: torch.Tensor, layout: Layout, dtype: torch.dtype, powers: torch.Tensor | None = None
) -> torch.Tensor:
    """32 rows x 128 columns of code minus zero, where the tensor cores take them: in the order of x's columns; with the
    rows' powers, as `raised` has them."""
    words = (
        block[: layout.code_bytes].numpy().view(np.uint32).astype(np.int64).reshape(2, 2, 8, 4, 2, 2)
    )  # half, u, g, t, i, j
    zeros = np.full((layout.parts, 8, 2, 2), 8)
    if layout.zeros:
        zeros = block[layout.code_bytes + layout.scale_bytes :].numpy().astype(np.int64).reshape(layout.parts, 8, 2, 2)
    at, end = layout.code_bytes, layout.code_bytes + layout.scale_bytes
    scales = block[at:end].clone().view(layout.scales).float().numpy().reshape(layout.parts, 8, 2, 2)
    out = torch.full((32, 128), torch.nan, dtype=torch.float64)
    for half in range(2):
        for step in range(8):  # products of 16 columns
            unit, j = divmod(step, 2)
            u, i = divmod(unit, 2)
            word = words[half, u, :, :, i, j]  # [g, t]
            z = zeros[unit * 32 // layout.group, :, half]
            if powers is None:
                a = registers(word, dtype, (z[:, 0, None], z[:, 1, None]))
            else:
                s = scales[unit * 32 // layout.group, :, half]
                rows = powers.numpy().astype(np.int64).reshape(2, 2, 8)[half]
                a = raised(word, (s[:, 0, None], s[:, 1, None]), (rows[0, :, None], rows[1, :, None]))
            for r in range(4):  # of wgmma: rows g, g + 8; columns 2t, 2t + 1 of the first and of the second eight
                for g in range(8):
                    for t in range(4):
                        column = step * 16 + r // 2 * 8 + 2 * t
                        out[half * 16 + r % 2 * 8 + g, column : column + 2] = a[r][g, t].double()
    return out


def pieces(plan: Plan, blocks: int, cta: int) -> Iterator[tuple[int, int, int]]:
    """Tile, first and end block of columns of a CTA: `Pieces` of the source."""
    if plan.tile.meet > 1:
        rank = cta % plan.tile.meet
        yield cta // plan.tile.meet, blocks * rank // plan.tile.meet, blocks * (rank + 1) // plan.tile.meet
        return
    for index in range(plan.whole):
        yield cta + index * plan.grid, 0, blocks
    if cta >= plan.sharers:
        return
    span, sharers, owns = blocks, plan.sharers, plan.helped > 0 and cta < plan.shared
    if plan.helped and not owns:
        span, cta, sharers = plan.helped, cta - plan.shared, sharers - plan.shared
    units = plan.shared * span
    unit, end = units * cta // sharers, units * (cta + 1) // sharers
    if owns:
        unit, end = cta * blocks + plan.helped, (cta + 1) * blocks
    while unit < end:
        t = unit // span
        first, last = unit - t * span, min(span, end - t * span)
        yield plan.whole * plan.grid + t, first, last
        unit += last - first


def sharers_of(plan: Plan, blocks: int, tile: int) -> tuple[range, list[int]]:
    """The CTAs that share a tile, and in which of their slots its part lies: `sum_partials` of the source."""
    t, units = tile - plan.whole * plan.grid, plan.shared * blocks
    first = ((t * blocks + 1) * plan.sharers + units - 1) // units - 1
    last = ((t + 1) * blocks * plan.sharers + units - 1) // units - 1
    first_slot = 0 if units * first // plan.sharers >= t * blocks else 1
    return range(first, last + 1), [first_slot] + [0] * (last - first)


def helpers_of(plan: Plan, tile: int) -> tuple[range, list[int]]:
    """The CTAs that leave parts of a tile that has an owner, and where: `add_help` of the source."""
    t, units, helpers = tile - plan.whole * plan.grid, plan.shared * plan.helped, plan.sharers - plan.shared
    first, last = ((t * plan.helped + 1) * helpers - 1) // units, ((t + 1) * plan.helped * helpers - 1) // units
    return range(plan.shared + first, plan.shared + last + 1), [t * 2 + i for i in range(last - first + 1)]


def place(plan: Plan, tile: int) -> tuple[int, int]:
    """Row tile and token tile: `row_tile_of` of the source."""
    per_band = plan.band * plan.row_tiles
    band = tile // per_band
    width = min(plan.band, plan.token_tiles - band * plan.band)
    in_band = tile - band * per_band
    return in_band // width, band * plan.band + in_band % width


def block_at(blocks: int, tiles: int, k: int, t: int) -> int:
    """Where block k of tile t lies, in blocks."""
    pair = k & ~1
    return tiles * pair + t * min(2, blocks - pair) + (k - pair)


def sent(tile: Tile, rank: int) -> Iterator[tuple[int, int, int]]:
    """For each sixteen of tokens: the rank of the cluster that sums it up, the box there that we send ours to (-1 where
    that is us), and which of that rank's sixteens it is: `meet` of the source."""
    meet, sixteens = tile.meet, tile.tokens // 16
    share = -(-sixteens // meet)
    for i in range(sixteens):
        to = i * meet // sixteens
        own = i - (to * sixteens + meet - 1) // meet
        yield to, -1 if to == rank else ((rank - to + meet) % meet - 1) * share + own, own
