"""OBC: each row chooses what goes next, the cheapest weight first (2208.11580): ExactOBS prunes, OBQ quantises.

Every row has an inverse Hessian of its own, which shrinks as its weights are decided. It is kept as a matrix and the
few vectors that are still to be taken off it: a step reads one row of the matrix, and only every `PENDING` steps one
GEMM brings the whole up to date. Columns that are decided are dropped from it along the way.

Shapes: R rows in all, B rows in flight, C columns, K columns still in the matrix, P pending vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.core import scales
from featherweight.core.problem import Factor, LayerProblem
from featherweight.core.rules import Grid, Pattern
from featherweight.core.serial import one_thread
from featherweight.core.solution import Solution, SparseSolution

PENDING = 32
DROP = 0.8  # the matrix is made smaller when this share of its columns, or less, is still undecided
ROW_BYTES = {"cpu": 256 << 20, "cuda": 8 << 30}  # for the inverse Hessians of the rows in flight


@dataclass(frozen=True)
class Trace:
    """In which order each row's weights go, and what each of them costs when it goes.

    Attributes:
        order_RC: int64 column indices (of blocks, for a pattern of blocks).
        cost_RC: the rise of the row's tr(D H D^T) at each step, damped H.
    """

    order_RC: Tensor
    cost_RC: Tensor

    def counts(self, total: int) -> Tensor:
        """How many steps each row takes (R) when `total` steps are taken and always the cheapest next one.

        A row's next step can be cheaper than one it has taken; merged from the rows' heads, a step's turn is the
        running maximum of its row, so the `total` smallest of those are exactly what a heap would give.
        """
        turn_RC = torch.cummax(self.cost_RC, -1).values
        taken = torch.argsort(turn_RC.flatten(), stable=True)[:total]
        return torch.bincount(taken // turn_RC.shape[-1], minlength=turn_RC.shape[0])

    def gone(self, counts_R: Tensor, columns: int) -> Tensor:
        """Which of the columns (or blocks) of each row go in its first `counts` steps, R x columns bool."""
        first_RC = torch.arange(self.order_RC.shape[-1], device=counts_R.device) < counts_R.unsqueeze(-1)
        gone_RC = torch.zeros(len(counts_R), columns, dtype=torch.bool, device=counts_R.device)
        return gone_RC.scatter_(-1, self.order_RC, first_RC)


def obs(problem: LayerProblem, pattern: Pattern) -> SparseSolution:
    """ExactOBS: prunes a layer to a pattern, and gives what is left its exact least-squares values.

    Unstructured sparsity is exact to one weight (or block) over the whole layer. Raises RequestError where the pattern
    does not fit the columns.
    """
    columns = problem.weight_RC.shape[-1]
    pattern.check(columns, problem.name)
    factor = problem.factor("natural")
    trace = prune_trace(problem, pattern, factor)
    total = trace.order_RC.numel() if pattern.of else round(pattern.sparsity * trace.order_RC.numel())
    gone_RC = trace.gone(trace.counts(total), columns // pattern.block)
    return least_squares(problem, ~gone_RC.repeat_interleave(pattern.block, -1), pattern, factor.damping)


def prune_trace(problem: LayerProblem, pattern: Pattern, factor: Factor) -> Trace:
    """The order in which ExactOBS prunes every row: until nothing is left, or an N:M pattern is full.

    `factor` is the problem's, in the natural order.
    """

    def run(rows: _Rows) -> tuple[Tensor, Tensor]:
        return _prune_blocks(rows, pattern.block) if pattern.block > 1 else _prune(rows, pattern)

    parts = _in_flight(problem, factor, run, shrinks=pattern.block == 1)
    return Trace(torch.cat([order for order, _ in parts]), torch.cat([cost for _, cost in parts]))


def obq(problem: LayerProblem, grid: Grid, lowest_zero: int = 0) -> Solution:
    """OBQ: rounds each row's weights one by one, the one that costs least first.

    A weight that has drifted more than half a step off the grid's end goes at once, the farthest first: later it would
    only be worse (the paper's outlier rule; weights that are exactly zero go before that). Scales are fitted on the
    given weights. `lowest_zero` is the smallest zero the file format can hold.
    """
    weight_RC = problem.weight_RC
    width = grid.width(weight_RC.shape[-1], problem.name)
    factor = problem.factor("natural")
    price_C = factor.upper_CC.square().sum(0).reciprocal()  # 1 / inv(H)_jj
    scale_RG, zero_RG = scales.fit(
        grid, weight_RC.unflatten(-1, (-1, width)), price_C.unflatten(0, (-1, width)), lowest_zero
    )
    scale_RC, zero_RC = (t.to(weight_RC.dtype).repeat_interleave(width, -1) for t in (scale_RG, zero_RG))
    codes_RC, loss_R = round_greedily(problem, grid, scale_RC, zero_RC, factor)
    return Solution(codes_RC.to(torch.uint8), scale_RG, zero_RG, grid, loss_R, factor.damping)


def round_greedily(
    problem: LayerProblem, grid: Grid, scale_RC: Tensor, zero_RC: Tensor, factor: Factor
) -> tuple[Tensor, Tensor]:
    """Codes (in the dtype of the weights) and losses of rows rounded greedily on given grids, a scale a weight."""

    def run(rows: _Rows) -> tuple[Tensor, Tensor]:
        codes_BC = torch.empty_like(rows.values_BK)
        loss_B = torch.zeros_like(rows.values_BK[:, 0])
        rows.along = [scale_RC[rows.row_B], zero_RC[rows.row_B]]
        for _ in range(problem.weight_RC.shape[-1]):
            with one_thread(problem.weight_RC.device):
                scale_BK, zero_BK = rows.along
                code_BK = grid.encode(rows.values_BK, scale_BK, zero_BK)
                at_B = _next_rounded(rows, (code_BK - zero_BK) * scale_BK, scale_BK)
                here = (rows.each_B, at_B)
                codes_BC[rows.each_B, rows.column_BK[here]] = code_BK[here]
                loss_B += rows.settle(at_B, (code_BK[here] - zero_BK[here]) * scale_BK[here])
            rows.catch_up()
        return codes_BC, loss_B

    parts = _in_flight(problem, factor, run, shrinks=True)
    return torch.cat([codes for codes, _ in parts]), torch.cat([loss for _, loss in parts])


def _next_rounded(rows: _Rows, nearest_BK: Tensor, scale_BK: Tensor) -> Tensor:
    """The position of the weight that OBQ rounds next in each row."""
    error_BK = (rows.values_BK - nearest_BK).mul_(rows.alive_BK)
    cheap_B, far_BK = rows.cheapest(error_BK), error_BK.square_() - scale_BK.square() / 4
    far_B = (far_BK > 0).any(-1) & (rows.values_BK[rows.each_B, cheap_B] != 0)
    return torch.where(far_B, error_BK.argmax(-1), cheap_B)


def least_squares(problem: LayerProblem, keep_RC: Tensor, pattern: Pattern, damping: float) -> SparseSolution:
    """The best values for given supports: each row solves H w = H w_dense on the columns it keeps.

    `damping` is that of the solution whose support it is: with it, H can be factored.
    """
    hessian_CC = problem.damped(damping)
    goal_RC, values_RC = problem.weight_RC @ hessian_CC, torch.zeros_like(problem.weight_RC)
    kept_R, by_count_R = keep_RC.sum(-1).sort()  # rows of like counts together: their systems have one size, K
    most = max(1, int(kept_R[-1]))
    size = max(1, ROW_BYTES[hessian_CC.device.type] // (2 * most * most * hessian_CC.element_size()))
    for row_B, count_B in zip(by_count_R.split(size), kept_R.split(size), strict=True):
        kept_first_BC = torch.argsort(keep_RC[row_B].byte(), dim=-1, descending=True, stable=True)
        column_BK = kept_first_BC[:, : max(1, int(count_B[-1]))]
        inside_BK = torch.arange(column_BK.shape[-1], device=count_B.device) < count_B.unsqueeze(-1)
        system_BKK = hessian_CC[column_BK.unsqueeze(-1), column_BK.unsqueeze(-2)]
        system_BKK *= inside_BK.unsqueeze(-1) & inside_BK.unsqueeze(-2)
        system_BKK.diagonal(dim1=-2, dim2=-1).add_(~inside_BK)
        goal_BK1 = (goal_RC[row_B].gather(-1, column_BK) * inside_BK).unsqueeze(-1)
        best_BK = torch.cholesky_solve(goal_BK1, torch.linalg.cholesky(system_BKK)).squeeze(-1)
        values_RC[row_B] = torch.zeros_like(values_RC[row_B]).scatter_(-1, column_BK, best_BK * inside_BK)
    delta_RC = problem.weight_RC - values_RC
    return SparseSolution(values_RC, keep_RC, pattern, ((delta_RC @ hessian_CC) * delta_RC).sum(-1), damping)


class _Rows:
    """Some rows with their inverse Hessians, as far as they are decided."""

    def __init__(self, weight_BC: Tensor, inverse_CC: Tensor, row_B: Tensor, shrinks: bool) -> None:
        rows, columns = weight_BC.shape
        self.shrinks = shrinks
        self.row_B, self.each_B = row_B, torch.arange(rows, device=weight_BC.device)
        self.values_BK = weight_BC.clone()
        self.column_BK = torch.arange(columns, device=weight_BC.device).expand(rows, -1).contiguous()
        self.alive_BK = torch.ones_like(self.values_BK)  # 1 or 0: a product is several times faster than a mask
        self.closed_BK = torch.zeros_like(self.values_BK)  # 0, or infinite where nothing may be picked
        self.inverse_BKK = inverse_CC.expand(rows, -1, -1).clone()
        self.diagonal_BK = inverse_CC.diagonal().expand(rows, -1).clone()
        self.along: list[Tensor] = []  # more that is said of the columns, and dropped with them
        self.pending_BPK = weight_BC.new_zeros(rows, PENDING, columns)
        self.waiting, self.undecided = 0, columns
        self.vector_BK = torch.zeros_like(self.values_BK)  # what the last step took off the inverse: its outer product

    def cheapest(self, error_BK: Tensor) -> Tensor:
        """The position in each row where an error of this much costs least, of those that are open."""
        return torch.addcdiv(self.closed_BK, error_BK * error_BK, self.diagonal_BK).argmin(-1)

    def settle(self, at_B: Tensor, value_B: Tensor) -> Tensor:
        """Gives the weight at these positions its final value, makes the others make up for it; returns the cost."""
        here, tiny = (self.each_B, at_B), torch.finfo(value_B.dtype).tiny
        row_BK = self.inverse_BKK[here]
        if self.waiting:
            pending_BPK = self.pending_BPK[:, : self.waiting]
            share_B1P = pending_BPK[self.each_B, :, at_B].unsqueeze(1)
            row_BK = torch.baddbmm(row_BK.unsqueeze(1), share_B1P, pending_BPK, alpha=-1).squeeze(1)
        pivot_B = row_BK[here].clamp(min=tiny).rsqrt()
        row_BK = torch.mul(row_BK, pivot_B.unsqueeze(-1), out=row_BK).mul_(self.alive_BK)
        error_B = (self.values_BK[here] - value_B) * pivot_B
        self.values_BK.addcmul_(row_BK, error_B.unsqueeze(-1), value=-1)
        self.values_BK[here] = value_B
        self.diagonal_BK.addcmul_(row_BK, row_BK, value=-1).clamp_(min=tiny)
        self.alive_BK[here] = 0.0
        self.closed_BK[here] = torch.inf
        self.pending_BPK[:, self.waiting] = self.vector_BK = row_BK
        self.waiting, self.undecided = self.waiting + 1, self.undecided - 1
        return error_B.square()

    def catch_up(self) -> None:
        """Once there are enough, takes the pending vectors off the matrix and drops columns that are decided."""
        if self.waiting < PENDING:
            return
        if self.shrinks and 0 < self.undecided <= DROP * self.values_BK.shape[-1]:
            kept_BK = torch.argsort(self.alive_BK, dim=-1, descending=True, stable=True)[:, : self.undecided]
            self.inverse_BKK = _cut(self.inverse_BKK, kept_BK)
            for name in ("values_BK", "column_BK", "alive_BK", "closed_BK", "diagonal_BK"):
                setattr(self, name, getattr(self, name).gather(-1, kept_BK))
            self.along = [tensor.gather(-1, kept_BK) for tensor in self.along]
            self.pending_BPK = self.pending_BPK.gather(-1, kept_BK.unsqueeze(1).expand(-1, PENDING, -1))
        self.inverse_BKK.baddbmm_(self.pending_BPK.mT, self.pending_BPK, alpha=-1)
        self.waiting = 0


def _cut(matrix_BCC: Tensor, kept_BK: Tensor) -> Tensor:
    """The kept rows and columns of each matrix, B x K x K; what was given is overwritten on a CPU.

    There one matrix after the other moves to the front of the same memory: five times faster than two transposes, and
    twice as fast as `gather`, which a GPU takes.
    """
    count, kept = kept_BK.shape
    if matrix_BCC.is_cuda:
        row_BKC = matrix_BCC.gather(1, kept_BK.unsqueeze(-1).expand(-1, -1, matrix_BCC.shape[-1]))
        return row_BKC.gather(2, kept_BK.unsqueeze(1).expand(-1, kept, -1))
    cut_BKK = matrix_BCC.view(-1)[: count * kept * kept].view(count, kept, kept)
    for matrix_CC, kept_K, cut_KK in zip(matrix_BCC, kept_BK, cut_BKK, strict=True):
        torch.index_select(matrix_CC.index_select(0, kept_K), 1, kept_K, out=cut_KK)
    return cut_BKK


def _prune(rows: _Rows, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prunes single weights, each time the one with the least w^2 / inv(H)_jj; order and costs, B x steps."""
    count, columns = rows.values_BK.shape
    width = pattern.of or columns
    quota = pattern.of - pattern.keep if pattern.of else columns
    left_BG = torch.full((count, columns // width), quota, device=rows.values_BK.device)
    order, cost = [], []
    for _ in range(columns // width * quota):
        with one_thread(rows.values_BK.device):
            at_B = rows.cheapest(rows.values_BK)
            column_B = rows.column_BK[rows.each_B, at_B]
            if pattern.of:
                left_BG[rows.each_B, column_B // width] -= 1
                full_BK = (left_BG == 0).gather(-1, rows.column_BK // width)
                rows.closed_BK.masked_fill_(full_BK, torch.inf)
            order.append(column_B)
            cost.append(rows.settle(at_B, torch.zeros_like(rows.values_BK[:, 0])))
        rows.catch_up()
    return torch.stack(order, -1), torch.stack(cost, -1)


def _prune_blocks(rows: _Rows, block: int) -> tuple[Tensor, Tensor]:
    """Prunes blocks of neighbouring columns, each time the one with the least w_b^T inv(inv(H)_bb) w_b."""
    inner_BNbb = rows.inverse_BKK.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))
    inner_BNbb = inner_BNbb.diagonal(dim1=1, dim2=3).movedim(-1, 1).contiguous()
    gone_BN = torch.zeros_like(rows.alive_BK[:, ::block], dtype=torch.bool)
    eye_bb = torch.eye(block, dtype=inner_BNbb.dtype, device=inner_BNbb.device)
    order, cost = [], []
    for _ in range(gone_BN.shape[-1]):
        safe_BNbb = torch.where(gone_BN[..., None, None], eye_bb, inner_BNbb)
        cost_BN = _block_cost(rows.values_BK.unflatten(-1, (-1, block)), safe_BNbb)
        pick_B = cost_BN.masked_fill_(gone_BN, torch.inf).argmin(-1)
        paid_B = torch.zeros_like(rows.values_BK[:, 0])
        for inside in range(block):
            with one_thread(paid_B.device):
                paid_B += rows.settle(pick_B * block + inside, torch.zeros_like(paid_B))
                vector_BNb = rows.vector_BK.unflatten(-1, (-1, block))
                inner_BNbb -= vector_BNb.unsqueeze(-1) * vector_BNb.unsqueeze(-2)
            rows.catch_up()
        gone_BN[rows.each_B, pick_B] = True
        order.append(pick_B)
        cost.append(paid_B)
    return torch.stack(order, -1), torch.stack(cost, -1)


def _block_cost(value_BNb: Tensor, matrix_BNbb: Tensor) -> Tensor:
    """v^T inv(M) v of every block, by elimination over all of them at once (thousands of small solves take ten times
    as long); `matrix_BNbb` is overwritten."""
    value_BNb, cost_BN = value_BNb.clone(), torch.zeros_like(value_BNb[..., 0])
    tiny = torch.finfo(value_BNb.dtype).tiny
    for k in range(value_BNb.shape[-1]):
        pivot_BN = matrix_BNbb[..., k, k].clamp(min=tiny)
        cost_BN += value_BNb[..., k].square() / pivot_BN
        share_BNb = matrix_BNbb[..., k + 1 :, k] / pivot_BN.unsqueeze(-1)
        value_BNb[..., k + 1 :] -= share_BNb * value_BNb[..., k : k + 1]
        matrix_BNbb[..., k + 1 :, k + 1 :] -= share_BNb.unsqueeze(-1) * matrix_BNbb[..., k, k + 1 :].unsqueeze(-2)
    return cost_BN


def _in_flight(
    problem: LayerProblem, factor: Factor, run: Callable[[_Rows], tuple[Tensor, Tensor]], shrinks: bool
) -> list[tuple[Tensor, Tensor]]:
    """Runs the rows by as many as fit."""
    inverse_CC, weight_RC = factor.upper_CC.mT @ factor.upper_CC, problem.weight_RC
    size = max(1, ROW_BYTES[weight_RC.device.type] // (inverse_CC.numel() * inverse_CC.element_size()))
    rows_R = torch.arange(weight_RC.shape[0], device=weight_RC.device)
    return [run(_Rows(weight_RC[row_B], inverse_CC, row_B, shrinks)) for row_B in rows_R.split(size)]
