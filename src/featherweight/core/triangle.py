"""The inverse of a triangular matrix: its diagonal blocks all at once, the rest by large products.

Shapes: C columns; a leading axis is allowed throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.core.products import exactly

WHOLE = 256  # columns of a block on the diagonal
LARGE = 2560  # columns of halves from which on products on a GPU's tensor cores are faster, all launches counted


def inverse_lower(lower_CC: Tensor) -> Tensor:
    """By halves: inv [[A, 0], [B, D]] = [[inv A, 0], [-inv D B inv A, inv D]]; only the lower triangle is read."""
    inverse_CC = torch.zeros_like(lower_CC, memory_format=torch.contiguous_format)
    _invert_diagonal(lower_CC, inverse_CC)
    _join(lower_CC, inverse_CC, 0, lower_CC.shape[-1])
    return inverse_CC


def _invert_diagonal(lower_CC: Tensor, inverse_CC: Tensor) -> None:
    columns = lower_CC.shape[-1]
    whole = [slice(at, at + WHOLE) for at in range(0, columns - WHOLE + 1, WHOLE)]
    left = slice(len(whole) * WHOLE, columns)
    for blocks in (whole, [left] if left.start < columns else []):
        if not blocks:
            continue
        lower_BWW = torch.stack([lower_CC[..., at, at] for at in blocks], -3)
        identity_WW = torch.eye(lower_BWW.shape[-1], dtype=lower_BWW.dtype, device=lower_BWW.device)
        found_BWW = torch.linalg.solve_triangular(lower_BWW, identity_WW.expand_as(lower_BWW), upper=False)
        for at, found_WW in zip(blocks, found_BWW.unbind(-3), strict=True):
            inverse_CC[..., at, at] = found_WW


def _join(lower_CC: Tensor, inverse_CC: Tensor, start: int, stop: int) -> None:
    """Fills the inverse between the two halves of start .. stop, once both are inverted."""
    if stop - start <= WHOLE:
        return
    middle = start + -(-(stop - start) // 2 // WHOLE) * WHOLE
    first, last = slice(start, middle), slice(middle, stop)
    _join(lower_CC, inverse_CC, start, middle)
    _join(lower_CC, inverse_CC, middle, stop)
    if stop - middle < LARGE:
        right_CC = lower_CC[..., last, first] @ inverse_CC[..., first, first]
        inverse_CC[..., last, first] = -(inverse_CC[..., last, last] @ right_CC)
        return
    # each of the inverses is half zeros, a quarter of them in one piece that is left out
    half = start + (middle - start) // 2
    right_CC = torch.cat(
        [
            exactly(lower_CC[..., last, first], inverse_CC[..., first, start:half]),
            exactly(lower_CC[..., last, half:middle], inverse_CC[..., half:middle, half:middle]),
        ],
        -1,
    )
    half = middle + (stop - middle) // 2
    upper, lower = slice(middle, half), slice(half, stop)
    inverse_CC[..., upper, first] = exactly(inverse_CC[..., upper, upper], right_CC[..., : half - middle, :]).neg_()
    inverse_CC[..., lower, first] = exactly(inverse_CC[..., lower, last], right_CC).neg_()
