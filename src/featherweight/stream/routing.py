"""What comes to the experts of a block: all tokens of a stream, their routing, and which of them serve which expert.

Shapes: T tokens, D width, K choices, N tokens of one expert.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import FallbackWarning, RequestError
from featherweight.models.experts import Experts, Routed
from featherweight.recipe import Recipe
from featherweight.stream.feed import Enough
from featherweight.stream.groups import BlockView
from featherweight.stream.hidden import HiddenStates

MOST = 4  # times the mean: the tokens an expert is calibrated on are that many at most
ENOUGH = 0.25  # tokens an input: an expert with fewer is starved
Tokens = tuple[Tensor, Tensor]  # which tokens, and which of each one's choices


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


@dataclass(frozen=True)
class Served:
    """One expert: how many tokens are routed to it, which ones it is calibrated on, and whether it has too few."""

    expert: int
    routed: int
    tokens: Tokens
    starved: bool


def served_by(name: str, experts: Experts, now: Routed, recipe: Recipe, columns: int) -> list[Served]:
    """Which tokens each expert is calibrated on: its own, evenly thinned out beyond `MOST` times the mean; all, where
    it is starved or the recipe routes all."""
    count, tokens = len(experts), now.expert_TK.shape[0]
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
        served.append(Served(expert, routed, own, starved))
    _tell_starved(name, experts, [s for s in served if s.starved], enough, tokens, recipe)
    return served


def _tell_starved(
    name: str, experts: Experts, starved: list[Served], enough: float, tokens: int, recipe: Recipe
) -> None:
    if not starved:
        return
    each = ", ".join(f"{experts.names[s.expert]} ({s.routed})" for s in starved)
    said = (
        f"{name}: {len(starved)} of {len(experts)} experts were sent fewer than {enough:g} of {tokens} tokens: expert "
        f"{each}"
    )
    if recipe.starved == "error":
        raise RequestError(f"{said}: calibrate on more text, or use --starved shared, --starved round or --route-all.")
    done = "rounded to nearest" if recipe.starved == "round" else "calibrated on all tokens"
    warnings.warn(f"{said}: these are {done}", FallbackWarning, stacklevel=2)
