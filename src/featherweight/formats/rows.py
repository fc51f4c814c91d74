"""Some rows of a matrix of codes, without the others: how an embedding looks tokens up.

Shapes: N rows asked for, R rows there are, C columns, G groups, W words.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from featherweight.codec import unpack_dense
from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.formats.base import solution_of


def grid_rows(tensors: Mapping[str, Tensor], grid: Grid, index_N: Tensor, columns: int) -> Solution:
    """Rows of `weight_packed` (words along a row), `weight_scale` and `weight_zero_point` (words along the rows)."""
    bits, packed_RW = grid.stored_bits, tensors["weight_packed"]
    scales_NG = tensors["weight_scale"][index_N]
    if grid.symmetric:
        zeros_NG = torch.full(scales_NG.shape, grid.middle, dtype=torch.uint8, device=scales_NG.device)
    else:
        zeros_NG = unpack_dense(tensors["weight_zero_point"].T, bits, len(packed_RW)).T[index_N]
    return solution_of(unpack_dense(packed_RW[index_N], bits, columns), scales_NG, zeros_NG, grid)
