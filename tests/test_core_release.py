"""Masks let go after rounding (`release`), against definitions and brute force.

Shapes: R outputs, C inputs, E layers of one shape.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from featherweight.core.problem import LayerProblem
from featherweight.core.refine import descend, refine
from featherweight.core.release import exchange, release, rounds_worth
from featherweight.core.rules import Grid, Joint, Pattern
from featherweight.core.solution import Solution
from featherweight.core.solve import Choices, solve
from featherweight.core.sweep import sweep
from oracles import brute_force_sparse, coordinate_pass, damped, exchange_group, layer_loss, levels, random_layer

HALF, TWO_OF_FOUR, SEVENTY = Pattern(0.5), Pattern(keep=2, of=4), Pattern(0.7)
GRIDS = [Grid(1.58, None), Grid(2, 32, False), Grid(4, 32)]
HELD = Choices(release=False)


def layer(rows: int = 16, columns: int = 96, seed: int = 0) -> LayerProblem:
    return LayerProblem(*random_layer(rows, columns, seed, dead=(3,) if columns > 8 else ()))


def joint(problem: LayerProblem, grid: Grid, pattern: Pattern, choices: Choices = HELD) -> Solution:
    solution = solve(problem, Joint(grid, pattern), choices)
    assert isinstance(solution, Solution)
    return solution


def check(problem: LayerProblem, solution: Solution, pattern: Pattern) -> None:
    """The certificate is true, the count exact, and what is pruned is zero."""
    assert solution.keep_RC is not None
    values_RC = solution.values(torch.float64)
    true_R = layer_loss(problem.weight_RC, values_RC, damped(problem.hessian_CC, solution.damping))
    torch.testing.assert_close(solution.loss_R.double(), true_R, rtol=1e-6, atol=0)
    assert not values_RC[~solution.keep_RC].any()
    if pattern.of:
        assert (solution.keep_RC.unflatten(-1, (-1, pattern.of)).sum(-1) == pattern.keep).all()
    else:
        assert int((~solution.keep_RC).sum()) == round(pattern.sparsity * solution.keep_RC.numel())


@pytest.mark.parametrize("pattern", [HALF, SEVENTY, TWO_OF_FOUR, Pattern(keep=1, of=8)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_release_lowers_the_loss_and_keeps_the_count(grid: Grid, pattern: Pattern) -> None:
    problem = layer()
    held = joint(problem, grid, pattern)
    found = release(problem, held, 3)
    check(problem, found, pattern)
    assert found.certificate < held.certificate
    assert found.scales_RG.dtype == held.scales_RG.dtype and torch.equal(found.zeros_RG, held.zeros_RG)
    if pattern.of:
        assert (found.loss_R <= held.loss_R * (1 + 1e-9)).all()
    more = release(problem, found, 1)
    assert more.certificate <= found.certificate


def test_it_is_worth_most_where_levels_are_few() -> None:
    problem = layer(32)
    starts = [joint(problem, grid, HALF) for grid in GRIDS]
    gain = [release(problem, held, 3).certificate / held.certificate for held in starts]
    assert gain[0] < 0.95 and gain[1] < 0.97 and gain[0] < gain[2]
    assert [rounds_worth(grid) for grid in GRIDS] == [3, 3, 0]


@pytest.mark.parametrize("pattern", [HALF, TWO_OF_FOUR], ids=str)
@pytest.mark.parametrize("grid, columns", [(Grid(1.58, None), 8), (Grid(2, 4, False), 4)], ids=str)
def test_brute_force_bounds_it_and_is_near(grid: Grid, columns: int, pattern: Pattern) -> None:
    before = after = best = 0.0
    for seed in range(6):
        problem = layer(3, columns, seed)
        held = joint(problem, grid, pattern)
        found = release(problem, held)
        check(problem, found, pattern)
        least = brute_force_sparse(problem.weight_RC, damped(problem.hessian_CC, 0.01), levels(found), pattern)
        assert found.certificate >= least * (1 - 1e-9)
        before, after, best = before + held.certificate, after + found.certificate, best + least
    assert after <= before and after < 1.35 * best


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_descent_at_a_price_is_coordinate_descent_on_loss_and_price(grid: Grid) -> None:
    problem = layer(8, 160, seed=2)  # more than one slab
    grid = replace(grid, group_size=None)
    solution = sweep(problem, grid)
    damped_CC = damped(problem.hessian_CC, 0.01)
    price = 2.0 * float(solution.loss_R.mean() / 160)
    expected_RC = coordinate_pass(problem.weight_RC, damped_CC, solution.values(torch.float64), levels(solution), price)
    found = descend(problem.weight_RC, damped_CC, solution, torch.tensor(price, dtype=torch.float64))
    torch.testing.assert_close(found.values(torch.float64), expected_RC, rtol=0, atol=1e-9)
    assert int(found.nonzero().sum()) < int(solution.nonzero().sum())
    free = descend(problem.weight_RC, damped_CC, solution, torch.tensor(0.0, dtype=torch.float64))
    assert torch.equal(free.codes_RC, descend(problem.weight_RC, damped_CC, solution).codes_RC)


@pytest.mark.parametrize("grid", [Grid(1.58, None), Grid(2, 8, False)], ids=str)
def test_exchanges_by_definition(grid: Grid) -> None:
    problem, pattern = layer(4, 24, seed=1), TWO_OF_FOUR
    held = joint(problem, grid, pattern, Choices(method="rtn"))
    held = replace(held, loss_R=held.loss_R.double())
    damped_CC, every = damped(problem.hessian_CC, 0.01), levels(held)
    stack = exchange(problem.weight_RC[None], damped_CC[None], held.stacked(), pattern).layer(0)
    assert stack.keep_RC is not None and held.keep_RC is not None
    for r in range(4):
        values_C, keep_C = held.values(torch.float64)[r], held.keep_RC[r]
        for start in range(0, 24, 4):
            values_C, keep_C = exchange_group(
                problem.weight_RC[r], damped_CC, values_C, keep_C, every[r], range(start, start + 4)
            )
        torch.testing.assert_close(stack.values(torch.float64)[r], values_C, rtol=0, atol=1e-9)
        assert torch.equal(stack.keep_RC[r], keep_C)
    assert not torch.equal(stack.keep_RC, held.keep_RC)


@pytest.mark.parametrize("pattern", [HALF, TWO_OF_FOUR], ids=str)
def test_stacked_layers_are_each_on_its_own(pattern: Pattern) -> None:
    rule, parts = Joint(Grid(2, 16), pattern), [layer(6, 32, seed) for seed in range(3)]
    stacked = LayerProblem(
        torch.stack([part.weight_RC for part in parts]), torch.stack([part.hessian_CC for part in parts])
    )
    together = solve(stacked, rule)
    for n, part in enumerate(parts):
        alone = solve(part, rule)
        assert torch.equal(together.layer(n).values(), alone.values())
        assert alone.certificate < solve(part, rule, HELD).certificate


def test_what_is_not_released() -> None:
    """Blocks, which single weights would break up; what has no pattern; and nothing where nothing is refined."""
    problem = layer(8, 32)
    blocks = joint(problem, Grid(2, 16), Pattern(0.5, block=4))
    assert release(problem, blocks) is blocks
    dense = refine(problem, sweep(problem, Grid(2, 16)))
    assert release(problem, dense) is dense
    for choices in (Choices(refine=0), Choices(method="rtn")):
        kept = [joint(problem, Grid(2, 16), HALF, replace(choices, release=on)) for on in (True, False)]
        assert torch.equal(kept[0].codes_RC, kept[1].codes_RC)


@pytest.mark.parametrize("sparsity", [0.0, 0.97])
def test_nearly_all_and_nearly_none(sparsity: float) -> None:
    problem, pattern = layer(4, 32), Pattern(sparsity)
    held = joint(problem, Grid(2, 16), pattern)
    found = release(problem, held, 2)
    check(problem, found, pattern)
    assert found.certificate <= held.certificate * (1 + 1e-9)
