"""What comes after the sweep (`refine`) and before it (`factor`, orders, damping), against definitions.

Shapes: R outputs, C inputs, G groups.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from featherweight.core import problem as core_problem
from featherweight.core.problem import LayerProblem, column_order, permuted
from featherweight.core.refine import descend, keep_better, refine, refit_scales
from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.core.sweep import round_to_nearest, sweep
from featherweight.errors import FallbackWarning, RequestError
from oracles import (
    activation_order,
    brute_force,
    coordinate_pass,
    damped,
    layer_loss,
    levels,
    pivot_order,
    random_layer,
)

SLACK = 1 + 1e-9  # two ways to compute one loss differ in their last bits
TINY = [(1.58, True, 6, None), (2, True, 6, 6), (2, False, 6, 3), (3, False, 4, 4), (3, True, 4, 2)]


def layer(rows: int = 16, columns: int = 128, seed: int = 0, dead: tuple[int, ...] = ()) -> LayerProblem:
    return LayerProblem(*random_layer(rows, columns, seed, dead))


def grid(bits: float = 3, group_size: int | None = 32, symmetric: bool = False, **more: object) -> Grid:
    return Grid(bits, group_size, symmetric, **{"scale_dtype": torch.bfloat16, **more})  # type: ignore[arg-type]


# --- refine ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, symmetric, columns, group_size", TINY)
def test_brute_force_bounds_the_solvers_and_refine_comes_near(
    bits: float, symmetric: bool, columns: int, group_size: int | None
) -> None:
    excess = torch.zeros(2, 2, dtype=torch.float64)  # sweep, refine x found, best
    for seed in range(4):
        problem = layer(12, columns, seed)
        damped_CC = damped(problem.hessian_CC, 0.01)
        swept = sweep(problem, grid(bits, group_size, symmetric))
        for i, solution in enumerate((swept, refine(problem, swept))):
            best_R = brute_force(problem.weight_RC, damped_CC, levels(solution))
            assert (best_R <= solution.loss_R * SLACK).all()
            excess[i] += torch.stack([solution.loss_R.sum(), best_R.sum()])
    sweep_excess, refine_excess = (excess[:, 0] / excess[:, 1] - 1).tolist()
    assert refine_excess < min(sweep_excess, 0.25)
    assert excess[1, 0] < 0.9 * excess[0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("start", ["round_to_nearest", "sweep"])
@pytest.mark.parametrize("bits, symmetric", [(1.58, True), (2, False), (4, True)])
def test_every_step_of_refine_descends(bits: float, symmetric: bool, start: str, dtype: torch.dtype) -> None:
    problem = layer(32, 160, seed=3, dead=(5, 77))
    problem = LayerProblem(problem.weight_RC.to(dtype), problem.hessian_CC.to(dtype))
    solution = {"sweep": sweep, "round_to_nearest": round_to_nearest}[start](problem, grid(bits, 32, symmetric))
    weight_RC, damped_CC = problem.weight_RC, problem.damped()
    slack = 1 + (1e-9 if dtype == torch.float64 else 1e-5)

    def descends(new: Solution, old: Solution) -> None:
        before_R, after_R = (layer_loss(weight_RC, s.values(torch.float64), damped_CC) for s in (old, new))
        assert (after_R <= before_R * slack).all() and after_R.sum() < before_R.sum()

    refitted = refit_scales(weight_RC, damped_CC, solution)
    descends(refitted, solution)
    descends(descend(weight_RC, damped_CC, refitted), refitted)
    before = solution
    for rounds in (1, 3):
        after = refine(problem, solution, rounds)
        descends(after, before)
        before = after
    assert torch.equal(before.zeros_RG, solution.zeros_RG) and before.scales_RG.dtype == torch.bfloat16


@pytest.mark.parametrize("bits, symmetric", [(1.58, True), (2, False), (4, True)])
def test_descend_is_coordinate_descent(bits: float, symmetric: bool) -> None:
    problem = layer(8, 160, seed=2, dead=(9, 130))
    solution = round_to_nearest(problem, grid(bits, 32, symmetric))
    damped_CC = damped(problem.hessian_CC, 0.01)
    expected_RC = coordinate_pass(problem.weight_RC, damped_CC, solution.values(torch.float64), levels(solution))
    after = descend(problem.weight_RC, damped_CC, solution)
    torch.testing.assert_close(after.values(torch.float64), expected_RC, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bits, symmetric", [(1.58, True), (2, False), (4, True)])
def test_descend_ends_where_no_single_weight_can_do_better(bits: float, symmetric: bool) -> None:
    problem = layer(4, 160, seed=4)  # two slabs
    damped_CC = problem.damped()
    solution = sweep(problem, grid(bits, 32, symmetric))
    for _ in range(50):
        before, solution = solution, descend(problem.weight_RC, damped_CC, solution)
        if torch.equal(before.codes_RC, solution.codes_RC):
            break
    else:
        raise AssertionError("no end in 50 passes")
    values_RC = solution.values(torch.float64)
    for j in range(160):
        for level_R in levels(solution)[:, j].unbind(-1):
            moved_RC = values_RC.clone()
            moved_RC[:, j] = level_R
            assert (layer_loss(problem.weight_RC, moved_RC, damped_CC) * SLACK >= solution.loss_R).all()


@pytest.mark.parametrize("bits, symmetric", [(1.58, True), (2, False), (4, True)])
def test_refit_scales_is_least_squares(bits: float, symmetric: bool) -> None:
    """With H = L L^T the loss is |L^T (w - K^T s)|^2, which numpy-style least squares solves too."""
    problem = layer(6, 96, seed=5)
    solution = sweep(problem, grid(bits, 24, symmetric, scale_dtype=torch.float64))
    refitted = refit_scales(problem.weight_RC, problem.damped(), solution)
    root_CC = torch.linalg.cholesky(damped(problem.hessian_CC, 0.01)).T
    for r in range(6):
        shift_GN = (solution.codes_RC[r].double().unflatten(-1, (4, 24))) - solution.zeros_RG[r].double().unsqueeze(-1)
        codes_CG = torch.block_diag(*shift_GN).T
        best_G = torch.linalg.lstsq(root_CC @ codes_CG, root_CC @ problem.weight_RC[r]).solution
        torch.testing.assert_close(refitted.scales_RG[r], best_G, rtol=1e-4, atol=0)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are searched and refitted some rows at a time, to bound memory."""
    problem = LayerProblem(*(torch.stack(t) for t in zip(random_layer(6, 64, 1), random_layer(6, 64, 2), strict=True)))
    whole = refine(problem, sweep(problem, grid()))
    monkeypatch.setattr("featherweight.core.scales.CHUNK_ELEMENTS", {"cpu": 128})
    monkeypatch.setattr("featherweight.core.refine.CHUNK_ELEMENTS", {"cpu": 256})
    parts = refine(problem, sweep(problem, grid()))
    assert torch.equal(whole.codes_RC, parts.codes_RC) and torch.equal(whole.scales_RG, parts.scales_RG)


def test_keep_better_goes_row_by_row() -> None:
    problem = layer(8)
    damped_CC = problem.damped()
    one, other = round_to_nearest(problem, grid()), sweep(problem, grid())
    mixed = replace(
        one, **{n: torch.cat([getattr(one, n)[:4], getattr(other, n)[4:]]) for n in ("codes_RC", "scales_RG")}
    )
    kept = keep_better(problem.weight_RC, damped_CC, mixed, other)
    assert torch.equal(kept.codes_RC, other.codes_RC)
    back = keep_better(problem.weight_RC, damped_CC, other, mixed)
    assert torch.equal(back.codes_RC, other.codes_RC)
    torch.testing.assert_close(kept.loss_R, other.loss_R)


@pytest.mark.parametrize(
    "rows",
    [
        8,
        1,
    ],
)
def test_the_given_solution_is_left_alone(rows: int) -> None:
    problem = layer(rows)
    solution = round_to_nearest(problem, grid())
    codes_RC, scales_RG = solution.codes_RC.clone(), solution.scales_RG.clone()
    assert not torch.equal(descend(problem.weight_RC, problem.damped(), solution).codes_RC, codes_RC)
    assert torch.equal(solution.codes_RC, codes_RC) and torch.equal(solution.scales_RG, scales_RG)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["plain", "mirrored"])
def test_weights_that_lie_on_a_grid_come_back_exactly(sign: float) -> None:
    generator = torch.Generator().manual_seed(6)
    codes_RC = torch.randint(0, 16, (8, 128), generator=generator)
    codes_RC[:, ::32] = 0  # the level that is there on one side only
    problem = replace(layer(8), weight_RC=sign * (codes_RC.double() - 8) * 2.0**-6)
    refined = refine(problem, sweep(problem, grid(4, 32, symmetric=True)))
    assert torch.equal(refined.codes_RC, codes_RC.to(torch.uint8))
    assert torch.equal(refined.values(torch.float64), problem.weight_RC) and refined.certificate == 0.0
    assert (refined.scales_RG == sign * 2.0**-6).all()


# --- order, factor and damping ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["activation", "pivot", "natural"])
def test_factor_is_that_of_the_inverse(order) -> None:  # type: ignore[no-untyped-def]
    problem = layer(1, 64, dead=(7,))
    factor = problem.factor(order)
    assert torch.equal(factor.upper_CC, factor.upper_CC.triu()) and (factor.upper_CC.diagonal() > 0).all()
    inverse_CC = torch.linalg.inv(permuted(damped(problem.hessian_CC, 0.01), factor.order_C))
    torch.testing.assert_close(factor.upper_CC.T @ factor.upper_CC, inverse_CC, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_orders_by_definition(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_problem, "PIVOTS", (64, 5, 12)[seed])
    damped_CC = damped(random_layer(1, 24, seed)[1], 0.01)
    assert column_order(damped_CC, "pivot").tolist() == pivot_order(damped_CC)
    assert column_order(damped_CC, "activation").tolist() == activation_order(damped_CC)
    assert column_order(damped_CC, "natural").tolist() == list(range(24))
    assert column_order(torch.ones(5, 5), "activation").tolist() == list(range(5))  # ties keep their places


@pytest.mark.parametrize("columns", [32, 128])
@pytest.mark.parametrize("seed", range(4))
def test_pivot_order_has_the_smallest_bound(seed: int, columns: int) -> None:
    """sum 1/U_jj^2 is what a sweep loses when every error is a full half step."""
    problem = layer(1, columns, seed)

    def bound(order: str) -> float:
        return float(problem.factor(order).upper_CC.diagonal().pow(-2).sum())  # type: ignore[arg-type]

    assert bound("pivot") <= bound("activation") < bound("natural")


def indefinite(columns: int, lowest: float) -> Tensor:
    """A matrix with mean diagonal one and the lowest eigenvalue given: no sum of x x^T, but rounding can make one."""
    generator = torch.Generator().manual_seed(8)
    basis_CC = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
    eigenvalues_C = torch.ones(columns, dtype=torch.float64)
    eigenvalues_C[0], eigenvalues_C[1] = lowest, 2 - lowest
    return (basis_CC * eigenvalues_C) @ basis_CC.T


@pytest.mark.parametrize(
    "lowest, asked, needed", [(-0.05, 0.01, 0.1), (-0.05, 0.0, 0.1), (-0.5, 0.01, 1.0), (-0.5, 0.06, 0.6)]
)
def test_damping_climbs_tenfold_and_says_so(lowest: float, asked: float, needed: float) -> None:
    problem = LayerProblem(layer(4, 32).weight_RC, indefinite(32, lowest), damping=asked, name="blocks.3.q_proj")
    with pytest.warns(FallbackWarning, match=rf"blocks\.3\.q_proj.*{asked:g}.*{needed:g}"):
        solution = sweep(problem, grid(4, 16))
    assert solution.damping == pytest.approx(needed, rel=1e-12)
    for solved in (solution, refine(problem, solution)):
        true_R = layer_loss(problem.weight_RC, solved.values(torch.float64), damped(problem.hessian_CC, needed))
        torch.testing.assert_close(solved.loss_R, true_R, rtol=1e-9, atol=0)


def test_rank_deficient_without_damping_climbs() -> None:
    problem = LayerProblem(layer(4, 8).weight_RC, torch.ones(8, 8, dtype=torch.float64), damping=0.0)
    with pytest.warns(FallbackWarning, match="damping 0: going on with 0.001"):
        assert sweep(problem, grid(4, 8)).damping == pytest.approx(1e-3)


def test_damping_has_an_end() -> None:
    problem = LayerProblem(layer(4, 32).weight_RC, -torch.eye(32, dtype=torch.float64) * 1e6, name="blocks.3.q_proj")
    with pytest.raises(RequestError, match=r"blocks\.3\.q_proj.*not positive definite.*asked: 0\.01.*more text"):
        sweep(problem, grid(4, 16))


def test_float64_comes_to_the_rescue_in_silence() -> None:
    """[[a, 1], [1, 1/a rounded up]]: the last pivot is positive, but lost in float32's rounding; no damping needed."""
    for a in range(3, 1000, 2):
        corner = torch.nextafter(torch.tensor(1.0 / a), torch.tensor(1.0))
        hessian_CC = torch.tensor([[float(corner), 1.0], [1.0, float(a)]])
        if int(torch.linalg.cholesky_ex(hessian_CC.flip(-2, -1))[1]):
            break
    else:
        raise AssertionError("float32 factored them all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factor = LayerProblem(torch.ones(1, 2), hessian_CC, damping=0.0).factor("natural")
    assert factor.damping == 0.0 and factor.upper_CC.dtype == torch.float32
    upper_CC = factor.upper_CC.double()
    torch.testing.assert_close(upper_CC.T @ upper_CC, torch.linalg.inv(hessian_CC.double()), rtol=1e-5, atol=0)
