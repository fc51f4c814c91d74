"""The layer-wise block solver: collect what every matrix sees, then solve the matrices that see the same, together.

Shapes: S sequences, T tokens, D width, R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from featherweight.core.hessian import CrossSum, HessianSum
from featherweight.core.problem import LayerProblem
from featherweight.core.refine import refine
from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.core.sweep import round_to_nearest, sweep
from featherweight.errors import FeatherweightError
from featherweight.models.tree import Matrix
from featherweight.recipe import Recipe
from featherweight.stream.hidden import HiddenStates

Tick = Callable[[float], None]


@dataclass(frozen=True)
class BlockView:
    """A block as a solver sees it.

    Attributes:
        module: the block on the device with its original weights.
        matrices: what is to be compressed in it.
        run: one batch of hidden states through the module.
        inputs: the hidden states the compressed model brings to this block; None where the method needs none.
        dense: those the original model brings, where the recipe's target asks for them; `collect` replaces them by the
            original block's outputs.
        batch: sequences in one forward pass.
    """

    module: nn.Module
    matrices: tuple[Matrix, ...]
    run: Callable[[Tensor], Tensor]
    inputs: HiddenStates | None
    dense: HiddenStates | None
    batch: int

    def weight(self, matrix: Matrix) -> Tensor:
        """The matrix as R x C float32 (a Conv1D keeps it the other way round)."""
        weight = self.parameter(matrix).detach()
        return (weight.T if matrix.transposed else weight).float()

    def put(self, matrix: Matrix, values_RC: Tensor) -> None:
        """Replaces the weights of a matrix by those of its solution."""
        with torch.no_grad():
            self.parameter(matrix).copy_(values_RC.T if matrix.transposed else values_RC)

    def parameter(self, matrix: Matrix) -> Tensor:
        """The module's own weight, laid out as the module has it."""
        return self.module.get_parameter(f"{matrix.path}.weight")


def layerwise(
    view: BlockView, rules: Mapping[str, Grid], recipe: Recipe, lowest_zero: int, tick: Tick
) -> dict[str, Solution]:
    """Solves every matrix of a block by itself; returns solutions by `Matrix.path`.

    `tick` hears the share of this block's work that is done, 0 .. 1.
    """
    if recipe.method == "rtn":
        return {
            matrix.path: round_to_nearest(_rtn_problem(view, matrix), rules[matrix.path], lowest_zero)
            for matrix in view.matrices
        }
    groups = input_groups(view)
    stages = [[group] for group in groups] if recipe.true_sequential else [groups]
    solutions: dict[str, Solution] = {}
    for number, stage in enumerate(stages):
        span = 1 / len(stages)

        def collected(share: float, number: int = number, span: float = span) -> None:
            tick((number + 0.6 * share) * span)

        sums = collect(view, stage, collected)
        for group, (hessian, cross) in zip(stage, sums, strict=True):
            solved = solve_group(view, group, hessian, cross, rules, recipe, lowest_zero)
            solutions |= solved
            if recipe.true_sequential:
                for matrix in group:
                    view.put(matrix, solved[matrix.path].values())
        tick((number + 1) * span)
    return solutions


def input_groups(view: BlockView) -> list[tuple[Matrix, ...]]:
    """Matrices that are fed the same tensor, in the order they run (q, k, v together; gate and up together)."""
    seen: list[tuple[Tensor, list[Matrix]]] = []

    def note(matrix: Matrix, inputs: Tensor) -> None:
        for tensor, matrices in seen:
            if tensor is inputs or (tensor.data_ptr() == inputs.data_ptr() and tensor.shape == inputs.shape):
                matrices.append(matrix)
                return
        seen.append((inputs, [matrix]))

    assert view.inputs is not None
    with torch.no_grad(), _listening(view, view.matrices, note):
        _, hidden_STD = next(view.inputs.batches(1))
        view.run(hidden_STD)
    missed = {m.name for m in view.matrices} - {m.name for _, matrices in seen for m in matrices}
    if missed:
        raise FeatherweightError(
            f"{min(missed)} was never run by its block: it cannot be calibrated; ignore it or use --method rtn."
        )
    return [tuple(matrices) for _, matrices in seen]


def collect(view: BlockView, groups: list[tuple[Matrix, ...]], tick: Tick) -> list[tuple[HessianSum, CrossSum | None]]:
    """H of each group's inputs over all sequences, and what those have in common with their drift (where wanted)."""
    assert view.inputs is not None
    device = view.inputs.device
    sums = {group[0].path: HessianSum(group[0].columns, device) for group in groups}
    crosses = (
        {g[0].path: CrossSum(g[0].columns, g[0].columns, device) for g in groups} if view.dense is not None else {}
    )
    heard: dict[str, Tensor] = {}
    original: dict[str, Tensor] = {}
    leaders = [group[0] for group in groups]
    sequences = view.inputs.states_STD.shape[0]
    for at, hidden_STD in view.inputs.batches(view.batch):
        dense_STD = None
        if view.dense is not None:
            with _listening(view, leaders, lambda matrix, inputs: original.__setitem__(matrix.path, inputs)):
                dense_STD = view.run(view.dense.states_STD[at].to(device))
        with _listening(view, leaders, lambda matrix, inputs: heard.__setitem__(matrix.path, inputs)):
            view.run(hidden_STD)
        for path, inputs in heard.items():
            sums[path].add(inputs)
            if original:
                crosses[path].add(original[path] - inputs, inputs)
        if view.dense is not None and dense_STD is not None:  # only now: what was heard may be a view of the states
            view.dense.states_STD[at] = dense_STD
        tick(at.stop / sequences)
    return [(sums[group[0].path], crosses.get(group[0].path)) for group in groups]


def solve_group(
    view: BlockView,
    group: tuple[Matrix, ...],
    hessian: HessianSum,
    cross: CrossSum | None,
    rules: Mapping[str, Grid],
    recipe: Recipe,
    lowest_zero: int,
) -> dict[str, Solution]:
    """Solves matrices with one H as one problem of all their rows, and takes the solution apart again."""
    weight_RC = torch.cat([view.weight(matrix) for matrix in group])
    problem = LayerProblem(weight_RC, hessian.mean(), hessian.tokens, recipe.damping, " + ".join(m.name for m in group))
    if cross is not None:
        problem = replace(problem, weight_RC=undo_drift(problem, cross.mean(), recipe.pull))
    solution = sweep(problem, rules[group[0].path], recipe.order, recipe.scales_from, lowest_zero=lowest_zero)
    if recipe.refine:
        solution = refine(problem, solution, recipe.refine)
    check_certificate(problem, solution)
    solutions, start = {}, 0
    for matrix in group:
        part = solution.rows(start, start + matrix.rows)
        scale = _energy(problem, start, start + matrix.rows)
        solutions[matrix.path] = replace(part, metrics={"relative_loss": part.certificate / scale if scale else 0.0})
        start += matrix.rows
    return solutions


def undo_drift(problem: LayerProblem, cross_CC: Tensor, pull: float) -> Tensor:
    """The weights that on the drifted inputs x' come closest to what the original weights make of the original x.

    W* = W + pull W (sum (x - x') x'^T) inv(H damped): the least-squares answer, of which `pull` is taken.
    """
    drift_CC = torch.linalg.solve(problem.damped(), cross_CC.T).T
    return problem.weight_RC + pull * (problem.weight_RC @ drift_CC)


def check_certificate(problem: LayerProblem, solution: Solution) -> None:
    """The solver's own loss against that of the values its codes stand for; a difference is a bug of ours."""
    delta_RC = problem.weight_RC - solution.values()
    actual = float(((delta_RC @ problem.damped(solution.damping)) * delta_RC).sum())
    if not abs(actual - solution.certificate) <= 1e-3 * abs(actual) + 1e-12:
        raise FeatherweightError(
            f"{problem.name}: the solver claims a loss of {solution.certificate:.6g} and its codes have {actual:.6g}: "
            "please report this."
        )


def _energy(problem: LayerProblem, start: int, stop: int) -> float:
    """tr(W H W^T) of some rows: what their outputs hold in all."""
    rows_RC = problem.weight_RC[start:stop]
    return float(((rows_RC @ problem.hessian_CC) * rows_RC).sum())


def _rtn_problem(view: BlockView, matrix: Matrix) -> LayerProblem:
    weight_RC = view.weight(matrix)
    return LayerProblem(weight_RC, torch.eye(matrix.columns, device=weight_RC.device), 0, 0.0, matrix.name)


@contextmanager
def _listening(
    view: BlockView, matrices: tuple[Matrix, ...] | list[Matrix], hear: Callable[[Matrix, Tensor], None]
) -> Iterator[None]:
    """Calls `hear` with the input of each of these matrices as the block runs."""
    handles = []
    for matrix in matrices:

        def hook(_: nn.Module, args: tuple[Tensor, ...], matrix: Matrix = matrix) -> None:
            hear(matrix, args[0])

        handles.append(view.module.get_submodule(matrix.path).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
