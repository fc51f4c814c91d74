"""OBC at the widths of large models: greedy inside slabs of columns, one GEMM between them.

An exact greedy solver holds an inverse Hessian for every row, C x C each. Here columns go slab by slab, as in the
sweep: inside a slab each row still chooses what goes next, every free weight of the layer making up for it, but what
is done in earlier slabs stands. With H = R R^T and U = inv(R), the Hessian that a slab's columns see while those after
it are free is R_ss R_ss^T, so a slab is a small layer of its own; its scaled errors E = (W_s - V_s) R_ss go into
the columns after it as E U_st, and ||E||^2 is its part of the loss. With one slab this is `obs` and `obq`.

Shapes: R outputs, C inputs, N columns of a slab.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.core import scales
from featherweight.core.greedy import least_squares, prune_trace, round_greedily
from featherweight.core.problem import Factor, LayerProblem
from featherweight.core.rules import Grid, Pattern
from featherweight.core.solution import Solution, SparseSolution

SLAB = 512  # what a slab costs against the whole: docs/log.md
SolveSlab = Callable[[LayerProblem, Factor, slice], Tensor]


def obs_by_slabs(
    problem: LayerProblem, pattern: Pattern, slab: int = SLAB, keep_RC: Tensor | None = None
) -> SparseSolution:
    """ExactOBS slab by slab, each with the same share of zeros, or as many as `keep_RC` has there (which ones is new).

    Raises RequestError where the pattern does not fit the columns.
    """
    pattern.check(problem.weight_RC.shape[-1], problem.name)
    unit = pattern.of or pattern.block
    kept: list[Tensor] = []

    def solve(part: LayerProblem, factor: Factor, at: slice) -> Tensor:
        trace = prune_trace(part, pattern, factor)
        steps = trace.order_RC.numel()
        share = pattern.sparsity if keep_RC is None else float((~keep_RC[:, at]).double().mean())
        counts = trace.counts(steps if pattern.of else round(share * steps))
        gone_RN = trace.gone(counts, part.weight_RC.shape[-1] // pattern.block).repeat_interleave(pattern.block, -1)
        kept.append(~gone_RN)
        return least_squares(part, ~gone_RN, pattern, 0.0).values_RC

    values_RC, loss_R, damping = _by_slabs(problem, max(slab // unit, 1) * unit, solve)
    return SparseSolution(values_RC, torch.cat(kept, -1), pattern, loss_R, damping)


def obq_by_slabs(problem: LayerProblem, grid: Grid, slab: int = SLAB, lowest_zero: int = 0) -> Solution:
    """OBQ slab by slab, on scales fitted to the given weights as `obq` fits them.

    `lowest_zero` is the smallest zero the file format can hold.
    """
    weight_RC = problem.weight_RC
    width = grid.width(weight_RC.shape[-1], problem.name)
    price_C = problem.factor("natural").upper_CC.square().sum(0).reciprocal()
    scale_RG, zero_RG = scales.fit(
        grid, weight_RC.unflatten(-1, (-1, width)), price_C.unflatten(0, (-1, width)), lowest_zero
    )
    scale_RC, zero_RC = (t.to(weight_RC.dtype).repeat_interleave(width, -1) for t in (scale_RG, zero_RG))
    codes: list[Tensor] = []

    def solve(part: LayerProblem, factor: Factor, at: slice) -> Tensor:
        codes_RN, _ = round_greedily(part, grid, scale_RC[:, at], zero_RC[:, at], factor)
        codes.append(codes_RN)
        return (codes_RN - zero_RC[:, at]) * scale_RC[:, at]

    _, loss_R, damping = _by_slabs(problem, slab, solve)
    return Solution(torch.cat(codes, -1).to(torch.uint8), scale_RG, zero_RG, grid, loss_R, damping)


def _by_slabs(problem: LayerProblem, slab: int, solve: SolveSlab) -> tuple[Tensor, Tensor, float]:
    """Solves slab after slab; returns all values, the losses of the rows and the damping that was needed."""
    factor = problem.factor("natural")
    upper_CC, weight_RC = factor.upper_CC, problem.weight_RC.clone()
    loss_R = torch.zeros_like(weight_RC[:, 0])
    for start in range(0, weight_RC.shape[-1], slab):
        at = slice(start, min(start + slab, weight_RC.shape[-1]))
        root_NN, now_RN = factor.root_CC[at, at].contiguous(), weight_RC[:, at].clone()
        part = LayerProblem(now_RN, root_NN @ root_NN.T, problem.tokens, 0.0, problem.name)
        order_N = torch.arange(now_RN.shape[-1], device=now_RN.device)
        weight_RC[:, at] = solve(part, Factor(root_NN, order_N, 0.0), at)
        error_RN = (now_RN - weight_RC[:, at]) @ root_NN
        weight_RC[:, at.stop :] -= error_RN @ upper_CC[at, at.stop :]
        loss_R += error_RN.square().sum(-1)
    return weight_RC, loss_R, factor.damping
