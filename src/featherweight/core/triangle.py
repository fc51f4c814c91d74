"""The inverse of a triangular matrix, its diagonal blocks all at once and the rest by products; and the triangular
factor of a matrix, in its own memory.

Shapes: C columns, N of a block, S before it; B blocks; E layers (a leading axis is allowed throughout).
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from featherweight.core import fused
from featherweight.core.products import add_, left, right, split_pays

WHOLE = 256  # columns of a block on the diagonal, where torch inverts it
BLOCK, STACKED_BLOCK = 2048, 256  # columns of a block of `root_`, of one matrix and of many
PANELS = 2  # blocks of rows that one product before a block has
IN_PLACE = 6144  # columns of one matrix from which on `root_` is faster than the whole at once
Blocks = list[tuple[slice, Tensor]]  # columns of a block and something of it, E x N x N, from the first on


def in_place_pays(matrix_CC: Tensor) -> bool:
    """Whether `root_` is faster than a Cholesky factor of the whole: of many, or of a large one, on a GPU."""
    alone, columns = matrix_CC.dim() == 2 or len(matrix_CC) == 1, matrix_CC.shape[-1]
    return matrix_CC.is_cuda and columns >= (IN_PLACE if alone else STACKED_BLOCK + 1)


def root_(matrix_CC: Tensor) -> Blocks | None:
    """Puts R, upper triangular with H = R R^T, in the place of H, whose upper triangle is read.

    Blocks go from the last to the first: a block's own R is a small Cholesky factor, P = what R has before the block
    is H's part there times its inverse, and the rows before lose P P^T. Nothing here waits for a GPU but the last
    line. Returns the blocks' inverses; None, and nothing of use left, where H is not positive definite.

    A large matrix is scaled to a diagonal between 1/2 and 2 first, and multiplied in halves of float16.
    """
    all_ECC = matrix_CC if matrix_CC.dim() == 3 else matrix_CC.unsqueeze(0)
    products = Products(len(all_ECC) == 1 and split_pays(all_ECC))
    unit_EC = unit_(all_ECC) if products.halved else None
    blocks, failures, found = blocks_of(all_ECC), [], []
    for number, own in reversed(list(enumerate(blocks))):
        before = slice(0, own.start)
        lower_ENN, info_E = torch.linalg.cholesky_ex(all_ECC[:, own, own].flip(-2, -1))
        failures.append(info_E)
        all_ECC[:, own, own] = lower_ENN.flip(-2, -1)
        inverse_ENN = inverse_lower(lower_ENN).flip(-2, -1)
        found.append((own, inverse_ENN if unit_EC is None else inverse_ENN * unit_EC[:, None, own]))
        if number:
            panel_ESN = products.of(all_ECC[:, before, own], inverse_ENN.mT)
            all_ECC[:, before, own], all_ECC[:, own, before] = panel_ESN, 0.0
            one, other = products.left(panel_ESN), products.right(panel_ESN.mT)
            for first in range(0, number, PANELS):
                at, end = blocks[first].start, blocks[min(first + PANELS, number) - 1].stop
                products.subtract_(all_ECC[:, at:end, at : own.start], one[:, at:end], other[..., at:])
    if unit_EC is not None:
        without_unit_(all_ECC, unit_EC)
    return found[::-1] if bool((torch.stack(failures) == 0).all()) else None


def inverses(upper_CC: Tensor) -> Blocks:
    """The inverses of an upper triangular matrix's blocks on the diagonal."""
    all_ECC = upper_CC if upper_CC.dim() == 3 else upper_CC.unsqueeze(0)
    found: Blocks = []
    for _, alike in groupby(blocks_of(all_ECC), lambda own: own.stop - own.start):  # those of one size at once
        blocks = list(alike)
        stacked = inverse_upper(torch.cat([all_ECC[:, own, own] for own in blocks]))
        found += zip(blocks, stacked.split(len(all_ECC)), strict=True)
    return found


def blocks_of(matrix_CC: Tensor) -> list[slice]:
    """The columns of each block, of one matrix or of many."""
    alone, columns = matrix_CC.dim() == 2 or len(matrix_CC) == 1, matrix_CC.shape[-1]
    block = BLOCK if alone else STACKED_BLOCK
    return [slice(start, min(start + block, columns)) for start in range(0, columns, block)]


def inverse_upper(upper_CC: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix."""
    return inverse_lower(upper_CC.flip(-2, -1)).flip(-2, -1)


def unit_(matrix_ECC: Tensor) -> Tensor:
    """Scales the upper half of a symmetric matrix to a diagonal between 1/2 and 2, blocks of rows at a time; returns
    what rows and columns were multiplied by."""
    unit_EC = torch.exp2(torch.round(torch.log2(matrix_ECC.diagonal(dim1=-2, dim2=-1)) * -0.5))  # powers of 2: exact
    for own in blocks_of(matrix_ECC):
        matrix_ECC[:, own, own.start :].mul_(unit_EC[:, own, None]).mul_(unit_EC[:, None, own.start :])
    return unit_EC


def without_unit_(root_ECC: Tensor, unit_EC: Tensor) -> None:
    """R of a matrix, where there is that of what `unit_` made of it."""
    for own in blocks_of(root_ECC):
        root_ECC[:, own, own.start :].div_(unit_EC[:, own, None])


class Products:
    """Products of float32 matrices: in halves of float16 where that is faster, of one layer then."""

    def __init__(self, halved: bool) -> None:
        self.halved = halved

    def left(self, one_EAK: Tensor) -> Tensor:
        return left(one_EAK, torch.float16) if self.halved else one_EAK

    def right(self, other_EKB: Tensor) -> Tensor:
        return right(other_EKB, torch.float16) if self.halved else other_EKB

    def subtract_(self, total_EAB: Tensor, one: Tensor, other: Tensor) -> None:
        """total -= one @ other, of what `left` and `right` made."""
        if self.halved:
            add_(total_EAB[0], one[0], other[0], alpha=-1)
        else:
            total_EAB.baddbmm_(one, other, alpha=-1)

    def of(self, one_EAK: Tensor, other_EKB: Tensor) -> Tensor:
        """one @ other."""
        if not self.halved:
            return one_EAK @ other_EKB
        found_EAB = one_EAK.new_empty((1, one_EAK.shape[-2], other_EKB.shape[-1]))
        add_(found_EAB[0], self.left(one_EAK)[0], self.right(other_EKB)[0], beta=0)
        return found_EAB


def inverse_lower(lower_CC: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, of which nothing else is read.

    Blocks on the diagonal first, then pairs of them, pairs of pairs and so on, all of a size at once: inv [[A, 0],
    [B, D]] = [[inv A, 0], [-inv D B inv A, inv D]].
    """
    lower_ECC = lower_CC if lower_CC.dim() == 3 else lower_CC.unsqueeze(0)
    inverse_ECC = torch.zeros_like(lower_ECC, memory_format=torch.contiguous_format)
    if fused.invert_diagonal(lower_ECC, inverse_ECC):
        width = fused.TRIANGLE
    else:
        width = WHOLE
        _invert_diagonal(lower_ECC, inverse_ECC)
    columns = lower_ECC.shape[-1]
    while width < columns:
        whole = columns // (2 * width) * 2 * width
        if whole:
            _join(_pairs(lower_ECC, width), _pairs(inverse_ECC, width), width)
        if columns - whole > width:
            _join(lower_ECC[:, whole:, whole:], inverse_ECC[:, whole:, whole:], width)
        width *= 2
    return inverse_ECC.view(lower_CC.shape)


def _invert_diagonal(lower_ECC: Tensor, inverse_ECC: Tensor) -> None:
    columns = lower_ECC.shape[-1]
    whole = [slice(at, at + WHOLE) for at in range(0, columns - WHOLE + 1, WHOLE)]
    rest = slice(len(whole) * WHOLE, columns)
    for blocks in (whole, [rest] if rest.start < columns else []):
        if not blocks:
            continue
        lower_EBNN = torch.stack([lower_ECC[:, at, at] for at in blocks], 1)
        identity_NN = torch.eye(lower_EBNN.shape[-1], dtype=lower_EBNN.dtype, device=lower_EBNN.device)
        found_EBNN = torch.linalg.solve_triangular(lower_EBNN, identity_NN.expand_as(lower_EBNN), upper=False)
        for at, found_ENN in zip(blocks, found_EBNN.unbind(1), strict=True):
            inverse_ECC[:, at, at] = found_ENN


def _pairs(matrix_ECC: Tensor, width: int) -> Tensor:
    """A view of the blocks of 2 x width columns on the diagonal, E x B x N x N, or B x N x N of one layer."""
    if len(matrix_ECC) == 1:
        matrix_ECC = matrix_ECC[0]
    count = matrix_ECC.shape[-1] // (2 * width)
    whole = matrix_ECC[..., : 2 * count * width, : 2 * count * width]
    blocks = whole.unflatten(-2, (count, -1)).unflatten(-1, (count, -1))
    found: Tensor = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    return found


def _join(lower: Tensor, inverse: Tensor, width: int) -> None:
    """Fills the inverse between `width` columns and those after them, once both are inverted."""
    first, last = slice(0, width), slice(width, None)
    found = inverse[..., last, last] @ (lower[..., last, first] @ inverse[..., first, first])
    inverse[..., last, first] = found.neg_()
