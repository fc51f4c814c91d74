"""What every solved layer goes through: its certificate is checked, and layers that were solved as one come apart.

Shapes: E layers of equal shape, R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from featherweight.core.problem import LayerProblem
from featherweight.core.products import times
from featherweight.core.rules import Rule
from featherweight.core.solution import AnySolution
from featherweight.core.solve import Choices
from featherweight.errors import FeatherweightError
from featherweight.models.tree import Matrix
from featherweight.stream.onelayer import solve_layer


def check_certificate(problem: LayerProblem, solution: AnySolution) -> None:
    """The solver's own loss against that of the values its codes stand for; a difference is a bug of ours."""
    delta_RC = problem.weight_RC - solution.values()
    actual = float((times(delta_RC, problem.damped(solution.damping)) * delta_RC).sum())
    if not abs(actual - solution.certificate) <= 1e-3 * abs(actual) + 1e-12:
        raise FeatherweightError(
            f"{problem.name}: the solver claims a loss of {solution.certificate:.6g} and its codes have {actual:.6g}: "
            "please report this."
        )


def split(problem: LayerProblem, solution: AnySolution, matrices: Iterable[Matrix]) -> dict[str, AnySolution]:
    """The solutions, by `Matrix.path`, of the matrices whose rows made up one problem, with their relative loss."""
    solutions: dict[str, AnySolution] = {}
    start = 0
    for matrix in matrices:
        part = solution.rows(start, start + matrix.rows)
        rows_RC = problem.weight_RC[start : start + matrix.rows]
        energy = float((times(rows_RC, problem.hessian_CC) * rows_RC).sum())
        metrics = {**part.metrics, "relative_loss": part.certificate / energy if energy else 0.0}
        solutions[matrix.path] = replace(part, metrics=metrics)
        start += matrix.rows
    return solutions


def solve_stack(
    problem: LayerProblem, gap_ECC: Tensor | None, rule: Rule, choices: Choices
) -> list[tuple[LayerProblem, AnySolution]]:
    """Each layer of a stack of equal shape, solved together as they would be one by one, with the problem it solves.

    `gap_ECC` is the part of the drift that is to be undone, as a mean: W becomes W + W gap inv(H) first.
    """
    count = len(problem.weight_RC)
    factor = problem.factor(choices.order)
    if factor.damping != problem.damping and count > 1:  # some layer needs more of it; the others need not have it too
        apart = [slice(n, n + 1) for n in range(count)]
        gaps = [None if gap_ECC is None else gap_ECC[at] for at in apart]
        return [solve_stack(_of(problem, at), gap, rule, choices)[0] for at, gap in zip(apart, gaps, strict=True)]
    if gap_ECC is not None:
        problem = replace(problem, weight_RC=problem.weight_RC + factor.solve(problem.weight_RC @ gap_ECC))
    stack = solve_layer(problem, rule, choices, factor)
    found = [(_of(problem, n), stack.layer(n)) for n in range(count)]
    for one, solution in found:
        check_certificate(one, solution)
    return found


def _of(problem: LayerProblem, at: int | slice) -> LayerProblem:
    return replace(problem, weight_RC=problem.weight_RC[at], hessian_CC=problem.hessian_CC[at])
