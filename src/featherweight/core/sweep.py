"""GPTQ: one pass over the columns, each rounding error pushed into the columns still free (2210.17323).

Shapes: R outputs, C inputs, G groups, N inputs of one group, E layers of one shape solved together (always there
inside). The weights are held transposed, E x C x R, so that a column is contiguous memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from featherweight.core import columns, compiled, fused, scales
from featherweight.core.problem import Factor, LayerProblem, Order
from featherweight.core.products import subtract_
from featherweight.core.rules import Grid
from featherweight.core.serial import one_thread
from featherweight.core.solution import Solution
from featherweight.errors import RequestError

SLAB, WIDE_SLAB = 128, 512  # columns; the latter where a slab is one kernel
FEW_ROWS, MANY_COLUMNS = 4096, 8192  # where slabs of 512 columns take a GPU less time than asking for them takes Python
ScalesFrom = Literal["original", "updated"]


def round_to_nearest(problem: LayerProblem, grid: Grid, lowest_zero: int = 0) -> Solution:
    """Every weight to its nearest level, nothing compensated; its loss is that of H damped like the sweep's.

    `lowest_zero` is the smallest zero the file format can hold. Raises RequestError if the groups do not fit.
    """
    weight_RC = problem.weight_RC
    grouped_RGN = weight_RC.unflatten(-1, (-1, grid.width(weight_RC.shape[-1], problem.name)))
    scale_RG, zero_RG = scales.fit(grid, grouped_RGN, None, lowest_zero)
    step, zero = scale_RG.unsqueeze(-1).to(weight_RC.dtype), zero_RG.unsqueeze(-1).to(weight_RC.dtype)
    codes_RC = grid.encode(grouped_RGN, step, zero).flatten(-2)
    delta_RC = weight_RC - ((codes_RC.unflatten(-1, grouped_RGN.shape[-2:]) - zero) * step).flatten(-2)
    loss_R = ((delta_RC @ problem.damped()) * delta_RC).sum(-1)
    return Solution(codes_RC.to(torch.uint8), scale_RG, zero_RG, grid, loss_R, problem.damping)


def sweep(
    problem: LayerProblem,
    grid: Grid,
    order: Order = "activation",
    scales_from: ScalesFrom = "original",
    slab: int | None = None,
    lowest_zero: int = 0,
    fitted: tuple[Tensor, Tensor] | None = None,
    factor: Factor | None = None,
    keep_RC: Tensor | None = None,
) -> Solution:
    """Rounds the columns one by one in `order`; inside a slab column by column, between slabs by one GEMM.

    Args:
        scales_from: "original" fits every group on the given weights before the sweep (static groups: any order, and
            nothing to store but the scales); "updated" fits a group on the weights as they stand when the slab it
            begins in begins, which needs the natural order.
        slab: columns swept together; the result does not depend on it except for the last bits (and "updated", for
            which it is 128 unless it is given).
        lowest_zero: the smallest zero the file format can hold.
        fitted: scales and zeros (R x G) to use instead of fitting them.
        factor: of this problem and order, where the caller already has it.
        keep_RC: bool, a mask: everything else becomes zero when its turn comes.

    Raises RequestError if the groups do not divide the columns, or H cannot be factored.
    """
    if scales_from == "updated" and order != "natural":
        raise RequestError("scales from updated weights need the natural column order: use --order natural.")
    width = grid.width(problem.weight_RC.shape[-1], problem.name)
    factor = factor or problem.factor(order)
    stacked = problem.weight_RC.dim() == 3
    weight_ERC = problem.weight_RC if stacked else problem.weight_RC.unsqueeze(0)
    upper_ECC = factor.upper_CC if stacked else factor.upper_CC.unsqueeze(0)
    order_EC = factor.order_C if stacked else factor.order_C.unsqueeze(0)
    if fitted is not None:
        scale_ERG, zero_ERG = fitted if stacked else (fitted[0].unsqueeze(0), fitted[1].unsqueeze(0))
    else:
        kept_ERC = weight_ERC if keep_RC is None else weight_ERC * keep_RC  # zeros lie on every grid
        scale_ERG, zero_ERG = scales.fit(
            grid, kept_ERC.unflatten(-1, (-1, width)), _importance(upper_ECC, order_EC, width), lowest_zero
        )
    weight_ECR, keep_ECR = _ordered(weight_ERC, order_EC), None
    if keep_RC is not None:
        keep_ECR = _ordered((keep_RC if stacked else keep_RC.unsqueeze(0)).to(weight_ECR.dtype), order_EC)
    pass_ = _Pass(grid, width, weight_ECR, upper_ECC, order_EC, scale_ERG, zero_ERG, lowest_zero, keep_ECR)
    pass_.run(slab, refit=scales_from == "updated" and fitted is None)
    codes_ERC = _in_place(pass_.codes_ECR, order_EC)
    solution = Solution(codes_ERC, pass_.scale_ERG, pass_.zero_ERG, grid, pass_.loss_ER, factor.damping)
    return replace(solution if stacked else solution.layer(0), keep_RC=keep_RC)


def _ordered(natural_ERC: Tensor, order_EC: Tensor) -> Tensor:
    """Columns in this order, each in one piece: E x C x R."""
    found_ECR = fused.turn(natural_ERC, torch.argsort(order_EC, -1))
    if found_ECR is None:
        each_E1 = torch.arange(len(natural_ERC), device=natural_ERC.device).unsqueeze(1)
        found_ECR = natural_ERC.transpose(1, 2).contiguous()[each_E1, order_EC]
    return found_ECR


def _in_place(ordered_ECR: Tensor, order_EC: Tensor) -> Tensor:
    """Columns as they were before `_ordered`, E x R x C."""
    place_EC = torch.argsort(order_EC, -1)
    found_ERC = fused.turn(ordered_ECR, place_EC, back=True)
    if found_ERC is None:
        each_E1 = torch.arange(len(ordered_ECR), device=ordered_ECR.device).unsqueeze(1)
        found_ERC = ordered_ECR[each_E1, place_EC].transpose(1, 2).contiguous()
    return found_ERC


def _importance(upper_ECC: Tensor, order_EC: Tensor, width: int) -> Tensor:
    """1/U_jj^2 of each column in its original place, E x G x N: the price of an error once the rest makes up for it."""
    price_EC = upper_ECC.diagonal(dim1=-2, dim2=-1).square().reciprocal()
    in_place_EGN: Tensor = torch.empty_like(price_EC).scatter_(-1, order_EC, price_EC).unflatten(-1, (-1, width))
    return in_place_EGN


class _Pass:
    """One sweep's working state; `run` fills codes and losses (and, when refitting, scales and zeros)."""

    def __init__(
        self,
        grid: Grid,
        width: int,
        weight_ECR: Tensor,
        upper_ECC: Tensor,
        order_EC: Tensor,
        scale_ERG: Tensor,
        zero_ERG: Tensor,
        lowest_zero: int,
        keep_ECR: Tensor | None = None,
    ) -> None:
        self.keep_ECR = keep_ECR
        self.grid, self.width, self.lowest_zero = grid, width, lowest_zero
        self.weight_ECR, self.upper_ECC, self.group_EC = weight_ECR, upper_ECC.contiguous(), order_EC // width
        self.scale_ERG, self.zero_ERG = scale_ERG, zero_ERG
        self.levels: columns.Levels | None  # made where they are needed: a GPU would have to be waited for
        self._transpose_scales()
        self.codes_ECR = torch.empty_like(weight_ECR, dtype=torch.uint8)
        self.loss_ER = torch.zeros_like(weight_ECR[:, 0])

    def run(self, slab: int | None, refit: bool) -> None:
        count = self.weight_ECR.shape[1]
        if refit:
            self.scale_ERG, self.zero_ERG = self.scale_ERG.clone(), self.zero_ERG.clone()
        if slab is None:
            slab = SLAB if refit or not fused.usable(self.weight_ECR) else self._wide_slab()
        for start in range(0, count, slab):
            stop = min(start + slab, count)
            if refit:
                self._refit(start, stop)
            errors_ENR = self.weight_ECR.new_empty(len(self.weight_ECR), stop - start, self.weight_ECR.shape[-1])
            self._slab(slice(start, stop), errors_ENR)
            if stop < count:
                rest = self.upper_ECC[:, start:stop, stop:].transpose(1, 2)
                subtract_(self.weight_ECR[:, stop:], rest, errors_ENR)

    def _wide_slab(self) -> int:
        layers, columns, rows = self.weight_ECR.shape
        few = layers * rows <= FEW_ROWS and columns >= MANY_COLUMNS and fused.roomy(self.weight_ECR.device)
        return 2 * WIDE_SLAB if few else WIDE_SLAB

    def _slab(self, at: slice, errors_ENR: Tensor) -> None:
        """Rounds the columns `at` and writes down their scaled errors E, with W - V = E U."""
        levels = (self.grid.bottom, self.grid.top)
        tensors = (self.weight_ECR, self.upper_ECC, self.scale_EGR, self.zero_EGR, self.group_EC, self.keep_ECR)
        for solver in (fused, compiled):
            if solver.sweep_slab(*tensors, errors_ENR, self.codes_ECR, self.loss_ER, at, levels):
                return
        keep_ENR = None if self.keep_ECR is None else self.keep_ECR[:, at]
        if self.levels is None:
            self.levels = columns.Levels.of(self.scale_EGR, self.zero_EGR, *levels)
        with one_thread(self.weight_ECR.device):
            found_ENR, self.codes_ECR[:, at] = columns.sweep_slab(
                self.weight_ECR[:, at], self.upper_ECC[:, at, at], self.levels, self.group_EC[:, at], keep_ENR
            )
            errors_ENR.copy_(found_ENR)
            self.loss_ER += found_ENR.square().sum(1)

    def _refit(self, start: int, stop: int) -> None:
        """Fits the groups that begin in this slab on the weights as they are now (natural order)."""
        for begin in range(-(-start // self.width) * self.width, stop, self.width):
            group_ERN = self.weight_ECR[:, begin : begin + self.width].transpose(1, 2).unsqueeze(2)
            price_EN = self.upper_ECC.diagonal(dim1=-2, dim2=-1)[:, begin : begin + self.width].square().reciprocal()
            scale, zero = scales.fit(self.grid, group_ERN, price_EN.unsqueeze(1), self.lowest_zero)
            at = begin // self.width
            self.scale_ERG[..., at : at + 1], self.zero_ERG[..., at : at + 1] = scale, zero
        self._transpose_scales()

    def _transpose_scales(self) -> None:
        """Scales and zeros in the arithmetic's dtype, with the rows of a group in one piece."""
        self.scale_EGR, self.zero_EGR = (
            tensor.transpose(1, 2).to(self.weight_ECR.dtype).contiguous()  # `to` alone leaves what has the dtype
            for tensor in (self.scale_ERG, self.zero_ERG)
        )
        self.levels = None
