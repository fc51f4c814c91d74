"""After the sweep: moves that can only lower a layer's loss, taken with all other weights in view.

The sweep decides each column once, knowing only the columns before it, on scales fitted before it began. Here the
codes are decided again with every other column known (coordinate descent: QuantEase, CDQuant, LNQ), and each row's
scales again with its codes known (a small least-squares problem). Both are exact minimisers of tr(D H D^T) in their
own variables, so alternating them descends.

Shapes: R outputs, C inputs, G groups, N inputs of one group, E layers of one shape (always there inside).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from featherweight.core import columns, compiled, fused, grams, scales, tiles
from featherweight.core.problem import LayerProblem
from featherweight.core.products import Pulls, times
from featherweight.core.serial import each, one_thread
from featherweight.core.solution import Solution
from featherweight.core.sweep import SLAB, WIDE_SLAB

Gram = Callable[[Tensor], Tensor | None]
"""K H K^T of every row, R x G x G, of codes less their zeros, R x G x N; None where it cannot after all."""

CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 28}  # of the temporaries in `refit_scales`; a CPU's in its cache


def refine(problem: LayerProblem, solution: Solution, rounds: int = 3) -> Solution:
    """Alternates `refit_scales` and `descend`; no row's tr(D H D^T), for H damped as in `solution`, ever rises.

    `solution.loss_R` must be those losses, as every solver here gives them.
    """
    if not rounds:
        return solution
    weight_RC, hessian_CC = problem.weight_RC, problem.damped(solution.damping)
    pull_RC = times(weight_RC, hessian_CC)
    for _ in range(rounds):
        solution = descend(weight_RC, hessian_CC, refit_scales(weight_RC, hessian_CC, solution, pull_RC))
    return refit_scales(weight_RC, hessian_CC, solution, pull_RC)


def row_loss(weight_RC: Tensor, hessian_CC: Tensor, solution: Solution) -> Tensor:
    """tr(D H D^T) of every row for the H given."""
    delta_RC = weight_RC - solution.values(weight_RC.dtype)
    return (times(delta_RC, hessian_CC) * delta_RC).sum(-1)


def keep_better(weight_RC: Tensor, hessian_CC: Tensor, old: Solution, new: Solution) -> Solution:
    """Row by row, the solution with the smaller loss; `old`, whose loss_R must be for this H, where they tie."""
    return _better(old, new, row_loss(weight_RC, hessian_CC, new), None)


def _better(old: Solution, new: Solution, new_R: Tensor, price_E: Tensor | None) -> Solution:
    """`keep_better` with the new losses known; with a price, every weight that is not zero adds it to a loss."""
    old_R = old.loss_R.to(new_R.dtype)
    saved_R = 0.0 if price_E is None else price_E.unsqueeze(-1) * (old.nonzero().sum(-1) - new.nonzero().sum(-1))
    take_R = new_R < old_R + saved_R
    take_R1 = take_R.unsqueeze(-1)
    return replace(
        old,
        codes_RC=torch.where(take_R1, new.codes_RC, old.codes_RC),
        scales_RG=torch.where(take_R1, new.scales_RG, old.scales_RG),
        zeros_RG=torch.where(take_R1, new.zeros_RG, old.zeros_RG),
        loss_R=torch.where(take_R, new_R, old_R),
    )


def refit_scales(weight_RC: Tensor, hessian_CC: Tensor, solution: Solution, pull_RC: Tensor | None = None) -> Solution:
    """The least-squares scales of each row for its codes, all groups of the row at once, rounded as they are stored.

    With K the codes less their zeros, masked to one group a row (G x C), the scales solve (K H K^T) s = K H w, and
    scales that differ by d change the loss by d K H K^T d^T - 2 d K H (w - v). A row keeps its scales where the new
    ones, once rounded, are no better. `pull_RC` is W H, where the caller has it.
    """
    pull_RC = times(weight_RC, hessian_CC) if pull_RC is None else pull_RC
    rows, width = weight_RC.shape[-2], weight_RC.shape[-1] // solution.scales_RG.shape[-1]
    each_row = 2 * solution.scales_RG.shape[-1] ** 2 + 4 * weight_RC.shape[-1]
    chunk = max(1, CHUNK_ELEMENTS[weight_RC.device.type] // each_row)
    gram: Gram | None = None
    if grams.usable(weight_RC, width):
        gram = partial(grams.gram, halves=grams.halved(hessian_CC))
    elif tiles.weighs(weight_RC, width):
        gram = partial(tiles.weigh, halves=tiles.halved(hessian_CC))

    def refit(at: int) -> tuple[Tensor, Tensor]:
        stop = min(at + chunk, rows)
        return _refitted(pull_RC[..., at:stop, :], hessian_CC, solution.rows(at, stop), gram)

    parts = each(refit, range(0, rows, chunk), weight_RC.device)
    scales_RG, loss_R = (torch.cat(part, axis) for part, axis in zip(zip(*parts, strict=True), (-2, -1), strict=True))
    return replace(solution, scales_RG=scales_RG, loss_R=loss_R)


def _refitted(pull_RC: Tensor, hessian_CC: Tensor, solution: Solution, gram: Gram | None) -> tuple[Tensor, Tensor]:
    """Scales and losses of some rows."""
    groups, dtype = solution.scales_RG.shape[-1], pull_RC.dtype
    shift_RGN = solution.codes_RC.unflatten(-1, (groups, -1)).to(dtype)
    shift_RGN = shift_RGN - solution.zeros_RG.unsqueeze(-1).to(dtype)
    right_RG = (pull_RC.unflatten(-1, (groups, -1)) * shift_RGN).sum(-1)
    left_RGG = None if gram is None else gram(shift_RGN)
    if left_RGG is None:
        left_RGG = _gram(shift_RGN, hessian_CC)
    whole_RGG = left_RGG.tril() + left_RGG.tril(-1).mT
    diagonal_RG = left_RGG.diagonal(dim1=-2, dim2=-1)
    diagonal_RG += 1e-6 * diagonal_RG.mean(-1, keepdim=True) + torch.finfo(dtype).tiny
    lower_RGG = torch.linalg.cholesky_ex(left_RGG)[0]
    found_RG = _solved(lower_RGG, right_RG)
    new_RG, old_RG = scales.store(found_RG, solution.grid.scale_dtype), solution.scales_RG
    usable = torch.isfinite(new_RG) & (new_RG.abs() > 1e-3 * old_RG.abs()) & (new_RG.abs() < 1e3 * old_RG.abs())
    new_RG = torch.where(usable, new_RG, old_RG)
    step_RG = new_RG.to(dtype) - old_RG.to(dtype)
    middle_RG = old_RG.to(dtype) + step_RG / 2
    gain_R = 2 * (step_RG * (right_RG - (whole_RGG @ middle_RG.unsqueeze(-1)).squeeze(-1))).sum(-1)
    better_R, loss_R = gain_R > 0, solution.loss_R.to(dtype)
    return torch.where(better_R.unsqueeze(-1), new_RG, old_RG), torch.where(better_R, loss_R - gain_R, loss_R)


def _solved(lower_RGG: Tensor, right_RG: Tensor) -> Tensor:
    """x of every row with L L^T x = right."""
    right_RG1 = right_RG.unsqueeze(-1)
    if not lower_RGG.is_cuda:
        return torch.cholesky_solve(right_RG1, lower_RGG).squeeze(-1)
    half_RG1 = torch.linalg.solve_triangular(lower_RGG, right_RG1, upper=False)  # `cholesky_solve` waits for the GPU
    found_RG1: Tensor = torch.linalg.solve_triangular(lower_RGG.mT, half_RG1, upper=True)
    return found_RG1.squeeze(-1)


def _gram(shift_RGN: Tensor, hessian_CC: Tensor) -> Tensor:
    """K H K^T of every row, R x G x G: the lower triangle, since solvers of symmetric systems read no more."""
    groups, width = shift_RGN.shape[-2:]
    hessian_GNC = hessian_CC.unflatten(-2, (groups, -1))
    left_RGG = shift_RGN.new_empty((*shift_RGN.shape[:-1], groups))
    for g in range(groups):
        upto_RC = shift_RGN[..., g, :] @ hessian_GNC[..., g, :, : (g + 1) * width]
        left_RGG[..., g, : g + 1] = (upto_RC.unflatten(-1, (g + 1, -1)) * shift_RGN[..., : g + 1, :]).sum(-1)
    return left_RGG


def descend(weight_RC: Tensor, hessian_CC: Tensor, solution: Solution, price_E: Tensor | None = None) -> Solution:
    """One pass of coordinate descent over the codes, column after column, all rows at once.

    With all other columns fixed, the loss in column j is a parabola around v_j + (D H)_j / H_jj; its best allowed
    value is the nearest one. With a price (one number for each layer) every weight that is not zero costs that much
    besides, and the better of that value and zero is taken. Columns go by slabs: one GEMM brings D H up to date for
    the next slab.
    """
    if weight_RC.dim() == 2:
        price_E = None if price_E is None else price_E.reshape(1)
        return descend(weight_RC.unsqueeze(0), hessian_CC.unsqueeze(0), solution.stacked(), price_E).layer(0)
    codes_RC, gain_R = _descended(weight_RC, hessian_CC, solution, price_E)
    return _better(solution, replace(solution, codes_RC=codes_RC), solution.loss_R.to(gain_R.dtype) - gain_R, price_E)


def _descended(
    weight_RC: Tensor, hessian_CC: Tensor, solution: Solution, price_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The codes after `descend`'s pass, and what the losses fall by, step after step (with a price, less than zero)."""
    weight_ECR = weight_RC.transpose(1, 2)
    scale_EGR, zero_EGR = (
        t.to(weight_RC.dtype).transpose(1, 2).contiguous() for t in (solution.scales_RG, solution.zeros_RG)
    )
    values_ECR = solution.values(weight_RC.dtype).transpose(1, 2).contiguous()
    delta_ECR = weight_ECR.contiguous() - values_ECR
    codes_ECR = solution.codes_RC.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    width = weight_ECR.shape[1] // scale_EGR.shape[1]
    free_ECR, hessian_CC = None, hessian_CC.contiguous()
    if solution.keep_RC is not None:
        free_ECR = solution.keep_RC.transpose(1, 2).to(weight_RC.dtype, memory_format=torch.contiguous_format)
    pulls, gain_ER = Pulls(hessian_CC, delta_ECR), torch.zeros_like(weight_RC[..., 0])
    bounds = solution.grid.bottom, solution.grid.top
    levels: columns.Levels | None = None  # made where they are needed: a GPU would have to be waited for
    group_EC = (torch.arange(weight_ECR.shape[1], device=weight_RC.device) // width).expand(len(weight_ECR), -1)
    slab = WIDE_SLAB if fused.usable(weight_RC) else SLAB
    for start in range(0, weight_ECR.shape[1], slab):
        at = slice(start, min(start + slab, weight_ECR.shape[1]))
        pull_ENR = pulls.of(at)
        state = (hessian_CC, values_ECR, scale_EGR, zero_EGR, free_ECR, delta_ECR, codes_ECR, gain_ER)
        if any(solver.descend_slab(pull_ENR, *state, at, bounds, price_E) for solver in (fused, compiled)):
            continue
        levels = levels or columns.Levels.of(scale_EGR, zero_EGR, *bounds)
        with one_thread(weight_RC.device):
            moved_ENR, codes_ENR, fallen_ER = columns.descend_slab(
                pull_ENR,
                hessian_CC[:, at, at],
                values_ECR[:, at],
                levels,
                group_EC[:, at],
                None if free_ECR is None else free_ECR[:, at],
                price_E,
            )
        delta_ECR[:, at] -= moved_ENR
        codes_ECR[:, at] = codes_ENR
        gain_ER += fallen_ER
    return codes_ECR.transpose(1, 2).contiguous(), gain_ER
