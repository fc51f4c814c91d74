"""Grids, scale searches, bad requests, dead inputs and the sums that H is made of.

Shapes: R outputs, C inputs, G groups, N inputs of one group, T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from featherweight.core import scales
from featherweight.core.hessian import CrossSum, HessianSum
from featherweight.core.problem import LayerProblem
from featherweight.core.refine import refine
from featherweight.core.rules import Grid, Search
from featherweight.core.solution import Solution
from featherweight.core.sweep import round_to_nearest, sweep
from featherweight.errors import RequestError
from oracles import layer_loss, levels, nearest, random_layer

SEARCHES = ["minmax", "mse", "hessian"]
updated_sweep = partial(sweep, order="natural", scales_from="updated")


def layer(rows: int = 16, columns: int = 128, seed: int = 0, dead: tuple[int, ...] = ()) -> LayerProblem:
    return LayerProblem(*random_layer(rows, columns, seed, dead))


def grid(bits: float = 4, symmetric: bool = True, search: str = "hessian", **more: object) -> Grid:
    return Grid(bits, 32, symmetric, search, **{"scale_dtype": torch.bfloat16, **more})  # type: ignore[arg-type]


def weighted_error(rule: Grid, weight_RGN: Tensor, importance_GN: Tensor, power: float = 2.0) -> Tensor:
    """sum importance x |error|^power of each group, R x G, with the scales that the rule's search finds."""
    scale_RG, zero_RG = scales.fit(rule, weight_RGN, importance_GN)
    blank_RC = torch.zeros(weight_RGN.shape[0], weight_RGN[0].numel(), dtype=torch.uint8)
    levels_RCL = levels(Solution(blank_RC, scale_RG, zero_RG, rule, torch.zeros(len(blank_RC))))
    levels_RGNL = levels_RCL.unflatten(1, weight_RGN.shape[1:])
    error_RGN = weight_RGN - nearest(weight_RGN, levels_RGNL)
    return (importance_GN * error_RGN.abs().pow(power)).sum(-1)


# --- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("bits, symmetric", [(1.58, True), (2, False), (4, True), (8, False)])
def test_codes_are_chosen_for_the_scale_that_is_stored(
    bits: float, symmetric: bool, search: str, dtype: torch.dtype
) -> None:
    problem = layer(seed=1)
    rule = grid(bits, symmetric, search, scale_dtype=dtype)
    solution = round_to_nearest(problem, rule)
    assert solution.scales_RG.dtype == dtype and solution.codes_RC.dtype == solution.zeros_RG.dtype == torch.uint8
    expected_RC = nearest(problem.weight_RC, levels(solution))
    assert torch.equal(solution.values(torch.float64), expected_RC)
    if bits == 8 and search == "minmax" and dtype != torch.float32:  # where it shows: rounded later, codes would differ
        exact = round_to_nearest(problem, replace(rule, scale_dtype=torch.float32))
        late = replace(solution, codes_RC=exact.codes_RC, zeros_RG=exact.zeros_RG)
        assert not torch.equal(late.values(torch.float64), expected_RC)


@pytest.mark.parametrize("solver", [round_to_nearest, sweep, updated_sweep])
@pytest.mark.parametrize("bits, symmetric", [(1.58, True), (2, True), (3, False), (8, True)])
def test_codes_and_zeros_stay_in_their_range(bits: float, symmetric: bool, solver) -> None:  # type: ignore[no-untyped-def]
    solution = solver(layer(seed=2), grid(bits, symmetric))
    top = 3 if bits == 1.58 else 2 ** int(bits) - 1
    assert int(solution.codes_RC.max()) == top and int(solution.codes_RC.min()) == (1 if bits == 1.58 else 0)
    if symmetric:
        assert (solution.zeros_RG == (top + 1) // 2).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_minmax_spans_the_extremes(bits: int) -> None:
    weight_RGN = layer(seed=3).weight_RC.unflatten(-1, (-1, 32))
    low_RG, high_RG = weight_RGN.amin(-1), weight_RGN.amax(-1)
    rule = grid(bits, False, "minmax", scale_dtype=torch.float32)
    scale_RG, zero_RG = scales.fit(rule, weight_RGN)
    torch.testing.assert_close(scale_RG.double(), (high_RG - low_RG) / (2**bits - 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(zero_RG.double(), (-low_RG / scale_RG.double()).round(), rtol=0, atol=0)
    scale_RG, _ = scales.fit(replace(rule, symmetric=True), weight_RGN)
    torch.testing.assert_close(scale_RG.double(), 2 * weight_RGN.abs().amax(-1) / (2**bits - 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "bits, symmetric",
    [(1.58, True), *((bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False))],
)
def test_searches_do_better_at_what_they_search_for(bits: float, symmetric: bool) -> None:
    weight_RGN = layer(32, seed=4).weight_RC.unflatten(-1, (-1, 32))
    importance_GN = torch.rand(4, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64).pow(4) + 1e-3
    minmax, mse, hessian = (grid(bits, symmetric, search, scale_dtype=torch.float32) for search in SEARCHES)
    assert (
        weighted_error(hessian, weight_RGN, importance_GN).sum()
        <= weighted_error(minmax, weight_RGN, importance_GN).sum()
    )
    assert weighted_error(hessian, weight_RGN, importance_GN).sum() <= (
        weighted_error(mse, weight_RGN, importance_GN).sum()
    )
    alike_GN = torch.ones_like(importance_GN)
    shrunk_RG, spanned_RG = (weighted_error(rule, weight_RGN, alike_GN, power=2.4) for rule in (mse, minmax))
    assert (shrunk_RG <= spanned_RG * (1 + 1e-6)).all()  # the whole range is its first candidate


def test_hessian_search_follows_the_importance() -> None:
    """An outlier in a column that hardly matters is clipped for the sake of the others, and not where it matters."""
    weight_RGN = layer(seed=5).weight_RC.unflatten(-1, (-1, 32)).clone()
    weight_RGN[..., 0] = 1.0  # three times the others' extremes
    importance_GN = torch.ones(4, 32, dtype=torch.float64)
    largest = []
    for price in (1e-4, 1e4):
        importance_GN[:, 0] = price
        scale_RG, _ = scales.fit(grid(3), weight_RGN, importance_GN)
        largest.append((scale_RG.double().abs() * 4).max())
    assert largest[0] < 0.7 < 0.9 < largest[1]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", SEARCHES)
def test_scales_are_never_zero_or_infinite(search: str, symmetric: bool) -> None:
    """Rows of zeros, and of weights beyond float16's range on both sides."""
    problem = layer(4)
    problem = replace(problem, weight_RC=problem.weight_RC * torch.tensor([[0.0], [1.0], [1e-9], [1e9]]).double())
    swept = sweep(problem, grid(4, symmetric, search, scale_dtype=torch.float16))
    for solution in (round_to_nearest(problem, swept.grid), swept, refine(problem, swept)):
        assert torch.isfinite(solution.scales_RG).all() and (solution.scales_RG != 0).all()
        assert torch.isfinite(solution.loss_R).all() and solution.loss_R[0] == 0
        assert (solution.values()[0] == 0).all()


@pytest.mark.parametrize("solver", [round_to_nearest, sweep, updated_sweep])
@pytest.mark.parametrize("search", SEARCHES)
def test_lowest_zero_is_respected(search: str, solver) -> None:  # type: ignore[no-untyped-def]
    problem = layer(seed=6)
    problem = replace(problem, weight_RC=problem.weight_RC.abs() + 0.2)  # would have the zero at code 0
    rule = grid(3, False, search)
    free, bound = solver(problem, rule), solver(problem, rule, lowest_zero=1)
    assert int(free.zeros_RG.min()) == 0 and int(bound.zeros_RG.min()) == 1
    assert int(refine(problem, bound).zeros_RG.min()) == 1
    true_R = layer_loss(problem.weight_RC, bound.values(torch.float64), problem.damped())
    torch.testing.assert_close(bound.loss_R, true_R, rtol=1e-9, atol=0)
    symmetric = solver(problem, grid(3, True, search), lowest_zero=1)
    assert (symmetric.zeros_RG == 4).all()


def test_mirrored_scales_help_groups_that_reach_further_up() -> None:
    problem = layer(seed=7)
    weight_RC = problem.weight_RC.clone()
    weight_RC[:, ::32] = 0.6  # the extreme of every group, on the side where a plain grid has a level less
    problem = replace(problem, weight_RC=weight_RC)
    mirrored, plain = (round_to_nearest(problem, grid(3, mirror=mirror)) for mirror in (True, False))
    assert (mirrored.scales_RG < 0).float().mean() > 0.9 and (plain.scales_RG > 0).all()
    assert torch.equal(mirrored.values(torch.float64), nearest(weight_RC, levels(mirrored)))
    plain_error, mirrored_error = ((weight_RC - s.values(torch.float64)).square().sum() for s in (plain, mirrored))
    assert mirrored_error < 0.9 * plain_error
    for search, bits in (("minmax", 3), ("mse", 3), ("hessian", 1.58)):
        assert (round_to_nearest(problem, grid(bits, search=search)).scales_RG > 0).all()


# --- dead inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["activation", "pivot", "natural"])
def test_dead_inputs_never_make_nan(order) -> None:  # type: ignore[no-untyped-def]
    problem = layer(dead=(0, 31, 32, 100, 127))
    assert problem.dead_C.nonzero().flatten().tolist() == [0, 31, 32, 100, 127]
    for hessian_CC in (problem.hessian_CC, torch.zeros_like(problem.hessian_CC)):
        swept = sweep(replace(problem, hessian_CC=hessian_CC), grid(2, False), order)
        for solution in (swept, refine(replace(problem, hessian_CC=hessian_CC), swept)):
            assert torch.isfinite(solution.values()).all() and torch.isfinite(solution.loss_R).all()


@pytest.mark.parametrize(
    "unit",
    [
        10.0,
        0.1,
    ],
)
def test_dead_inputs_cost_the_live_ones_nothing(unit: float) -> None:
    """A layer with dead inputs loses no more than one whose weights there are zero."""
    dead = tuple(range(0, 128, 8))
    problem = layer(32, seed=8, dead=dead)
    problem = replace(problem, hessian_CC=problem.hessian_CC * unit**2)
    weight_RC = problem.weight_RC.clone()
    weight_RC[:, dead] = 0.0
    without = replace(problem, weight_RC=weight_RC)
    for bits in (2, 4):
        losses = [
            float(layer_loss(p.weight_RC, sweep(p, grid(bits, False)).values(torch.float64), p.hessian_CC).sum())
            for p in (problem, without)
        ]
        assert losses[0] <= 1.03 * losses[1]


# --- bad requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [round_to_nearest, sweep])
def test_group_size_that_does_not_divide(solver) -> None:  # type: ignore[no-untyped-def]
    problem = replace(layer(2, 96), name="blocks.3.down_proj")
    message = r"blocks\.3\.down_proj has 96 inputs.*group size 64 .*--group-size 32 or 16 or 8 or row"
    with pytest.raises(RequestError, match=message):
        solver(problem, Grid(4, 64))
    with pytest.raises(RequestError, match=r"has 12 inputs.*group size 8 .*use --group-size row"):
        solver(layer(2, 12), Grid(4, 8))


@pytest.mark.parametrize("shape", [(96, 128), (64, 64), (2, 128, 96)])
def test_hessian_of_another_layer(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=rf"blocks\.0\.q has 128 inputs but its Hessian is \({shape[0]}, .*collect"):
        LayerProblem(torch.zeros(4, 128), torch.zeros(shape), name="blocks.0.q")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_with_nan(bad: float) -> None:
    hessian_CC = torch.eye(8)
    hessian_CC[3, 4] = bad
    with pytest.raises(RequestError, match=r"blocks\.0\.q saw inputs with NaN or Inf: run the model in float32"):
        LayerProblem(torch.zeros(4, 8), hessian_CC, name="blocks.0.q")


@pytest.mark.parametrize("bits", [0, 1, 9, 1.5, 16])
def test_bits_there_are_not(bits: float) -> None:
    with pytest.raises(RequestError, match=rf"1\.58, 2, 3, 4, 5, 6, 7, 8, not {bits}: choose"):
        Grid(bits)


def test_grids_that_contradict_themselves() -> None:
    with pytest.raises(RequestError, match=r"ternary.*-1, 0, 1 only: drop asymmetric or ask for 2 bits"):
        Grid(1.58, symmetric=False)
    with pytest.raises(RequestError, match=r"group size must be 1 or more .*not 0"):
        Grid(4, 0)


@pytest.mark.parametrize("order", ["activation", "pivot"])
def test_updated_scales_need_the_natural_order(order) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RequestError, match="natural column order: use --order natural"):
        sweep(layer(), grid(), order, "updated")


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_over_batches(dtype: torch.dtype) -> None:
    """Against float64 on the inputs as they are in `dtype`: nothing is lost but float32's own rounding."""
    generator = torch.Generator().manual_seed(9)
    hessian, cross = HessianSum(24, torch.device("cpu")), CrossSum(10, 24, torch.device("cpu"))
    assert (hessian.mean() == 0).all() and (cross.mean() == 0).all()
    expected_CC, expected_RC = torch.zeros(24, 24).double(), torch.zeros(10, 24).double()
    for shape in ((3, 50), (200,), (1, 7)):
        inputs = (torch.randn(*shape, 24, generator=generator) + 0.5).to(dtype)
        difference = torch.randn(*shape, 10, generator=generator).to(dtype)
        hessian.add(inputs)
        cross.add(difference, inputs)
        x_TC = inputs.flatten(0, -2).double()
        expected_CC += x_TC.T @ x_TC
        expected_RC += difference.flatten(0, -2).double().T @ x_TC
    assert hessian.tokens == cross.tokens == 357
    copied_CC, hessian_CC = hessian.mean(), hessian.into_mean()
    assert torch.equal(copied_CC, hessian_CC) and not hessian.sum_CC.numel()
    for mean, expected in ((hessian_CC, expected_CC / 357), (cross.mean(), expected_RC / 357)):
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean.double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("search", ["minmax", "mse", "hessian"])
def test_threads_find_the_scales_that_one_finds(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "CHUNK_ELEMENTS", {"cpu": 512})
    rule, weight_RGN = Grid(4, 32, search=search), torch.randn(40, 3, 32)
    before, alone = torch.get_num_threads(), scales.fit(rule, weight_RGN)
    torch.set_num_threads(3)
    try:
        together = scales.fit(rule, weight_RGN)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
