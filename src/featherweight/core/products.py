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
AHEAD = 2048  # rows of H that are made halves of at once
EXACT = 2048  # along it at once: tensor cores cut off what they add up, which shows in long sums


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
            found_AB = left_exactly(one) @ right_exactly(other)
            total_AB = found_AB if total_AB is None else total_AB.add_(found_AB)
    assert total_AB is not None
    return total_AB


def left_exactly(one_AK: Tensor) -> Tensor:
    """[a1 a1 a2], A x 3K in float32, a1 of as many bits as TF32 has: for `add_exactly_`."""
    first = _truncated(one_AK)
    return torch.cat([first, first, one_AK - first], -1)


def right_exactly(other_KB: Tensor) -> Tensor:
    """[b1; b2; b1], 3K x B in float32."""
    first = _truncated(other_KB)
    return torch.cat([first, other_KB - first, first], -2)


def add_exactly_(total_EAB: Tensor, left_EAK: Tensor, right_EKB: Tensor, alpha: float, beta: float = 1.0) -> None:
    """total = beta x total + alpha x left @ right in TF32, in place, of what the two functions before this one make."""
    with _tf32():
        total_EAB.baddbmm_(left_EAK, right_EKB, beta=beta, alpha=alpha)


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
            first, second = _halves(self.delta_ECR[:, self.changed])
            thirds = self.halves_ECR.chunk(3, 1)
            for third, value in zip(thirds, (first, second, first), strict=True):
                third[:, self.changed] = value
        self.changed = at
        return _multiplied(self._rows(at), self.halves_ECR)

    def _rows(self, at: slice) -> Tensor:
        """H[at] in halves, made for several slabs at once."""
        if self.made is None or at.stop > self.made[0] + self.made[1].shape[1]:
            self.made = at.start, left(self.hessian_ECC[:, at.start : max(at.start + AHEAD, at.stop)])
        start, halves_ENC = self.made
        return halves_ENC[:, at.start - start : at.stop - start]


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
