"""What every solved layer goes through: its certificate is checked, and layers that were solved as one come apart.

Shapes: E layers of equal shape, R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from featherweight.core import fused, scales
from featherweight.core.problem import LayerProblem, loss_R
from featherweight.core.products import left, roughly, times
from featherweight.core.refine import descend, refit_scales
from featherweight.core.rules import Grid, Rule
from featherweight.core.solution import AnySolution, Solution
from featherweight.core.solve import Choices
from featherweight.core.sweep import WIDE_SLAB, sweep
from featherweight.errors import FeatherweightError
from featherweight.models.tree import Matrix
from featherweight.stream.onelayer import solve_layer

COMPILERS = 3  # threads
COMPILED_ROWS, COMPILED_COLUMNS = 64, 256  # of the layer that is solved for the sake of its kernels
MANY_ROWS = 1 << 16  # for which column loops are another kernel
LOSS_TOLERANCE, ENERGY_TOLERANCE = 1e-3, 1e-6  # of a loss that is claimed: relative to itself, and to w H w^T


def check_certificate(problem: LayerProblem, solution: AnySolution) -> None:
    """The solver's own loss, layer by layer, against that of the values its codes stand for; a difference is a bug of
    ours.

    Where descent set out from far worse codes (one column with a thousandfold H, and scales chosen without it), the
    claim keeps the rounding of all that was taken away: a millionth of the layer's w H w^T is no difference.
    """
    actual_R = loss_R(problem, solution.values(), solution.damping)
    sums = torch.stack([actual_R.sum(-1).double(), solution.loss_R.double().sum(-1)]).view(2, -1).tolist()
    for layer, (actual, claimed) in enumerate(zip(*sums, strict=True)):
        difference = abs(actual - claimed)
        if difference <= LOSS_TOLERANCE * abs(actual) + 1e-12:
            continue
        given = problem.weight_RC, problem.damped(solution.damping)
        one_RC, one_CC = (each if each.dim() == 2 else each[layer] for each in given)
        if not difference <= ENERGY_TOLERANCE * float((times(one_RC, one_CC) * one_RC).sum()):
            raise FeatherweightError(
                f"{problem.name}: the solver claims a loss of {claimed:.6g} and its codes have {actual:.6g}: "
                "please report this."
            )


def energy_R(problem: LayerProblem) -> Tensor:
    """What losses are relative to, w H w^T of every row, to three digits."""
    return (roughly(problem.weight_RC, problem.hessian_CC) * problem.weight_RC).sum(-1)


def split(energy_R: Tensor, solution: AnySolution, matrices: Iterable[Matrix]) -> dict[str, AnySolution]:
    """The solutions, by `Matrix.path`, of the matrices whose rows made up one problem, with their relative loss.

    Losses go to the CPU, where the sums that are told of cost nothing.
    """
    solution, energy_R = replace(solution, loss_R=solution.loss_R.cpu()), energy_R.cpu()
    solutions: dict[str, AnySolution] = {}
    start = 0
    for matrix in matrices:
        part = solution.rows(start, start + matrix.rows)
        energy = float(energy_R[start : start + matrix.rows].sum())
        metrics = {**part.metrics, "relative_loss": part.certificate / energy if energy else 0.0}
        solutions[matrix.path] = replace(part, metrics=metrics)
        start += matrix.rows
    return solutions


def solve_stack(
    problem: LayerProblem, gap_ECC: Tensor | None, rule: Rule, choices: Choices
) -> tuple[LayerProblem, list[AnySolution]]:
    """A stack of layers of equal shape, solved together as they would be one by one; and the problem that was solved.

    `gap_ECC` is the part of the drift that is to be undone, as a mean: W becomes W + W gap inv(H) first.
    """
    count = len(problem.weight_RC)
    factor = problem.factor(choices.order)
    if factor.damping != problem.damping and count > 1:  # some layer needs more of it; the others need not have it too
        apart = [slice(n, n + 1) for n in range(count)]
        gaps = [None if gap_ECC is None else gap_ECC[at] for at in apart]
        found = [solve_stack(_of(problem, at), gap, rule, choices) for at, gap in zip(apart, gaps, strict=True)]
        moved_ERC = torch.cat([one.weight_RC for one, _ in found])
        return problem.moved(moved_ERC), [solution for _, each in found for solution in each]
    if gap_ECC is not None:
        problem = problem.moved(problem.weight_RC + factor.solve(times(problem.weight_RC, gap_ECC)))
    stack = solve_layer(problem, rule, choices, factor)
    check_certificate(problem, stack)
    stack = replace(stack, loss_R=stack.loss_R.cpu())
    return problem, [stack.layer(n) for n in range(count)]


def compile_solver(rule: Rule, choices: Choices, device: torch.device) -> None:
    """Has what the first real layer needs compiled, on a small random one, one kernel a thread: it takes seconds, and
    the device has other work meanwhile.
    """
    if not isinstance(rule, Grid) or choices.method != "gptq" or not fused.usable(torch.empty(0, device=device)):
        return
    with torch.cuda.device(device), torch.no_grad():  # neither is known to other threads than the first
        pieces = _pieces(rule, choices, device)
        torch.cuda.current_stream().synchronize()
    with ThreadPoolExecutor(COMPILERS, "compiler") as pool:
        list(pool.map(lambda piece: _run_apart(piece, device), pieces))
    fused.try_again()  # if compiling beside other things has failed, the first layer may yet do it alone


def _pieces(grid: Grid, choices: Choices, device: torch.device) -> list[Callable[[], Any]]:
    """What of a solver is a kernel each, on a small layer."""
    width = grid.group_size or COMPILED_COLUMNS
    columns = -(-COMPILED_COLUMNS // width) * width
    draw = torch.Generator(device).manual_seed(0)
    weight_RC = torch.randn(COMPILED_ROWS, columns, generator=draw, dtype=torch.float32, device=device)
    problem = LayerProblem(weight_RC, torch.eye(columns, dtype=torch.float32, device=device), columns)
    shape = (COMPILED_ROWS, columns // width)
    fitted = (
        torch.ones(shape, dtype=grid.scale_dtype, device=device),
        torch.full(shape, grid.middle, dtype=torch.uint8, device=device),
    )
    codes_RC = torch.full_like(weight_RC, grid.middle, dtype=torch.uint8)
    solution = Solution(codes_RC, *fitted, grid, weight_RC.square().sum(-1))
    return [
        lambda: scales.fit(grid, weight_RC.unflatten(-1, (-1, width)), None, choices.lowest_zero),
        lambda: sweep(problem, grid, choices.order, fitted=fitted),
        lambda: fused.compile_slabs(device, MANY_ROWS, WIDE_SLAB),
        lambda: descend(weight_RC, problem.hessian_CC, solution),
        lambda: refit_scales(weight_RC, problem.hessian_CC, solution),
        lambda: [left(weight_RC.mT), left(weight_RC, torch.float16), left(weight_RC.mT, torch.float16)],
    ]


def _run_apart(work: Callable[[], Any], device: torch.device) -> None:
    stream = torch.cuda.Stream(device)
    with torch.no_grad(), torch.cuda.stream(stream):
        work()
    stream.synchronize()


def _of(problem: LayerProblem, at: slice) -> LayerProblem:
    return replace(problem, weight_RC=problem.weight_RC[at], hessian_CC=problem.hessian_CC[at])
