"""Which weights survive, decided with the whole layer in view, and the best values for those that do.

`choose` splits "fit the layer" from "obey the pattern" and lets the two argue (ADMM; Boyd 2011 section 9.1, for layers
2401.02938 and ALPS 2406.07831): it costs a GEMM a round and finds masks about as good as ExactOBS. `resolve` gives any
mask its least-squares values by conjugate gradients, `swap` exchanges single weights of it while that pays.

Shapes: R outputs, C inputs, K candidates; a leading E (layers of one shape) is allowed in `choose` and `resolve`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from featherweight.core.problem import Factor, LayerProblem
from featherweight.core.rules import Pattern
from featherweight.core.solution import SparseSolution
from featherweight.errors import RequestError

PENALTIES = (0.1, 0.16, 0.25, 0.4, 0.63, 1.0)  # of disagreeing, relative to the mean diagonal of H; one Cholesky each
ROUNDS = 4  # at each penalty; a fifth takes 0.3 % off the loss and a fifth more time
STEPS = 10  # of conjugate gradients from a sweep's values: within 0.1 % of the exact answer on every real layer tried
WARM_STEPS = 2  # from ADMM's values, for as much (docs/log.md)
SAMPLE = 1 << 15  # weights that the threshold of a round is read off
CHUNK_ELEMENTS, CHUNK_ROWS = 1 << 17, 192  # of what goes through a round together on a CPU, the larger
PAIRED = 8  # the largest group whose pairs are compared
CANDIDATES = 16  # weights of a row that may leave, and as many that may come, in one round of swaps


def choose(problem: LayerProblem, pattern: Pattern, factor: Factor | None = None) -> SparseSolution:
    """The mask that ADMM settles on, with the values it has there by then; unstructured zeros compete over the layer.

    With B the fit to the layer, Z what obeys the pattern and U the sum of their differences, a round is
    B = (W H + p (Z - U)) inv(H + p), T = U + B, Z = the best part of T, U = the rest of it.
    `factor` is the problem's in any order, where the caller has it. Raises RequestError where the pattern does not fit
    the columns, and as `problem.factor` does.
    """
    pattern.check(problem.weight_RC.shape[-1], problem.name)
    damping = (factor or problem.factor("natural")).damping
    damped_CC = problem.damped(damping)
    size_C = damped_CC.diagonal(dim1=-2, dim2=-1).sqrt()
    hessian_CC = damped_CC / (size_C.unsqueeze(-1) * size_C.unsqueeze(-2))  # inputs of one size: penalties weigh alike
    start_RC = problem.weight_RC * size_C.unsqueeze(-2)
    goal_RC = start_RC @ hessian_CC
    both_RC = start_RC * best_mask(start_RC.square(), pattern)  # T
    identity_CC = torch.eye(hessian_CC.shape[-1], dtype=hessian_CC.dtype, device=hessian_CC.device)
    for penalty in PENALTIES:
        inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(hessian_CC + penalty * identity_CC))
        for _ in range(ROUNDS):
            _argue(both_RC, goal_RC, inverse_CC, penalty, pattern)
    keep_RC = best_mask(both_RC.square(), pattern)
    values_RC = both_RC * keep_RC / size_C.unsqueeze(-2)
    return SparseSolution(values_RC, keep_RC, pattern, _loss_R(problem.weight_RC, damped_CC, values_RC), damping)


def _argue(both_RC: Tensor, goal_RC: Tensor, inverse_CC: Tensor, penalty: float, pattern: Pattern) -> None:
    """One round of ADMM: T, in place, some rows at a time, so that a CPU finds them in its cache.

    With Z the best part of T and U the rest, the next T is U + (W H + p (Z - U)) inv(H + p).
    """
    best_part = _best_part(both_RC, pattern)
    multiply = torch.Tensor.addmm_ if both_RC.dim() == 2 else torch.Tensor.baddbmm_
    rows = both_RC.shape[-2] if both_RC.is_cuda else max(CHUNK_ROWS, CHUNK_ELEMENTS // both_RC[..., 0, :].numel())
    for start in range(0, both_RC.shape[-2], rows):
        at = slice(start, start + rows)
        now_RC = both_RC[..., at, :]
        kept_RC = best_part(now_RC, at)
        kept_RC.sub_(now_RC.sub_(kept_RC))  # `now` is U by now
        multiply(now_RC, torch.add(goal_RC[..., at, :], kept_RC, alpha=penalty, out=kept_RC), inverse_CC)


def _best_part(both_RC: Tensor, pattern: Pattern) -> Callable[[Tensor, slice], Tensor]:
    """What gives some rows of T their best part, zero elsewhere.

    The threshold of unstructured sparsity is read off a sample of a large layer: much faster, and good to 0.2 %.
    """
    if pattern.of:
        return lambda now_RC, at: now_RC * _best_of_groups(now_RC.square(), pattern)
    if pattern.block > 1 or both_RC.dim() > 2 or both_RC.numel() < 8 * SAMPLE:
        keep_RC = best_mask(both_RC.square(), pattern)
        return lambda now_RC, at: now_RC * keep_RC[..., at, :]
    some_N = both_RC.flatten()[:: both_RC.numel() // SAMPLE].abs()
    zeros = round(pattern.sparsity * len(some_N))
    limit = float(some_N.kthvalue(zeros).values) if zeros else -1.0
    return lambda now_RC, at: torch.nn.functional.hardshrink(now_RC, limit) if zeros else now_RC.clone()


def best_mask(worth_RC: Tensor, pattern: Pattern) -> Tensor:
    """The mask of this pattern that keeps the most worth in each layer, with exactly its number of zeros."""
    if pattern.of:
        return _best_of_groups(worth_RC, pattern)
    block_RN = worth_RC.unflatten(-1, (-1, pattern.block)).sum(-1).flatten(-2)
    zeros = round(pattern.sparsity * block_RN.shape[-1])
    keep_RN = torch.ones_like(block_RN, dtype=torch.bool)
    keep_RN.scatter_(-1, block_RN.topk(zeros, -1, largest=False, sorted=False).indices, False)
    keep_RC: Tensor = keep_RN.unflatten(-1, (worth_RC.shape[-2], -1)).repeat_interleave(pattern.block, -1)
    return keep_RC


def _best_of_groups(worth_RC: Tensor, pattern: Pattern) -> Tensor:
    """N:M masks: in small groups by comparing all pairs (several times faster than sorting), of equals the first."""
    group_RGM = worth_RC.unflatten(-1, (-1, pattern.of))
    if pattern.of > PAIRED:
        kept = group_RGM.topk(pattern.keep, -1).indices
        return torch.zeros_like(group_RGM, dtype=torch.bool).scatter_(-1, kept, True).flatten(-2)
    places = group_RGM.unbind(-1)
    better = [torch.zeros_like(place, dtype=torch.int8) for place in places]  # how many of its group outdo it
    for one, other in itertools.combinations(range(pattern.of), 2):
        first = places[one] >= places[other]
        better[other] += first
        better[one] += ~first
    return torch.stack([count < pattern.keep for count in better], -1).flatten(-2)


def resolve(
    problem: LayerProblem, solution: SparseSolution, steps: int = STEPS, factor: Factor | None = None
) -> SparseSolution:
    """The values of a support moved towards their least-squares ones by `steps` of conjugate gradients.

    All rows at once, preconditioned by inv(H) cut to each row's support; no row's loss rises (a row that rounding
    would have made worse keeps its values). `factor` is the problem's in any order, where the caller has it.
    """
    if not steps:
        return solution
    hessian_CC, keep_RC = problem.damped(solution.damping), solution.keep_RC
    inverse_CC = (factor or problem.factor("natural")).inverse()
    values_RC = solution.values_RC
    residual_RC = ((problem.weight_RC - values_RC) @ hessian_CC).mul_(keep_RC)
    toward_RC = conditioned_RC = (residual_RC @ inverse_CC).mul_(keep_RC)
    progress_R1 = (residual_RC * conditioned_RC).sum(-1, keepdim=True)
    tiny = torch.finfo(values_RC.dtype).tiny
    for step in range(steps):
        bent_RC = (toward_RC @ hessian_CC).mul_(keep_RC)
        stride_R1 = progress_R1 / (toward_RC * bent_RC).sum(-1, keepdim=True).clamp(min=tiny)
        values_RC = torch.addcmul(values_RC, stride_R1, toward_RC)
        if step + 1 == steps:
            break
        residual_RC.addcmul_(stride_R1, bent_RC, value=-1)
        conditioned_RC = (residual_RC @ inverse_CC).mul_(keep_RC)
        before_R1, progress_R1 = progress_R1, (residual_RC * conditioned_RC).sum(-1, keepdim=True)
        toward_RC = torch.addcmul(conditioned_RC, progress_R1 / before_R1.clamp(min=tiny), toward_RC)
    return better_rows(problem, solution, replace(solution, values_RC=values_RC))


def swap(
    problem: LayerProblem, solution: SparseSolution, rounds: int = 4, factor: Factor | None = None
) -> SparseSolution:
    """Exchanges one kept weight of each row for a pruned one where that lowers its loss, then resolves; many times.

    The pair is the best of the `CANDIDATES` cheapest to lose and the `CANDIDATES` most wanted, priced exactly with the
    other weights held; with N:M sparsity both must lie in one group. Counts of zeros stay as they are, row by row.
    Raises RequestError for a pattern of blocks, which single weights would break up.
    """
    if solution.pattern.block > 1:
        raise RequestError(
            f"{problem.name} has zeros in blocks of {solution.pattern.block}, and swaps move single weights: take 0."
        )
    hessian_CC = problem.damped(solution.damping)
    for _ in range(rounds):
        keep_RC = _swapped(problem.weight_RC, hessian_CC, solution)
        if bool((keep_RC == solution.keep_RC).all()):
            break
        moved = replace(solution, keep_RC=keep_RC, values_RC=solution.values_RC * keep_RC)
        moved = replace(moved, loss_R=_loss_R(problem.weight_RC, hessian_CC, moved.values_RC))
        solution = better_rows(problem, solution, resolve(problem, moved, STEPS, factor))
    return solution


def _swapped(weight_RC: Tensor, hessian_CC: Tensor, solution: SparseSolution) -> Tensor:
    """The mask after the best exchange of each row, where one lowers its loss."""
    values_RC, keep_RC = solution.values_RC, solution.keep_RC
    slope_RC, curve_C = (values_RC - weight_RC) @ hessian_CC, hessian_CC.diagonal()
    count = min(CANDIDATES, values_RC.shape[-1])
    lose_RC = (values_RC.square() * curve_C - 2 * values_RC * slope_RC).masked_fill(~keep_RC, torch.inf)
    want_RC = (slope_RC.square() / curve_C).masked_fill(keep_RC, -torch.inf)
    (lose_RK, from_RK), (want_RK, to_RK) = lose_RC.topk(count, -1, largest=False), want_RC.topk(count, -1)
    slope_RKK = (
        slope_RC.gather(-1, to_RK).unsqueeze(-2)
        - values_RC.gather(-1, from_RK).unsqueeze(-1) * (hessian_CC[from_RK.unsqueeze(-1), to_RK.unsqueeze(-2)])
    )
    change_RKK = lose_RK.unsqueeze(-1) - slope_RKK.square() / curve_C[to_RK].unsqueeze(-2)
    change_RKK = torch.where(torch.isfinite(want_RK).unsqueeze(-2), change_RKK, torch.inf)
    if solution.pattern.of:
        group = solution.pattern.of
        change_RKK.masked_fill_((from_RK // group).unsqueeze(-1) != (to_RK // group).unsqueeze(-2), torch.inf)
    best_R, pair_R = change_RKK.flatten(-2).min(-1)
    out_R1 = from_RK.gather(-1, (pair_R // count).unsqueeze(-1))
    in_R1 = to_RK.gather(-1, (pair_R % count).unsqueeze(-1))
    swapped_RC = keep_RC.scatter(-1, out_R1, False).scatter(-1, in_R1, True)
    return torch.where((best_R < 0).unsqueeze(-1), swapped_RC, keep_RC)


def better_rows(problem: LayerProblem, old: SparseSolution, new: SparseSolution) -> SparseSolution:
    """Row by row, the solution with the smaller loss; `old`, whose loss_R must be true, where they tie."""
    new_R = _loss_R(problem.weight_RC, problem.damped(old.damping), new.values_RC)
    take_R1 = (new_R < old.loss_R).unsqueeze(-1)
    return replace(
        old,
        values_RC=torch.where(take_R1, new.values_RC, old.values_RC),
        keep_RC=torch.where(take_R1, new.keep_RC, old.keep_RC),
        loss_R=torch.minimum(new_R, old.loss_R),
    )


def _loss_R(weight_RC: Tensor, hessian_CC: Tensor, values_RC: Tensor) -> Tensor:
    delta_RC = weight_RC - values_RC
    return ((delta_RC @ hessian_CC) * delta_RC).sum(-1)


def masked(problem: LayerProblem, keep_RC: Tensor, pattern: Pattern, damping: float) -> SparseSolution:
    """The given weights under a mask, nothing made up for: where `resolve` starts."""
    values_RC = problem.weight_RC * keep_RC
    loss_R = _loss_R(problem.weight_RC, problem.damped(damping), values_RC)
    return SparseSolution(values_RC, keep_RC, pattern, loss_R, damping)
