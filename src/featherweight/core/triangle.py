"""The inverse of a triangular matrix, its diagonal blocks all at once and the rest by large products; and the factor of
an inverse, in the matrix's own memory.

Shapes: C columns, N of a block, M after it, S before it; E layers (a leading axis is allowed throughout).
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.core.products import EXACT, add_exactly_, exactly, left_exactly, right_exactly, split_pays

WHOLE = 256  # columns of a block on the diagonal
BLOCK, STACKED_BLOCK = 1024, 256  # columns of a block of `inverse_factor_`, of one matrix and of many
PANELS = 4  # blocks that one product before a block is wide
IN_PLACE = 8192  # columns of one matrix from which `inverse_factor_` is faster than the whole at once
LARGE = 2560  # columns of halves from which on products on a GPU's tensor cores are faster, all launches counted


def in_place_pays(matrix_CC: Tensor) -> bool:
    """Whether `inverse_factor_` is faster than a Cholesky factor and its inverse: of many, or of a large one, on a
    GPU."""
    alone, columns = matrix_CC.dim() == 2 or len(matrix_CC) == 1, matrix_CC.shape[-1]
    return matrix_CC.is_cuda and columns > (IN_PLACE - 1 if alone else STACKED_BLOCK)


def inverse_factor_(matrix_CC: Tensor) -> bool:
    """Puts U, upper triangular with inv(H) = U^T U, in the place of H, whose upper triangle is read.

    With H = R R^T, R upper triangular as well, U = inv(R). Blocks go from the last to the first: a block's own R and
    its inverse are small problems; what R has before it is a product with that inverse, what it takes from H there a
    second, and what U has after it a third, with the part of U that is there by then. False, and nothing of use left,
    where H is not positive definite.
    """
    all_ECC = matrix_CC if matrix_CC.dim() == 3 else matrix_CC.unsqueeze(0)
    columns, block = all_ECC.shape[-1], BLOCK if len(all_ECC) == 1 else STACKED_BLOCK
    products = _Products(columns >= LARGE and split_pays(all_ECC))
    failures = []
    for start in reversed(range(0, columns, block)):
        stop = min(start + block, columns)
        own, before, after = slice(start, stop), slice(0, start), slice(stop, columns)
        lower_ENN, info_E = torch.linalg.cholesky_ex(all_ECC[:, own, own].flip(-2, -1))
        failures.append(info_E)
        upper_ENN = inverse_lower(lower_ENN).flip(-2, -1)
        if stop < columns:
            row_ENM = torch.zeros_like(all_ECC[:, own, after], memory_format=torch.contiguous_format)
            for at in range(0, columns - stop, EXACT):  # the part of U that is there is upper triangular too
                piece = slice(stop + at, min(stop + at + EXACT, columns))
                products.add_(row_ENM[..., at:], all_ECC[:, own, piece], all_ECC[:, piece, stop + at :])
            products.add_(all_ECC[:, own, after], upper_ENN, row_ENM, alpha=-1, beta=0)
        if start:
            panel_ESN = torch.empty_like(all_ECC[:, before, own], memory_format=torch.contiguous_format)
            products.add_(panel_ESN, all_ECC[:, before, own], upper_ENN.mT, beta=0)
            all_ECC[:, before, own] = panel_ESN
            left, right = products.left(panel_ESN), products.right(panel_ESN.mT)
            for at in range(0, start, PANELS * block):
                end = min(at + PANELS * block, start)
                products.join_(all_ECC[:, :end, at:end], left[:, :end], right[..., at:end], alpha=-1)
        all_ECC[:, own, own] = upper_ENN
        all_ECC[:, after, own] = 0.0
    return bool((torch.stack(failures) == 0).all())


class _Products:
    """Products that are added to a matrix in place: in TF32 threes where that is faster."""

    def __init__(self, split: bool) -> None:
        self.split = split

    def left(self, one_EAK: Tensor) -> Tensor:
        return left_exactly(one_EAK) if self.split else one_EAK

    def right(self, other_EKB: Tensor) -> Tensor:
        return right_exactly(other_EKB) if self.split else other_EKB

    def join_(self, total_EAB: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, beta: float = 1.0) -> None:
        if self.split:
            add_exactly_(total_EAB, left, right, alpha, beta)
        else:
            total_EAB.baddbmm_(left, right, alpha=alpha, beta=beta)

    def add_(self, total_EAB: Tensor, one: Tensor, other: Tensor, alpha: float = 1.0, beta: float = 1.0) -> None:
        self.join_(total_EAB, self.left(one), self.right(other), alpha, beta)


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
