"""2:4 sparse blocks in plain torch: what the products of csrc/wna16.cu and csrc/w4a16_hopper.cu make of their bytes.

Words, lanes and places are those of PTX's mma.sp.m16n8k32 (and of a warp's share of wgmma.sp.m64nNk32).

Shapes: T tokens; a block is 32 rows x 128 columns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from featherweight.kernels.wna16_layout import COLUMNS, ROWS, Layout
from w4a16_hopper_emulation import registers


def zeros_of(block: Tensor, layout: Layout) -> np.ndarray:
    """[group, g, half, odd row]."""
    if not layout.zeros:
        return np.full((layout.parts, 8, 2, 2), layout.middle)
    at = layout.code_bytes + layout.scale_bytes
    return block[at : at + layout.zero_bytes].numpy().astype(np.int64).reshape(layout.parts, 8, 2, 2)


def operands(block: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Code minus zero of 32 rows x 128 columns where the tensor cores put them, 0 elsewhere; float64."""
    words = block[: layout.code_bytes].numpy().view(np.uint32).astype(np.int64).reshape(2, 8, 4, 4)  # half, g, t, unit
    places = block[-layout.place_bytes :].numpy().view(np.uint32).astype(np.int64).reshape(8, 4, 4)  # g, t, unit
    zeros = zeros_of(block, layout)
    out = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for half in range(2):
        for unit in range(4):
            z = zeros[unit * 32 // layout.group, :, half]
            a = registers(words[half, :, :, unit], dtype, (z[:, 0, None], z[:, 1, None]))
            for r in range(4):  # rows g, g + 8; columns 4t .. 4t + 3, then 16 further on
                for g in range(8):
                    for t in range(4):
                        chosen = places[g, 2 * half + r // 2, unit]  # of the lane of this pair that has this half of 32
                        first, second = (chosen >> (16 * (r % 2) + 4 * t + 2 * i) & 3 for i in range(2))
                        assert first < second, "places rise"
                        at = unit * 32 + r // 2 * 16 + 4 * t
                        out[half * 16 + r % 2 * 8 + g, [at + first, at + second]] = a[r][g, t].double()
    return out


def multiply_block(block: Tensor, x_TC: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """32 rows x T of one block, scales on the sums of groups."""
    scales = block[layout.code_bytes :][: layout.scale_bytes].view(layout.scales).double().view(layout.parts, 8, 2, 2)
    by_row = scales.permute(2, 3, 1, 0).reshape(ROWS, layout.parts)  # half, odd, g
    weights = operands(block, layout, dtype) * by_row.repeat_interleave(layout.group, 1)
    return weights @ x_TC.double().T
