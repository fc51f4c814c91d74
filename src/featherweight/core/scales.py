"""Choosing the scale and the zero of every group of weights.

Shapes: R outputs, G groups, N inputs of one group, B groups of all layers; a leading E is allowed where it says so.
Searches have the rows last (B x N x R): what a group's scale is multiplied by is then contiguous memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.core import compiled, fused
from featherweight.core.rules import Grid
from featherweight.core.serial import each

SHRINKS = 80  # candidates of the paper's search: the range times 1.00, 0.99, ... 0.21
PAPER_POWER = 2.4  # and the power of the error it adds up
FINE = (-0.025, -0.0125, 0.0125, 0.025)  # steps around the best of the ladder
CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}  # weights searched at a time: a CPU does it in its cache

COMPILED_GROUPS = 1 << 16  # searched at a time in C: what their candidates take is then some megabytes

Cost = Callable[[Tensor], Tensor]
"""What errors (B x N x R, which it may write over) cost a group, B x R."""
Weigh = Callable[[Tensor, Tensor], list[Tensor]]
"""The least that any of K scales and zeros (K x B x R) costs, and that scale and zero; 1 x B x R each."""


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
    if grid.search == "hessian":
        found = fused.search(grid, weight_RGN, importance.unsqueeze(-3), ladder(grid), FINE, lowest_zero)
        if found:
            return found
        if compiled.usable(weight_RGN):
            return _compiled_search(grid, weight_RGN, importance, lowest_zero)
    weight_BNR, importance_B1N = weight_RGN.movedim(-3, -1).flatten(0, -3), importance.flatten(0, -2).unsqueeze(1)
    groups, width, rows = weight_BNR.shape
    most = CHUNK_ELEMENTS[weight_RGN.device.type]
    wide = max(1, min(rows, most // width))
    many = max(1, most // (width * wide))

    def search(at: tuple[int, int]) -> tuple[Tensor, Tensor]:
        here = slice(at[0], at[0] + many)
        part_BNR = weight_BNR[here, :, at[1] : at[1] + wide].contiguous()
        return _fit(grid, part_BNR, importance_B1N[here].to(part_BNR), lowest_zero)

    starts = [(first, row) for first in range(0, groups, many) for row in range(0, rows, wide)]
    scale_BR = weight_BNR.new_empty(groups, rows, dtype=grid.scale_dtype)
    zero_BR = torch.empty_like(scale_BR, dtype=torch.uint8)
    for (first, row), (scale, zero) in zip(starts, each(search, starts, weight_RGN.device), strict=True):
        scale_BR[first : first + many, row : row + wide] = scale
        zero_BR[first : first + many, row : row + wide] = zero
    shape = (*weight_RGN.shape[:-3], weight_RGN.shape[-2], rows)
    return scale_BR.view(shape).mT.contiguous(), zero_BR.view(shape).mT.contiguous()


def _compiled_search(grid: Grid, weight_RGN: Tensor, importance_GN: Tensor, lowest_zero: int) -> tuple[Tensor, Tensor]:
    """`fit`'s search by weighted error, layer by layer, with the candidates weighed in C."""
    if weight_RGN.dim() == 4:
        pairs = zip(weight_RGN, importance_GN, strict=True)
        each_layer = [_compiled_search(grid, weight, importance, lowest_zero) for weight, importance in pairs]
        scales, zeros = zip(*each_layer, strict=True)
        return torch.stack(scales), torch.stack(zeros)
    rows, groups, _ = weight_RGN.shape
    prices_GN, found = importance_GN.to(weight_RGN).contiguous(), []
    for some_RGN in weight_RGN.split(max(1, COMPILED_GROUPS // groups)):
        some_BN = some_RGN.flatten(0, 1).contiguous()

        def weigh(scale_KB1: Tensor, zero_KB1: Tensor, some_BN: Tensor = some_BN) -> list[Tensor]:
            zeros = None if grid.symmetric else zero_KB1.squeeze(-1)
            bounds = (grid.bottom, grid.top, grid.middle)
            cost_B, place_B = compiled.least(some_BN, prices_GN, scale_KB1.squeeze(-1), zeros, bounds)
            place_1B1 = place_B.view(1, -1, 1)
            return [cost_B.view(1, -1, 1), *(tensor.gather(0, place_1B1) for tensor in (scale_KB1, zero_KB1))]

        found.append(_searched(grid, some_BN.unsqueeze(-1), weigh, lowest_zero))
    scale_B1, zero_B1 = (torch.cat(part) for part in zip(*found, strict=True))
    return scale_B1.view(rows, groups), zero_B1.view(rows, groups)


def _fit(grid: Grid, weight_BNR: Tensor, importance_B1N: Tensor, lowest_zero: int) -> tuple[Tensor, Tensor]:
    """Scales and zeros, B x R."""
    if grid.search == "minmax":
        return _from_range(grid, *_range(weight_BNR, grid), lowest_zero)
    if grid.search == "mse":
        return _shrink_search(grid, weight_BNR, *_range(weight_BNR, grid), lowest_zero)
    cost = _weighted(importance_B1N)

    def weigh(scale_KBR: Tensor, zero_KBR: Tensor) -> list[Tensor]:
        return _least(_costs(cost, weight_BNR, scale_KBR, zero_KBR, grid), scale_KBR, zero_KBR)

    return _searched(grid, weight_BNR, weigh, lowest_zero)


def _searched(grid: Grid, weight_BNR: Tensor, weigh: Weigh, lowest_zero: int) -> tuple[Tensor, Tensor]:
    """The search by weighted error: scales and zeros, B x R."""
    if grid.symmetric:
        return _symmetric_search(grid, weight_BNR.abs().amax(-2), weigh)
    return _asymmetric_search(grid, *_range(weight_BNR, grid), weigh, lowest_zero)


def store(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as a file of this dtype holds it: rounded, and never rounded to zero or infinity."""
    sign = torch.where(scale < 0, -1.0, 1.0)
    return (sign * scale.abs().clamp(*fused.bounds(dtype))).to(dtype)


def _range(weight_BNR: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    low, high = weight_BNR.amin(-2).clamp(max=0), weight_BNR.amax(-2).clamp(min=0)
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


def _costs(cost: Cost, weight_BNR: Tensor, scale_KBR: Tensor, zero_KBR: Tensor, grid: Grid) -> Tensor:
    """What each of K scales and zeros costs, K x B x R.

    A scale below zero mirrors the grid: distances from zero, in steps of the scale's size, have the bounds mirrored.
    Candidates of the size of the one before them are not divided and rounded again.
    """
    step_BNR, error_BNR = torch.empty_like(weight_BNR), torch.empty_like(weight_BNR)
    size_KB1R = scale_KBR.abs().to(weight_BNR.dtype).unsqueeze(-2)
    low_KBR, high_KBR = (bound - zero_KBR.to(weight_BNR.dtype) for bound in (grid.bottom, grid.top))
    mirrored_KBR = scale_KBR < 0
    low_KB1R = torch.where(mirrored_KBR, -high_KBR, low_KBR).unsqueeze(-2)
    high_KB1R = torch.where(mirrored_KBR, -low_KBR, high_KBR).unsqueeze(-2)
    found = []
    for number, size_B1R in enumerate(size_KB1R):
        if not number or not torch.equal(size_B1R, size_KB1R[number - 1]):
            torch.mul(weight_BNR, size_B1R.reciprocal(), out=step_BNR).round_()
        torch.clamp(step_BNR, low_KB1R[number], high_KB1R[number], out=error_BNR)
        torch.addcmul(weight_BNR, error_BNR, size_B1R, value=-1, out=error_BNR)
        found.append(cost(error_BNR))
    return torch.stack(found)


def _power(error_BNR: Tensor) -> Tensor:
    """The sum of |error|^2.4 of each group, B x R."""
    return error_BNR.abs_().pow_(PAPER_POWER).sum(-2)


def _weighted(importance_B1N: Tensor) -> Cost:
    """The sum of error^2 x importance of each group, B x R."""
    return lambda error_BNR: torch.bmm(importance_B1N, torch.mul(error_BNR, error_BNR, out=error_BNR)).squeeze(1)


def _least(costs_KBR: Tensor, *given_KBR: Tensor) -> list[Tensor]:
    """The least of the costs, and what is given for it: the first wins ties, so the result does not depend on luck."""
    places_K11 = torch.arange(len(costs_KBR), 0, -1, dtype=torch.int64, device=costs_KBR.device).view(-1, 1, 1)
    least_KBR = costs_KBR <= costs_KBR.amin(0)
    index_1BR = len(costs_KBR) - (least_KBR * places_K11).amax(0, keepdim=True)  # a CPU's argmin is 20 times slower
    return [tensor_KBR.gather(0, index_1BR) for tensor_KBR in (costs_KBR, *given_KBR)]


def _shrink_search(
    grid: Grid, weight_BNR: Tensor, low_BR: Tensor, high_BR: Tensor, lowest_zero: int
) -> tuple[Tensor, Tensor]:
    """The whole range, 0.99 of it, ... 0.21 of it."""
    shares_K11 = (1 - torch.arange(SHRINKS, dtype=low_BR.dtype, device=low_BR.device) / 100).view(-1, 1, 1)
    scale_KBR, zero_KBR = _from_range(grid, shares_K11 * low_BR, shares_K11 * high_BR, lowest_zero)
    _, scale, zero = _least(_costs(_power, weight_BNR, scale_KBR, zero_KBR, grid), scale_KBR, zero_KBR)
    return scale[0], zero[0]


def _symmetric_search(grid: Grid, extreme_BR: Tensor, weigh: Weigh) -> tuple[Tensor, Tensor]:
    """Scales from 1.08 down to 0.33 of the extreme over the middle code, and their mirror images; then finer steps."""
    extreme_BR = torch.where(extreme_BR == 0, 1.0, extreme_BR) / (1 if grid.ternary else grid.middle)
    signs = (1.0, -1.0) if grid.mirror and not grid.ternary else (1.0,)
    factors = extreme_BR.new_tensor([sign * factor for factor in ladder(grid) for sign in signs])
    zero_BR = torch.full_like(extreme_BR, grid.middle, dtype=torch.uint8)

    def offer(steps_KBR: Tensor) -> list[Tensor]:
        scale_KBR = store(steps_KBR, grid.scale_dtype)
        return weigh(scale_KBR, zero_BR.expand_as(scale_KBR))[:2]

    first = offer(factors.view(-1, 1, 1) * extreme_BR)
    centre_1BR = first[1].to(extreme_BR.dtype)
    fine_K11 = extreme_BR.new_tensor(FINE).view(-1, 1, 1)
    finer = offer(centre_1BR + torch.copysign(fine_K11 * extreme_BR, fine_K11 * centre_1BR))
    _, scale = _least(*map(torch.cat, zip(first, finer, strict=True)))
    return scale[0], zero_BR


def _asymmetric_search(
    grid: Grid, low_BR: Tensor, high_BR: Tensor, weigh: Weigh, lowest_zero: int
) -> tuple[Tensor, Tensor]:
    """Scales from 1.04 down to 0.29 of the range, each with the three zeros that centre it best; then finer steps."""
    full_BR = (high_BR - low_BR) / grid.top

    def offer(steps_KBR: Tensor) -> list[Tensor]:
        """The least cost of these scales, each with three zeros; the scale and the zero."""
        scale_KBR = store(steps_KBR.clamp(min=0), grid.scale_dtype)
        middle_KBR = torch.round((grid.top - (low_BR + high_BR) / scale_KBR.to(low_BR.dtype)) / 2)  # clips both alike
        shifts = middle_KBR.new_tensor([0, -1, 1]).view(-1, 1, 1)
        zero_KBR = (middle_KBR.unsqueeze(1) + shifts).clamp(lowest_zero, grid.top).to(torch.uint8).flatten(0, 1)
        return weigh(scale_KBR.repeat_interleave(3, 0), zero_KBR)

    first = offer(full_BR.new_tensor(ladder(grid)).view(-1, 1, 1) * full_BR)
    finer = offer(first[1].to(full_BR.dtype) + full_BR.new_tensor(FINE).view(-1, 1, 1) * full_BR)
    _, scale, zero = _least(*map(torch.cat, zip(first, finer, strict=True)))
    return scale[0], zero[0]


def ladder(grid: Grid) -> list[float]:
    """Shares of the extreme, or of the range, to try; at more bits the steps left out change no loss (docs/log.md)."""
    highest = 1.08 if grid.symmetric else 1.04
    steps = {2: 16, 3: 13}.get(grid.stored_bits, 10)
    return [1.0, *(highest - 0.05 * step for step in range(steps))]  # 1.0: weights on such a grid stay there
