"""csrc/wna16.cu in plain torch: the same words, lanes, splits and sums, one launch at a time.

Shapes: R rows, C columns, T tokens; blocks [tiles, blocks of a tile, bytes].
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

import sparse24_emulation
from featherweight.kernels.wna16_layout import COLUMNS, ROWS, Layout, blocks_of
from featherweight.kernels.wna16_plan import Plan

STEP = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
X_SCALE = {torch.float16: 1.0, torch.bfloat16: 2.0**64}
LANES = (8, 4)  # g, t


def odd_step(layout: Layout) -> int:
    """How many times the steps of even rows' codes are those of odd rows'."""
    return 1 if layout.bits == 8 else 16


def registers(block: Tensor, layout: Layout) -> Tensor:
    """The words a[4] that a lane multiplies by, as the kernel masks them: int32 [half, u, i, j, g, t, 4]."""
    field = ((1 << layout.bits) - 1) * 0x00010001
    words = block[: layout.code_bytes].view(torch.int32).long() & 0xFFFFFFFF
    if layout.bits == 8:
        pairs = words.view(2, 2, 2, *LANES, 2, 2).permute(0, 1, 2, 5, 3, 4, 6)  # half, u, i, g, t, j, k2
        return torch.stack([pairs[..., k2] >> 8 * odd & field for k2 in (0, 1) for odd in (0, 1)], -1)
    if layout.bits == 4:
        w = words.view(2, 2, *LANES, 2, 2).permute(0, 1, 4, 5, 2, 3)  # half, u, g, t, i, j
    else:
        low = words[:256].view(2, *LANES, 2, 2).permute(0, 3, 4, 1, 2)  # half, g, t, u, i
        w = torch.stack((low, low >> 2), 3)
    if layout.bits == 3:
        third = words[256:].view(*LANES, 2, 2).permute(2, 3, 0, 1)  # g, t, half, u
        placed = torch.stack((third << 2, third << 1, third, third >> 1), 2)  # half, u, e = 2i + j, g, t
        w = w & 0x33333333 | placed.unflatten(2, (2, 2)) & 0xCCCCCCCC
    return torch.stack([w >> 8 * k2 & field << 4 * odd for k2 in (0, 1) for odd in (0, 1)], -1)


def fragments(block: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """`registers` as the two 16-bit floats each that a tensor core takes them for; float64 [..., 4, 2]."""
    words = registers(block, layout).to(torch.int32).contiguous()
    return words.view(torch.int16).view(dtype).unflatten(-1, (4, 2)).double()


def zeros_of(block: Tensor, layout: Layout) -> Tensor:
    """Zeros as the kernel reads them, odd rows' in their own steps: float64 [group, g, half, odd]."""
    packed = block[layout.code_bytes + layout.scale_bytes :]
    if not layout.zeros:
        even = torch.full((layout.parts, 8, 2), layout.middle, dtype=torch.float64)
        return torch.stack((even, even * odd_step(layout)), -1)
    if layout.bits < 4:
        v = packed.view(torch.int16).long() & 0xFFFF
        v = (v | v << 8) & 0x00FF00FF
        even, odd = v & 0x000F000F, v & 0x00F000F0
    else:
        v = packed.view(torch.int32).long() & 0xFFFFFFFF
        even, odd = v & 0x00FF00FF, v >> 8 & 0x00FF00FF if layout.bits == 8 else v >> 4 & 0x01F001F0
    halves = [torch.stack((each & 0xFFFF, each >> 16), -1) for each in (even, odd)]
    return torch.stack(halves, -1).double().view(layout.parts, 8, 2, 2)


def multiply_block(block: Tensor, x_TC: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """32 rows x T of one block: codes as subnormals, zeros as the first addend, scales on the sums."""
    if layout.sparse:
        return sparse24_emulation.multiply_block(block, x_TC, layout, dtype)
    step, x_scale = STEP[dtype], X_SCALE[dtype]
    pairs = fragments(block, layout, dtype)  # half, u, i, j, g, t, (k2, odd), k1
    x = (x_TC.double() * x_scale).to(dtype).double().view(-1, 2, 2, 2, 2, 4, 2)  # T, u, i, j, k2, t, k1
    scales = block[layout.code_bytes :][: layout.scale_bytes].view(layout.scales).double().view(layout.parts, 8, 2, 2)
    zeros = zeros_of(block, layout)
    sums = x_TC.double().unflatten(-1, (layout.parts, -1)).sum(-1)  # T, group of the block
    total = torch.zeros(2, 2, 8, len(x_TC), dtype=torch.float64)
    for part in range(layout.parts):
        units = range(part * layout.group // 32, (part + 1) * layout.group // 32)
        for odd in range(2):
            unit_step = odd_step(layout) ** odd * step * x_scale
            acc = -zeros[part, :, :, odd].T.unsqueeze(-1) * sums[:, part] * step * x_scale
            for unit in units:
                u, i = divmod(unit, 2)
                a = pairs[:, u, i, ..., odd::2, :]  # half, j, g, t, k2, k1
                acc = acc + torch.einsum("hjgtkl,Tjktl->hgT", a, x[:, u, i])
            total[:, odd] += scales[part, :, :, odd].T.unsqueeze(-1) * acc / unit_step
    return total.reshape(ROWS, -1)


def product(weights: Tensor, x_TC: Tensor, rows: int, layout: Layout, plan: Plan) -> Tensor:
    """y_TR as the clusters, CTAs and warps of a launch share it out; sums are counted as the barriers count them."""
    blocks_TKB = blocks_of(weights, rows, x_TC.shape[1], layout)
    tiles, across = blocks_TKB.shape[:2]
    x_TC = torch.nn.functional.pad(x_TC, (0, across * COLUMNS - x_TC.shape[1]))
    y_TR = torch.full((len(x_TC), rows), torch.nan, dtype=torch.float64)
    for cluster in range(plan.clusters):
        ours = range(cluster, tiles, plan.clusters)
        for start in range(0, len(ours), plan.row_warps):
            here = ours[start : start + plan.row_warps]
            for row, total in one_pass(blocks_TKB, x_TC, layout, plan, here):
                if row < rows:
                    assert y_TR[:, row].isnan().all(), "a row is stored twice"
                    y_TR[:, row] = total
    return y_TR


def half_bytes(plan: Plan) -> int:
    """Of the sums of a half tile."""
    return -(-plan.tokens // 2) * 128


def place(plan: Plan, part: int, half: int, layout: Layout) -> tuple[int, int]:
    """The CTA of the cluster that the sums of a half tile of a pass go to, and where in its memory."""
    owner, own_part = half // plan.owned, part // plan.warp_splits == half // plan.owned
    if plan.own and own_part:
        warp = part % plan.warp_splits * plan.row_warps + half // 2
        at = warp * plan.stages * plan.chunk * layout.block_bytes + half % 2 * half_bytes(plan)
        assert at + half_bytes(plan) <= (warp + 1) * plan.stages * plan.chunk * layout.block_bytes <= plan.at_barriers
        return owner, at
    before = part - plan.warp_splits if plan.own and part >= (owner + 1) * plan.warp_splits else part
    at = plan.at_partials + before * plan.part_bytes + (half - owner * plan.owned) * half_bytes(plan)
    assert at + half_bytes(plan) <= plan.bytes
    return owner, at


def one_pass(blocks_TKB: Tensor, x_TC: Tensor, layout: Layout, plan: Plan, here: range) -> Iterator[tuple[int, Tensor]]:
    """Row numbers and their sums for the tiles `here`, a warp each in every split of the columns."""
    chunks, splits = -(-blocks_TKB.shape[1] // plan.chunk), plan.parts
    sent = torch.zeros(len(here) * ROWS, len(x_TC), dtype=torch.float64)
    received = [0] * plan.size
    places: list[tuple[int, int]] = []
    for part in range(splits):
        first, end = (chunks * n // splits * plan.chunk for n in (part, part + 1))
        for slot, tile in enumerate(here):
            for k in range(first, min(end, blocks_TKB.shape[1])):
                x = x_TC[:, k * COLUMNS : (k + 1) * COLUMNS]
                sent[slot * ROWS : (slot + 1) * ROWS] += multiply_block(blocks_TKB[tile, k], x, layout, x_TC.dtype)
            for h in range(2):
                places.append(place(plan, part, slot * 2 + h, layout))
                received[(slot * 2 + h) // plan.owned] += -(-len(x_TC) // 2) * 8 * 16
    for (rank, at), (after, after_at) in pairwise(sorted(places)):
        assert (after, after_at) >= (rank, at + half_bytes(plan)), "sums lie over each other"
    for rank in range(plan.size):
        halves = min(plan.owned, max(0, len(here) * 2 - rank * plan.owned))
        assert received[rank] == splits * halves * -(-len(x_TC) // 2) * 128, "a barrier would never open, or too early"
    for slot, tile in enumerate(here):
        for r in range(ROWS):
            yield tile * ROWS + r, sent[slot * ROWS + r]
