"""A solved layer: integer codes and what turns them into numbers, with the certificate of its loss.

Shapes: R outputs, C inputs, G groups of C/G neighbouring inputs; a leading E (experts) is allowed throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from featherweight.core.rules import Grid, Joint, Pattern, Rule


@dataclass(frozen=True)
class Solution:
    """Integer codes of one weight matrix; floats are a view of them.

    Attributes:
        codes_RC: uint8, 0 .. levels-1 (`Grid.levels`).
        scales_RG: the step of each group in the dtype it is stored in; may be negative (a mirrored grid), never zero.
        zeros_RG: uint8, the code that stands for 0.0; a symmetric grid holds `Grid.middle` everywhere.
        grid: the rule the codes obey.
        loss_R: float32, what the solver says each row's tr(D H D^T) is, for the damped H it worked with.
        damping: the relative damping that was needed in the end (the asked one, or ten times it, ...).
        metrics: anything else worth a line in the journal, by name.
        keep_RC: bool, of a pruned layer: what may differ from zero (the rest has its group's zero as code).
        pattern: of a pruned layer: the rule its mask obeys.
    """

    codes_RC: Tensor
    scales_RG: Tensor
    zeros_RG: Tensor
    grid: Grid
    loss_R: Tensor
    damping: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    keep_RC: Tensor | None = None
    pattern: Pattern | None = None

    @property
    def rule(self) -> Rule:
        """What the solver was asked for."""
        return self.grid if self.pattern is None else Joint(self.grid, self.pattern)

    @property
    def certificate(self) -> float:
        """The solver's own figure for tr(D H D^T), damped H, summed over rows."""
        return float(self.loss_R.double().sum())

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights these codes stand for, (code - zero) * scale, computed in `dtype`; shape R x C."""
        grouped: Tensor = self.codes_RC.unflatten(-1, (self.scales_RG.shape[-1], -1))
        grouped = (grouped - self.zeros_RG.unsqueeze(-1).to(dtype)) * self.scales_RG.unsqueeze(-1).to(dtype)
        return grouped.flatten(-2)

    def nonzero(self) -> Tensor:
        """Which values differ from zero, R x C bool."""
        grouped = self.codes_RC.unflatten(-1, (self.scales_RG.shape[-1], -1))
        differs: Tensor = (grouped != self.zeros_RG.unsqueeze(-1)).flatten(-2)
        return differs

    def rows(self, start: int, stop: int) -> Solution:
        """The solution of rows start .. stop-1: how layers that were solved stacked come apart again."""
        return self._each(lambda tensor: tensor.narrow(self.codes_RC.dim() - 2, start, stop - start))

    def stacked(self) -> Solution:
        """The same with a leading axis of one layer."""
        return self._each(lambda tensor: tensor.unsqueeze(0))

    def layer(self, index: int) -> Solution:
        """Without the leading axis: one of its layers."""
        return self._each(lambda tensor: tensor[index])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Solution:
        tensors = (self.codes_RC, self.scales_RG, self.zeros_RG)
        codes_RC, scales_RG, zeros_RG = (change(tensor) for tensor in tensors)
        keep_RC = None if self.keep_RC is None else change(self.keep_RC)
        loss_R = change(self.loss_R)
        return replace(self, codes_RC=codes_RC, scales_RG=scales_RG, zeros_RG=zeros_RG, loss_R=loss_R, keep_RC=keep_RC)


@dataclass(frozen=True)
class SparseSolution:
    """A pruned layer whose remaining weights are plain floats.

    Attributes:
        values_RC: the weights, zero where pruned, in the dtype of the problem.
        keep_RC: bool, what was not pruned (a kept weight may still be zero by chance).
        pattern: the rule the mask obeys.
        loss_R: what the solver says each row's tr(D H D^T) is, for the damped H it worked with.
        damping: the relative damping that was needed in the end.
        metrics: anything else worth a line in the journal, by name.
    """

    values_RC: Tensor
    keep_RC: Tensor
    pattern: Pattern
    loss_R: Tensor
    damping: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def rule(self) -> Rule:
        """What the solver was asked for."""
        return self.pattern

    @property
    def certificate(self) -> float:
        """The solver's own figure for tr(D H D^T), damped H, summed over rows."""
        return float(self.loss_R.double().sum())

    @property
    def sparsity(self) -> float:
        """The share of pruned weights."""
        return 1.0 - float(self.keep_RC.double().mean())

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights, R x C."""
        return self.values_RC.to(dtype)

    def rows(self, start: int, stop: int) -> SparseSolution:
        """The solution of rows start .. stop-1: how layers that were solved stacked come apart again."""
        return self._each(lambda tensor: tensor.narrow(self.values_RC.dim() - 2, start, stop - start))

    def layer(self, index: int) -> SparseSolution:
        """Without the leading axis: one of its layers."""
        return self._each(lambda tensor: tensor[index])

    def _each(self, change: Callable[[Tensor], Tensor]) -> SparseSolution:
        values_RC, keep_RC, loss_R = (change(tensor) for tensor in (self.values_RC, self.keep_RC, self.loss_R))
        return replace(self, values_RC=values_RC, keep_RC=keep_RC, loss_R=loss_R)


AnySolution = Solution | SparseSolution
