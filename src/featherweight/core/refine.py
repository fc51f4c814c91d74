"""After the sweep: moves that can only lower a layer's loss, taken with all other weights in view.

The sweep decides each column once, knowing only the columns before it, on scales fitted before it began. Here the
codes are decided again with every other column known (coordinate descent: QuantEase, CDQuant, LNQ), and each row's
scales again with its codes known (a small least-squares problem). Both are exact minimisers of tr(D H D^T) in their
own variables, so alternating them descends.

Shapes: R outputs, C inputs, G groups, N inputs of one group, E layers of one shape (always there inside).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from featherweight.core import columns, fused, scales
from featherweight.core.problem import LayerProblem
from featherweight.core.products import Pulls, times
from featherweight.core.serial import each, one_thread
from featherweight.core.solution import Solution

SLAB = 128
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 28}  # of the temporaries in `refit_scales`; a CPU's in its cache


def refine(problem: LayerProblem, solution: Solution, rounds: int = 3) -> Solution:
    """Alternates `refit_scales` and `descend`; no row's tr(D H D^T), for H damped as in `solution`, ever rises.

    `solution.loss_R` must be those losses, as every solver here gives them.
    """
    if not rounds:
        return solution
    weight_RC, hessian_CC = problem.weight_RC, problem.damped(solution.damping)
    pull_RC = pull_on(weight_RC, hessian_CC, solution)
    for _ in range(rounds):
        solution = refit_scales(weight_RC, hessian_CC, solution, pull_RC)
        solution, pull_RC = _descended(weight_RC, hessian_CC, solution, None)
    return refit_scales(weight_RC, hessian_CC, solution, pull_RC)


def pull_on(weight_RC: Tensor, hessian_CC: Tensor, solution: Solution) -> Tensor:
    """D H: half of what the loss falls by where a value moves a little."""
    return times(weight_RC - solution.values(weight_RC.dtype), hessian_CC)


def row_loss(weight_RC: Tensor, hessian_CC: Tensor, solution: Solution) -> Tensor:
    """tr(D H D^T) of every row for the H given."""
    delta_RC = weight_RC - solution.values(weight_RC.dtype)
    return (times(delta_RC, hessian_CC) * delta_RC).sum(-1)


def keep_better(
    weight_RC: Tensor, hessian_CC: Tensor, old: Solution, new: Solution, price_E: Tensor | None = None
) -> Solution:
    """Row by row, the solution with the smaller loss; `old`, whose loss_R must be for this H, where they tie.

    With a price, every weight that is not zero adds it to the loss that is compared.
    """
    return _better(old, new, row_loss(weight_RC, hessian_CC, new), price_E)[0]


def _better(old: Solution, new: Solution, new_R: Tensor, price_E: Tensor | None) -> tuple[Solution, Tensor]:
    """`keep_better` where the new losses are known; and which rows are new, R x 1."""
    old_R = old.loss_R.to(new_R.dtype)
    saved_R = 0.0 if price_E is None else price_E.unsqueeze(-1) * (old.nonzero().sum(-1) - new.nonzero().sum(-1))
    take_R = new_R < old_R + saved_R
    take_R1 = take_R.unsqueeze(-1)
    solution = replace(
        old,
        codes_RC=torch.where(take_R1, new.codes_RC, old.codes_RC),
        scales_RG=torch.where(take_R1, new.scales_RG, old.scales_RG),
        zeros_RG=torch.where(take_R1, new.zeros_RG, old.zeros_RG),
        loss_R=torch.where(take_R, new_R, old_R),
    )
    return solution, take_R1


def refit_scales(weight_RC: Tensor, hessian_CC: Tensor, solution: Solution, pull_RC: Tensor | None = None) -> Solution:
    """The least-squares scales of each row for its codes, all groups of the row at once, rounded as they are stored.

    With K the codes less their zeros, masked to one group a row (G x C), the scales move by (K H K^T)^-1 K H d, d being
    what is left of the row; `pull_RC` is D H, where the caller has it (or zero, for a row to stay as it is).
    A row keeps its scales where the new ones, once rounded, are no better; `solution.loss_R` must be true for this H.
    """
    pull_RC = pull_on(weight_RC, hessian_CC, solution) if pull_RC is None else pull_RC
    each_row = solution.scales_RG.shape[-1] ** 2 + 4 * weight_RC.shape[-1]
    chunk = max(1, CHUNK_ELEMENTS[weight_RC.device.type] // each_row)
    rows = weight_RC.shape[-2]

    def refit(at: int) -> tuple[Tensor, Tensor]:
        stop = min(at + chunk, rows)
        return _least_squares(solution.rows(at, stop), pull_RC[..., at:stop, :], hessian_CC)

    scales_RG, loss_R = zip(*each(refit, range(0, rows, chunk), weight_RC.device), strict=True)
    return replace(solution, scales_RG=torch.cat(scales_RG, -2), loss_R=torch.cat(loss_R, -1))


def _least_squares(part: Solution, pull_RC: Tensor, hessian_CC: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and losses of some rows: scales that move by t change the loss by t K H K^T t^T - 2 t (K H d)."""
    dtype, groups = pull_RC.dtype, part.scales_RG.shape[-1]
    shift_RGN = part.codes_RC.unflatten(-1, (groups, -1)).to(dtype) - part.zeros_RG.unsqueeze(-1).to(dtype)
    right_RG = (pull_RC.unflatten(-1, (groups, -1)) * shift_RGN).sum(-1)
    left_RGG = fused.gram(shift_RGN, hessian_CC)
    if left_RGG is None:
        left_RGG = _gram(shift_RGN, hessian_CC)
    diagonal_RG = left_RGG.diagonal(dim1=-2, dim2=-1)
    more_R1 = 1e-6 * diagonal_RG.mean(-1, keepdim=True) + torch.finfo(dtype).tiny
    diagonal_RG += more_R1
    lower_RGG = torch.linalg.cholesky_ex(left_RGG)[0]
    old_RG = part.scales_RG
    move_RG = torch.cholesky_solve(right_RG.unsqueeze(-1), lower_RGG).squeeze(-1)
    new_RG = scales.store(old_RG.to(dtype) + move_RG, part.grid.scale_dtype)
    usable = torch.isfinite(new_RG) & (new_RG.abs() > 1e-3 * old_RG.abs()) & (new_RG.abs() < 1e3 * old_RG.abs())
    new_RG = torch.where(usable, new_RG, old_RG)
    move_RG = new_RG.to(dtype) - old_RG.to(dtype)
    bent_R = (lower_RGG.mT @ move_RG.unsqueeze(-1)).square().sum((-2, -1)) - (more_R1 * move_RG.square()).sum(-1)
    change_R = bent_R - 2 * (move_RG * right_RG).sum(-1)
    better_R = change_R < 0
    loss_R = part.loss_R.to(dtype) + torch.where(better_R, change_R, 0.0)
    return torch.where(better_R.unsqueeze(-1), new_RG, old_RG), loss_R


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
    return _descended(weight_RC, hessian_CC, solution, price_E)[0]


def _descended(
    weight_RC: Tensor, hessian_CC: Tensor, solution: Solution, price_E: Tensor | None
) -> tuple[Solution, Tensor]:
    """`descend`, and D H as it then is; zero for rows that are left as they were."""
    if weight_RC.dim() == 2:
        price_E = None if price_E is None else price_E.reshape(1)
        found, pull_ERC = _descended(weight_RC.unsqueeze(0), hessian_CC.unsqueeze(0), solution.stacked(), price_E)
        return found.layer(0), pull_ERC[0]
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
    pulls, bounds = Pulls(hessian_CC, delta_ECR), (solution.grid.bottom, solution.grid.top)
    levels: columns.Levels | None = None  # made where they are needed: a GPU would have to be waited for
    group_EC = (torch.arange(weight_ECR.shape[1], device=weight_RC.device) // width).expand(len(weight_ECR), -1)
    for start in range(0, weight_ECR.shape[1], SLAB):
        at = slice(start, min(start + SLAB, weight_ECR.shape[1]))
        pull_ENR = pulls.of(at)
        state = (hessian_CC, values_ECR, scale_EGR, zero_EGR, free_ECR, delta_ECR, codes_ECR)
        if fused.descend_slab(pull_ENR, *state, at, bounds, price_E):
            continue
        levels = levels or columns.Levels.of(scale_EGR, zero_EGR, *bounds)
        with one_thread(weight_RC.device):
            moved_ENR, codes_ENR = columns.descend_slab(
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
    new = replace(solution, codes_RC=codes_ECR.transpose(1, 2).contiguous())
    delta_RC = weight_RC - new.values(weight_RC.dtype)
    pull_RC = times(delta_RC, hessian_CC)
    found, taken_R1 = _better(solution, new, (pull_RC * delta_RC).sum(-1), price_E)
    return found, pull_RC.mul_(taken_R1)
