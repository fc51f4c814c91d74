"""The experts of a block: what they see is gathered once, then they are solved together, as many as fit at a time.

An expert's inputs are those of the tokens routed to it, so no forward pass of the block shows every matrix anything.
Instead one pass keeps what comes to the experts as a whole, all tokens and their routing; each expert is then run by
itself on its tokens, its matrices in turn, each on what the compressed ones before it make.

Where the original model's outputs are aimed at, expert e of a token is to give what the original's expert e would have
given on the original's inputs, whichever experts the original sent that token to: it is the expert that serves the
token now, and the router is not ours to mend.

Of several processes each runs all experts on its own sequences' tokens; an expert's sums are added up in the process
that solves it, and nowhere else.

Shapes: T tokens, D width, K choices, E experts (in a chunk), N tokens of one expert, R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Rule
from featherweight.core.solution import AnySolution
from featherweight.core.solve import Choices
from featherweight.models.experts import find_experts
from featherweight.models.offload import taken_out
from featherweight.models.tree import Matrix
from featherweight.recipe import Recipe
from featherweight.stream.expert_sums import Mixture, Summing, Sums
from featherweight.stream.groups import BlockView, Solved
from featherweight.stream.portions import CHUNK_BYTES, put_away
from featherweight.stream.routing import Gathered, Served, gather, served_by
from featherweight.stream.solving import energy_R, solve_stack, split


def mixtures_of(view: BlockView) -> list[Mixture]:
    """The mixtures of a block that still has its original weights; empty for a dense block."""
    found = []
    for path, experts in find_experts(view.module):
        name = next(m.name for m in view.matrices if m.path.startswith(f"{path}.")).rsplit(".", 2)[0]
        original = None if view.dense is None else gather(view, path, view.dense, "original")
        found.append(Mixture(path, name, experts, original))
    return found


def without_experts(view: BlockView, mixtures: Sequence[Mixture]) -> BlockView:
    """The view of everything else."""
    inside = tuple(f"{mixture.path}." for mixture in mixtures)
    return replace(view, matrices=tuple(m for m in view.matrices if not m.path.startswith(inside))) if inside else view


def solve_mixtures(
    view: BlockView, mixtures: Sequence[Mixture], rules: Mapping[str, Rule], recipe: Recipe, choices: Choices
) -> dict[str, Solved]:
    """Solves every matrix of every expert, puts its values in its place, and returns the solutions by `Matrix.path`.

    RequestError where an expert is starved and the recipe says that this is an error.
    """
    solutions: dict[str, Solved] = {}
    for mixture in mixtures:
        solutions |= _solve_mixture(view, mixture, rules, recipe, choices)
    return solutions


def _solve_mixture(
    view: BlockView, mixture: Mixture, rules: Mapping[str, Rule], recipe: Recipe, choices: Choices
) -> dict[str, Solved]:
    assert view.inputs is not None
    gathered, served, steps = _prepared(view, mixture, recipe)
    view.ready()
    matrices = {matrix.path: matrix for matrix in view.matrices}
    columns = [matrices[mixture.matrix_path(0, leaves[0])].columns for leaves in steps]
    each_bytes, processes = 4 * max(columns) ** 2 * (1 if mixture.original is None else 2), view.world.size
    if view.keep is not None:  # and the weights, which are not held already: of every process's experts in each
        inside = [m for path, m in matrices.items() if path.startswith(f"{mixture.path}.0.")]
        each_bytes += 8 * processes * sum(m.rows * m.columns for m in inside)
    size = processes * max(1, CHUNK_BYTES[view.inputs.device.type] // each_bytes)
    summing = Summing(mixture, gathered.routed, view.inputs.device, view.world)
    solutions: dict[str, Solved] = {}
    for start in range(0, len(served), size):
        chunk = served[start : start + size]
        with taken_out(mixture.experts, (each.expert for each in chunk)):
            solved = _solve_chunk(view, summing, chunk, steps, rules, recipe, choices)
        solutions |= put_away(view, mixture.path, mixture.experts, solved)
    for each in (gathered, mixture.original):
        if each is not None:
            each.states.close()
    return solutions


def expert_sums(view: BlockView, mixture: Mixture, recipe: Recipe) -> Iterator[tuple[tuple[Matrix, ...], Sums]]:
    """Expert by expert, the matrices that are given the same tensor and its sums, with all weights as they are.

    Of several processes each is given some of the experts.
    """
    assert view.inputs is not None
    gathered, served, steps = _prepared(view, mixture, recipe)
    matrices = {matrix.path: matrix for matrix in view.matrices}
    summing = Summing(mixture, gathered.routed, view.inputs.device, view.world)
    for each, owner in zip(served, view.world.deal([1.0] * len(served)), strict=True):
        for leaves in steps:
            sums = summing.sums(each, {}, leaves[0], owner)
            if sums is not None:
                yield tuple(matrices[mixture.matrix_path(each.expert, leaf)] for leaf in leaves), sums
    gathered.states.close()


def _prepared(
    view: BlockView, mixture: Mixture, recipe: Recipe
) -> tuple[Gathered, list[Served], list[tuple[str, ...]]]:
    """What comes to the experts now, which tokens each is calibrated on, and the order of an expert's matrices."""
    assert view.inputs is not None
    gathered = gather(view, mixture.path, view.inputs, "experts")
    now = gathered.routed
    with taken_out(mixture.experts, [0]):
        steps = _steps(mixture, [m.path for m in view.matrices], now.inputs_TD[:2].to(view.inputs.device))
    first = mixture.matrix_path(0, steps[0][0])
    columns = next(matrix.columns for matrix in view.matrices if matrix.path == first)
    special_T = None if view.special_ST is None else view.special_ST.flatten()
    return gathered, served_by(mixture.name, mixture.experts, now, recipe, columns, special_T, view.world), steps


def _solve_chunk(
    view: BlockView,
    summing: Summing,
    chunk: Sequence[Served],
    steps: Sequence[tuple[str, ...]],
    rules: Mapping[str, Rule],
    recipe: Recipe,
    choices: Choices,
) -> dict[str, AnySolution]:
    """Solves some experts, each in one process: matrices with one input together, those that run first first."""
    mixture = summing.mixture
    modules = [mixture.experts.expert(served.expert) for served in chunk]
    originals = [{name: weight.data for name, weight in module.named_parameters()} for module in modules]
    matrices = {matrix.path: matrix for matrix in view.matrices}
    owners = view.world.deal([1.0] * len(chunk))
    solutions: dict[str, AnySolution] = {}
    for leaves in steps:
        sums: dict[int, Sums] = {}
        with view.phases("hessian"):
            for n, served in enumerate(chunk):
                found = summing.sums(served, originals[n], leaves[0], owners[n])
                sums |= {} if found is None else {n: found}
        mine: dict[str, AnySolution] = {}
        for alike, numbers in _alike(mixture, {n: chunk[n] for n in sums}, leaves, rules, recipe).items():
            mine |= _solve_alike(view, mixture, alike, {n: (chunk[n], sums[n]) for n in numbers}, recipe, choices)
        step = view.world.everyones(mine, rules)
        for path, solution in step.items():
            view.put(matrices[path], solution.values())
        solutions |= step
    return solutions


def _solve_alike(
    view: BlockView,
    mixture: Mixture,
    alike: _Alike,
    which: Mapping[int, tuple[Served, Sums]],
    recipe: Recipe,
    choices: Choices,
) -> dict[str, AnySolution]:
    """Solves the same matrices of some experts as one stack."""
    matrices = {matrix.path: matrix for matrix in view.matrices}
    served, sums = zip(*which.values(), strict=True)
    inside = [[matrices[mixture.matrix_path(each.expert, leaf)] for leaf in alike.leaves] for each in served]
    gaps = [each.gap_CC for each in sums if each.gap_CC is not None and not alike.rounded]
    problem = LayerProblem(
        torch.stack([torch.cat([view.weight(matrix) for matrix in each]) for each in inside]),
        torch.stack([each.hessian_CC for each in sums]),
        min(each.tokens for each in sums),
        recipe.relative_damping,
        f"{' + '.join(matrix.name for matrix in inside[0])} of {len(inside)} experts",
    )
    chosen = replace(choices, method="rtn") if alike.rounded else choices
    with view.phases("solve"):
        problem, solved = solve_stack(problem, recipe.pull * torch.stack(gaps) if gaps else None, alike.rule, chosen)
        energy_ER = energy_R(problem).cpu()
    solutions: dict[str, AnySolution] = {}
    for expert, each, energies_R, solution in zip(served, inside, energy_ER, solved, strict=True):
        told = {"tokens": expert.routed, **({"starved": 1} if expert.starved else {})}
        for path, part in split(energies_R, solution, each).items():
            solutions[path] = replace(part, metrics={**part.metrics, **told})
    return solutions


def _steps(mixture: Mixture, paths: Sequence[str], probe_TD: Tensor) -> list[tuple[str, ...]]:
    """The matrices of an expert, those that are given the same tensor together, in the order they run."""
    expert, prefix = mixture.experts.expert(0), mixture.matrix_path(0, "")
    heard: list[tuple[Tensor, list[str]]] = []

    def hear(leaf: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        same = [leaves for tensor, leaves in heard if tensor is args[0]]
        if same:
            same[0].append(leaf)
        else:
            heard.append((args[0], [leaf]))

    leaves = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
    handles = [expert.get_submodule(leaf).register_forward_pre_hook(partial(hear, leaf)) for leaf in leaves]
    try:
        with torch.no_grad():
            expert(probe_TD)
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(found) for _, found in heard]


@dataclass(frozen=True)
class _Alike:
    """What matrices that are solved as one have in common."""

    rule: Rule
    leaves: tuple[str, ...]
    rounded: bool


def _alike(
    mixture: Mixture, chunk: Mapping[int, Served], leaves: tuple[str, ...], rules: Mapping[str, Rule], recipe: Recipe
) -> dict[_Alike, list[int]]:
    """The experts of a chunk, by number in it, that can be solved together."""
    found: dict[_Alike, list[int]] = {}
    for number, served in chunk.items():
        by_rule: dict[Rule, list[str]] = {}
        for leaf in leaves:
            by_rule.setdefault(rules[mixture.matrix_path(served.expert, leaf)], []).append(leaf)
        for rule, some in by_rule.items():
            rounded = served.starved and recipe.starved == "round"
            found.setdefault(_Alike(rule, tuple(some), rounded), []).append(number)
    return found
