"""The triangular factor of a matrix by several processes that have the same matrix, each on a device of its own.

Shapes: C columns, N of a block, S before it, E one layer (a leading axis is allowed).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from featherweight.core import triangle
from featherweight.core.products import split_pays

LEAST_COLUMNS = 16384  # below, what is sent takes as long as what is saved


class Helpers(Protocol):
    """The processes: this one's number, how many there are, and how one's tensor gets to all."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def spread(self, owner: int, tensor: Tensor) -> None:
        """Puts what the owner has in a contiguous tensor in everyone's."""


def sharing_pays(matrix_CC: Tensor, helpers: Helpers) -> bool:
    """Whether `shared_root_` is faster than `root_` by each: of one large matrix."""
    return helpers.size > 1 and matrix_CC.dim() == 2 and matrix_CC.shape[-1] >= LEAST_COLUMNS


def agreed(found: bool, helpers: Helpers, device: torch.device) -> bool:
    """What the first process found, which all go by."""
    told = torch.tensor([float(found)], device=device)
    helpers.spread(0, told)
    return bool(told)


def shared_root_(matrix_CC: Tensor, helpers: Helpers) -> triangle.Blocks | None:
    """`triangle.root_` of a matrix that all helpers have and all call this with.

    Blocks of rows are dealt out in turn. The owner of the last one that is left makes its R and the inverse of that;
    every process makes R before the block for its own rows, which all need, and takes off them what they lose. So the
    matrix's upper half is sent once, and products, all but those within a block, are shared.
    """
    all_ECC, blocks = matrix_CC.unsqueeze(0), triangle.blocks_of(matrix_CC)
    products = triangle.Products(split_pays(matrix_CC))
    unit_EC = triangle.unit_(all_ECC) if products.halved else None
    mine = range(helpers.rank, len(blocks), helpers.size)
    inverses = []
    for number, own in reversed(list(enumerate(blocks))):
        width = own.stop - own.start
        both_2NN = all_ECC.new_empty((2, width, width))  # R of the block and its inverse
        if number in mine:
            lower_ENN, info_E = torch.linalg.cholesky_ex(all_ECC[:, own, own].flip(-2, -1))
            both_2NN[0] = torch.where(info_E.view(1, 1, 1) == 0, lower_ENN.flip(-2, -1), torch.nan)[0]
            both_2NN[1] = triangle.inverse_lower(lower_ENN).flip(-2, -1)[0]
        helpers.spread(number % helpers.size, both_2NN)
        all_ECC[:, own, own] = both_2NN[:1]
        inverses.append((own, both_2NN[1:] if unit_EC is None else both_2NN[1:] * unit_EC[:, None, own]))
        if number:
            panel_ESN = _panel(all_ECC, blocks[:number], own, both_2NN[1:], products, helpers)
            all_ECC[:, : own.start, own], all_ECC[:, own, : own.start] = panel_ESN, 0.0
            other = products.right(panel_ESN.mT)
            for at in (blocks[n] for n in mine if n < number):
                one = products.left(panel_ESN[:, at])
                products.subtract_(all_ECC[:, at, at.start : own.start], one, other[..., at.start :])
    if unit_EC is not None:
        triangle.without_unit_(all_ECC, unit_EC)
    return inverses[::-1] if bool(torch.isfinite(matrix_CC.diagonal()).all()) else None


def _panel(
    all_ECC: Tensor,
    before: list[slice],
    own: slice,
    upper_ENN: Tensor,
    products: triangle.Products,
    helpers: Helpers,
) -> Tensor:
    """What R has before a block, E x S x N: each process makes that of its rows."""
    found_ESN = all_ECC.new_empty((1, own.start, own.stop - own.start))
    for owner in range(helpers.size):
        theirs = before[owner :: helpers.size]
        if not theirs:
            continue
        part_EPN = all_ECC.new_empty((1, sum(at.stop - at.start for at in theirs), found_ESN.shape[-1]))
        parts = part_EPN.split([at.stop - at.start for at in theirs], -2)
        for at, part in zip(theirs, parts, strict=True):
            if owner == helpers.rank:
                part.copy_(products.of(all_ECC[:, at, own], upper_ENN.mT))
        helpers.spread(owner, part_EPN)
        for at, part in zip(theirs, parts, strict=True):
            found_ESN[:, at] = part
    return found_ESN
