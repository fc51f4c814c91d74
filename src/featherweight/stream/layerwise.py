"""The layer-wise block solver: collect what every matrix sees, then solve the matrices that see the same, together.

Shapes: R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from featherweight.core.problem import Factor, LayerProblem
from featherweight.core.products import times
from featherweight.core.rules import Grid, Rule
from featherweight.core.solution import AnySolution, Solution
from featherweight.core.solve import Choices, solve
from featherweight.models.tree import Matrix
from featherweight.recipe import Recipe
from featherweight.stream.dealing import Sharers, deal_stage
from featherweight.stream.experts import mixtures_of, solve_mixtures, without_experts
from featherweight.stream.groups import Solved
from featherweight.stream.inputs import BlockView, Group, GroupSums, Tick, collect, input_groups
from featherweight.stream.portions import round_experts, rtn_problem
from featherweight.stream.solving import check_certificate, energy_R, split

UNSHARED = Sharers()


def layerwise(
    view: BlockView, rules: Mapping[str, Rule], recipe: Recipe, choices: Choices, tick: Tick
) -> dict[str, Solved]:
    """Solves every matrix of a block by itself; returns solutions by `Matrix.path`.

    `tick` hears the share of this block's work that is done, 0 .. 1.
    """
    solutions: dict[str, Solved] = {}
    if recipe.method == "rtn":
        solutions |= round_experts(view, rules, choices)
        others = [matrix for matrix in view.matrices if matrix.path not in solutions]
        return solutions | {m.path: solve(rtn_problem(view, m), rules[m.path], choices) for m in others}
    mixtures = mixtures_of(view)
    rest = without_experts(view, mixtures)
    stages = _stages(input_groups(rest), recipe)
    # Experts come last, but before a matrix that writes the block's output and so makes up for them too.
    ends = bool(stages) and all(group.writes == "end" for group in stages[-1])
    turn = len(stages) - 1 if ends else len(stages)
    steps = [*stages, *mixtures]

    def collected(share: float) -> None:
        tick((number + 0.6 * share) / len(steps))

    for number, stage in enumerate(stages):
        if number == turn:
            solutions |= solve_mixtures(view, mixtures, rules, recipe, choices)
        found = solve_stage(rest, stage, collect(rest, stages, number, recipe, collected), rules, recipe, choices)
        solutions |= found
        more = number + 1 < len(stages) or (mixtures and number < turn)
        for matrix in (m for group in stage for m in group.matrices) if more else ():
            rest.put(matrix, found[matrix.path].values())
            rest.settled.add(matrix.path)
        tick((number + 1) / len(steps))
    if turn == len(stages):
        solutions |= solve_mixtures(view, mixtures, rules, recipe, choices)
    return solutions


def _stages(groups: list[Group], recipe: Recipe) -> list[list[Group]]:
    """The groups that are collected and solved together; each stage sees the block with those before it compressed."""
    if recipe.true_sequential and groups:
        return [[group] for group in groups]
    if recipe.target == "original" and len(groups) > 1:  # the last one makes up for what the others did
        return [groups[:-1], groups[-1:]]
    return [groups]


def solve_stage(
    view: BlockView,
    stage: list[Group],
    sums: list[GroupSums],
    rules: Mapping[str, Rule],
    recipe: Recipe,
    choices: Choices,
) -> dict[str, AnySolution]:
    """Solves the groups of one stage; of several processes each solves some, or a part of the rows of one or all,
    whichever is done first, and has the others' from the others."""
    view.ready()
    world = view.world
    divisible = [all(isinstance(rules[matrix.path], Grid) for matrix in group.matrices) for group in stage]
    deal = deal_stage(stage, divisible, world)
    mine: dict[str, AnySolution] = {}
    shared: dict[str, AnySolution] = {}
    for group, each, owner in zip(stage, sums, deal.owners, strict=True):
        if owner == world.rank:
            mine |= solve_group(view, group, each, rules, recipe, choices)
    for group, each, owner in zip(stage, sums, deal.owners, strict=True):
        if owner is None:
            shared |= solve_group(view, group, each, rules, recipe, choices, deal.sharers)
    return shared | (world.everyones(mine, rules) if any(owner is not None for owner in deal.owners) else {})


def solve_group(
    view: BlockView,
    group: Group,
    sums: GroupSums,
    rules: Mapping[str, Rule],
    recipe: Recipe,
    choices: Choices,
    sharers: Sharers = UNSHARED,
) -> dict[str, AnySolution]:
    """Solves matrices with one H and one rule as one problem of all their rows, and takes the solution apart again.

    Of several `sharers` each solves its part of every matrix's rows, where the rules let rows be solved apart.
    """
    by_rule: dict[Rule, list[Matrix]] = {}
    for matrix in group.matrices:
        by_rule.setdefault(rules[matrix.path], []).append(matrix)
    solutions: dict[str, AnySolution] = {}
    hessian_CC = sums.hessian.into_mean()
    for rule, matrices in by_rule.items():
        alike = replace(group, matrices=tuple(matrices))
        solutions |= _solve_alike(view, alike, hessian_CC, sums, rule, recipe, choices, sharers)
    return solutions


def _solve_alike(
    view: BlockView,
    group: Group,
    hessian_CC: Tensor,
    sums: GroupSums,
    rule: Rule,
    recipe: Recipe,
    choices: Choices,
    sharers: Sharers,
) -> dict[str, AnySolution]:
    parts = [sharers.part(matrix.rows) for matrix in group.matrices]
    weight_RC = torch.cat([view.weight(matrix)[at] for matrix, at in zip(group.matrices, parts, strict=True)])
    name = " + ".join(matrix.name for matrix in group.matrices)
    problem = LayerProblem(weight_RC, hessian_CC, sums.hessian.tokens, recipe.relative_damping, name)
    with view.phases("factor"):
        factor = problem.factor(recipe.order, sharers.world)
    with view.phases("solve"):
        gap = sums.gap_mean(weight_RC, problem.hessian_CC, parts[0])
        if gap is not None:
            problem = problem.moved(undo_drift(problem, factor, group, gap, recipe.pull))
        del weight_RC, gap
        solution = solve(problem, rule, choices, factor)
        check_certificate(problem, solution)
        energy = energy_R(problem)
        if sharers.world.size > 1:
            solution, energy = _whole(solution, energy, group, sharers)
        return split(energy, solution, group.matrices)


def _whole(solution: AnySolution, energy_R: Tensor, group: Group, sharers: Sharers) -> tuple[AnySolution, Tensor]:
    """What all sharers have, each of its part of every matrix's rows, in the order of the matrices."""
    assert isinstance(solution, Solution) and solution.keep_RC is None
    ours = [solution.codes_RC, solution.scales_RG, solution.zeros_RG, solution.loss_R, energy_R]
    counts = sharers.counts(group)
    wholes: list[Tensor] = []
    for parts in zip(*sharers.world.rows_of_each(ours, list(map(sum, counts))), strict=True):
        by_matrix = zip(*(part.split(rows) for part, rows in zip(parts, counts, strict=True)), strict=True)
        wholes.append(torch.cat([torch.cat(each) for each in by_matrix]))
    codes_RC, scales_RG, zeros_RG, loss_R, energy_R = wholes
    return replace(solution, codes_RC=codes_RC, scales_RG=scales_RG, zeros_RG=zeros_RG, loss_R=loss_R), energy_R


def undo_drift(problem: LayerProblem, factor: Factor, group: Group, gap: Tensor, pull: float) -> Tensor:
    """The weights moved by `pull` of the way to the least-squares answer to the drift of the blocks before.

    With x the inputs as they are now and x* the original model's, matrices inside the block are to give W x*: the
    answer is W + W (sum (x* - x) x^T) inv(H). Those that write to the residual stream are to bring it to where the
    original model has it, g away: W + (sum g x^T) inv(H). `gap` is the sum (as a mean), C x C or R x C.
    """
    weight_RC = problem.weight_RC
    if group.writes:
        return weight_RC + pull * factor.solve(gap)
    if weight_RC.shape[0] > len(gap):  # fewer rows go through the factor
        return weight_RC + pull * times(weight_RC, factor.solve(gap))
    return weight_RC + pull * factor.solve(times(weight_RC, gap))
