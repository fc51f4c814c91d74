"""The layer-wise block solver: collect what every matrix sees, then solve the matrices that see the same, together.

Shapes: R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from featherweight.core.problem import Factor, LayerProblem
from featherweight.core.rules import Rule
from featherweight.core.solution import AnySolution
from featherweight.core.solve import Choices, solve
from featherweight.errors import FeatherweightError
from featherweight.models.tree import Matrix
from featherweight.recipe import Recipe
from featherweight.stream.inputs import BlockView, Group, GroupSums, Tick, collect, input_groups


def layerwise(
    view: BlockView, rules: Mapping[str, Rule], recipe: Recipe, choices: Choices, tick: Tick
) -> dict[str, AnySolution]:
    """Solves every matrix of a block by itself; returns solutions by `Matrix.path`.

    `tick` hears the share of this block's work that is done, 0 .. 1.
    """
    if recipe.method == "rtn":
        return {matrix.path: solve(_rtn_problem(view, matrix), rules[matrix.path], choices) for matrix in view.matrices}
    solutions: dict[str, AnySolution] = {}
    stages = _stages(input_groups(view), recipe)
    for number, stage in enumerate(stages):
        span, last = 1 / len(stages), number + 1 == len(stages)

        def collected(share: float, number: int = number, span: float = span) -> None:
            tick((number + 0.6 * share) * span)

        for group, sums in zip(stage, collect(view, stages, number, recipe, collected), strict=True):
            solutions |= solve_group(view, group, sums, rules, recipe, choices)
        for matrix in () if last else (m for group in stage for m in group.matrices):
            view.put(matrix, solutions[matrix.path].values())
        tick((number + 1) * span)
    return solutions


def _stages(groups: list[Group], recipe: Recipe) -> list[list[Group]]:
    """The groups that are collected and solved together; each stage sees the block with those before it compressed."""
    if recipe.true_sequential:
        return [[group] for group in groups]
    if recipe.target == "original" and len(groups) > 1:  # the last one makes up for what the others did
        return [groups[:-1], groups[-1:]]
    return [groups]


def solve_group(
    view: BlockView,
    group: Group,
    sums: GroupSums,
    rules: Mapping[str, Rule],
    recipe: Recipe,
    choices: Choices,
) -> dict[str, AnySolution]:
    """Solves matrices with one H and one rule as one problem of all their rows, and takes the solution apart again."""
    by_rule: dict[Rule, list[Matrix]] = {}
    for matrix in group.matrices:
        by_rule.setdefault(rules[matrix.path], []).append(matrix)
    solutions: dict[str, AnySolution] = {}
    for rule, matrices in by_rule.items():
        solutions |= _solve_alike(view, replace(group, matrices=tuple(matrices)), sums, rule, recipe, choices)
    return solutions


def _solve_alike(
    view: BlockView, group: Group, sums: GroupSums, rule: Rule, recipe: Recipe, choices: Choices
) -> dict[str, AnySolution]:
    weight_RC = torch.cat([view.weight(matrix) for matrix in group.matrices])
    name = " + ".join(matrix.name for matrix in group.matrices)
    problem = LayerProblem(weight_RC, sums.hessian.mean(), sums.hessian.tokens, recipe.relative_damping, name)
    factor = problem.factor(recipe.order)
    if sums.gap is not None:
        problem = replace(problem, weight_RC=undo_drift(problem, factor, group, sums.gap.mean(), recipe.pull))
    solution = solve(problem, rule, choices, factor)
    check_certificate(problem, solution)
    solutions: dict[str, AnySolution] = {}
    start = 0
    for matrix in group.matrices:
        part = solution.rows(start, start + matrix.rows)
        scale = _energy(problem, start, start + matrix.rows)
        solutions[matrix.path] = replace(part, metrics={"relative_loss": part.certificate / scale if scale else 0.0})
        start += matrix.rows
    return solutions


def undo_drift(problem: LayerProblem, factor: Factor, group: Group, gap: Tensor, pull: float) -> Tensor:
    """The weights moved by `pull` of the way to the least-squares answer to the drift of the blocks before.

    With x the inputs as they are now and x* the original model's, matrices inside the block are to give W x*: the
    answer is W + W (sum (x* - x) x^T) inv(H). Those that write to the residual stream are to bring it to where the
    original model has it, g away: W + (sum g x^T) inv(H). `gap` is the sum (as a mean), C x C or R x C.
    """
    toward_RC = gap if group.writes else problem.weight_RC @ gap
    return problem.weight_RC + pull * factor.solve(toward_RC)


def check_certificate(problem: LayerProblem, solution: AnySolution) -> None:
    """The solver's own loss against that of the values its codes stand for; a difference is a bug of ours."""
    delta_RC = problem.weight_RC - solution.values()
    actual = float(((delta_RC @ problem.damped(solution.damping)) * delta_RC).sum())
    if not abs(actual - solution.certificate) <= 1e-3 * abs(actual) + 1e-12:
        raise FeatherweightError(
            f"{problem.name}: the solver claims a loss of {solution.certificate:.6g} and its codes have {actual:.6g}: "
            "please report this."
        )


def _energy(problem: LayerProblem, start: int, stop: int) -> float:
    """tr(W H W^T) of some rows: what their outputs hold in all."""
    rows_RC = problem.weight_RC[start:stop]
    return float(((rows_RC @ problem.hessian_CC) * rows_RC).sum())


def _rtn_problem(view: BlockView, matrix: Matrix) -> LayerProblem:
    weight_RC = view.weight(matrix)
    return LayerProblem(weight_RC, torch.eye(matrix.columns, device=weight_RC.device), 0, 0.0, matrix.name)
