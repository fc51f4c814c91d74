"""What comes to the experts of a block: all tokens of a stream, their routing, and which of them serve which expert.

Shapes: T tokens, D width, K choices, N tokens of one expert.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import FallbackWarning, RequestError
from featherweight.models.experts import Experts, Routed
from featherweight.recipe import Recipe
from featherweight.stream.feed import Enough
from featherweight.stream.groups import BlockView
from featherweight.stream.hidden import HiddenStates
from featherweight.stream.parallel import ALONE, World

MOST = 4  # times the mean: the tokens an expert is calibrated on are that many at most
HELP = 0.5  # tokens an input: what the layer's tokens weigh for an expert that is sent fewer than it has inputs


@dataclass(frozen=True)
class Tokens:
    """Some tokens of all processes.

    Attributes:
        token_N: which of this process's tokens are among them.
        choice_N: which of each one's choices is meant.
        total: how many they are in all processes.
    """

    token_N: Tensor
    choice_N: Tensor
    total: int


@dataclass(frozen=True)
class Gathered:
    """All that comes to the experts from one stream, and the states in which its inputs are kept."""

    routed: Routed
    states: HiddenStates


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
            with view.phases("forward"), suppress(Enough):
                view.run(hidden_STD)
            routed = heard.pop()
            if kept is None:
                tokens, width = routed.inputs_TD.shape
                kept = states.another(name, width, tokens // len(hidden_STD))
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


@dataclass(frozen=True)
class Served:
    """One expert and the tokens it is calibrated on.

    Attributes:
        routed: how many tokens are sent to it, in all processes.
        own: those of them that count.
        help: tokens of the whole layer that count too, as it is sent fewer than it has inputs; None where it is not.
        weight: how many of its own tokens the help weighs as much as.
    """

    expert: int
    routed: int
    own: Tokens
    help: Tokens | None
    weight: float

    @property
    def starved(self) -> bool:
        return self.help is not None


def served_by(
    name: str,
    experts: Experts,
    now: Routed,
    recipe: Recipe,
    columns: int,
    special_T: Tensor | None = None,
    world: World = ALONE,
) -> list[Served]:
    """Which tokens each expert is calibrated on: its own, or all where the recipe says so; help where they are few.
    Special ones are left out.

    No more than `MOST` times the mean are taken of either, one in so many, over all processes: the same tokens as one
    process would take. RequestError for a starved expert where the recipe calls that an error; a FallbackWarning with
    the numbers of tokens otherwise.
    """
    count = len(experts)
    counts = [int((now.expert_TK < count).sum()), len(now.expert_TK)]
    token_N = torch.arange(len(now.expert_TK))
    if special_T is not None:
        now = replace(now, expert_TK=now.expert_TK.masked_fill(special_T.to(now.expert_TK.device)[:, None], count))
        token_N = token_N[~special_T]
    candidates = [*now.dealt(count), (token_N, torch.zeros_like(token_N))]
    sent, tokens, *seen = _Seen.by_all([*counts, *(len(each) for each, _ in candidates)], world)
    most = max(1, MOST * sent.total // count)
    *routed, everything = (_thinned(*pair, each, most) for pair, each in zip(candidates, seen, strict=True))
    whole = Tokens(*candidates[-1], seen[-1].total)
    served = []
    for expert, own in enumerate(routed):
        number = seen[expert].total
        help = everything if number < columns and not recipe.route_all else None
        served.append(Served(expert, number, whole if recipe.route_all else own, help, HELP * columns))
    starved = [each for each in served if each.starved]
    if starved:
        _tell_starved(name, experts, starved, columns, tokens.total, recipe, world)
    return served


@dataclass(frozen=True)
class _Seen:
    """How many things the processes have in all, and how many those before this one."""

    total: int
    before: int

    @staticmethod
    def by_all(counts: list[int], world: World) -> list[_Seen]:
        """Of each of the things that every process counts."""
        count_PN = torch.stack([count_N for (count_N,) in world.from_each([torch.tensor(counts)])])
        totals, before = count_PN.sum(0).tolist(), count_PN[: world.rank].sum(0).tolist()
        return [_Seen(*pair) for pair in zip(totals, before, strict=True)]


def _thinned(token_N: Tensor, choice_N: Tensor, seen: _Seen, most: int) -> Tokens:
    """At most so many of the tokens of all processes, evenly taken; of these the ones that are here."""
    if seen.total <= most:
        return Tokens(token_N, choice_N, seen.total)
    at_N = torch.arange(most, device=token_N.device) * seen.total // most - seen.before
    at_N = at_N[(at_N >= 0) & (at_N < len(token_N))]
    return Tokens(token_N[at_N], choice_N[at_N], most)


def _tell_starved(
    name: str, experts: Experts, starved: list[Served], enough: int, tokens: int, recipe: Recipe, world: World
) -> None:
    each = ", ".join(f"{s.expert} ({s.routed})" for s in starved)
    said = (
        f"{name}: {len(starved)} of {len(experts)} experts were sent fewer tokens (of {tokens}) than they have inputs "
        f"({enough}): expert {each}"
    )
    if recipe.starved == "error":
        raise RequestError(f"{said}: calibrate on more text, or use --starved shared, --starved round or --route-all.")
    done = "rounded to nearest" if recipe.starved == "round" else "calibrated on others' tokens too"
    if world.leads:
        warnings.warn(f"{said}: these are {done}", FallbackWarning, stacklevel=2)
