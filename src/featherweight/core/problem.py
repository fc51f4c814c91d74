"""One linear layer as a quadratic: its weights and the Hessian of its inputs.

Shapes: R outputs, C inputs; a leading E (layers of one shape, experts) is allowed throughout.
"""

from __future__ import annotations

import warnings
from copy import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from featherweight.core.products import split_pays, times
from featherweight.core.shared_factor import Helpers, agreed, shared_inverse_factor_, sharing_pays
from featherweight.core.triangle import in_place_pays, inverse_factor_, inverse_lower
from featherweight.errors import FallbackWarning, RequestError

Order = Literal["activation", "pivot", "natural"]
DAMPING_TRIES = 5
INEXACT = 1e-2  # how far off the image of the random vector may be that a factor is tried on
PERMUTED_ROWS = 4096  # at a time
PIVOTS = 64  # columns that a greedy order takes before the rest of H is brought up to date
TRIANGLE_COLUMNS = 2048  # of a product with a triangular matrix, at a time


@dataclass(frozen=True)
class Factor:
    """What solvers need of H: U upper triangular with inv(H damped and permuted) = U^T U, and the permutation."""

    upper_CC: Tensor
    order_C: Tensor
    damping: float

    def inverse(self) -> Tensor:
        """inv(H damped), C x C, in the layer's own column order."""
        inverse_CC = self.upper_CC.mT @ self.upper_CC
        back_C = torch.argsort(self.order_C, -1)
        return permuted(inverse_CC, back_C)

    def solve(self, rows_RC: Tensor) -> Tensor:
        """rows inv(H damped), for rows in the layer's own column order."""
        if rows_RC.dim() == 2:  # a gather of single numbers takes several times as long
            permuted_RC = times(times(rows_RC.index_select(-1, self.order_C), self.upper_CC.mT), self.upper_CC)
            return permuted_RC.index_select(-1, torch.argsort(self.order_C))
        order_RC = self.order_C.unsqueeze(-2).expand_as(rows_RC)
        permuted_RC = _times_upper(_times_lower(rows_RC.gather(-1, order_RC), self.upper_CC), self.upper_CC)
        return torch.empty_like(permuted_RC).scatter_(-1, order_RC, permuted_RC)


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
        """The upper Cholesky factor of the inverse, by one reversed Cholesky and one triangular inverse.

        With J the reversal of the order and J H J = L L^T, U = inv(J L J) = J inv(L) J. If L does not exist in float32
        it is tried in float64; if not there either, the damping is raised tenfold, with a FallbackWarning, until it
        does.
        """
        for step in range(DAMPING_TRIES):
            damping = max(self.damping, 1e-4) * 10.0**step if step else self.damping
            diagonal_C = self._damped_diagonal(damping)
            order_C = _pivot_order(self.damped(damping)) if order == "pivot" else _plain_order(diagonal_C, order)
            upper_CC = self._upper(order_C, diagonal_C, helpers)
            if upper_CC is not None:
                if step:
                    warnings.warn(
                        f"{self.name}: H needs more than damping {self.damping:g}: going on with {damping:g}",
                        FallbackWarning,
                        stacklevel=2,
                    )
                return Factor(upper_CC, order_C, damping)
        raise RequestError(
            f"{self.name}: H is not positive definite even with damping {damping:g} (asked: {self.damping:g}): "
            "calibrate on more text."
        )

    def _upper(self, order_C: Tensor, diagonal_C: Tensor, helpers: Helpers | None) -> Tensor | None:
        """U of H with this diagonal, in this order; None where that is not positive definite even in float64."""

        def ordered(order_C: Tensor) -> Tensor:
            matrix_CC = permuted(self.hessian_CC, order_C)
            matrix_CC.diagonal(dim1=-2, dim2=-1).copy_(diagonal_C.gather(-1, order_C))
            return matrix_CC

        if in_place_pays(self.hessian_CC):
            upper_CC = ordered(order_C)
            if helpers is not None and sharing_pays(upper_CC, helpers):
                made = shared_inverse_factor_(upper_CC, helpers) and self._inverts(upper_CC, order_C, diagonal_C)
                made = agreed(made, helpers, upper_CC.device)
            else:
                made = inverse_factor_(upper_CC) and self._inverts(upper_CC, order_C, diagonal_C)
            if made:
                return upper_CC
            del upper_CC
        return _inverse_factor(ordered(order_C.flip(-1)))

    def _inverts(self, upper_CC: Tensor, order_C: Tensor, diagonal_C: Tensor) -> bool:
        """Whether U H U^T z = z for some random z and H with this diagonal: products in halves of float16 may be too
        inexact for an H that float32 can still do."""
        draw = torch.Generator(upper_CC.device).manual_seed(0)
        z_C = torch.randn(upper_CC.shape[:-1], generator=draw, dtype=upper_CC.dtype, device=upper_CC.device)
        x_C = torch.empty_like(z_C).scatter_(-1, order_C, _image(upper_CC.mT, z_C))
        added_C = diagonal_C - self.hessian_CC.diagonal(dim1=-2, dim2=-1)
        y_C = _image(self.hessian_CC, x_C) + added_C * x_C
        error = (_image(upper_CC, y_C.gather(-1, order_C)) - z_C).square().sum(-1)
        return bool((error <= INEXACT**2 * z_C.square().sum(-1)).all())


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


def _times_lower(rows_RC: Tensor, upper_CC: Tensor) -> Tensor:
    """rows U^T, by blocks of columns so that most zeros of U are left out."""
    if not split_pays(rows_RC):
        return rows_RC @ upper_CC.mT
    columns = upper_CC.shape[-1]
    blocks = [slice(at, at + TRIANGLE_COLUMNS) for at in range(0, columns, TRIANGLE_COLUMNS)]
    return torch.cat([times(rows_RC[..., at.start :], upper_CC[..., at, at.start :].mT) for at in blocks], -1)


def _times_upper(rows_RC: Tensor, upper_CC: Tensor) -> Tensor:
    """rows U, likewise."""
    if not split_pays(rows_RC):
        return rows_RC @ upper_CC
    columns = upper_CC.shape[-1]
    blocks = [slice(at, at + TRIANGLE_COLUMNS) for at in range(0, columns, TRIANGLE_COLUMNS)]
    return torch.cat([times(rows_RC[..., : at.stop], upper_CC[..., : at.stop, at]) for at in blocks], -1)


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


def _inverse_factor(reversed_CC: Tensor) -> Tensor | None:
    """U with inv(H) = U^T U, of J H J; None where H is not positive definite even in float64."""
    for dtype in (reversed_CC.dtype, torch.float64):
        lower_CC, info = torch.linalg.cholesky_ex(reversed_CC.to(dtype))
        if bool((info == 0).all()):
            result_CC = inverse_lower(lower_CC).to(reversed_CC.dtype).flip(-2, -1)
            if bool(torch.isfinite(result_CC).all()):
                return result_CC
    return None
