"""csrc/w4a16.cu in plain torch: the same words, lanes, splits and sums, one launch at a time.

Shapes: R rows, C columns, T tokens; blocks [tiles, blocks of a tile, bytes].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from featherweight.kernels.w4a16_layout import CODE_BYTES, COLUMNS, ROWS, Layout, blocks_of
from featherweight.kernels.w4a16_plan import Plan

STEP = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
X_SCALE = {torch.float16: 1.0, torch.bfloat16: 2.0**64}


def fragments(words: Tensor, dtype: torch.dtype) -> Tensor:
    """A lane's words -> its four registers of two 16-bit floats each, as the kernel masks them; float64."""
    masks = (0x000F000F, 0x00F000F0)
    registers = [words >> 8 * (r // 2) & masks[r % 2] for r in range(4)]
    stacked = torch.stack(registers, -1).to(torch.int32).contiguous()
    return stacked.view(torch.int16).view(dtype).unflatten(-1, (4, 2)).double()


def multiply_block(block: Tensor, x_TC: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """32 rows x T of one block: codes as subnormals, zeros as the first addend, scales on the sums."""
    step, x_scale = STEP[dtype], X_SCALE[dtype]
    words = block[:CODE_BYTES].view(torch.int32).view(2, 2, 8, 4, 2, 2)  # half, u, g, t, i, j
    registers = fragments(words, dtype)
    x = (x_TC.double() * x_scale).to(dtype).double().view(-1, 2, 2, 4, 2, 2, 2)  # T, u, i, t, j, k2, k1
    scales = block[CODE_BYTES : CODE_BYTES + layout.scale_bytes].view(layout.scales).double()
    scales = scales.view(layout.parts, 8, 2, 2)
    zeros = torch.full_like(scales, 8)
    if layout.zeros:
        zeros = block[CODE_BYTES + layout.scale_bytes :].double().view(layout.parts, 8, 2, 2)
    sums = x_TC.double().unflatten(-1, (layout.parts, -1)).sum(-1)  # T, group of the block
    total = torch.zeros(2, 2, 8, len(x_TC), dtype=torch.float64)
    for part in range(layout.parts):
        units = range(part * layout.group // 32, (part + 1) * layout.group // 32)
        for odd in range(2):
            planes = 16.0**odd * step * x_scale
            acc = -zeros[part, :, :, odd].T.unsqueeze(-1) * sums[:, part] * planes
            for unit in units:
                u, i = divmod(unit, 2)
                a = registers[:, u, :, :, i, :, odd::2]  # half, g, t, j, k2, k1
                acc = acc + torch.einsum("hgtjkl,Ttjkl->hgT", a, x[:, u, i])
            total[:, odd] += scales[part, :, :, odd].T.unsqueeze(-1) * acc / planes
    return total.reshape(ROWS, -1)


def product(weights: Tensor, x_TC: Tensor, rows: int, layout: Layout, plan: Plan) -> Tensor:
    """y_TR as the clusters, CTAs and warps of a launch share it out; sums are counted as the barriers count them."""
    blocks_TKB = blocks_of(weights, rows, x_TC.shape[1], layout)
    tiles, across = blocks_TKB.shape[:2]
    x_TC = torch.nn.functional.pad(x_TC, (0, across * COLUMNS - x_TC.shape[1]))
    y_TR = torch.full((len(x_TC), rows), torch.nan, dtype=torch.float64)
    for cluster in range(plan.clusters):
        ours = range(cluster, tiles, plan.clusters)
        for start in range(0, len(ours), plan.split.row_warps):
            here = ours[start : start + plan.split.row_warps]
            for row, total in one_pass(blocks_TKB, x_TC, layout, plan, here):
                if row < rows:
                    assert y_TR[:, row].isnan().all(), "a row is stored twice"
                    y_TR[:, row] = total
    return y_TR


def one_pass(blocks_TKB: Tensor, x_TC: Tensor, layout: Layout, plan: Plan, here: range) -> Iterator[tuple[int, Tensor]]:
    """Row numbers and their sums for the tiles `here`, a warp each in every split of the columns."""
    chunks, splits, owned = -(-blocks_TKB.shape[1] // plan.chunk), plan.split.parts, 1 << plan.owned_log2
    sent = torch.zeros(plan.split.size * owned, len(x_TC), dtype=torch.float64)
    received = [0] * plan.split.size
    for part in range(splits):
        first, end = (chunks * n // splits * plan.chunk for n in (part, part + 1))
        for slot, tile in enumerate(here):
            for k in range(first, min(end, blocks_TKB.shape[1])):
                x = x_TC[:, k * COLUMNS : (k + 1) * COLUMNS]
                sent[slot * ROWS : (slot + 1) * ROWS] += multiply_block(blocks_TKB[tile, k], x, layout, x_TC.dtype)
            for h in range(2):
                received[slot * ROWS + 16 * h >> plan.owned_log2] += 16 * len(x_TC) * 4
    for rank in range(plan.split.size):
        expected = min(owned, max(0, len(here) * ROWS - rank * owned))
        assert received[rank] == splits * len(x_TC) * expected * 4, "a barrier would never open, or too early"
    for slot, tile in enumerate(here):
        for r in range(ROWS):
            yield tile * ROWS + r, sent[slot * ROWS + r]
