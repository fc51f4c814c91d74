"""The mask of a pruned and rounded layer let go: codes and zeros decided together, with as many zeros as before.

A mask is chosen for weights that may still take any value. Once scales and codes are known, other weights are worth
keeping. Coordinate descent can choose them too: unstructured, with a price on every weight that is not zero, the same
for the whole layer and such that as many are kept; N:M, by exchanging kept for pruned weights inside their group.

Shapes: R outputs, C inputs, M inputs of one N:M group, N inputs of one slab, E layers of one shape.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from featherweight.core.problem import LayerProblem
from featherweight.core.refine import descend, keep_better, refit_scales, row_loss
from featherweight.core.rules import Grid, Pattern
from featherweight.core.serial import one_thread
from featherweight.core.solution import Solution
from featherweight.core.support import SAMPLE, best_mask
from featherweight.core.sweep import SLAB

ROUNDS = 3
FEW_BITS = 3  # at more there is 1 % of the loss to find, and nothing of the KL (docs/log.md)


def rounds_worth(grid: Grid) -> int:
    """How many rounds pay for themselves."""
    return ROUNDS if grid.stored_bits <= FEW_BITS else 0


def release(problem: LayerProblem, solution: Solution, rounds: int | None = None) -> Solution:
    """Descends over values and zeros at once; no layer's tr(D H D^T), damped as in `solution`, rises.

    The number of kept weights stays exact: in the layer (unstructured, where single rows may lose or gain some, and so
    may rise) or in each group (N:M, where no row rises). `solution.loss_R` must be true for `problem`. A mask of
    blocks stays as it is, and without a pattern there is nothing to release. `rounds` None is as many as pay.
    """
    pattern = solution.pattern
    if pattern is None or pattern.block > 1:
        return solution
    rounds = rounds_worth(solution.grid) if rounds is None else rounds
    if not rounds:
        return solution
    if problem.weight_RC.dim() == 2:
        stack = replace(problem, weight_RC=problem.weight_RC.unsqueeze(0), hessian_CC=problem.hessian_CC.unsqueeze(0))
        return release(stack, solution.stacked(), rounds).layer(0)
    hessian_CC = problem.damped(solution.damping)
    if pattern.of:
        for _ in range(rounds):
            solution = refit_scales(
                problem.weight_RC, hessian_CC, exchange(problem.weight_RC, hessian_CC, solution, pattern)
            )
        return solution
    return _released(problem.weight_RC, hessian_CC, solution, pattern, rounds)


def _released(weight_RC: Tensor, hessian_CC: Tensor, given: Solution, pattern: Pattern, rounds: int) -> Solution:
    """Unstructured: rounds at the price that keeps the count, then exactly that many, and a round with those held."""
    free = replace(given, keep_RC=None)
    for _ in range(rounds):
        price_E = _price(_worth(weight_RC, hessian_CC, free), pattern)
        free = refit_scales(weight_RC, hessian_CC, descend(weight_RC, hessian_CC, free, price_E))
    keep_RC = _exactly(_worth(weight_RC, hessian_CC, free), free.nonzero(), pattern)
    zero_RC = free.zeros_RG.repeat_interleave(weight_RC.shape[-1] // free.zeros_RG.shape[-1], -1)
    held = replace(free, codes_RC=torch.where(keep_RC, free.codes_RC, zero_RC), keep_RC=keep_RC)
    held = replace(held, loss_R=row_loss(weight_RC, hessian_CC, held))
    held = refit_scales(weight_RC, hessian_CC, descend(weight_RC, hessian_CC, held))
    better_E = held.loss_R.sum(-1) < given.loss_R.to(held.loss_R.dtype).sum(-1)

    def pick(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(better_E.view(-1, *[1] * (new.dim() - 1)), new, old)

    assert given.keep_RC is not None
    return replace(
        held,
        codes_RC=pick(held.codes_RC, given.codes_RC),
        scales_RG=pick(held.scales_RG, given.scales_RG),
        keep_RC=pick(keep_RC, given.keep_RC),
        loss_R=pick(held.loss_R, given.loss_R.to(held.loss_R.dtype)),
    )


def _worth(weight_RC: Tensor, hessian_CC: Tensor, solution: Solution) -> Tensor:
    """What each weight's best level takes off the loss against zero, all others held."""
    values_RC = solution.values(weight_RC.dtype)
    curve_C = hessian_CC.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    goal_RC = torch.addcdiv(values_RC, (weight_RC - values_RC) @ hessian_CC, curve_C)
    grouped_RGN = goal_RC.unflatten(-1, (solution.scales_RG.shape[-1], -1))
    scale_RG1, zero_RG1 = (t.unsqueeze(-1).to(weight_RC.dtype) for t in (solution.scales_RG, solution.zeros_RG))
    best_RC = (solution.grid.encode(grouped_RGN, scale_RG1, zero_RG1) - zero_RG1).mul_(scale_RG1).flatten(-2)
    return (2 * goal_RC).sub_(best_RC).mul_(best_RC).mul_(curve_C)


def _price(worth_RC: Tensor, pattern: Pattern) -> Tensor:
    """The price at which as many weights are worth keeping as the pattern keeps, read off a sample; one a layer."""
    some_EN = worth_RC.flatten(1)[:, :: max(1, worth_RC[0].numel() // SAMPLE)]
    zeros = round(pattern.sparsity * some_EN.shape[1])
    return some_EN.kthvalue(zeros, -1).values.clamp(min=0) if zeros else some_EN.new_zeros(len(some_EN))


def _exactly(worth_RC: Tensor, nonzero_RC: Tensor, pattern: Pattern) -> Tensor:
    """As many weights as the pattern keeps: of those that are not zero the best, or all and the best of the others."""
    kept = worth_RC[0].numel() - round(pattern.sparsity * worth_RC[0].numel())
    many_E = (nonzero_RC.sum((-2, -1)) > kept).view(-1, 1, 1)
    worth_RC = torch.where(nonzero_RC & ~many_E, torch.inf, worth_RC)
    return best_mask(torch.where(~nonzero_RC & many_E, -torch.inf, worth_RC), pattern)


def exchange(weight_RC: Tensor, hessian_CC: Tensor, solution: Solution, pattern: Pattern) -> Solution:
    """One pass over the groups of an N:M pattern: the exchange of a kept for a pruned weight that helps most, where
    one does, then each code of the group in turn to its best level, as `descend` has it. Leading axis E throughout.
    """
    run = _Exchange(weight_RC, hessian_CC, solution, pattern)
    step = max(1, SLAB // pattern.of) * pattern.of
    for start in range(0, weight_RC.shape[-1], step):
        run.slab(slice(start, min(start + step, weight_RC.shape[-1])))
    codes_RC, keep_RC = (t.transpose(1, 2).contiguous() for t in (run.codes_ECR, run.keep_ECR))
    new = keep_better(weight_RC, hessian_CC, solution, replace(solution, codes_RC=codes_RC))
    took_R1 = (new.codes_RC == codes_RC).all(-1, keepdim=True)
    assert solution.keep_RC is not None
    return replace(new, keep_RC=torch.where(took_R1, keep_RC, solution.keep_RC))


class _Exchange:
    """The working state of one pass; everything is held transposed, a column in one piece."""

    def __init__(self, weight_RC: Tensor, hessian_CC: Tensor, solution: Solution, pattern: Pattern) -> None:
        assert solution.keep_RC is not None
        dtype, self.width = weight_RC.dtype, weight_RC.shape[-1] // solution.scales_RG.shape[-1]
        self.hessian_CC, self.of, self.grid = hessian_CC.contiguous(), pattern.of, solution.grid
        self.scale_EGR, self.zero_EGR = (
            t.to(dtype).transpose(1, 2).contiguous() for t in (solution.scales_RG, solution.zeros_RG)
        )
        self.values_ECR = solution.values(dtype).transpose(1, 2).contiguous()
        self.delta_ECR = weight_RC.transpose(1, 2) - self.values_ECR
        self.codes_ECR = solution.codes_RC.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        self.keep_ECR = solution.keep_RC.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    def slab(self, at: slice) -> None:
        pull_ENR = self.hessian_CC[:, at] @ self.delta_ECR
        with one_thread(pull_ENR.device):
            for begin in range(at.start, at.stop, self.of):
                group = slice(begin, begin + self.of)
                moved_EMR = self._group(pull_ENR[:, begin - at.start : begin - at.start + self.of], group)
                self.delta_ECR[:, group] -= moved_EMR
                if group.stop < at.stop:
                    after_ENM = self.hessian_CC[:, group.stop : at.stop, group]
                    pull_ENR[:, group.stop - at.start :].baddbmm_(after_ENM, moved_EMR, alpha=-1)

    def _group(self, pull_EMR: Tensor, group: slice) -> Tensor:
        """Decides one group again; returns how far its values move. `pull` is (D H) of its columns."""
        at_M = torch.arange(group.start, group.stop, device=pull_EMR.device) // self.width
        scale_EMR, zero_EMR = self.scale_EGR[:, at_M], self.zero_EGR[:, at_M]
        before_EMR, hessian_EMM = self.values_ECR[:, group], self.hessian_CC[:, group, group]
        low_EMR, high_EMR = self.grid.bottom - zero_EMR, self.grid.top - zero_EMR
        bounds = (scale_EMR, low_EMR, high_EMR)
        values_EMR = _swapped(before_EMR, self.keep_ECR[:, group], pull_EMR, hessian_EMM, bounds)
        pull_EMR = pull_EMR.baddbmm(hessian_EMM, values_EMR - before_EMR, alpha=-1)
        keep_EMR = self.keep_ECR[:, group].to(pull_EMR.dtype)
        for j in range(self.of):
            goal_ER = values_EMR[:, j] + pull_EMR[:, j] / hessian_EMM[:, j, j, None]
            step_ER = _level(goal_ER, *(bound[:, j] for bound in bounds)) * keep_EMR[:, j]
            change_ER = step_ER * scale_EMR[:, j] - values_EMR[:, j]
            pull_EMR.sub_(hessian_EMM[:, :, j, None] * change_ER.unsqueeze(1))
            values_EMR[:, j] += change_ER
            self.codes_ECR[:, group.start + j] = (step_ER + zero_EMR[:, j]).to(torch.uint8)
        return values_EMR - before_EMR


def _level(goal: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The nearest level, in steps."""
    return torch.maximum(torch.minimum((goal / scale).round_(), high), low)


def _swapped(
    values_EMR: Tensor,
    keep_EMR: Tensor,
    pull_EMR: Tensor,
    hessian_EMM: Tensor,
    bounds: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """The values after the exchange in each group that lowers the loss most, if one does; `keep_EMR` follows.

    Weight i becoming zero changes the loss by v_i (2 (D H)_i + v_i H_ii) and (D H)_j by v_i H_ij; weight j then takes
    H_jj q (2 g - q) off it, q its best level and g = (D H)_j / H_jj.
    """
    size = len(hessian_EMM[0])
    curve_EM1 = hessian_EMM.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    lose_EMR = values_EMR * (2 * pull_EMR + values_EMR * curve_EM1)
    lose_EMR = lose_EMR.masked_fill(~keep_EMR, torch.inf)
    goal_EMMR = pull_EMR.unsqueeze(1) + values_EMR.unsqueeze(2) * hessian_EMM.unsqueeze(-1)  # i goes, j comes
    goal_EMMR /= curve_EM1.unsqueeze(1)
    scale_EMR, low_EMR, high_EMR = (bound.unsqueeze(1) for bound in bounds)
    level_EMMR = _level(goal_EMMR, scale_EMR, low_EMR, high_EMR) * scale_EMR
    gain_EMMR = (2 * goal_EMMR).sub_(level_EMMR).mul_(level_EMMR).mul_(curve_EM1.unsqueeze(1))
    change_EMMR = (lose_EMR.unsqueeze(2) - gain_EMMR).masked_fill_(keep_EMR.unsqueeze(1), torch.inf)
    best_E1R, pair_E1R = change_EMMR.flatten(1, 2).min(1, keepdim=True)
    out_E1R, in_E1R = pair_E1R // size, pair_E1R % size
    does_E1R = best_E1R < 0
    new_E1R = level_EMMR.flatten(1, 2).gather(1, pair_E1R)
    swapped_EMR = values_EMR.scatter(1, out_E1R, 0.0).scatter_(1, in_E1R, new_E1R)
    mask_EMR = keep_EMR.scatter(1, out_E1R, False).scatter_(1, in_E1R, True)
    keep_EMR.copy_(torch.where(does_E1R, mask_EMR, keep_EMR))
    return torch.where(does_E1R, swapped_EMR, values_EMR)
