"""Weights with a column's numbers in one piece, as the column loops want them, in any order of columns; and back.

Shapes: E layers, R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.core import fused


def ordered(natural_ERC: Tensor, order_EC: Tensor) -> Tensor:
    """Columns in this order, E x C x R."""
    found_ECR = fused.turn(natural_ERC, torch.argsort(order_EC, -1))
    if found_ECR is None:
        each_E1 = torch.arange(len(natural_ERC), device=natural_ERC.device).unsqueeze(1)
        found_ECR = natural_ERC.transpose(1, 2).contiguous()[each_E1, order_EC]
    return found_ECR


def natural(ordered_ECR: Tensor, order_EC: Tensor) -> Tensor:
    """Columns as they were before `ordered`, E x R x C."""
    place_EC = torch.argsort(order_EC, -1)
    found_ERC = fused.turn(ordered_ECR, place_EC, back=True)
    if found_ERC is None:
        each_E1 = torch.arange(len(ordered_ECR), device=ordered_ECR.device).unsqueeze(1)
        found_ERC = ordered_ECR[each_E1, place_EC].transpose(1, 2).contiguous()
    return found_ERC


def turned(natural_ERC: Tensor) -> Tensor:
    """E x C x R in their own order, or the other way round: a copy."""
    count = natural_ERC.shape[2]
    found_ECR = fused.turn(natural_ERC, torch.arange(count, device=natural_ERC.device).expand(len(natural_ERC), -1))
    return natural_ERC.transpose(1, 2).clone(memory_format=torch.contiguous_format) if found_ECR is None else found_ECR
