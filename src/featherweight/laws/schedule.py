"""Gradual magnitude pruning: which share of the weights is zero at which step, and which ones.

Sources: cubic ramp, arXiv 1710.01878; dense for 25 % of the steps, ramp for 50 %, fixed for 25 %, uniform over the
matrices: arXiv 2309.08520. Pruned weights are set to zero and, as in its code, never come back: their score is then 0.

Shapes: X matrices, N weights of a matrix, G groups of neighbours along a row, M places of a group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.errors import RequestError

DENSE, FIXED = 0.25, 0.75
"""Shares of a run: dense before the first, the mask fixed from the second on."""
UPDATES = 100
"""The mask is computed anew about so many times per run length: fifty times on the ramp."""


@dataclass(frozen=True)
class Pattern:
    """Which weights may stay: any share 1 - S of a matrix (`group` 0), or `kept` of every `group` along the inputs."""

    name: str
    sparsity: float
    kept: int = 0
    group: int = 0


def pattern(text: str) -> Pattern:
    """From "0.75" (unstructured) or "2:4" (N:M: 2 of 4 stay). RequestError for a sparsity outside [0, 1)."""
    if found := re.fullmatch(r"(\d+):(\d+)", text.strip()):
        kept, group = int(found[1]), int(found[2])
        if not (0 < kept < group <= 64 and 64 % group == 0):
            raise RequestError(f"pattern {text}: of N:M, N must be from 1 to M - 1 and M one of 2, 4, 8, 16, 32, 64.")
        return Pattern(f"{kept}:{group}", 1 - kept / group, kept, group)
    try:
        sparsity = float(text)
    except ValueError:
        raise RequestError(f"sparsity {text!r}: give a number from 0 up to, not including, 1, or N:M as 2:4.") from None
    if not 0 <= sparsity < 1:
        raise RequestError(f"sparsity {text} is out of range: it must be from 0 up to, not including, 1.")
    return Pattern(f"{sparsity:g}", sparsity)


def ramp(steps: int) -> tuple[int, int]:
    """The step at which pruning starts and the one from which the mask is fixed."""
    return int(DENSE * steps), int(FIXED * steps)


def share_at(step: int, steps: int) -> float:
    """Share of the final sparsity in force at a step: 0, then 1 - (1 - p)^3 with p from 0 to 1 on the ramp, then 1."""
    first, last = ramp(steps)
    done = min(max((step - first) / (last - first), 0.0), 1.0)
    return 1 - (1 - done) ** 3


def is_update(step: int, steps: int) -> bool:
    """Whether the mask is computed anew before this step: every 1 / UPDATES of the run on the ramp, and at its end."""
    first, last = ramp(steps)
    return step == last or (first < step < last and (step - first) % max(1, round(steps / UPDATES)) == 0)


def keep_largest(score_XN: Tensor, zeros_X: Tensor) -> Tensor:
    """A mask that is False at exactly zeros_X[x] places of row x, those of least score; of equal scores, the first.

    score_XN: float32, none below 0; zeros_X: int64, from 0 to N, on the same device. No sort and no copy to the host:
    the threshold is found bit by bit, since floats not below 0 have the order of their bits.
    """
    bits_XN = score_XN.view(torch.int32)
    threshold_X = torch.zeros_like(zeros_X, dtype=torch.int32)
    for bit in reversed(range(31)):
        higher_X = threshold_X + (1 << bit)
        below_X = (bits_XN < higher_X[:, None]).sum(1)
        threshold_X = torch.where(below_X <= zeros_X, higher_X, threshold_X)
    kept_XN = bits_XN >= threshold_X[:, None]
    tied_XN = bits_XN == threshold_X[:, None]
    spare_X = zeros_X - (~kept_XN).sum(1)
    return kept_XN & ~(tied_XN & (tied_XN.cumsum(1, dtype=torch.int32) <= spare_X[:, None]))


def grouped(weight_XN: Tensor, share: float, kept: int, group: int) -> Tensor:
    """The mask of an N:M ramp: a share of each matrix's groups holds `kept` non-zeros of `group`, the others all.

    Held to it are the groups that lose least by it (sum of squares of what goes), so at share p exactly round(p G) of G
    groups are, and the sparsity is p (1 - kept / group).
    """
    weight_XGM = weight_XN.unflatten(1, (-1, group))
    ranked_XGM, order_XGM = weight_XGM.abs().sort(dim=2, descending=True, stable=True)
    cost_XG = ranked_XGM[:, :, kept:].square().sum(2)
    held_X = torch.full((len(weight_XN),), round(share * cost_XG.shape[1]), device=weight_XN.device)
    free_XG = keep_largest(cost_XG, held_X)
    best_XGM = torch.zeros_like(weight_XGM, dtype=torch.bool).scatter_(2, order_XGM[:, :, :kept], True)
    return (best_XGM | free_XG[:, :, None]).flatten(1)


def mask(weight_XN: Tensor, which: Pattern, share: float) -> Tensor:
    """The mask of X equally large matrices, each pruned alike, when this share of the pattern's sparsity is in force.

    Unstructured: exactly round(share S N) of each matrix go, those of least magnitude.
    """
    if which.group:
        return grouped(weight_XN, share, which.kept, which.group)
    zeros = round(share * which.sparsity * weight_XN.shape[1])
    return keep_largest(weight_XN.abs(), torch.full((len(weight_XN),), zeros, device=weight_XN.device))
