"""The columns of a slab one after the other: the sweep's and the descent's inner loops, by NumPy on a CPU.

A column is some ten operations on R numbers. A call of NumPy's costs a third of one of torch's, and a product of a
vector with few rows a tenth, so what the columns before owe to the next is added up in two steps: for `PIECE` columns
at once by torch, and inside these by NumPy.

Shapes: R outputs, N columns of the slab, G groups, E layers of one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
PIECE = 8  # columns between two products by torch
ROWS = 1024  # of one product by NumPy: with more, its BLAS wakes threads for some microseconds of work


@dataclass(frozen=True)
class Levels:
    """What a weight may become in units of its group's scale, less the group's zero; all E x G x R."""

    scale_EGR: Tensor
    zero_EGR: Tensor
    inverse: Array
    scale: Array
    low: Array
    high: Array

    @classmethod
    def of(cls, scale_EGR: Tensor, zero_EGR: Tensor, lowest: int, highest: int) -> Levels:
        """Scales and zeros in the arithmetic's dtype; codes lie in lowest .. highest."""
        tensors = (scale_EGR.reciprocal(), scale_EGR, lowest - zero_EGR, highest - zero_EGR)
        return cls(scale_EGR, zero_EGR, *(tensor.cpu().numpy() for tensor in tensors))

    def columns(self, group_EN: Tensor) -> list[list[Array]]:
        """For every column the reciprocal, the scale, the lowest and the highest level of its groups, E x R each."""
        tables = (self.inverse, self.scale, self.low, self.high)
        if len(group_EN) == 1:
            of_group = {group: [table[:, group] for table in tables] for group in set(group_EN[0].tolist())}
            return [of_group[group] for group in group_EN[0].tolist()]
        each_E = np.arange(len(group_EN))
        return [[table[each_E, group_E] for table in tables] for group_E in group_EN.T.cpu().numpy()]

    def codes(self, steps_ENR: Tensor, group_EN: Tensor) -> Tensor:
        """The codes (uint8) of levels."""
        each_E1 = torch.arange(len(group_EN), device=group_EN.device).unsqueeze(1)
        return (steps_ENR.to(self.zero_EGR.device) + self.zero_EGR[each_E1, group_EN]).to(torch.uint8)


def sweep_slab(
    pull_ENR: Tensor,
    root_ENN: Tensor,
    weight_ENR: Tensor,
    levels: Levels,
    group_EN: Tensor,
    keep_ENR: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """How far each weight of the slab moves, its codes, and the losses (E x R); `pull` is (W - V) R of the columns
    before the slab, and may be written over. `keep_ENR` is 1 where a weight may differ from zero."""
    moved_ENR, codes_ENR, pull_ENR, pivot_EN1 = _decided(
        pull_ENR, root_ENN.mT, weight_ENR, levels, group_EN, keep_ENR, None
    )
    return moved_ENR, codes_ENR, (pull_ENR - moved_ENR * pivot_EN1).square().sum(1)


def descend_slab(
    pull_ENR: Tensor,
    hessian_ENN: Tensor,
    values_ENR: Tensor,
    levels: Levels,
    group_EN: Tensor,
    free_ENR: Tensor | None,
    price_E: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """How far each value of the slab moves, its codes, and what the losses (E x R) fall by; `pull` is (D H) of the
    slab's columns as it begins, and may be written over. `free_ENR` is 1 where a weight may differ from zero, which
    costs `price_E` where it does."""
    moved_ENR, codes_ENR, pull_ENR, curve_EN1 = _decided(
        pull_ENR, hessian_ENN, values_ENR, levels, group_EN, free_ENR, price_E
    )
    # the loss falls by 2 move (D H) - move^2 H
    return moved_ENR, codes_ENR, ((2 * pull_ENR - moved_ENR * curve_EN1) * moved_ENR).sum(1)


def _decided(
    pull_ENR: Tensor,
    owed_ENN: Tensor,
    values_ENR: Tensor,
    levels: Levels,
    group_EN: Tensor,
    free_ENR: Tensor | None,
    price_E: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Column by column the level nearest to value + pull / pivot: how far values moved, codes, pulls as they were then,
    and pivots. What a column moves by is owed to all after it, of which `owed` holds what of it, row by row."""
    now_ENR, owed_ENN = pull_ENR.cpu(), owed_ENN.cpu().contiguous()
    moved_ENR, steps_ENR = torch.empty_like(now_ENR), torch.empty_like(now_ENR)
    moved, steps, values = moved_ENR.numpy(), steps_ENR.numpy(), values_ENR.cpu().numpy()
    curve = owed_ENN.diagonal(dim1=-2, dim2=-1).reciprocal().numpy()
    price = None if price_E is None else price_E.cpu().numpy()[:, None] * curve
    free = None if free_ENR is None else free_ENR.cpu().numpy()
    columns, goal = levels.columns(group_EN), np.empty_like(values[:, 0])

    def decide(j: int, now: Array) -> None:
        inverse, scale, low, high = columns[j]
        if free is not None:  # a pruned weight has one level left, zero
            low, high = low * free[:, j], high * free[:, j]
        step, move, value = steps[:, j], moved[:, j], values[:, j]
        np.multiply(now, curve[:, j : j + 1], out=goal)
        np.add(goal, value, out=goal)
        _nearest(goal, inverse, low, high, step)
        np.multiply(step, scale, out=move)
        if price is not None:  # what it takes off the loss against what it costs
            keep = (2 * goal - move) * move > price[:, j : j + 1]
            np.multiply(step, keep, out=step)
            np.multiply(move, keep, out=move)
        np.subtract(move, value, out=move)

    _one_by_one(now_ENR, owed_ENN, moved_ENR, decide)
    device, pivot_EN1 = pull_ENR.device, owed_ENN.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return moved_ENR.to(device), levels.codes(steps_ENR, group_EN), now_ENR.to(device), pivot_EN1.to(device)


def _nearest(goal: Array, inverse: Array, low: Array, high: Array, step: Array) -> None:
    """The allowed level nearest to goal x inverse."""
    np.multiply(goal, inverse, out=step)
    np.rint(step, out=step)
    np.minimum(step, high, out=step)
    np.maximum(step, low, out=step)


def _one_by_one(now_ENR: Tensor, owed_ENN: Tensor, found_ENR: Tensor, decide: Callable[[int, Array], None]) -> None:
    """Calls `decide` for every column j with what is there less owed[j, i] x found[i] of all columns i before it.

    `decide` writes found[j]; `now_ENR` is written over.
    """
    now, owed, found = now_ENR.numpy(), owed_ENN.numpy(), found_ENR.numpy()
    layers, count, rows = now.shape
    debt = np.empty((layers, 1, rows), now.dtype)
    pieces = [slice(at, at + ROWS) for at in range(0, rows, ROWS)]
    parts = [debt[:, :, piece] for piece in pieces]
    for start in range(0, count, PIECE):
        stop = min(start + PIECE, count)
        if start:
            now_ENR[:, start:stop].baddbmm_(owed_ENN[:, start:stop, :start], found_ENR[:, :start], alpha=-1)
        for j in range(start, stop):
            column = now[:, j]
            if j > start:
                factors = owed[:, j : j + 1, start:j]
                for piece, part in zip(pieces, parts, strict=True):
                    np.matmul(factors, found[:, start:j, piece], out=part)
                np.subtract(column, debt[:, 0], out=column)
            decide(j, column)
