"""Slow, plain float64 answers that the solvers of `core` are held against. Nothing here calls a solver of the package.

Shapes: R outputs, C inputs, G groups, L levels of a group, K combinations of codes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featherweight.core.rules import Pattern
from featherweight.core.solution import Solution


def random_layer(rows: int, columns: int, seed: int, dead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Weights R x C and a Hessian C x C of correlated inputs of uneven size, float64; inputs in `dead` are always 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing_CC = torch.eye(columns, dtype=torch.float64) + normal(columns, columns) / columns**0.5
    x_TC = normal(3 * columns, columns) @ mixing_CC * (0.5 * normal(columns)).exp()
    x_TC[:, list(dead)] = 0.0
    return 0.1 * normal(rows, columns), x_TC.T @ x_TC / x_TC.shape[0]


def damped(hessian_CC: Tensor, damping: float) -> Tensor:
    """H in float64, `damping` times the mean diagonal of live inputs added, a hundredth of that mean for dead ones."""
    hessian = hessian_CC.double().numpy().copy()
    diagonal = np.diag(hessian).copy()
    live = diagonal != 0
    mean = diagonal[live].mean() if live.any() else 1.0
    np.fill_diagonal(hessian, np.where(live, diagonal, 0.01 * mean) + damping * mean)
    return torch.from_numpy(hessian)


def layer_loss(weight_RC: Tensor, values_RC: Tensor, hessian_CC: Tensor) -> Tensor:
    """tr(D H D^T) row by row, in float64, by its definition."""
    delta_RC = weight_RC.double() - values_RC.double()
    return torch.einsum("ri,ij,rj->r", delta_RC, hessian_CC.double(), delta_RC)


def levels(solution: Solution) -> Tensor:
    """Every value that each weight may take with the solution's scales and zeros, float64, R x C x L.

    The codes of b bits are 0 .. 2^b - 1; ternary has 1, 2, 3.
    """
    bits = solution.grid.bits
    codes_L = torch.arange(1, 4) if bits == 1.58 else torch.arange(2 ** int(bits))
    shift_RGL = codes_L.double() - solution.zeros_RG.double().unsqueeze(-1)
    levels_RGL = shift_RGL * solution.scales_RG.double().unsqueeze(-1)
    columns = solution.codes_RC.shape[1]
    return levels_RGL.repeat_interleave(columns // levels_RGL.shape[1], 1)


def nearest(weight: Tensor, levels_: Tensor) -> Tensor:
    """The nearest of the levels in the last axis of `levels_` to each weight."""
    at = (weight.unsqueeze(-1) - levels_).abs().argmin(-1, keepdim=True)
    return torch.take_along_dim(levels_, at, -1).squeeze(-1)


@dataclass(frozen=True)
class Eliminated:
    """What elimination gives: values R x C, the loss of each row, and 1/[H_F^-1]_jj of each column at its turn."""

    values_RC: Tensor
    loss_R: Tensor
    price_C: Tensor


def eliminate(weight_RC: Tensor, damped_CC: Tensor, order: list[int], levels_RCL: Tensor) -> Eliminated:
    """Optimal brain surgery column by column (2208.11580, eq. 2-4) with the inverse of H itself, nothing factored.

    Rounds a column to its nearest level, moves the error to all columns that are left, and takes the column out of
    H^-1 by one step of Gaussian elimination.
    """
    rest_RC = weight_RC.double().clone()
    inverse_CC = torch.linalg.inv(damped_CC.double())
    values_RC, price_C = torch.empty_like(rest_RC), torch.empty_like(rest_RC[0])
    loss_R = torch.zeros_like(rest_RC[:, 0])
    for j in order:
        values_RC[:, j] = nearest(rest_RC[:, j], levels_RCL[:, j])
        error_R = rest_RC[:, j] - values_RC[:, j]
        price_C[j] = 1.0 / inverse_CC[j, j]
        loss_R += error_R.square() * price_C[j]
        row_C = inverse_CC[j].clone()
        rest_RC.addr_(error_R * price_C[j], row_C, alpha=-1)
        inverse_CC.addr_(row_C * price_C[j], row_C, alpha=-1)
        inverse_CC[j], inverse_CC[:, j] = 0.0, 0.0  # exactly, so that rounding does not add up
    return Eliminated(values_RC, loss_R, price_C)


def coordinate_pass(
    weight_RC: Tensor, damped_CC: Tensor, values_RC: Tensor, levels_RCL: Tensor, price: float = 0.0
) -> Tensor:
    """One pass of coordinate descent: each column in turn to its best level, all others held; the new values.

    A level that is not zero costs `price` besides.
    """
    values_RC = values_RC.double().clone()
    for j in range(values_RC.shape[1]):
        slope_R = (weight_RC.double() - values_RC) @ damped_CC[:, j]
        goal_R1 = (values_RC[:, j] + slope_R / damped_CC[j, j]).unsqueeze(-1)
        cost_RL = damped_CC[j, j] * (goal_R1 - levels_RCL[:, j]).square() + price * (levels_RCL[:, j] != 0)
        values_RC[:, j] = torch.take_along_dim(levels_RCL[:, j], cost_RL.argmin(-1, keepdim=True), -1).squeeze(-1)
    return values_RC


def exchange_group(
    weight_C: Tensor, damped_CC: Tensor, values_C: Tensor, keep_C: Tensor, levels_CL: Tensor, group: range
) -> tuple[Tensor, Tensor]:
    """Values and mask of one row after the best exchange in one N:M group, and then each kept code to its best level.

    Every kept weight is tried as zero with every pruned one at every level, each by its whole loss.
    """

    def loss(candidate_C: Tensor) -> float:
        return float(layer_loss(weight_C[None], candidate_C[None], damped_CC))

    best, best_C, mask_C = loss(values_C), values_C.clone(), keep_C.clone()
    for out, into in itertools.product(group, group):
        if keep_C[out] and not keep_C[into]:
            for level in levels_CL[into]:
                tried_C, kept_C = values_C.clone(), keep_C.clone()
                tried_C[out], tried_C[into] = 0.0, level
                kept_C[out], kept_C[into] = False, True
                if loss(tried_C) < best - 1e-12:
                    best, best_C, mask_C = loss(tried_C), tried_C, kept_C
    for j in (j for j in group if mask_C[j]):
        tries = [best_C.index_fill(0, torch.tensor(j), float(level)) for level in levels_CL[j]]
        best_C = min(tries, key=loss)
    return best_C, mask_C


def activation_order(damped_CC: Tensor) -> list[int]:
    """Columns by falling diagonal; the earlier column first where two are alike."""
    return sorted(range(damped_CC.shape[0]), key=lambda j: (-float(damped_CC[j, j]), j))


def pivot_order(damped_CC: Tensor) -> list[int]:
    """From the last column to the first: the column that the ones behind it explain best, by explicit inverses."""
    behind: list[int] = []
    while len(behind) < damped_CC.shape[0]:
        left = [j for j in range(damped_CC.shape[0]) if j not in behind]
        pivots = [float(1 / torch.linalg.inv(damped_CC[[j, *behind]][:, [j, *behind]])[0, 0]) for j in left]
        behind.insert(0, left[int(np.argmin(pivots))])
    return behind


def brute_force_sparse(weight_RC: Tensor, damped_CC: Tensor, levels_RCL: Tensor, pattern: Pattern) -> float:
    """The smallest tr(D H D^T) of a layer over all levels with as many zeros, at least, as the pattern asks for."""
    rows, columns, count = levels_RCL.shape
    choice_KC = torch.tensor(list(itertools.product(range(count), repeat=columns)))
    kept = rows * columns - round(pattern.zeros * rows * columns)
    best_N = torch.zeros(kept + 1, dtype=torch.float64)  # of the rows so far, with at most N weights that are not zero
    for weight_C, levels_CL in zip(weight_RC.double(), levels_RCL, strict=True):
        values_KC = levels_CL[torch.arange(columns), choice_KC]
        loss_K = (((weight_C - values_KC) @ damped_CC.double()) * (weight_C - values_KC)).sum(-1)
        if pattern.of:
            allowed_K = ((values_KC != 0).unflatten(-1, (-1, pattern.of)).sum(-1) <= pattern.keep).all(-1)
            loss_K = loss_K.masked_fill(~allowed_K, torch.inf)
        used_K = (values_KC != 0).sum(-1)
        row_N = torch.stack([loss_K[used_K <= n].min() for n in range(columns + 1)])
        both_N = [(best_N[: n + 1].flip(0)[: columns + 1] + row_N[: n + 1]).min() for n in range(kept + 1)]
        best_N = torch.stack(both_N)
    return float(best_N[-1])


def brute_force(weight_RC: Tensor, damped_CC: Tensor, levels_RCL: Tensor) -> Tensor:
    """The smallest tr(D H D^T) of each row over all combinations of levels; for C <= 6."""
    columns, count = levels_RCL.shape[1:]
    choice_KC = torch.tensor(list(itertools.product(range(count), repeat=columns)))
    best = []
    for weight_C, levels_CL in zip(weight_RC.double(), levels_RCL, strict=True):
        delta_KC = weight_C - levels_CL[torch.arange(columns), choice_KC]
        best.append(((delta_KC @ damped_CC.double()) * delta_KC).sum(-1).min())
    return torch.stack(best)
