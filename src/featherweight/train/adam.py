"""Adam for parameters whose averages the caller keeps, and what changes from step to step as one table on the device.

Nothing here waits for the device, and a step reads its numbers from one small tensor that stays where it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MEAN, SQUARE, EPSILON = 0.9, 0.999, 1e-8
LAST_RATE = 0.05  # of the first: where the cosine ends
HARDEST = 10.0  # of soft steps, before they are whole
PACE = 6  # numbers of a step: weight rate, scale rate, second correction, hardness, its share, whether steps are whole


def cosine(progress: float) -> float:
    """The share of the first rate after `progress` (0 .. 1) of the steps."""
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def hardness(progress: float) -> tuple[float, bool]:
    """How hard soft steps are after `progress` (0 .. 1), and whether they are whole: in the second half."""
    return 1.0 + (HARDEST - 1.0) * min(1.0, 2 * progress), progress >= 0.5


def paces(steps: int, weight_rate: float, scale_rate: float, device: torch.device) -> Tensor:
    """What each step needs to know, steps x PACE float32.

    Both rates with Adam's first correction in them, the inverse root of the second; and, of soft steps, their hardness
    h, 1 / (2 tanh(h / 2)), and 1 in the second half, when they are whole.
    """
    rows = []
    for step in range(steps):
        done = step / steps
        rate = cosine(done) / (1 - MEAN ** (step + 1))
        inverse = 1 / math.sqrt(1 - SQUARE ** (step + 1))
        hard, whole = hardness(done)
        share = 0.5 / math.tanh(hard / 2)
        rows.append([weight_rate * rate, scale_rate * rate, inverse, hard, share, float(whole)])
    return torch.tensor(rows, dtype=torch.float32, device=device).view(steps, PACE)


def adam_(
    parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: Tensor | float, inverse: Tensor | float
) -> None:
    """One step in place, of the parameter and of its two averages (2014: Kingma and Ba, algorithm 1).

    `rate` and `inverse` carry the corrections: rate / (1 - MEAN^t) and 1 / sqrt(1 - SQUARE^t).
    """
    mean.lerp_(gradient, 1 - MEAN)
    square.mul_(SQUARE).addcmul_(gradient, gradient, value=1 - SQUARE)
    parameter.sub_(mean / (square.sqrt().mul_(inverse).add_(EPSILON)) * rate)
