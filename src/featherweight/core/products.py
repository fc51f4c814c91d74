"""Products of float32 matrices on the tensor cores of a GPU, exact enough for losses and targets; elsewhere plain ones.

A float32 number is a bfloat16 and what that leaves, again a bfloat16, to 16 bits of it: a = a1 + a2. Of the four
products of two such sums the smallest is left out, and the other three are one product along a thrice as long inner
axis, [a1 a1 a2] [b1; b2; b1], added up in float32. What comes out is off by 2e-5 to 5e-5 of its norm (float32:
3e-7, one product in TF32: 3e-4) and takes 0.29 of float32's time (measured on an H100: docs/log.md).

Shapes: A, B, K any; a leading axis is allowed throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

LEAST = 256  # along the inner axis; below, there is nothing to be gained
EXACT = 2048  # along it at once: tensor cores cut off what they add up, which shows in long sums


def times(one_AK: Tensor, other_KB: Tensor) -> Tensor:
    """one @ other."""
    if not split_pays(one_AK):
        return one_AK @ other_KB
    return _multiplied(left(one_AK), right(other_KB))


def subtract_(total_EAB: Tensor, one_EAK: Tensor, other_EKB: Tensor) -> None:
    """total -= one @ other, in place, layer by layer."""
    if not split_pays(one_EAK):
        total_EAB.baddbmm_(one_EAK, other_EKB, alpha=-1)
    elif len(total_EAB) > 1:
        total_EAB -= _multiplied(left(one_EAK), right(other_EKB))
    else:
        total_AB, halves = total_EAB[0], (left(one_EAK)[0], right(other_EKB)[0])
        torch.addmm(total_AB, *halves, alpha=-1, out_dtype=torch.float32, out=total_AB)


def exactly(one_AK: Tensor, other_KB: Tensor) -> Tensor:
    """one @ other to nearly float32's own accuracy (4e-6 at 4096), by three products in TF32: of the first ten bits
    after the point and of what they leave. Takes 0.53 of float32's time.
    """
    if not split_pays(one_AK):
        return one_AK @ other_KB
    total_AB: Tensor | None = None
    with _tf32():
        for one, other in zip(one_AK.split(EXACT, -1), other_KB.split(EXACT, -2), strict=True):
            a1, b1 = _truncated(one), _truncated(other)
            both = torch.cat([a1, a1, one - a1], -1), torch.cat([b1, other - b1, b1], -2)
            total_AB = both[0] @ both[1] if total_AB is None else total_AB.add_(both[0] @ both[1])
    assert total_AB is not None
    return total_AB


class Pulls:
    """Rows of H @ D, some at a time, while D changes in the rows that were asked for last (E x C x C, E x C x R)."""

    def __init__(self, hessian_ECC: Tensor, delta_ECR: Tensor) -> None:
        self.hessian_ECC, self.delta_ECR = hessian_ECC, delta_ECR
        self.split = split_pays(hessian_ECC)
        if self.split:
            self.hessian_ECC, self.halves_ECR = left(hessian_ECC), right(delta_ECR)
        self.changed: slice | None = None

    def of(self, at: slice) -> Tensor:
        """H[at] @ D as it is now, E x N x R."""
        if not self.split:
            return self.hessian_ECC[:, at] @ self.delta_ECR
        if self.changed is not None:
            first, second = _halves(self.delta_ECR[:, self.changed])
            thirds = self.halves_ECR.chunk(3, 1)
            for third, value in zip(thirds, (first, second, first), strict=True):
                third[:, self.changed] = value
        self.changed = at
        return _multiplied(self.hessian_ECC[:, at], self.halves_ECR)


def split_pays(one_AK: Tensor) -> bool:
    """Whether a product with this on its left is done on tensor cores."""
    return one_AK.is_cuda and one_AK.dtype == torch.float32 and one_AK.shape[-1] >= LEAST


def left(one_AK: Tensor) -> Tensor:
    """[a1 a1 a2], A x 3K in bfloat16: a factor that is used on the left more than once."""
    first, second = _halves(one_AK)
    return torch.cat([first, first, second], -1)


def right(other_KB: Tensor) -> Tensor:
    """[b1; b2; b1], 3K x B in bfloat16."""
    first, second = _halves(other_KB)
    return torch.cat([first, second, first], -2)


def _truncated(matrix: Tensor) -> Tensor:
    """With the 13 bits cleared that TF32 does not have."""
    return (matrix.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)


@contextmanager
def _tf32() -> Iterator[None]:
    """Lets a GPU multiply float32 as TF32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _halves(matrix: Tensor) -> tuple[Tensor, Tensor]:
    first = matrix.to(torch.bfloat16)
    return first, (matrix - first).to(torch.bfloat16)


def _multiplied(left_AK: Tensor, right_KB: Tensor) -> Tensor:
    if left_AK.dim() == 2:
        return torch.mm(left_AK, right_KB, out_dtype=torch.float32)
    return torch.bmm(left_AK, right_KB, out_dtype=torch.float32)
