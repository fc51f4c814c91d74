"""What the matrices of one expert see: sums over the tokens that it is calibrated on, of all processes.

Shapes: T tokens, D width, K choices, N tokens of one expert, C inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from featherweight.core.hessian import CrossSum, HessianSum
from featherweight.models.experts import Expert, Experts, Routed
from featherweight.stream.parallel import World
from featherweight.stream.routing import Gathered, Served, Tokens

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


@dataclass(frozen=True)
class Sums:
    """H of what a matrix of one expert is given and, with a dense stream, the drift in common with it; as means."""

    hessian_CC: Tensor
    gap_CC: Tensor | None
    tokens: int


@dataclass(frozen=True)
class Summing:
    """Adds up what experts are given, which `now` says of this process's tokens."""

    mixture: Mixture
    now: Routed
    device: torch.device
    world: World

    def sums(self, served: Served, original: Mapping[str, Tensor], leaf: str, owner: int) -> Sums | None:
        """The sums of an expert's own tokens and, where those are few, of all that help it out; in the process that
        owns it alone. `original` are the weights it had, by name, where some have others now."""
        own = self._over(served.own, served.expert, original, leaf, owner)
        help = None if served.help is None else self._over(served.help, served.expert, original, leaf, owner)
        if own is None or help is None:
            return own
        share = own.tokens / (own.tokens + served.weight)
        gap_CC = None
        if own.gap_CC is not None and help.gap_CC is not None:
            gap_CC = torch.lerp(help.gap_CC, own.gap_CC, share)
        return Sums(torch.lerp(help.hessian_CC, own.hessian_CC, share), gap_CC, own.tokens)

    def _over(self, tokens: Tokens, number: int, original: Mapping[str, Tensor], leaf: str, owner: int) -> Sums | None:
        expert, before = self.mixture.experts.expert(number), None
        if self.mixture.original is not None:
            before = replace(self.mixture.original.routed, scale_TK=self.now.scale_TK)
        columns = expert.get_submodule(leaf).get_parameter("weight").shape[-1]
        hessian = HessianSum(columns, self.device)
        gap = None if before is None else CrossSum(columns, columns, self.device)
        pieces = (part.split(PIECE_TOKENS) for part in (tokens.token_N, tokens.choice_N))
        for piece in zip(*pieces, strict=True):
            inputs_NC = _heard(expert, leaf, self.now.inputs(*piece).to(self.device))
            hessian.add(inputs_NC)
            if gap is not None and before is not None:
                before_NC = _heard(expert, leaf, before.inputs(*piece).to(self.device), original)
                gap.add(before_NC - inputs_NC, inputs_NC)
        self.world.sum_to(owner, hessian.sum_CC)
        hessian.tokens = tokens.total
        if gap is not None:
            self.world.sum_to(owner, gap.sum_RC)
            gap.sum_RC.div_(max(tokens.total, 1))
        if owner != self.world.rank:
            return None
        return Sums(hessian.into_mean(), None if gap is None else gap.sum_RC, tokens.total)


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
