"""How many bits a matrix of small codes needs at least, when each weight is coded on its own."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

MOST_LEVELS = 4


def level_counts(codes: Tensor) -> list[int]:
    """How often each of the codes 0 .. 3 occurs in a uint8 tensor of any shape, which has no others."""
    assert codes.dtype == torch.uint8, codes.dtype
    if codes.is_cuda:
        found = torch.stack([(codes == level).sum() for level in range(1, MOST_LEVELS)]).tolist()
    else:  # NumPy compares and counts many times faster than torch does there
        found = [int(np.count_nonzero(codes.numpy() == level)) for level in range(1, MOST_LEVELS)]
    most = int(codes.max()) if codes.numel() else 0
    assert most < MOST_LEVELS, f"there are codes up to {most}, above {MOST_LEVELS - 1}"
    return [codes.numel() - sum(found), *found]


def entropy_bits(codes: Tensor) -> float:
    """Shannon's entropy of the codes' distribution in bits a weight: sum p log2 1/p (0 for one code alone)."""
    shares = [count / codes.numel() for count in level_counts(codes) if count]
    return sum(share * math.log2(1 / share) for share in shares)


def zero_share(codes: Tensor, zero: int = 0) -> float:
    """P(0): the share of weights whose code is `zero`."""
    return level_counts(codes)[zero] / codes.numel()
