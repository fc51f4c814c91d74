"""Products of float32 matrices on the tensor cores of a GPU, exact enough for losses and targets; elsewhere plain ones.

A float32 number is a bfloat16 and what that leaves, again a bfloat16, to 16 bits of it: a = a1 + a2. Of the four
products of two such sums the smallest is left out, and the other three are one product along a thrice as long inner
axis, [a1 a1 a2] [b1; b2; b1], added up in float32. What comes out is off by 2e-5 to 5e-5 of its norm (float32:
3e-7, one product in TF32: 3e-4) and takes 0.29 of float32's time (measured on an H100: docs/log.md).

Shapes: A, B, K any; a leading axis is allowed throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.core import fused

LEAST = 256  # along the inner axis; below, there is nothing to be gained
AHEAD = 2048  # rows of H that are made halves of at once


def times(one_AK: Tensor, other_KB: Tensor) -> Tensor:
    """one @ other."""
    if not split_pays(one_AK):
        return one_AK @ other_KB
    return _multiplied(left(one_AK), right(other_KB))


def roughly(one_AK: Tensor, other_KB: Tensor) -> Tensor:
    """one @ other for sums that need three digits: on a GPU's tensor cores one product in bfloat16."""
    if not split_pays(one_AK):
        return one_AK @ other_KB
    return _multiplied(one_AK.to(torch.bfloat16), other_KB.to(torch.bfloat16))


def subtract_(total_EAB: Tensor, one_EAK: Tensor, other_EKB: Tensor) -> None:
    """total -= one @ other, in place, layer by layer."""
    if not split_pays(one_EAK):
        total_EAB.baddbmm_(one_EAK, other_EKB, alpha=-1)
    elif len(total_EAB) > 1:
        total_EAB -= _multiplied(left(one_EAK), right(other_EKB))
    else:
        add_(total_EAB[0], left(one_EAK)[0], right(other_EKB)[0], alpha=-1)


def add_(total_AB: Tensor, left_AK: Tensor, right_KB: Tensor, alpha: float = 1.0, beta: float = 1.0) -> None:
    """total = beta x total + alpha x left @ right, in place, of what `left` and `right` make, on a GPU."""
    torch.addmm(total_AB, left_AK, right_KB, alpha=alpha, beta=beta, out_dtype=torch.float32, out=total_AB)


class Pulls:
    """Rows of H @ D, some at a time and in order, while D changes in those asked for last (E x C x C, E x C x R)."""

    def __init__(self, hessian_ECC: Tensor, delta_ECR: Tensor) -> None:
        self.hessian_ECC, self.delta_ECR = hessian_ECC, delta_ECR
        self.split = split_pays(hessian_ECC)
        if self.split:
            self.halves_ECR = right(delta_ECR)
        self.made: tuple[int, Tensor] | None = None  # rows of H in halves: where they begin, and AHEAD of them
        self.changed: slice | None = None

    def of(self, at: slice) -> Tensor:
        """H[at] @ D as it is now, E x N x R."""
        if not self.split:
            return self.hessian_ECC[:, at] @ self.delta_ECR
        if self.changed is not None:
            self._halve(self.changed)
        self.changed = at
        return _multiplied(self._rows(at), self.halves_ECR)

    def _halve(self, at: slice) -> None:
        """Brings the halves of D[at] up to date."""
        if not fused.halve_rows(self.delta_ECR[:, at], self.halves_ECR, at.start):
            first, second = _halves(self.delta_ECR[:, at])
            for third, value in zip(self.halves_ECR.chunk(3, 1), (first, second, first), strict=True):
                third[:, at] = value

    def _rows(self, at: slice) -> Tensor:
        """H[at] in halves, made for several slabs at once."""
        if self.made is None or at.stop > self.made[0] + self.made[1].shape[1]:
            self.made = at.start, left(self.hessian_ECC[:, at.start : max(at.start + AHEAD, at.stop)])
        start, halves_ENC = self.made
        return halves_ENC[:, at.start - start : at.stop - start]


def split_pays(one_AK: Tensor) -> bool:
    """Whether a product with this on its left is done on tensor cores."""
    return one_AK.is_cuda and one_AK.dtype == torch.float32 and one_AK.shape[-1] >= LEAST


def left(one_AK: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[a1 a1 a2], A x 3K in `dtype`: a factor that is used on the left more than once.

    In float16 a sum has 22 bits, as long as the numbers lie around 1 (`triangle.root_` sees to that): its products
    are as exact as float32's own. In bfloat16 it has 16, wherever the numbers lie.
    """
    found = fused.halves(one_AK, "left", dtype)
    if found is None:
        first, second = _halves(one_AK, dtype)
        found = torch.cat([first, first, second], -1)
    return found


def right(other_KB: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[b1; b2; b1], 3K x B, likewise."""
    found = fused.halves(other_KB, "right", dtype)
    if found is None:
        first, second = _halves(other_KB, dtype)
        found = torch.cat([first, second, first], -2)
    return found


def _halves(matrix: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    first = matrix.to(dtype)
    return first, (matrix - first).to(dtype)


def _multiplied(left_AK: Tensor, right_KB: Tensor) -> Tensor:
    if left_AK.dim() == 2:
        return torch.mm(left_AK, right_KB, out_dtype=torch.float32)
    return torch.bmm(left_AK, right_KB, out_dtype=torch.float32)
