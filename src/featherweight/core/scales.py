"""Choosing the scale and the zero of every group of weights.

Shapes: R outputs, G groups, N inputs of one group; a leading E is allowed throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.core import fused
from featherweight.core.rules import Grid
from featherweight.core.serial import one_thread

SHRINKS = 80  # candidates of the paper's search: the range times 1.00, 0.99, ... 0.21
PAPER_POWER = 2.4  # and the power of the error it adds up
FINE = (-0.025, -0.0125, 0.0125, 0.025)  # steps around the best of the ladder
CHUNK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 26}  # weights searched at a time: a CPU does it in its cache


def fit(
    grid: Grid, weight_RGN: Tensor, importance_GN: Tensor | None = None, lowest_zero: int = 0
) -> tuple[Tensor, Tensor]:
    """Scales (in the stored dtype) and zeros (uint8), both R x G, for weights in groups.

    `minmax` takes the extremes of the group (zero included); `mse` shrinks that range step by step for the least
    sum |error|^2.4, as GPTQ's code does; `hessian` searches ranges (symmetric: both mirror images; asymmetric: several
    zeros) for the least sum of error^2 weighted by `importance_GN` (1 where None).
    `lowest_zero` is the smallest zero the file format can hold.
    """
    importance = torch.ones_like(weight_RGN[..., 0, :, :]) if importance_GN is None else importance_GN
    importance = importance.unsqueeze(-3)
    rows = max(1, CHUNK_ELEMENTS[weight_RGN.device.type] // weight_RGN[..., 0, :, :].numel())
    with one_thread(weight_RGN.device):
        parts = [_fit(grid, part, importance, lowest_zero) for part in weight_RGN.split(rows, -3)]
    return torch.cat([scale for scale, _ in parts], -2), torch.cat([zero for _, zero in parts], -2)


def _fit(grid: Grid, weight_RGN: Tensor, importance: Tensor, lowest_zero: int) -> tuple[Tensor, Tensor]:
    if grid.search == "minmax":
        return _from_range(grid, *_range(weight_RGN, grid), lowest_zero)
    if grid.search == "mse":
        return _shrink_search(grid, weight_RGN, lowest_zero)
    if found := fused.search(grid, weight_RGN, importance, ladder(grid), FINE, lowest_zero):
        return found
    if grid.symmetric:
        return _symmetric_search(grid, weight_RGN, importance)
    return _asymmetric_search(grid, weight_RGN, importance, lowest_zero)


def store(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as a file of this dtype holds it: rounded, and never rounded to zero or infinity."""
    sign = torch.where(scale < 0, -1.0, 1.0)
    return (sign * scale.abs().clamp(*fused.bounds(dtype))).to(dtype)


def _range(weight_RGN: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    low, high = weight_RGN.amin(-1).clamp(max=0), weight_RGN.amax(-1).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = low == high
    return torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)


def _from_range(grid: Grid, low: Tensor, high: Tensor, lowest_zero: int) -> tuple[Tensor, Tensor]:
    """The scale that spans low .. high with all levels, and the code of 0.0."""
    if grid.ternary:
        return store(high / 2, grid.scale_dtype), torch.full(
            high.shape, grid.middle, dtype=torch.uint8, device=high.device
        )
    scale = store((high - low) / (grid.top - grid.bottom), grid.scale_dtype)
    if grid.symmetric:
        return scale, torch.full(high.shape, grid.middle, dtype=torch.uint8, device=high.device)
    zero = torch.round(-low / scale.to(low.dtype)).clamp(lowest_zero, grid.top)
    return scale, zero.to(torch.uint8)


def _error(grid: Grid, weight_RGN: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """weight - its nearest level, for one candidate scale and zero of each group."""
    scale = scale.unsqueeze(-1).to(weight_RGN.dtype)
    step_RGN = torch.mul(weight_RGN, scale.reciprocal()).round_()
    if grid.symmetric:  # bounds that are numbers are several times faster than bounds of each group
        step_RGN.clamp_(grid.bottom - grid.middle, grid.top - grid.middle)
    else:
        zero = zero.unsqueeze(-1).to(weight_RGN.dtype)
        step_RGN.add_(zero).clamp_(grid.bottom, grid.top).sub_(zero)
    return torch.addcmul(weight_RGN, step_RGN, scale, value=-1, out=step_RGN)


def _weighted(grid: Grid, weight_RGN: Tensor, importance: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The sum of error^2 x importance of each group."""
    error_RGN = _error(grid, weight_RGN, scale, zero)
    return error_RGN.square_().mul_(importance).sum(-1)


class _Best:
    """The best candidate so far of each group; the first one wins ties, so the result does not depend on luck."""

    def __init__(self) -> None:
        self.cost: Tensor | None = None

    def offer(self, cost: Tensor, scale: Tensor, zero: Tensor) -> None:
        if self.cost is None:
            self.cost, self.scale, self.zero = cost, scale, zero
            return
        better = cost < self.cost
        self.cost = torch.where(better, cost, self.cost)
        self.scale, self.zero = torch.where(better, scale, self.scale), torch.where(better, zero, self.zero)


def _shrink_search(grid: Grid, weight_RGN: Tensor, lowest_zero: int) -> tuple[Tensor, Tensor]:
    best, (low, high) = _Best(), _range(weight_RGN, grid)
    for step in range(SHRINKS):
        share = 1 - step / 100
        scale, zero = _from_range(grid, share * low, share * high, lowest_zero)
        best.offer(_error(grid, weight_RGN, scale, zero).abs().pow(PAPER_POWER).sum(-1), scale, zero)
    return best.scale, best.zero


def _symmetric_search(grid: Grid, weight_RGN: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scales from 1.08 down to 0.33 of the extreme over the middle code, and their mirror images; then finer steps."""
    extreme = weight_RGN.abs().amax(-1)
    extreme = torch.where(extreme == 0, torch.ones_like(extreme), extreme)
    levels = 1 if grid.ternary else grid.middle
    zero = torch.full(extreme.shape, grid.middle, dtype=torch.uint8, device=extreme.device)
    signs = (1.0, -1.0) if grid.mirror and not grid.ternary else (1.0,)
    best = _Best()

    def offer(scale: Tensor) -> None:
        scale = store(scale, grid.scale_dtype)
        best.offer(_weighted(grid, weight_RGN, importance, scale, zero), scale, zero)

    for factor in ladder(grid):
        for sign in signs:
            offer(sign * extreme * factor / levels)
    centre = best.scale.to(weight_RGN.dtype)
    for fine in FINE:
        offer(centre + torch.copysign(fine * extreme / levels, fine * centre))
    return best.scale, best.zero


def _asymmetric_search(grid: Grid, weight_RGN: Tensor, importance: Tensor, lowest_zero: int) -> tuple[Tensor, Tensor]:
    """Scales from 1.04 down to 0.29 of the range, each with the three zeros that centre it best; then finer steps."""
    low, high = _range(weight_RGN, grid)
    full = (high - low) / grid.top
    best = _Best()
    for factor in ladder(grid):
        _offer_zeros(best, grid, weight_RGN, importance, full * factor, low, high, lowest_zero)
    centre = best.scale.to(weight_RGN.dtype)
    for fine in FINE:
        _offer_zeros(best, grid, weight_RGN, importance, centre + fine * full, low, high, lowest_zero)
    return best.scale, best.zero


def ladder(grid: Grid) -> list[float]:
    """Shares of the extreme, or of the range, to try; at more bits the steps left out change no loss (docs/log.md)."""
    highest = 1.08 if grid.symmetric else 1.04
    steps = {2: 16, 3: 13}.get(grid.stored_bits, 10)
    return [1.0, *(highest - 0.05 * step for step in range(steps))]  # 1.0: weights on such a grid stay there


def _offer_zeros(
    best: _Best,
    grid: Grid,
    weight_RGN: Tensor,
    importance: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    lowest_zero: int,
) -> None:
    scale = store(scale.clamp(min=0), grid.scale_dtype)
    middle = torch.round((grid.top - (low + high) / scale.to(low.dtype)) / 2)  # clips both ends alike
    for shift in (0, -1, 1):
        zero = (middle + shift).clamp(lowest_zero, grid.top).to(torch.uint8)
        best.offer(_weighted(grid, weight_RGN, importance, scale, zero), scale, zero)
