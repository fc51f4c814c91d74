"""One layer, any rule, any method: what stands between "compress this" and the solvers of this room.

Shapes: R outputs, C inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from featherweight.core import support
from featherweight.core.blocked import obq_by_slabs, obs_by_slabs
from featherweight.core.greedy import obq, obs
from featherweight.core.problem import Factor, LayerProblem, Order
from featherweight.core.prune import prune, prune_and_round
from featherweight.core.refine import refine
from featherweight.core.release import release
from featherweight.core.rules import Grid, Joint, Pattern, Rule
from featherweight.core.solution import AnySolution, Solution, SparseSolution
from featherweight.core.sweep import ScalesFrom, round_to_nearest, sweep

Method = Literal["gptq", "obq", "rtn"]
Mask = Literal["admm", "sparsegpt", "wanda", "obs"]
EXACT_COLUMNS = 2048  # greedy solvers go slab by slab beyond: their time grows as the cube


@dataclass(frozen=True)
class Choices:
    """How a layer is solved; `Rule` says for what.

    Attributes:
        method: how weights are rounded: "gptq" (the sweep), "obq" (greedy, slow) or "rtn" (nothing is made up for;
            with a pattern: magnitude pruning).
        mask: how zeros are chosen: "admm" (the layer as a whole), "sparsegpt" (in the sweep, slab by slab), "wanda"
            (|w| times its input, row by row) or "obs" (greedy, slow).
        order, scales_from: see `sweep`.
        refine: rounds of descent after rounding.
        release: with a grid and a pattern, decide zeros and codes together after that, as many zeros kept; not where
            nothing is refined.
        resolve: steps of conjugate gradients on the weights that are kept (at most 2 after ADMM, which begins near the
            answer); 0 leaves them as the mask's method does.
        swaps: rounds of exchanging kept for pruned weights after that.
        lowest_zero: the smallest zero the file format can hold.
        value_dtype: what floats are stored in; pruned weights are rounded to it at the end. None leaves them.
    """

    method: Method = "gptq"
    mask: Mask = "admm"
    order: Order = "activation"
    scales_from: ScalesFrom = "original"
    refine: int = 1
    release: bool = True
    resolve: int = support.STEPS
    swaps: int = 0
    lowest_zero: int = 0
    value_dtype: torch.dtype | None = None


def solve(
    problem: LayerProblem, rule: Rule, choices: Choices | None = None, factor: Factor | None = None
) -> AnySolution:
    """Rounds, prunes, or both: the solution a recipe's choices give for one layer.

    `factor` is the problem's in the chosen order, where the caller has it. Raises RequestError where the rule does not
    fit the columns or H cannot be factored.
    """
    choices = choices or Choices()
    if isinstance(rule, Grid):
        return _rounded(problem, rule, choices, factor)
    if isinstance(rule, Pattern):
        return _as_stored(problem, _pruned(problem, rule, choices, factor), choices.value_dtype)
    if choices.mask == "sparsegpt" and not choices.resolve:
        solution = prune_and_round(problem, rule, lowest_zero=choices.lowest_zero)
        return refine(problem, solution, choices.refine)
    return _joint(problem, rule, choices, factor)


def _rounded(problem: LayerProblem, grid: Grid, choices: Choices, factor: Factor | None) -> Solution:
    if choices.method == "rtn":
        return round_to_nearest(problem, grid, choices.lowest_zero)
    if choices.method == "obq":
        greedy = obq if problem.weight_RC.shape[-1] <= EXACT_COLUMNS else obq_by_slabs
        solution = greedy(problem, grid, lowest_zero=choices.lowest_zero)
    else:
        solution = sweep(
            problem, grid, choices.order, choices.scales_from, lowest_zero=choices.lowest_zero, factor=factor
        )
    return refine(problem, solution, choices.refine)


def _pruned(problem: LayerProblem, pattern: Pattern, choices: Choices, factor: Factor | None) -> SparseSolution:
    pattern.check(problem.weight_RC.shape[-1], problem.name)
    if choices.method == "rtn":
        keep_RC = support.best_mask(problem.weight_RC.square(), pattern)
        return support.masked(problem, keep_RC, pattern, problem.damping)
    factor = factor or problem.factor("natural")
    steps = choices.resolve
    if choices.mask == "obs":
        exact = problem.weight_RC.shape[-1] <= EXACT_COLUMNS
        solution = obs(problem, pattern) if exact else obs_by_slabs(problem, pattern)
    elif choices.mask == "admm":
        solution, steps = support.choose(problem, pattern, factor), min(choices.resolve, support.WARM_STEPS)
    else:
        wanda = choices.mask == "wanda"
        solution = prune(problem, pattern, "wanda" if wanda else "obs", "row" if wanda else "slab")
    solution = support.resolve(problem, solution, steps, factor)
    return support.swap(problem, solution, choices.swaps, factor) if choices.swaps else solution


def _joint(problem: LayerProblem, rule: Joint, choices: Choices, factor: Factor | None) -> Solution:
    """Prunes first, then rounds what is left, the mask held; then lets go of the mask (`release`).

    Rounding starts from the pruned weights V*, so grids are fitted to survivors and every survivor already makes up for
    what was pruned. With V the result, tr((W-V) H (W-V)^T) = that of W-V* + that of V*-V + 2 tr((W-V*) H (V*-V)^T); the
    last term is zero where V* is exact, and is added where it is not.
    """
    pruned = _pruned(problem, rule.pattern, choices, factor)
    from_pruned = replace(problem, weight_RC=pruned.values_RC)
    if choices.method == "rtn":
        rounded = replace(round_to_nearest(from_pruned, rule.grid, choices.lowest_zero), keep_RC=pruned.keep_RC)
    else:
        swept = sweep(
            from_pruned,
            rule.grid,
            choices.order,
            choices.scales_from,
            lowest_zero=choices.lowest_zero,
            factor=factor,
            keep_RC=pruned.keep_RC,
        )
        rounded = refine(from_pruned, swept, choices.refine)
    hessian_CC = problem.damped(rounded.damping)
    cross_RC = (problem.weight_RC - pruned.values_RC) @ hessian_CC
    cross_R = (cross_RC * (pruned.values_RC - rounded.values(cross_RC.dtype))).sum(-1)
    loss_R = pruned.loss_R + rounded.loss_R + 2 * cross_R
    joint = replace(rounded, loss_R=loss_R, pattern=rule.pattern)
    released = choices.release and choices.refine and choices.method != "rtn"
    return release(problem, joint) if released else joint


def _as_stored(problem: LayerProblem, solution: SparseSolution, dtype: torch.dtype | None) -> SparseSolution:
    """The solution with its values rounded to the dtype a file holds them in, and the loss that leaves."""
    if dtype is None:
        return solution
    values_RC: Tensor = solution.values_RC.to(dtype).to(solution.values_RC.dtype)
    delta_RC = problem.weight_RC - values_RC
    loss_R = ((delta_RC @ problem.damped(solution.damping)) * delta_RC).sum(-1)
    return replace(solution, values_RC=values_RC, loss_R=loss_R)
