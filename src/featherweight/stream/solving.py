"""What every solved layer goes through: its certificate is checked, and layers that were solved as one come apart.

Shapes: E layers of equal shape, R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from featherweight.core.problem import LayerProblem, loss_R
from featherweight.core.products import roughly, times
from featherweight.core.rules import Rule
from featherweight.core.solution import AnySolution
from featherweight.core.solve import Choices
from featherweight.errors import FeatherweightError
from featherweight.models.tree import Matrix
from featherweight.stream.onelayer import solve_layer

LOSS_TOLERANCE, ENERGY_TOLERANCE = 1e-3, 1e-6  # of a loss that is claimed: relative to itself, and to w H w^T


def check_certificate(problem: LayerProblem, solution: AnySolution) -> None:
    """The solver's own loss, layer by layer, against that of the values its codes stand for; a difference is a bug of
    ours.

    Where descent set out from far worse codes (one column with a thousandfold H, and scales chosen without it), the
    claim keeps the rounding of all that was taken away: a millionth of the layer's w H w^T is no difference.
    """
    actual_R = loss_R(problem, solution.values(), solution.damping)
    sums = torch.stack([actual_R.sum(-1).double(), solution.loss_R.double().sum(-1)]).view(2, -1).tolist()
    for layer, (actual, claimed) in enumerate(zip(*sums, strict=True)):
        difference = abs(actual - claimed)
        if difference <= LOSS_TOLERANCE * abs(actual) + 1e-12:
            continue
        given = problem.weight_RC, problem.damped(solution.damping)
        one_RC, one_CC = (each if each.dim() == 2 else each[layer] for each in given)
        if not difference <= ENERGY_TOLERANCE * float((times(one_RC, one_CC) * one_RC).sum()):
            raise FeatherweightError(
                f"{problem.name}: the solver claims a loss of {claimed:.6g} and its codes have {actual:.6g}: "
                "please report this."
            )


def energy_R(problem: LayerProblem) -> Tensor:
    """What losses are relative to, w H w^T of every row, to three digits."""
    return (roughly(problem.weight_RC, problem.hessian_CC) * problem.weight_RC).sum(-1)


def split(energy_R: Tensor, solution: AnySolution, matrices: Iterable[Matrix]) -> dict[str, AnySolution]:
    """The solutions, by `Matrix.path`, of the matrices whose rows made up one problem, with their relative loss.

    Losses go to the CPU, where the sums that are told of cost nothing.
    """
    solution, energy_R = replace(solution, loss_R=solution.loss_R.cpu()), energy_R.cpu()
    solutions: dict[str, AnySolution] = {}
    start = 0
    for matrix in matrices:
        part = solution.rows(start, start + matrix.rows)
        energy = float(energy_R[start : start + matrix.rows].sum())
        metrics = {**part.metrics, "relative_loss": part.certificate / energy if energy else 0.0}
        solutions[matrix.path] = replace(part, metrics=metrics)
        start += matrix.rows
    return solutions


def solve_stack(
    problem: LayerProblem, gap_ECC: Tensor | None, rule: Rule, choices: Choices
) -> tuple[LayerProblem, list[AnySolution]]:
    """A stack of layers of equal shape, solved together as they would be one by one; and the problem that was solved.

    `gap_ECC` is the part of the drift that is to be undone, as a mean: W becomes W + W gap inv(H) first.
    """
    count = len(problem.weight_RC)
    factor = problem.factor(choices.order)
    if factor.damping != problem.damping and count > 1:  # some layer needs more of it; the others need not have it too
        apart = [slice(n, n + 1) for n in range(count)]
        gaps = [None if gap_ECC is None else gap_ECC[at] for at in apart]
        found = [solve_stack(_of(problem, at), gap, rule, choices) for at, gap in zip(apart, gaps, strict=True)]
        moved_ERC = torch.cat([one.weight_RC for one, _ in found])
        return problem.moved(moved_ERC), [solution for _, each in found for solution in each]
    if gap_ECC is not None:
        problem = problem.moved(problem.weight_RC + factor.solve(times(problem.weight_RC, gap_ECC)))
    stack = solve_layer(problem, rule, choices, factor)
    check_certificate(problem, stack)
    stack = replace(stack, loss_R=stack.loss_R.cpu())
    return problem, [stack.layer(n) for n in range(count)]


def _of(problem: LayerProblem, at: slice) -> LayerProblem:
    return replace(problem, weight_RC=problem.weight_RC[at], hessian_CC=problem.hessian_CC[at])
