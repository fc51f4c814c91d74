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

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.core.hessian import CrossSum, HessianSum
from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Rule
from featherweight.core.solution import AnySolution
from featherweight.core.solve import Choices
from featherweight.errors import FallbackWarning, RequestError
from featherweight.models.experts import Experts, Routed, find_experts
from featherweight.models.tree import Matrix
from featherweight.recipe import Recipe
from featherweight.stream.feed import Enough
from featherweight.stream.groups import BlockView
from featherweight.stream.hidden import HiddenStates
from featherweight.stream.solving import solve_stack, split

MOST = 4  # times the mean: the tokens an expert is calibrated on are that many at most
ENOUGH = 0.25  # tokens an input: an expert with fewer is starved
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # of the sums of experts that are solved together
PIECE_TOKENS = 1 << 14  # of one expert, run at a time
Tick = Callable[[float], None]
Tokens = tuple[Tensor, Tensor]  # which tokens, and which of each one's choices


@dataclass(frozen=True)
class Gathered:
    """All that comes to the experts from one stream, and the states in which its inputs are kept."""

    routed: Routed
    states: HiddenStates


@dataclass(frozen=True)
class Mixture:
    """The experts of one module of a block, and what the original model brings to them (None where nothing asks)."""

    path: str
    experts: Experts
    original: Gathered | None

    def matrix_path(self, expert: int, leaf: str) -> str:
        return f"{self.path}.{self.experts.names[expert]}.{leaf}"


def mixtures_of(view: BlockView) -> list[Mixture]:
    """The mixtures of a block that still has its original weights; empty for a dense block."""
    return [
        Mixture(path, experts, None if view.dense is None else gather(view, path, view.dense, "original"))
        for path, experts in find_experts(view.module)
    ]


def without_experts(view: BlockView, mixtures: Sequence[Mixture]) -> BlockView:
    """The view of everything else."""
    inside = tuple(f"{mixture.path}." for mixture in mixtures)
    return replace(view, matrices=tuple(m for m in view.matrices if not m.path.startswith(inside))) if inside else view


@torch.no_grad()
def gather(view: BlockView, path: str, states: HiddenStates, name: str) -> Gathered:
    """What comes to the experts at `path` from all hidden states, in their order, kept where those are kept."""
    experts = view.module.get_submodule(path)
    assert isinstance(experts, Experts)
    heard: list[Routed] = []

    def hear(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard.append(experts.routed(*args, *kwargs.values()))
        raise Enough

    kept: HiddenStates | None = None
    routing: list[Tensor] = []
    scales: list[Tensor] = []
    handle = experts.register_forward_pre_hook(hear, with_kwargs=True)
    try:
        for at, hidden_STD in states.batches(view.batch):
            with suppress(Enough):
                view.run(hidden_STD)
            routed = heard.pop()
            if kept is None:
                kept = states.another(name, routed.inputs_TD.shape[-1])
            place = kept.states_STD[at]
            place.copy_(routed.inputs_TD.view(place.shape))
            routing.append(routed.expert_TK.to(place.device))
            scales += [] if routed.scale_TK is None else [routed.scale_TK.to(place.device)]
    finally:
        handle.remove()
    assert kept is not None
    most = max(part.shape[-1] for part in routing)
    expert_TK = torch.cat([nn.functional.pad(part, (0, most - part.shape[-1]), value=len(experts)) for part in routing])
    scale_TK = torch.cat([nn.functional.pad(part, (0, most - part.shape[-1])) for part in scales]) if scales else None
    return Gathered(Routed(kept.states_STD.flatten(0, 1), expert_TK, scale_TK=scale_TK), kept)


def solve_mixture(
    view: BlockView, mixture: Mixture, rules: Mapping[str, Rule], recipe: Recipe, choices: Choices, tick: Tick
) -> dict[str, AnySolution]:
    """Solves every matrix of every expert, puts its values in its place, and returns the solutions by `Matrix.path`.

    RequestError where an expert is starved and the recipe says that this is an error.
    """
    assert view.inputs is not None
    gathered = gather(view, mixture.path, view.inputs, "experts")
    now = gathered.routed
    matrices = {matrix.path: matrix for matrix in view.matrices}
    steps = _steps(mixture, [m.path for m in view.matrices], now.inputs_TD[:2].to(view.inputs.device))
    columns = [matrices[mixture.matrix_path(0, leaves[0])].columns for leaves in steps]
    served = _served(mixture, now, recipe, columns[0])
    each_bytes = 4 * max(columns) ** 2 * (1 if mixture.original is None else 2)
    size = max(1, CHUNK_BYTES[view.inputs.device.type] // each_bytes)
    solutions: dict[str, AnySolution] = {}
    for start in range(0, len(served), size):
        solutions |= _solve_chunk(view, mixture, now, served[start : start + size], steps, rules, recipe, choices)
        tick(min(start + size, len(served)) / len(served))
    for each in (gathered, mixture.original):
        if each is not None:
            each.states.close()
    return solutions


def _solve_chunk(
    view: BlockView,
    mixture: Mixture,
    now: Routed,
    chunk: Sequence[_Served],
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
        sums = [
            _sums(mixture, now, served, original, leaves[0], view.inputs.device)
            for served, original in zip(chunk, originals, strict=True)
        ]
        for alike, numbers in _alike(mixture, chunk, leaves, rules, recipe).items():
            which = [[matrices[mixture.matrix_path(chunk[n].expert, leaf)] for leaf in alike.leaves] for n in numbers]
            weight_ERC = torch.stack([torch.cat([view.weight(matrix) for matrix in each]) for each in which])
            hessian_ECC = torch.stack([sums[n][0].mean() for n in numbers])
            gaps = [gap.mean() for n in numbers if (gap := sums[n][1]) is not None and not alike.rounded]
            problem = LayerProblem(
                weight_ERC,
                hessian_ECC,
                min(sums[n][0].tokens for n in numbers),
                recipe.relative_damping,
                f"{' + '.join(matrix.name for matrix in which[0])} of {len(which)} experts",
            )
            chosen = replace(choices, method="rtn") if alike.rounded else choices
            solved = solve_stack(problem, recipe.pull * torch.stack(gaps) if gaps else None, alike.rule, chosen)
            for n, each, (one, solution) in zip(numbers, which, solved, strict=True):
                told = {"tokens": chunk[n].routed, **({"starved": 1} if chunk[n].starved else {})}
                for path, part in split(one, solution, each).items():
                    solutions[path] = replace(part, metrics={**part.metrics, **told})
                    view.put(matrices[path], part.values())
    return solutions


@dataclass(frozen=True)
class _Served:
    """One expert: how many tokens are routed to it, which ones it is calibrated on, and whether it has too few."""

    expert: int
    routed: int
    tokens: Tokens
    starved: bool


def _served(mixture: Mixture, now: Routed, recipe: Recipe, columns: int) -> list[_Served]:
    """Which tokens each expert is calibrated on: its own, evenly thinned out beyond `MOST` times the mean; all, where
    it is starved or the recipe routes all."""
    count, tokens = len(mixture.experts), now.expert_TK.shape[0]
    most = max(1, MOST * int((now.expert_TK < count).sum()) // count)
    everything = (torch.arange(tokens), torch.zeros(tokens, dtype=torch.int64))
    enough, served = ENOUGH * columns, []
    for expert in range(count):
        token_N, choice_N = now.of(expert)
        routed = len(token_N)
        if routed > most:
            thin = torch.arange(most, device=token_N.device) * routed // most
            token_N, choice_N = token_N[thin], choice_N[thin]
        starved = routed < enough and not recipe.route_all
        own = everything if starved or recipe.route_all else (token_N, choice_N)
        served.append(_Served(expert, routed, own, starved))
    _tell_starved(mixture, [s for s in served if s.starved], enough, tokens, recipe)
    return served


def _tell_starved(mixture: Mixture, starved: list[_Served], enough: float, tokens: int, recipe: Recipe) -> None:
    if not starved:
        return
    names = ", ".join(f"{mixture.experts.names[s.expert]} ({s.routed})" for s in starved)
    said = (
        f"{mixture.path}: of {len(mixture.experts)} experts, {len(starved)} were sent fewer than {enough:g} of {tokens} "
        f"tokens: {names}"
    )
    if recipe.starved == "error":
        raise RequestError(f"{said}; calibrate on more text, or use --starved shared, --starved round or --route-all.")
    done = "rounded to nearest" if recipe.starved == "round" else "calibrated on all tokens"
    warnings.warn(f"{said}; these are {done}", FallbackWarning, stacklevel=2)


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


def _sums(
    mixture: Mixture, now: Routed, served: _Served, original: Mapping[str, Tensor], leaf: str, device: torch.device
) -> tuple[HessianSum, CrossSum | None]:
    """H of what a matrix of one expert is given and, with a dense stream, the drift in common with it."""
    expert = mixture.experts.expert(served.expert)
    hessian: HessianSum | None = None
    gap: CrossSum | None = None
    for tokens in zip(*(part.split(PIECE_TOKENS) for part in served.tokens), strict=True):
        inputs_NC = _heard(expert, leaf, now.inputs(*tokens).to(device))
        hessian = hessian or HessianSum(inputs_NC.shape[-1], device)
        hessian.add(inputs_NC)
        if mixture.original is not None:
            before = replace(mixture.original.routed, scale_TK=now.scale_TK)
            before_NC = _heard(expert, leaf, before.inputs(*tokens).to(device), original)
            gap = gap or CrossSum(inputs_NC.shape[-1], inputs_NC.shape[-1], device)
            gap.add(before_NC - inputs_NC, inputs_NC)
    assert hessian is not None, "an expert without tokens is given all"
    return hessian, gap


@torch.no_grad()
def _heard(expert: nn.Module, leaf: str, x_ND: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """What one of an expert's matrices is given when the expert is given x, with other weights if asked for."""
    heard: list[Tensor] = []

    def hear(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        heard.append(args[0])
        raise Enough

    handle = expert.get_submodule(leaf).register_forward_pre_hook(hear)
    try:
        with suppress(Enough):
            torch.func.functional_call(expert, dict(weights or {}), (x_ND,))
    finally:
        handle.remove()
    return heard[0]


@dataclass(frozen=True)
class _Alike:
    """What matrices that are solved as one have in common."""

    rule: Rule
    leaves: tuple[str, ...]
    rounded: bool


def _alike(
    mixture: Mixture, chunk: Sequence[_Served], leaves: tuple[str, ...], rules: Mapping[str, Rule], recipe: Recipe
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
