"""Solutions as something that gradient descent can improve, and back: what is stored is what the forward pass used.

This is the plain form, by autograd; `fused` does what `OnGrid` says in one kernel where it can.
Shapes: R outputs, C inputs, G groups, N inputs of one group.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.core.solution import AnySolution, Solution, SparseSolution
from featherweight.train.adam import hardness
from featherweight.train.fake_quant import fake_quantize, softly, stored, valued, whole

NEAR, ROUNDING_NEAR = 0.49, 0.47  # steps: how far from its value a weight may begin, trained or tuned in its rounding
LEAST_SCALE = 0.05  # of the first one: a scale that vanishes cannot come back
PAPERS_LEAST_SCALE = 1e-4


class Trainable(ABC, nn.Module):
    """One matrix in training. `weights` and `steps` (scales and zeros) are its parameters, at two rates."""

    start: AnySolution
    weights: list[nn.Parameter]
    steps: list[nn.Parameter]
    transposed: bool = False

    @abstractmethod
    def values(self, soft: bool = False) -> Tensor:
        """The matrix the block runs with now, R x C float32, with gradients to the parameters.

        Its codes are whole, or, with `soft`, as they are trained at this moment.
        """

    @abstractmethod
    def solution(self) -> AnySolution:
        """What `values` stands for, in codes (and as a file stores it)."""

    def tidy(self) -> None:
        """Brings parameters back to where they mean something, after a step."""

    def harden(self, progress: float) -> None:
        """Hears how much of the training is done, 0 .. 1."""


class OnGrid(Trainable):
    """Latent weights that a grid makes codes of, with scales, zeros, and a mask that stays.

    Attributes:
        start: gives the grid, the first scales and zeros, and the mask.
        kind: what a latent weight is: "steps" of its scale as it is now, "absolute" (the paper), or in "rounding" how
            far its code is from the one of `start`.
        latent_RGN: the parameter; scale_RG1, relative to unit_RG1; zero_RG1, a parameter where the grid has zeros and
            they are trained.
        lowest_zero: the smallest zero the file format can hold; least: the least scale, relative to its unit.
    """

    start: Solution

    def __init__(
        self,
        start: Solution,
        kind: Literal["steps", "absolute", "rounding"],
        latent_RC: Tensor,
        unit_RG1: Tensor,
        lowest_zero: int,
        least: float,
    ) -> None:
        super().__init__()
        self.start, self.kind, self.lowest_zero, self.least = start, kind, max(start.grid.bottom, lowest_zero), least
        first_RG1 = start.scales_RG.float().unsqueeze(-1)
        self.unit_RG1 = unit_RG1
        self.latent_RGN = nn.Parameter(latent_RC.unflatten(-1, (first_RG1.shape[-2], -1)))
        self.scale_RG1 = nn.Parameter(first_RG1 / unit_RG1)
        self.trains_zeros = kind != "rounding" and not start.grid.symmetric
        self.zero_RG1 = nn.Parameter(start.zeros_RG.float().unsqueeze(-1), requires_grad=self.trains_zeros)
        self.keep_RGN = None if start.keep_RC is None else start.keep_RC.unflatten(-1, self.latent_RGN.shape[-2:])
        self.weights = [self.latent_RGN]
        self.steps = [self.scale_RG1, *([self.zero_RG1] if self.trains_zeros else [])]

    @abstractmethod
    def codes(self, zero_RG1: Tensor) -> Tensor:
        """The code of every latent weight, float32, R x G x N."""

    @torch.no_grad()
    def solution(self) -> Solution:
        zero_RG1 = self.zeros()
        codes_RGN = self.codes(zero_RG1)
        if self.keep_RGN is not None:
            codes_RGN = torch.where(self.keep_RGN, codes_RGN, zero_RG1)
        return replace(
            self.start,
            codes_RC=codes_RGN.flatten(-2).to(torch.uint8),
            scales_RG=self.scales().squeeze(-1).to(self.start.scales_RG.dtype),
            zeros_RG=zero_RG1.squeeze(-1).to(torch.uint8),
        )

    @torch.no_grad()
    def tidy(self) -> None:
        self.scale_RG1.clamp_(min=self.least)

    def scales(self) -> Tensor:
        """The scales as they will be stored, float32 with gradients, R x G x 1."""
        return stored(self.scale_RG1 * self.unit_RG1, self.start.scales_RG.dtype)

    def zeros(self) -> Tensor:
        """The zeros as they will be stored, float32 with gradients where they are trained, R x G x 1."""
        return whole(self.zero_RG1, self.lowest_zero, self.start.grid.top) if self.trains_zeros else self.zero_RG1

    def _masked(self, value_RGN: Tensor) -> Tensor:
        return (value_RGN if self.keep_RGN is None else value_RGN * self.keep_RGN).flatten(-2)


class TrainedGrid(OnGrid):
    """Weights, scales and zeros by straight-through (Block-AP): codes are wherever the weights are now."""

    def __init__(self, start: Solution, latent_RC: Tensor, lowest_zero: int, relative: bool) -> None:
        """
        Args:
            start: gives the grid, the first scales and zeros, and the mask, which stays.
            latent_RC: where the weights begin; their codes are those of `start` if they are within half a step of its
                values (`beginning`).
            lowest_zero: the smallest zero the file format can hold.
            relative: hold weights in steps of their scale as it is *now*, and scales relative to the first ones. One
                rate then serves every matrix, and a scale has its true gradient, code - zero. Held as they are (the
                paper), it is round(w / s) - w / s, which is nothing at all for weights that begin on the grid.
        """
        scale_RG1 = start.scales_RG.float().unsqueeze(-1)
        if relative:
            latent_RC = (latent_RC.float().unflatten(-1, (scale_RG1.shape[-2], -1)) / scale_RG1).flatten(-2)
            super().__init__(start, "steps", latent_RC, scale_RG1, lowest_zero, LEAST_SCALE)
        else:
            super().__init__(
                start, "absolute", latent_RC.float().clone(), scale_RG1.sign(), lowest_zero, PAPERS_LEAST_SCALE
            )

    def values(self, soft: bool = False) -> Tensor:
        grid, scale_RG1, zero_RG1 = self.start.grid, self.scales(), self.zeros()
        if self.kind == "absolute":
            return self._masked(fake_quantize(self.latent_RGN, scale_RG1, zero_RG1, grid.bottom, grid.top))
        steps_RGN = fake_quantize(self.latent_RGN, torch.ones_like(scale_RG1), zero_RG1, grid.bottom, grid.top)
        return self._masked(steps_RGN * scale_RG1)

    def codes(self, zero_RG1: Tensor) -> Tensor:
        scale_RG1 = self.scales() if self.kind == "absolute" else torch.ones_like(self.scale_RG1)
        return self.start.grid.encode(self.latent_RGN, scale_RG1, zero_RG1)


class TrainedRounding(OnGrid):
    """Codes that may move by one from where they began, and scales: soft steps that harden for the first half of the
    training, and are whole in the second, with the gradient of the soft ones."""

    def __init__(self, start: Solution, weight_RC: Tensor) -> None:
        scale_RG1 = start.scales_RG.float().unsqueeze(-1)
        shape = (scale_RG1.shape[-2], -1)
        latent_RC = beginning(start, weight_RC, ROUNDING_NEAR)
        offset_RC = ((latent_RC - start.values()).unflatten(-1, shape) / scale_RG1).flatten(-2)
        super().__init__(start, "rounding", offset_RC, scale_RG1, 0, LEAST_SCALE)
        self.first_RGN = start.codes_RC.unflatten(-1, self.latent_RGN.shape[-2:])
        self.harden(0.0)

    def values(self, soft: bool = False) -> Tensor:
        moved_RGN = softly(self.latent_RGN, self.hardness)
        if self.whole or not soft:
            moved_RGN = valued(moved_RGN, self.latent_RGN.round())
        grid = self.start.grid
        steps_RGN = (self.first_RGN + moved_RGN).clamp(grid.bottom, grid.top) - self.zero_RG1
        return self._masked(steps_RGN * self.scales())

    def codes(self, zero_RG1: Tensor) -> Tensor:
        return (self.first_RGN + self.latent_RGN.round()).clamp(self.start.grid.bottom, self.start.grid.top)

    @torch.no_grad()
    def tidy(self) -> None:
        super().tidy()
        self.latent_RGN.clamp_(-1.0, 1.0)

    def harden(self, progress: float) -> None:
        self.hardness, self.whole = hardness(progress)


class TrainedFloats(Trainable):
    """The weights that a pruned layer kept; the mask stays."""

    start: SparseSolution

    def __init__(self, start: SparseSolution, dtype: torch.dtype | None, relative: bool) -> None:
        super().__init__()
        self.start, self.dtype = start, dtype or start.values_RC.dtype
        values_RC = start.values().float()
        # a power of two near their size: what is not trained further is what it was, to the last bit
        size = values_RC.square().mean().sqrt().item() if relative else 1.0
        self.unit = 2.0 ** round(math.log2(size)) if size else 1.0
        self.weight = nn.Parameter(values_RC / self.unit)
        self.weights, self.steps = [self.weight], []

    def values(self, soft: bool = False) -> Tensor:
        return stored(self.weight * self.unit, self.dtype) * self.start.keep_RC

    @torch.no_grad()
    def solution(self) -> SparseSolution:
        return replace(self.start, values_RC=self.values().to(self.start.values_RC.dtype))


def beginning(start: Solution, weight_RC: Tensor, near: float) -> Tensor:
    """Where the trained weights of a solution begin: at its values, moved towards the originals by `near` steps at
    most, so that every code is what it was and the ones that were close calls may change first."""
    room_RC = near * start.scales_RG.abs().float().repeat_interleave(
        start.codes_RC.shape[-1] // start.scales_RG.shape[-1], -1
    )
    values_RC = start.values()
    return values_RC + torch.minimum(torch.maximum(weight_RC - values_RC, -room_RC), room_RC)
