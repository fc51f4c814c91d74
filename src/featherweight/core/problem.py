"""One linear layer as a quadratic: its weights and the Hessian of its inputs.

Shapes: R outputs, C inputs; a leading E (layers of one shape, experts) is allowed throughout.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from featherweight.core.products import split_pays, subtract_, times
from featherweight.core.shared_factor import Helpers, agreed, shared_root_, sharing_pays
from featherweight.core.triangle import Blocks, in_place_pays, inverse_upper, inverses, root_
from featherweight.errors import FallbackWarning, RequestError

Order = Literal["activation", "pivot", "natural"]
DAMPING_TRIES = 5
INEXACT = 1e-2  # how far off the image of the random vector may be that a factor is tried on
PERMUTED_ROWS = 4096  # at a time
PIVOTS = 64  # columns that a greedy order takes before the rest of H is brought up to date


@dataclass(frozen=True)
class Factor:
    """What solvers need of H: R upper triangular with H damped and permuted = R R^T, and the permutation."""

    root_CC: Tensor
    order_C: Tensor
    damping: float
    blocks: Blocks | None = None  # inverses of R's on the diagonal, where they are there already

    @cached_property
    def upper_CC(self) -> Tensor:
        """U = inv(R), so that the inverse of H is U^T U."""
        return inverse_upper(self.root_CC)

    def inverse(self) -> Tensor:
        """inv(H damped), C x C, in the layer's own column order."""
        inverse_CC = self.upper_CC.mT @ self.upper_CC
        back_C = torch.argsort(self.order_C, -1)
        return permuted(inverse_CC, back_C)

    def solve(self, rows_RC: Tensor) -> Tensor:
        """rows inv(H damped), for rows in the layer's own column order."""
        if rows_RC.dim() == 2:  # a gather of single numbers takes several times as long
            found_RC = self._without_root(rows_RC.index_select(-1, self.order_C))
            return found_RC.index_select(-1, torch.argsort(self.order_C))
        order_RC = self.order_C.unsqueeze(-2).expand_as(rows_RC)
        found_RC = self._without_root(rows_RC.gather(-1, order_RC))
        return torch.empty_like(found_RC).scatter_(-1, order_RC, found_RC)

    def _without_root(self, rows_RC: Tensor) -> Tensor:
        """rows inv(R^T) inv(R), of rows in the factor's order."""
        if not split_pays(rows_RC):
            half_RC = torch.linalg.solve_triangular(self.root_CC.mT, rows_RC, upper=False, left=False)
            solved_RC: Tensor = torch.linalg.solve_triangular(self.root_CC, half_RC, upper=True, left=False)
            return solved_RC
        found_RC = rows_RC.clone(memory_format=torch.contiguous_format)
        found_ERC = found_RC if found_RC.dim() == 3 else found_RC.unsqueeze(0)
        for turned in (False, True):
            for own, inverse_ENN, rest, owing_ESN in self._steps(turned):
                found_ERC[..., own] = times(found_ERC[..., own], inverse_ENN.mT)
                if owing_ESN.numel():
                    subtract_(found_ERC[..., rest], found_ERC[..., own], owing_ESN.mT)
        return found_RC

    def off_root(self, z_C: Tensor, turned: bool) -> Tensor:
        """inv(R) z, or with R `turned` inv(R^T) z."""
        found_EC = z_C.clone() if z_C.dim() == 2 else z_C.unsqueeze(0).clone()
        for own, inverse_ENN, rest, owing_ESN in self._steps(turned):
            found_EC[:, own] = _image(inverse_ENN, found_EC[:, own])
            if owing_ESN.numel():
                found_EC[:, rest] -= _image(owing_ESN, found_EC[:, own])
        return found_EC.view(z_C.shape)

    def _steps(self, turned: bool) -> Iterator[tuple[slice, Tensor, slice, Tensor]]:
        """Block by block, in the order in which they are solved: its columns, the inverse there, the columns that are
        left, and what they owe to it."""
        root_ECC = self.root_CC if self.root_CC.dim() == 3 else self.root_CC.unsqueeze(0)
        for own, inverse_ENN in self._inverses if turned else reversed(self._inverses):
            rest = slice(own.stop, root_ECC.shape[-1]) if turned else slice(0, own.start)
            if turned:
                yield own, inverse_ENN.mT, rest, root_ECC[:, own, rest].mT
            else:
                yield own, inverse_ENN, rest, root_ECC[:, rest, own]

    @cached_property
    def _inverses(self) -> Blocks:
        """Of R's blocks on the diagonal."""
        return self.blocks or inverses(self.root_CC)


@dataclass(frozen=True)
class LayerProblem:
    """Minimise tr(D H D^T) over the values V a rule allows, D = weight - V.

    Attributes:
        weight_RC: float32 weights (or float64, then everything is computed in float64).
        hessian_CC: X^T X / tokens of the layer's inputs, same dtype.
        tokens: how many inputs H was made of.
        damping: what is added to H's diagonal, relative to its mean (0.01 = 1 %).
        name: the layer's name, for messages.
    """

    weight_RC: Tensor
    hessian_CC: Tensor
    tokens: int = 0
    damping: float = 0.01
    name: str = "the layer"

    def __post_init__(self) -> None:
        columns = self.weight_RC.shape[-1]
        if self.hessian_CC.shape[-2:] != (columns, columns):
            shape = tuple(self.hessian_CC.shape)
            raise RequestError(
                f"{self.name} has {columns} inputs but its Hessian is {shape}: collect H from its inputs."
            )
        if not bool(torch.isfinite(torch.stack(torch.aminmax(self.hessian_CC))).all()):  # NaN is its own least and most
            raise RequestError(
                f"{self.name} saw inputs with NaN or Inf: run the model in float32 or check its weights."
            )

    def moved(self, weight_RC: Tensor) -> LayerProblem:
        """The same with other weights; H is known to be finite, which takes a pass over it and has a GPU waited for."""
        other = copy(self)
        object.__setattr__(other, "weight_RC", weight_RC)
        return other

    @property
    def dead_C(self) -> Tensor:
        """Inputs that were never different from zero; any value of their weights costs nothing."""
        return self.hessian_CC.diagonal(dim1=-2, dim2=-1) == 0

    def damped(self, damping: float | None = None) -> Tensor:
        """H with `damping` x the mean diagonal of live inputs added, and a hundredth of that mean for dead inputs.

        Dead inputs so weigh little in every search and sum, whatever the unit of H.
        """
        hessian_CC = self.hessian_CC.clone()
        hessian_CC.diagonal(dim1=-2, dim2=-1).copy_(self._damped_diagonal(damping))
        return hessian_CC

    def _damped_diagonal(self, damping: float | None = None) -> Tensor:
        diagonal_C = self.hessian_CC.diagonal(dim1=-2, dim2=-1)
        dead_C = self.dead_C.to(diagonal_C.dtype)
        live = (diagonal_C.shape[-1] - dead_C.sum(-1, keepdim=True)).clamp(min=1)
        mean = diagonal_C.sum(-1, keepdim=True) / live
        mean = torch.where(mean > 0, mean, torch.ones_like(mean))
        return diagonal_C + 0.01 * mean * dead_C + (self.damping if damping is None else damping) * mean

    def factor(self, order: Order = "activation", helpers: Helpers | None = None) -> Factor:
        """R by one reversed Cholesky: with J the reversal of the order and J H J = L L^T, R = J L J.

        If L does not exist in float32 it is tried in float64; if not there either, the damping is raised tenfold, with
        a FallbackWarning, until it does.
        """
        for step in range(DAMPING_TRIES):
            damping = max(self.damping, 1e-4) * 10.0**step if step else self.damping
            diagonal_C = self._damped_diagonal(damping)
            order_C = _pivot_order(self.damped(damping)) if order == "pivot" else _plain_order(diagonal_C, order)
            found = self._factor(order_C, diagonal_C, damping, helpers)
            if found is not None:
                if step:
                    warnings.warn(
                        f"{self.name}: H needs more than damping {self.damping:g}: going on with {damping:g}",
                        FallbackWarning,
                        stacklevel=2,
                    )
                return found
        raise RequestError(
            f"{self.name}: H is not positive definite even with damping {damping:g} (asked: {self.damping:g}): "
            "calibrate on more text."
        )

    def _factor(self, order_C: Tensor, diagonal_C: Tensor, damping: float, helpers: Helpers | None) -> Factor | None:
        """The factor of H with this diagonal, in this order; None where that is not positive definite even in
        float64."""

        def ordered(order_C: Tensor) -> Tensor:
            matrix_CC = permuted(self.hessian_CC, order_C)
            matrix_CC.diagonal(dim1=-2, dim2=-1).copy_(_taken(diagonal_C, order_C))
            return matrix_CC

        if in_place_pays(self.hessian_CC):
            root_CC = ordered(order_C)
            sharers = helpers if helpers is not None and sharing_pays(root_CC, helpers) else None
            blocks = root_(root_CC) if sharers is None else shared_root_(root_CC, sharers)
            found = Factor(root_CC, order_C, damping, blocks)
            made = blocks is not None and self._is_root(found, diagonal_C)
            if made if sharers is None else agreed(made, sharers, root_CC.device):
                return found
            del root_CC, blocks, found
        whole_CC = _root(ordered(order_C.flip(-1)))
        return None if whole_CC is None else Factor(whole_CC, order_C, damping)

    def _is_root(self, factor: Factor, diagonal_C: Tensor) -> bool:
        """Whether inv(R) H inv(R^T) z = z for some random z and H with this diagonal: products in halves of float16 may
        be too inexact for an H that float32 can still do."""
        draw = torch.Generator(diagonal_C.device).manual_seed(0)
        z_C = torch.randn(diagonal_C.shape, generator=draw, dtype=diagonal_C.dtype, device=diagonal_C.device)
        x_C = torch.empty_like(z_C).scatter_(-1, factor.order_C, factor.off_root(z_C, turned=True))
        added_C = diagonal_C - self.hessian_CC.diagonal(dim1=-2, dim2=-1)
        y_C = _image(self.hessian_CC, x_C) + added_C * x_C
        error = (factor.off_root(_taken(y_C, factor.order_C), turned=False) - z_C).square().sum(-1)
        return bool((error <= INEXACT**2 * z_C.square().sum(-1)).all())


def _taken(values_C: Tensor, order_C: Tensor) -> Tensor:
    """Values in this order; of one layer by a kernel that is faster than a gather."""
    return values_C.index_select(0, order_C) if values_C.dim() == 1 else values_C.gather(-1, order_C)


def _image(matrix_CC: Tensor, z_C: Tensor) -> Tensor:
    """Matrix times vector: of one matrix by a kernel for that, four times as fast as one for products."""
    if len(matrix_CC) == 1 and matrix_CC.dim() == 3:
        return (matrix_CC[0] @ z_C[0]).unsqueeze(0)
    return matrix_CC @ z_C if matrix_CC.dim() == 2 else (matrix_CC @ z_C.unsqueeze(-1)).squeeze(-1)


def loss_R(problem: LayerProblem, values_RC: Tensor, damping: float | None = None) -> Tensor:
    """tr(D H D^T) row by row, D = weight - values; `damping` None takes H as measured, else damped by that much."""
    delta_RC = problem.weight_RC - values_RC.to(problem.weight_RC.dtype)
    found_R = (times(delta_RC, problem.hessian_CC) * delta_RC).sum(-1)
    if damping is None:
        return found_R
    added_C = problem._damped_diagonal(damping) - problem.hessian_CC.diagonal(dim1=-2, dim2=-1)
    return found_R + (delta_RC.square() * added_C.unsqueeze(-2)).sum(-1)


def column_order(damped_CC: Tensor, order: Order) -> Tensor:
    """The order in which columns are rounded, as indices C (E x C with a leading axis).

    natural: as they come. activation: falling diagonal of H (GPTQ's act-order). pivot: the smallest remaining
    Schur complement goes last, again and again (2507.18553), which makes sum 1/U_jj^2 smaller still.
    """
    if order == "pivot":
        return _pivot_order(damped_CC)
    return _plain_order(damped_CC.diagonal(dim1=-2, dim2=-1), order)


def _plain_order(diagonal_C: Tensor, order: Order) -> Tensor:
    if order == "activation":
        return torch.argsort(diagonal_C, dim=-1, descending=True, stable=True)
    return torch.arange(diagonal_C.shape[-1], device=diagonal_C.device).expand(diagonal_C.shape).contiguous()


def permuted(matrix_CC: Tensor, order_C: Tensor) -> Tensor:
    """Rows and columns of a symmetric matrix taken in the given order."""
    if matrix_CC.dim() == 2:
        found_CC = torch.empty_like(matrix_CC)
        for at in range(0, len(order_C), PERMUTED_ROWS):  # the largest H there are leave no room for a second copy
            rows = matrix_CC.index_select(0, order_C[at : at + PERMUTED_ROWS])
            torch.index_select(rows, 1, order_C, out=found_CC[at : at + PERMUTED_ROWS])
        return found_CC
    rows = torch.take_along_dim(matrix_CC, order_C.unsqueeze(-1), -2)
    return torch.take_along_dim(rows, order_C.unsqueeze(-2), -1)


def _pivot_order(damped_CC: Tensor) -> Tensor:
    """Greedy: factor H from the last column to the first, each time taking the smallest pivot that is left.

    What H is after so many columns is made by one product for every PIVOTS of them; in between, only what the next
    column and all pivots have become.
    """
    rest_CC, picks = damped_CC.clone(), []
    pivot_C = rest_CC.diagonal(dim1=-2, dim2=-1).clone()  # infinite where taken
    for begin in range(0, rest_CC.shape[-1], PIVOTS):
        taken_NC = rest_CC.new_empty((*pivot_C.shape[:-1], min(PIVOTS, rest_CC.shape[-1] - begin), pivot_C.shape[-1]))
        share_NC = torch.empty_like(taken_NC)
        for i in range(taken_NC.shape[-2]):
            pick = pivot_C.argmin(-1, keepdim=True)
            picks.append(pick)
            column_1C = torch.take_along_dim(rest_CC, pick.unsqueeze(-1), -2)
            owed_N1 = torch.take_along_dim(taken_NC[..., :i, :], pick.unsqueeze(-1), -1)
            column_C = (column_1C - owed_N1.mT @ share_NC[..., :i, :]).squeeze(-2)
            share_C = column_C / torch.take_along_dim(column_C, pick, -1)
            taken_NC[..., i, :], share_NC[..., i, :] = column_C, share_C
            pivot_C = (pivot_C - column_C * share_C).scatter_(-1, pick, torch.inf)
        rest_CC -= taken_NC.mT @ share_NC
    return torch.cat(picks[::-1], -1)


def _root(reversed_CC: Tensor) -> Tensor | None:
    """R with H = R R^T, of J H J; None where H is not positive definite even in float64."""
    for dtype in (reversed_CC.dtype, torch.float64):
        upper = not reversed_CC.is_cuda  # R then lies row by row; on a GPU turning it over costs less
        half_CC, info = torch.linalg.cholesky_ex(reversed_CC.to(dtype), upper=upper)
        lower_CC = half_CC.mT if upper else half_CC
        root_CC: Tensor = lower_CC.to(reversed_CC.dtype).flip(-2, -1).contiguous()
        if bool((info == 0).all()) and bool(torch.isfinite(root_CC).all()):
            return root_CC
    return None
