"""How many bits a matrix of small codes needs at least, when each weight is coded on its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_LEVELS = 4


def level_counts(codes: Tensor) -> list[int]:
    """How often each of the codes 0 .. 3 occurs in a uint8 tensor of any shape, which has no others."""
    assert codes.dtype == torch.uint8, codes.dtype
    counts: list[int] = torch.bincount(codes.flatten(), minlength=MOST_LEVELS).tolist()
    assert len(counts) == MOST_LEVELS, f"there are codes up to {len(counts) - 1}, above {MOST_LEVELS - 1}"
    return counts


def entropy_bits(codes: Tensor) -> float:
    """Shannon's entropy of the codes' distribution in bits a weight: sum p log2 1/p (0 for one code alone)."""
    shares = [count / codes.numel() for count in level_counts(codes) if count]
    return sum(share * math.log2(1 / share) for share in shares)


def zero_share(codes: Tensor, zero: int = 0) -> float:
    """P(0): the share of weights whose code is `zero`."""
    return level_counts(codes)[zero] / codes.numel()
