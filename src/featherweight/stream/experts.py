"""The experts of a block: what they see is gathered once, then they are solved together, as many as fit at a time.

An expert's inputs are those of the tokens routed to it, so no forward pass of the block shows every matrix anything.
Instead one pass keeps what comes to the experts as a whole, all tokens and their routing; each expert is then run by
itself on its tokens, its matrices in turn, each on what the compressed ones before it make.

Where the original model's outputs are aimed at, expert e of a token is to give what the original's expert e would have
given on the original's inputs, whichever experts the original sent that token to: it is the expert that serves the
token now, and the router is not ours to mend.

Shapes: T tokens, D width, K choices, E experts (in a chunk), N tokens of one expert, R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from featherweight.core.hessian import CrossSum, HessianSum
from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Rule
from featherweight.core.solution import AnySolution
from featherweight.core.solve import Choices
from featherweight.models.experts import Expert, Experts, Routed, find_experts
from featherweight.models.offload import taken_out
from featherweight.models.tree import Matrix
from featherweight.recipe import Recipe
from featherweight.stream.groups import BlockView, Solved
from featherweight.stream.portions import CHUNK_BYTES, put_away
from featherweight.stream.routing import Gathered, Served, Tokens, gather, served_by
from featherweight.stream.solving import energy_R, solve_stack, split

PIECE_TOKENS = 1 << 14  # of one expert, run at a time


@dataclass(frozen=True)
class Mixture:
    """The experts of one module of a block.

    Attributes:
        path: of the module in the block.
        name: what it is called in messages.
        original: what the original model brings to them; None where nothing asks for it.
    """

    path: str
    name: str
    experts: Experts
    original: Gathered | None

    def matrix_path(self, expert: int, leaf: str) -> str:
        return f"{self.path}.{expert}.{leaf}"


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
    matrices = {matrix.path: matrix for matrix in view.matrices}
    columns = [matrices[mixture.matrix_path(0, leaves[0])].columns for leaves in steps]
    each_bytes = 4 * max(columns) ** 2 * (1 if mixture.original is None else 2)
    if view.keep is not None:  # and the weights, which are not held already
        each_bytes += 8 * sum(
            m.rows * m.columns for path, m in matrices.items() if path.startswith(f"{mixture.path}.0.")
        )
    size = max(1, CHUNK_BYTES[view.inputs.device.type] // each_bytes)
    solutions: dict[str, Solved] = {}
    for start in range(0, len(served), size):
        chunk = served[start : start + size]
        with taken_out(mixture.experts, (each.expert for each in chunk)):
            solved = _solve_chunk(view, mixture, gathered.routed, chunk, steps, rules, recipe, choices)
        solutions |= put_away(view, mixture.path, mixture.experts, solved)
    for each in (gathered, mixture.original):
        if each is not None:
            each.states.close()
    return solutions


def expert_sums(view: BlockView, mixture: Mixture, recipe: Recipe) -> Iterator[tuple[tuple[Matrix, ...], Sums]]:
    """Expert by expert, the matrices that are given the same tensor and its sums, with all weights as they are."""
    assert view.inputs is not None
    gathered, served, steps = _prepared(view, mixture, recipe)
    matrices = {matrix.path: matrix for matrix in view.matrices}
    for each in served:
        for leaves in steps:
            sums = _sums(mixture, gathered.routed, each, {}, leaves[0], view.inputs.device)
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
    return gathered, served_by(mixture.name, mixture.experts, now, recipe, columns, special_T), steps


def _solve_chunk(
    view: BlockView,
    mixture: Mixture,
    now: Routed,
    chunk: Sequence[Served],
    steps: Sequence[tuple[str, ...]],
    rules: Mapping[str, Rule],
    recipe: Recipe,
    choices: Choices,
) -> dict[str, AnySolution]:
    """Solves some experts: matrices with one input together, those that run first first."""
    assert view.inputs is not None
    modules = [mixture.experts.expert(served.expert) for served in chunk]
    originals = [{name: weight.data for name, weight in module.named_parameters()} for module in modules]
    matrices = {matrix.path: matrix for matrix in view.matrices}
    solutions: dict[str, AnySolution] = {}
    for leaves in steps:
        with view.phases("hessian"):
            sums = [
                _sums(mixture, now, served, original, leaves[0], view.inputs.device)
                for served, original in zip(chunk, originals, strict=True)
            ]
        for alike, numbers in _alike(mixture, chunk, leaves, rules, recipe).items():
            which = [[matrices[mixture.matrix_path(chunk[n].expert, leaf)] for leaf in alike.leaves] for n in numbers]
            weight_ERC = torch.stack([torch.cat([view.weight(matrix) for matrix in each]) for each in which])
            hessian_ECC = torch.stack([sums[n].hessian_CC for n in numbers])
            gaps = [gap for n in numbers if (gap := sums[n].gap_CC) is not None and not alike.rounded]
            problem = LayerProblem(
                weight_ERC,
                hessian_ECC,
                min(sums[n].tokens for n in numbers),
                recipe.relative_damping,
                f"{' + '.join(matrix.name for matrix in which[0])} of {len(which)} experts",
            )
            chosen = replace(choices, method="rtn") if alike.rounded else choices
            with view.phases("solve"):
                problem, solved = solve_stack(
                    problem, recipe.pull * torch.stack(gaps) if gaps else None, alike.rule, chosen
                )
                energy_ER = energy_R(problem)
            for n, each, energies_R, solution in zip(numbers, which, energy_ER, solved, strict=True):
                told = {"tokens": chunk[n].routed, **({"starved": 1} if chunk[n].starved else {})}
                for path, part in split(energies_R, solution, each).items():
                    solutions[path] = replace(part, metrics={**part.metrics, **told})
                    view.put(matrices[path], part.values())
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
class Sums:
    """H of what a matrix of one expert is given and, with a dense stream, the drift in common with it; as means."""

    hessian_CC: Tensor
    gap_CC: Tensor | None
    tokens: int


def _sums(
    mixture: Mixture, now: Routed, served: Served, original: Mapping[str, Tensor], leaf: str, device: torch.device
) -> Sums:
    """The sums of an expert's own tokens and, where those are few, of all that help it out."""
    own = _sums_over(mixture, now, served.expert, served.own, original, leaf, device)
    if served.help is None:
        return own
    help = _sums_over(mixture, now, served.expert, served.help, original, leaf, device)
    share = own.tokens / (own.tokens + served.weight)
    gap_CC = None
    if own.gap_CC is not None and help.gap_CC is not None:
        gap_CC = torch.lerp(help.gap_CC, own.gap_CC, share)
    return Sums(torch.lerp(help.hessian_CC, own.hessian_CC, share), gap_CC, own.tokens)


def _sums_over(
    mixture: Mixture,
    now: Routed,
    number: int,
    tokens: Tokens,
    original: Mapping[str, Tensor],
    leaf: str,
    device: torch.device,
) -> Sums:
    expert = mixture.experts.expert(number)
    columns = expert.get_submodule(leaf).get_parameter("weight").shape[-1]
    hessian, gap = HessianSum(columns, device), CrossSum(columns, columns, device)
    for piece in zip(*(part.split(PIECE_TOKENS) for part in tokens), strict=True):
        inputs_NC = _heard(expert, leaf, now.inputs(*piece).to(device))
        hessian.add(inputs_NC)
        if mixture.original is not None:
            before = replace(mixture.original.routed, scale_TK=now.scale_TK)
            before_NC = _heard(expert, leaf, before.inputs(*piece).to(device), original)
            gap.add(before_NC - inputs_NC, inputs_NC)
    gap_CC = None if mixture.original is None else gap.sum_RC.div_(max(gap.tokens, 1))
    return Sums(hessian.into_mean(), gap_CC, hessian.tokens)


@torch.no_grad()
def _heard(expert: nn.Module, leaf: str, x_ND: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """What one of an expert's matrices is given when the expert is given x, with other weights if asked for."""
    assert isinstance(expert, Expert)
    if leaf != "down_proj":
        return x_ND
    parameters = dict(expert.named_parameters())
    own = {name: parameter.data for name, parameter in parameters.items()}
    for name, weight in (weights or {}).items():
        parameters[name].data = weight
    try:
        return expert.inner(x_ND)
    finally:
        for name, weight in own.items():
            parameters[name].data = weight


@dataclass(frozen=True)
class _Alike:
    """What matrices that are solved as one have in common."""

    rule: Rule
    leaves: tuple[str, ...]
    rounded: bool


def _alike(
    mixture: Mixture, chunk: Sequence[Served], leaves: tuple[str, ...], rules: Mapping[str, Rule], recipe: Recipe
) -> dict[_Alike, list[int]]:
    """The experts of a chunk, by number in it, that can be solved together."""
    found: dict[_Alike, list[int]] = {}
    for number, served in enumerate(chunk):
        by_rule: dict[Rule, list[str]] = {}
        for leaf in leaves:
            by_rule.setdefault(rules[mixture.matrix_path(served.expert, leaf)], []).append(leaf)
        for rule, some in by_rule.items():
            rounded = served.starved and recipe.starved == "round"
            found.setdefault(_Alike(rule, tuple(some), rounded), []).append(number)
    return found
