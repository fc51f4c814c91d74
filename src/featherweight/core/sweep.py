"""GPTQ: one pass over the columns, each rounding error made up for by the columns still free (2210.17323).

The paper takes columns off the inverse of H. With H = R R^T, R upper triangular, the loss of a row is ||(w - v) R||^2,
and its part k holds no column after k: column k of v is to be near w_k + s_k / R_kk, s = (w - v) R summed over the
columns before k. That is the same answer (as 2307.13304 shows of LDL) without an inverse: half the work in a factor.

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
TOGETHER = 4096  # columns whose pull by those before them is made at once
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
    root_ECC = factor.root_CC if stacked else factor.root_CC.unsqueeze(0)
    order_EC = factor.order_C if stacked else factor.order_C.unsqueeze(0)
    if fitted is not None:
        scale_ERG, zero_ERG = fitted if stacked else (fitted[0].unsqueeze(0), fitted[1].unsqueeze(0))
    else:
        kept_ERC = weight_ERC if keep_RC is None else weight_ERC * keep_RC  # zeros lie on every grid
        scale_ERG, zero_ERG = scales.fit(
            grid, kept_ERC.unflatten(-1, (-1, width)), _importance(root_ECC, order_EC, width), lowest_zero
        )
    weight_ECR, keep_ECR = _ordered(weight_ERC, order_EC), None
    if keep_RC is not None:
        keep_ECR = _ordered((keep_RC if stacked else keep_RC.unsqueeze(0)).to(weight_ECR.dtype), order_EC)
    pass_ = _Pass(grid, width, weight_ECR, root_ECC, order_EC, scale_ERG, zero_ERG, lowest_zero, keep_ECR)
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


def _importance(root_ECC: Tensor, order_EC: Tensor, width: int) -> Tensor:
    """R_jj^2 of each column in its original place, E x G x N: the price of an error once the rest makes up for it."""
    price_EC = root_ECC.diagonal(dim1=-2, dim2=-1).square()
    in_place_EGN: Tensor = torch.empty_like(price_EC).scatter_(-1, order_EC, price_EC).unflatten(-1, (-1, width))
    return in_place_EGN


class _Pass:
    """One sweep's working state; `run` fills codes and losses (and, when refitting, scales and zeros)."""

    def __init__(
        self,
        grid: Grid,
        width: int,
        weight_ECR: Tensor,
        root_ECC: Tensor,
        order_EC: Tensor,
        scale_ERG: Tensor,
        zero_ERG: Tensor,
        lowest_zero: int,
        keep_ECR: Tensor | None = None,
    ) -> None:
        self.keep_ECR = keep_ECR
        self.grid, self.width, self.lowest_zero = grid, width, lowest_zero
        self.weight_ECR, self.root_ECC, self.group_EC = weight_ECR, root_ECC.contiguous(), order_EC // width
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
        together = count if refit else max(TOGETHER // slab, 1) * slab
        for first in range(0, count, together):
            self._slabs(slice(first, min(first + together, count)), slab, together, refit)

    def _slabs(self, at: slice, slab: int, together: int, refit: bool) -> None:
        """The slabs of the columns `at`, whose pull by all columns before is made at once; what weights have moved by,
        V - W, takes their place for the columns after these."""
        # (W - V) R of the columns that are decided
        pull_ENR = torch.zeros_like(self.weight_ECR[:, at], memory_format=torch.contiguous_format)
        for done in range(0, at.start, together):
            before = slice(done, done + together)
            subtract_(pull_ENR, self.root_ECC[:, before, at].mT, self.weight_ECR[:, before])
        for start in range(at.start, at.stop, slab):
            own, rest = slice(start, min(start + slab, at.stop)), slice(min(start + slab, at.stop), at.stop)
            if refit:
                self._refit(own, pull_ENR)
            moved_ENR = torch.empty_like(self.weight_ECR[:, own], memory_format=torch.contiguous_format)
            self._slab(own, pull_ENR[:, start - at.start : own.stop - at.start].contiguous(), moved_ENR)
            if rest.start < rest.stop:
                subtract_(pull_ENR[:, rest.start - at.start :], self.root_ECC[:, own, rest].mT, moved_ENR)
            if at.stop < self.weight_ECR.shape[1]:
                self.weight_ECR[:, own] = moved_ENR

    def _wide_slab(self) -> int:
        layers, columns, rows = self.weight_ECR.shape
        few = layers * rows <= FEW_ROWS and columns >= MANY_COLUMNS and fused.roomy(self.weight_ECR.device)
        return 2 * WIDE_SLAB if few else WIDE_SLAB

    def _slab(self, at: slice, pull_ENR: Tensor, moved_ENR: Tensor) -> None:
        """Rounds the columns `at` and writes down what they moved by, V - W."""
        levels = (self.grid.bottom, self.grid.top)
        read = (pull_ENR, self.root_ECC, self.weight_ECR, self.scale_EGR, self.zero_EGR, self.group_EC)
        for solver in (fused, compiled):
            if solver.sweep_slab(*read, self.keep_ECR, moved_ENR, self.codes_ECR, self.loss_ER, at, levels):
                return
        keep_ENR = None if self.keep_ECR is None else self.keep_ECR[:, at]
        if self.levels is None:
            self.levels = columns.Levels.of(self.scale_EGR, self.zero_EGR, *levels)
        with one_thread(self.weight_ECR.device):
            found_ENR, self.codes_ECR[:, at], lost_ER = columns.sweep_slab(
                *(pull_ENR, self.root_ECC[:, at, at], self.weight_ECR[:, at]),
                *(self.levels, self.group_EC[:, at], keep_ENR),
            )
            moved_ENR.copy_(found_ENR)
            self.loss_ER += lost_ER

    def _refit(self, at: slice, pull_ECR: Tensor) -> None:
        """Fits the groups that begin in this slab on the weights as they are now (natural order): moved so that they
        make up for all that is decided, W + pull inv(R) of the columns from the slab's first on."""
        start = at.start
        begins = range(-(-start // self.width) * self.width, at.stop, self.width)
        if not begins:
            return
        ahead = slice(start, begins[-1] + self.width)
        root_ENN, pull_ENR = self.root_ECC[:, ahead, ahead], pull_ECR[:, ahead]
        now_ENR = self.weight_ECR[:, ahead] + torch.linalg.solve_triangular(root_ENN.mT, pull_ENR, upper=False)
        price_EC = self.root_ECC.diagonal(dim1=-2, dim2=-1).square()
        for begin in begins:
            group_ERN = now_ENR[:, begin - start : begin - start + self.width].transpose(1, 2).unsqueeze(2)
            price_EN = price_EC[:, begin : begin + self.width]
            scale, zero = scales.fit(self.grid, group_ERN, price_EN.unsqueeze(1), self.lowest_zero)
            group = slice(begin // self.width, begin // self.width + 1)
            self.scale_ERG[..., group], self.zero_ERG[..., group] = scale, zero
        self._transpose_scales()

    def _transpose_scales(self) -> None:
        """Scales and zeros in the arithmetic's dtype, with the rows of a group in one piece."""
        self.scale_EGR, self.zero_EGR = (
            tensor.transpose(1, 2).to(self.weight_ECR.dtype).contiguous()  # `to` alone leaves what has the dtype
            for tensor in (self.scale_ERG, self.zero_ERG)
        )
        self.levels = None
