"""SparseGPT: one pass over the columns, each pruned weight made up for by the columns still free (2301.00774).

Shapes: R outputs, C inputs, N columns of a slab, M columns of an N:M group. Weights are held transposed, C x R.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from featherweight.core import compiled, scales
from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid, Joint, Pattern
from featherweight.core.serial import one_thread
from featherweight.core.solution import Solution, SparseSolution
from featherweight.core.sweep import SLAB

Saliency = Literal["obs", "wanda"]
Scope = Literal["slab", "row"]
Levels = tuple[Grid, Tensor, Tensor]  # a grid with the scale and the zero of every weight, C x R


def prune(
    problem: LayerProblem,
    pattern: Pattern,
    saliency: Saliency = "obs",
    scope: Scope = "slab",
    slab: int = SLAB,
    keep_RC: Tensor | None = None,
) -> SparseSolution:
    """Prunes a layer to a pattern in one sweep, in the natural order of the columns.

    Masks are chosen on the weights as they stand by then: unstructured when a slab begins, N:M when a group begins.

    Args:
        saliency: what a weight is worth: "obs" w^2/U_jj^2, its price once the rest makes up for it; "wanda" |w| times
            the size of its input (2306.11695).
        scope: with unstructured sparsity, the weights that compete: all of a slab, or each row's in a slab.
        slab: columns swept together (whole N:M groups or blocks), and the window of an unstructured mask.
        keep_RC: a mask to use instead of choosing one (True is kept).

    Raises RequestError where the pattern does not fit the columns.
    """
    run = _Run(problem, pattern, saliency, scope, slab)
    run.go(keep_RC)
    return SparseSolution(run.weight_CR.T.contiguous(), run.kept(), pattern, run.loss_R, run.damping)


def prune_and_round(
    problem: LayerProblem,
    rule: Joint,
    saliency: Saliency = "obs",
    scope: Scope = "slab",
    slab: int = SLAB,
    lowest_zero: int = 0,
) -> Solution:
    """The same sweep with every weight that is kept rounded at once, as the paper joins the two.

    One error, of pruning or of rounding, goes into the columns still free. Grids are fitted on the given weights before
    the sweep, pruned ones included. `lowest_zero` is the smallest zero the file format can hold.
    """
    grid = rule.grid
    grouped_RGN = problem.weight_RC.unflatten(-1, (-1, grid.width(problem.weight_RC.shape[-1], problem.name)))
    scale_RG, zero_RG = scales.fit(grid, grouped_RGN, None, lowest_zero)
    run = _Run(problem, rule.pattern, saliency, scope, slab)
    width = grouped_RGN.shape[-1]
    scale_CR, zero_CR = (t.to(problem.weight_RC.dtype).repeat_interleave(width, -1).T for t in (scale_RG, zero_RG))
    run.go(None, (grid, scale_CR.contiguous(), zero_CR.contiguous()))
    codes_RC = grid.encode(run.weight_CR, scale_CR, zero_CR).T.contiguous().to(torch.uint8)
    keep_RC = run.kept()
    return Solution(codes_RC, scale_RG, zero_RG, grid, run.loss_R, run.damping, keep_RC=keep_RC, pattern=rule.pattern)


class _Run:
    """One sweep's working state; `go` prunes (and rounds) the weights in place."""

    def __init__(self, problem: LayerProblem, pattern: Pattern, saliency: Saliency, scope: Scope, slab: int) -> None:
        pattern.check(problem.weight_RC.shape[-1], problem.name)
        factor = problem.factor("natural")
        self.pattern, self.scope, self.upper_CC, self.damping = pattern, scope, factor.upper_CC, factor.damping
        self.weight_CR = problem.weight_RC.T.clone(memory_format=torch.contiguous_format)  # never the caller's own
        self.price_C = _price(problem, factor.upper_CC, saliency)
        self.kept_CR = torch.ones_like(self.weight_CR, dtype=torch.bool)
        self.loss_R = torch.zeros_like(self.weight_CR[0])
        unit = pattern.of or pattern.block
        self.step = max(slab // unit, 1) * unit

    def kept(self) -> Tensor:
        return self.kept_CR.T.contiguous()

    def go(self, keep_RC: Tensor | None, levels: Levels | None = None) -> None:
        weight_CR, kept_CR, upper_CC, pattern = self.weight_CR, self.kept_CR, self.upper_CC, self.pattern
        if keep_RC is not None:
            kept_CR.copy_(keep_RC.T)
        for start in range(0, weight_CR.shape[0], self.step):
            at = slice(start, min(start + self.step, weight_CR.shape[0]))
            if keep_RC is None and not pattern.of:
                kept_CR[at] = _unstructured(weight_CR[at].square() * self.price_C[at, None], pattern, self.scope)
            choosing = pattern if keep_RC is None and pattern.of else None
            here = None if levels is None else (levels[0], levels[1][at], levels[2][at])
            slab_of = (weight_CR[at], kept_CR[at], upper_CC[at, at], self.price_C[at], choosing)
            error_NR = compiled.prune_slab(*slab_of) if here is None else None
            if error_NR is None:
                with one_thread(weight_CR.device):
                    error_NR = _sweep_slab(*slab_of, here)
            weight_CR[at.stop :].addmm_(upper_CC[at, at.stop :].T, error_NR, alpha=-1)
            self.loss_R += error_NR.square().sum(0)


def _price(problem: LayerProblem, upper_CC: Tensor, saliency: Saliency) -> Tensor:
    """What a unit of each squared weight is worth."""
    if saliency == "wanda":
        return problem.hessian_CC.diagonal().clone()
    return upper_CC.diagonal().square().reciprocal()


def _unstructured(worth_NR: Tensor, pattern: Pattern, scope: Scope) -> Tensor:
    """The mask of a slab with exactly its share of zeros, in whole blocks of columns."""
    worth_NR = worth_NR.unflatten(0, (-1, pattern.block)).sum(1)
    kept_NR = torch.ones_like(worth_NR, dtype=torch.bool)
    if scope == "row":
        zeros = round(pattern.sparsity * worth_NR.shape[0])
        kept_NR.scatter_(0, worth_NR.topk(zeros, 0, largest=False, sorted=False).indices, False)
    else:
        zeros = round(pattern.sparsity * worth_NR.numel())
        kept_NR.view(-1)[worth_NR.flatten().topk(zeros, largest=False, sorted=False).indices] = False
    return kept_NR.repeat_interleave(pattern.block, 0)


def _sweep_slab(
    weight_NR: Tensor,
    kept_NR: Tensor,
    upper_NN: Tensor,
    price_N: Tensor,
    choosing: Pattern | None,
    levels: Levels | None,
) -> Tensor:
    """Prunes (and rounds) a slab in place, choosing N:M masks on the way; returns its scaled errors E: W - V = E U."""
    error_NR = torch.zeros_like(weight_NR)
    pivot_N = upper_NN.diagonal().reciprocal()
    width = choosing.of if choosing else 1
    for start in range(0, weight_NR.shape[0], width):
        group = slice(start, start + width)
        now_MR = torch.addmm(weight_NR[group], upper_NN[:start, group].T, error_NR[:start], alpha=-1)
        if choosing:
            worth_MR = now_MR.square() * price_N[group, None]
            gone_MR = worth_MR.topk(choosing.of - choosing.keep, 0, largest=False, sorted=False).indices
            kept_NR[group] = torch.ones_like(now_MR, dtype=torch.bool).scatter_(0, gone_MR, False)
        for inside in range(width):
            j = start + inside
            if inside:
                now_MR[inside].addmv_(error_NR[start:j].T, upper_NN[start:j, j], alpha=-1)
            torch.mul(now_MR[inside], kept_NR[j], out=weight_NR[j])
            if levels is not None:
                grid, scale_R, zero_R = levels[0], levels[1][j], levels[2][j]
                weight_NR[j] = (grid.encode(weight_NR[j], scale_R, zero_R) - zero_R) * scale_R
            torch.sub(now_MR[inside], weight_NR[j], out=error_NR[j]).mul_(pivot_N[j])
    return error_NR
