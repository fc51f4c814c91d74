"""A compressed layer whose weights are trained on text too: Block-AP's straight-through rule, end to end.

Shapes: T tokens, R outputs, C inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from featherweight.core.solution import Solution
from featherweight.linear import CompressedLinear
from featherweight.train.trainable import OnGrid, TrainedFloats, TrainedGrid


class TunedWeights(nn.Module):
    """A compressed layer with its weights (those a mask kept), scales and, with `zeros`, zero points as parameters.

    Weights are float32, in steps of their scale as it is now, and begin at the codes: only those that all of the text
    pulls the same way reach another. Pruned layers that are not rounded train their floats.
    """

    trained: OnGrid | TrainedFloats

    def __init__(self, layer: CompressedLinear, zeros: bool) -> None:
        super().__init__()
        start = layer.solution()
        self.layer = layer
        if isinstance(start, Solution):
            lowest = layer.format.lowest_zero(start.grid)
            self.trained = TrainedGrid(start, start.values(), lowest, relative=True)
            self.trained.trains_zeros &= zeros
            self.trained.zero_RG1.requires_grad_(self.trained.trains_zeros)
        else:
            self.trained = TrainedFloats(start, start.values_RC.dtype, relative=True)
        self.trained.weights, self.trained.steps = [], []  # parameters are other ones once they are sharded

    @property
    def weights(self) -> list[nn.Parameter]:
        """Trained at the rate of weights."""
        return [self.trained.latent_RGN if isinstance(self.trained, OnGrid) else self.trained.weight]

    @property
    def scales(self) -> list[nn.Parameter]:
        """Relative to those they began with; none of a layer that is not rounded."""
        return [self.trained.scale_RG1] if isinstance(self.trained, OnGrid) else []

    @property
    def zeros(self) -> list[nn.Parameter]:
        """Zero points, where they are trained."""
        return [self.trained.zero_RG1] if isinstance(self.trained, OnGrid) and self.trained.trains_zeros else []

    def forward(self, x_TC: Tensor) -> Tensor:
        """y_TR for x_TC."""
        return functional.linear(x_TC, self.trained.values().to(x_TC.dtype), self.layer.bias)

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The layer's tensors as its format packs them now, by suffix."""
        return self.layer.format.pack(self.trained.solution(), dtype=self.layer.dtype)
