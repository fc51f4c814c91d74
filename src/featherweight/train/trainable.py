"""Solutions as something that gradient descent can improve, and back: what is stored is what the forward pass used.

Shapes: R outputs, C inputs, G groups, N inputs of one group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from featherweight.core.solution import AnySolution, Solution, SparseSolution
from featherweight.train.fake_quant import fake_quantize, softly, stored, valued, whole

NEAR, ROUNDING_NEAR = 0.49, 0.47  # steps: how far from its value a weight may begin, trained or tuned in its rounding
HARDEST = 10.0  # of the soft steps, before they are whole
LEAST_SCALE = 0.05  # of the first one: a scale that vanishes cannot come back
PAPERS_LEAST_SCALE = 1e-4


class Trainable(ABC, nn.Module):
    """One matrix in training. `weights` and `steps` (scales and zeros) are its parameters, at two rates."""

    weights: list[nn.Parameter]
    steps: list[nn.Parameter]
    transposed: bool = False

    @abstractmethod
    def values(self) -> Tensor:
        """The matrix the block runs with now, R x C float32, with gradients to the parameters."""

    @abstractmethod
    def solution(self) -> AnySolution:
        """What `values` stands for, in codes (and as a file stores it)."""

    def tidy(self) -> None:
        """Brings parameters back to where they mean something, after a step."""

    def harden(self, progress: float) -> None:
        """Hears how much of the training is done, 0 .. 1."""


class TrainedGrid(Trainable):
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
        super().__init__()
        self.start, self.lowest_zero, self.relative = start, lowest_zero, relative
        scale_RG1 = start.scales_RG.float().unsqueeze(-1)
        self.unit_RG1 = scale_RG1 if relative else scale_RG1.sign()
        self.least = LEAST_SCALE if relative else PAPERS_LEAST_SCALE
        latent_RGN = latent_RC.float().unflatten(-1, (scale_RG1.shape[-2], -1))
        self.weight = nn.Parameter(latent_RGN / scale_RG1 if relative else latent_RGN)
        self.scale = nn.Parameter(scale_RG1 / self.unit_RG1)
        self.zero = nn.Parameter(start.zeros_RG.float().unsqueeze(-1), requires_grad=not start.grid.symmetric)
        self.keep_RGN = None if start.keep_RC is None else start.keep_RC.unflatten(-1, latent_RGN.shape[-2:])
        self.weights, self.steps = [self.weight], [self.scale, *([] if start.grid.symmetric else [self.zero])]

    def values(self) -> Tensor:
        grid, scale_RG1, zero_RG1 = self.start.grid, self._scale(), self._zero()
        value_RGN = fake_quantize(self._latent(scale_RG1), scale_RG1, zero_RG1, grid.bottom, grid.top)
        return (value_RGN if self.keep_RGN is None else value_RGN * self.keep_RGN).flatten(-2)

    @torch.no_grad()
    def solution(self) -> Solution:
        grid, scale_RG1, zero_RG1 = self.start.grid, self._scale(), self._zero()
        codes_RGN = grid.encode(self._latent(scale_RG1), scale_RG1, zero_RG1)
        if self.keep_RGN is not None:
            codes_RGN = torch.where(self.keep_RGN, codes_RGN, zero_RG1)
        return replace(
            self.start,
            codes_RC=codes_RGN.flatten(-2).to(torch.uint8),
            scales_RG=scale_RG1.squeeze(-1).to(self.start.scales_RG.dtype),
            zeros_RG=zero_RG1.squeeze(-1).to(torch.uint8),
        )

    @torch.no_grad()
    def tidy(self) -> None:
        self.scale.clamp_(min=self.least)

    def _latent(self, scale_RG1: Tensor) -> Tensor:
        return self.weight * scale_RG1 if self.relative else self.weight

    def _scale(self) -> Tensor:
        return stored(self.scale * self.unit_RG1, self.start.scales_RG.dtype)

    def _zero(self) -> Tensor:
        grid = self.start.grid
        return self.zero if grid.symmetric else whole(self.zero, max(grid.bottom, self.lowest_zero), grid.top)


class TrainedRounding(Trainable):
    """Codes that may move by one from where they began, and scales: soft steps that harden for the first half of the
    training, and are whole in the second, with the gradient of the soft ones."""

    def __init__(self, start: Solution, weight_RC: Tensor) -> None:
        super().__init__()
        self.start, self.hardness, self.whole = start, 1.0, False
        scale_RG1 = start.scales_RG.float().unsqueeze(-1)
        shape = (scale_RG1.shape[-2], -1)
        latent_RC = beginning(start, weight_RC, ROUNDING_NEAR)
        offset_RC = (latent_RC - start.values()).unflatten(-1, shape) / scale_RG1
        self.unit_RG1 = scale_RG1
        self.codes_RGN = start.codes_RC.unflatten(-1, shape).float()
        self.zero_RG1 = start.zeros_RG.float().unsqueeze(-1)
        self.offset = nn.Parameter(offset_RC)
        self.scale = nn.Parameter(torch.ones_like(scale_RG1))
        self.keep_RGN = None if start.keep_RC is None else start.keep_RC.unflatten(-1, shape)
        self.weights, self.steps = [self.offset], [self.scale]

    def values(self) -> Tensor:
        moved = softly(self.offset, self.hardness)
        if self.whole or not torch.is_grad_enabled():
            moved = valued(moved, self.offset.round())
        grid = self.start.grid
        value_RGN = ((self.codes_RGN + moved).clamp(grid.bottom, grid.top) - self.zero_RG1) * self._scale()
        return (value_RGN if self.keep_RGN is None else value_RGN * self.keep_RGN).flatten(-2)

    @torch.no_grad()
    def solution(self) -> Solution:
        grid = self.start.grid
        codes_RGN = (self.codes_RGN + self.offset.round()).clamp(grid.bottom, grid.top)
        if self.keep_RGN is not None:
            codes_RGN = torch.where(self.keep_RGN, codes_RGN, self.zero_RG1)
        return replace(
            self.start,
            codes_RC=codes_RGN.flatten(-2).to(torch.uint8),
            scales_RG=self._scale().squeeze(-1).to(self.start.scales_RG.dtype),
        )

    @torch.no_grad()
    def tidy(self) -> None:
        self.scale.clamp_(min=LEAST_SCALE)
        self.offset.clamp_(-1.0, 1.0)

    def harden(self, progress: float) -> None:
        self.hardness, self.whole = 1.0 + (HARDEST - 1.0) * min(1.0, 2 * progress), progress >= 0.5

    def _scale(self) -> Tensor:
        return stored(self.scale * self.unit_RG1, self.start.scales_RG.dtype)


class TrainedFloats(Trainable):
    """The weights that a pruned layer kept; the mask stays."""

    def __init__(self, start: SparseSolution, dtype: torch.dtype | None, relative: bool) -> None:
        super().__init__()
        self.start, self.dtype = start, dtype or start.values_RC.dtype
        values_RC = start.values().float()
        self.unit = values_RC.square().mean().sqrt().item() if relative else 1.0
        self.weight = nn.Parameter(values_RC / self.unit)
        self.weights, self.steps = [self.weight], []

    def values(self) -> Tensor:
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
