"""Random packed weights and the devices that plans are checked for.

Shapes: R rows, C columns, G groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from featherweight.core.rules import Grid, Pattern
from featherweight.core.solution import Solution
from featherweight.kernels import two_of_four
from featherweight.kernels.wna16_layout import Layout
from featherweight.kernels.wna16_plan import Device

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
H100 = Device(132, 232448, 233472, ((1, 132), (2, 66), (4, 30), (8, 15)))
A100 = Device(108, 166912, 167936, ((1, 108),))
RTX_3090 = Device(82, 101376, 102400, ((1, 82),))


def drawn(rows: int, columns: int, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, scales and zeros for `pack`; zeros may be one above the top code, as some files have them."""
    draw = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 1 << layout.bits, (rows, columns), dtype=torch.uint8, generator=draw)
    scales = (torch.rand(rows, columns // layout.group, generator=draw) + 0.1).to(layout.scales)
    highest = min(1 << layout.bits, 255)
    zeros = torch.randint(0, highest + 1, scales.shape, dtype=torch.uint8, generator=draw)
    zeros = zeros if layout.zeros else torch.full_like(zeros, layout.middle)
    if layout.sparse:
        zeros = zeros.clamp_max(15)  # a pruned weight is a code, too
        codes = pruned(codes, zeros)
    return codes, scales, zeros


def pruned(codes: Tensor, zeros: Tensor) -> Tensor:
    """Two of each four codes, drawn, become the zero of their group; some runs keep fewer."""
    draw = torch.Generator().manual_seed(4)
    order = torch.rand(codes.shape[0], codes.shape[1] // 4, 4, generator=draw).argsort(-1)
    most = torch.randint(1, 3, (*order.shape[:2], 1), generator=draw)
    return torch.where((order < most).flatten(1), codes, zeros.repeat_interleave(codes.shape[1] // zeros.shape[1], 1))


def sparse_solution(grid: Grid, rows: int, columns: int, dtype: torch.dtype = HALF) -> Solution:
    """2:4."""
    dense = solution(grid, rows, columns, dtype)
    codes = pruned(dense.codes_RC, dense.zeros_RG)
    off = codes != dense.zeros_RG.repeat_interleave(columns // dense.zeros_RG.shape[1], 1)
    places = two_of_four.gather(codes, dense.zeros_RG)[1].long().unflatten(1, (-1, 2))
    keep = torch.zeros(rows, columns // 4, 4, dtype=torch.bool).scatter_(-1, places, True).flatten(1)
    assert not bool((off & ~keep).any())
    return replace(dense, codes_RC=codes, keep_RC=keep, pattern=Pattern(keep=2, of=4))


def solution(grid: Grid, rows: int, columns: int, dtype: torch.dtype = HALF) -> Solution:
    draw = torch.Generator().manual_seed(5)
    codes = torch.randint(grid.bottom, grid.top + 1, (rows, columns), dtype=torch.uint8, generator=draw)
    scales = (torch.rand(rows, columns // grid.width(columns), generator=draw) * 0.1 + 0.01).to(dtype)
    zeros = torch.full(scales.shape, grid.middle, dtype=torch.uint8)
    if not grid.symmetric:
        zeros = torch.randint(0, grid.top + 1, scales.shape, dtype=torch.uint8, generator=draw)
    return Solution(codes, scales, zeros, grid, torch.zeros(rows))
