"""The sweep and its siblings against elimination by explicit inverses, the authors' code, and their own certificate.

Shapes: R outputs, C inputs, G groups, E layers of one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from featherweight.core import products, scales, triangle
from featherweight.core.problem import LayerProblem, Order, loss_R
from featherweight.core.refine import refine
from featherweight.core.rules import Grid
from featherweight.core.shared_factor import shared_root_
from featherweight.core.solution import Solution
from featherweight.core.sweep import round_to_nearest, sweep
from featherweight.core.triangle import Blocks, inverse_lower, inverses, root_
from featherweight.stream.parallel import ALONE
from oracles import activation_order, damped, eliminate, layer_loss, levels, random_layer

DATA = Path(__file__).parent / "data"
ORDERS: list[Order] = ["activation", "pivot", "natural"]
DEAD = (3, 40, 41, 127)


@cache
def layer(
    rows: int = 8, columns: int = 128, seed: int = 0, dead: tuple[int, ...] = (), damping: float = 0.01
) -> LayerProblem:
    weight_RC, hessian_CC = random_layer(rows, columns, seed, dead)
    return LayerProblem(weight_RC, hessian_CC, damping=damping)


def grid(bits: float = 4, group_size: int | None = 32, symmetric: bool = True, search: str = "hessian") -> Grid:
    return Grid(bits, group_size, symmetric, search, torch.bfloat16)  # type: ignore[arg-type]


def assert_same(one: Solution, other: Solution, rtol: float = 1e-9) -> None:
    """Equal codes, scales and zeros, and losses equal up to rounding."""
    assert torch.equal(one.codes_RC, other.codes_RC)
    assert torch.equal(one.scales_RG, other.scales_RG)
    assert torch.equal(one.zeros_RG, other.zeros_RG)
    torch.testing.assert_close(one.loss_R, other.loss_R, rtol=rtol, atol=0)


# --- the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_a_factor_solves(order: Order) -> None:
    """rows inv(H) in the layer's own column order, stacked layers too."""
    problem = layer(columns=64, seed=3)
    rows_RC = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected_RC = torch.linalg.solve(problem.damped(), rows_RC.T).T
    torch.testing.assert_close(problem.factor(order).solve(rows_RC), expected_RC, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("number, bits, symmetric", [(0, 1.58, True), (1, 2, False), (2, 3, False), (3, 4, True)])
def test_sweep_is_elimination(number: int, bits: float, symmetric: bool, turn: int) -> None:
    """Every grid with every group size and every order, and every order with every group size."""
    order, group_size = ORDERS[turn], (32, 128, None)[(turn + number) % 3]
    problem, rule = layer(columns=256, seed=11), grid(bits, group_size, symmetric)
    solution = sweep(problem, rule, order)
    damped_CC = damped(problem.hessian_CC, 0.01)
    if order == "pivot":  # held against its definition in test_core_refine.py
        turns = problem.factor("pivot").order_C.tolist()
    else:
        turns = activation_order(damped_CC) if order == "activation" else list(range(256))
    expected = eliminate(problem.weight_RC, damped_CC, turns, levels(solution))
    torch.testing.assert_close(solution.values(torch.float64), expected.values_RC, rtol=0, atol=1e-9)
    torch.testing.assert_close(solution.loss_R, expected.loss_R, rtol=1e-9, atol=0)
    # The scales were searched with the price that elimination finds for an error in each column.
    width = group_size or 256
    fitted = scales.fit(rule, problem.weight_RC.unflatten(-1, (-1, width)), expected.price_C.unflatten(0, (-1, width)))
    assert torch.equal(solution.scales_RG, fitted[0]) and torch.equal(solution.zeros_RG, fitted[1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_from_updated_weights_are_those_of_elimination(bits: int, symmetric: bool) -> None:
    """With slabs as wide as groups, each group's scale is that of the weights elimination has left there."""
    problem, rule = layer(columns=128, seed=bits), grid(bits, 32, symmetric, "minmax")
    solution = sweep(problem, rule, "natural", "updated", slab=32)
    rest_RC, inverse_CC = problem.weight_RC.clone(), torch.linalg.inv(damped(problem.hessian_CC, 0.01))
    for start in range(0, 128, 32):
        now_RGN = rest_RC[:, start : start + 32].unsqueeze(1)
        scale_R1, zero_R1 = scales.fit(rule, now_RGN)
        assert torch.equal(solution.scales_RG[:, start // 32], scale_R1[:, 0])
        assert torch.equal(solution.zeros_RG[:, start // 32], zero_R1[:, 0])
        for j in range(start, start + 32):
            error_R = rest_RC[:, j] - solution.values(torch.float64)[:, j]
            rest_RC -= torch.outer(error_R / inverse_CC[j, j], inverse_CC[j])
            inverse_CC = inverse_CC - torch.outer(inverse_CC[:, j], inverse_CC[j]) / inverse_CC[j, j]


# --- the certificate --------------------------------------------------------------------------------------------------


def rounded(problem: LayerProblem, rule: Grid) -> Solution:
    return round_to_nearest(problem, rule)


def swept(problem: LayerProblem, rule: Grid) -> Solution:
    return sweep(problem, rule)


def swept_updated(problem: LayerProblem, rule: Grid) -> Solution:
    return sweep(problem, rule, "natural", "updated")


def refined(problem: LayerProblem, rule: Grid) -> Solution:
    return refine(problem, sweep(problem, rule, "pivot"))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    "bits, symmetric, dead",
    [(1.58, True, ()), (1.58, True, DEAD), (2, False, ()), (3, True, DEAD), (4, True, ()), (8, False, DEAD)],
)
@pytest.mark.parametrize("solver", [rounded, swept, swept_updated, refined])
def test_certificate_is_the_loss(solver, bits, symmetric, dead, dtype, tolerance) -> None:  # type: ignore[no-untyped-def]
    weight_RC, hessian_CC = random_layer(16, 160, seed=7, dead=dead)
    problem = LayerProblem(weight_RC.to(dtype), hessian_CC.to(dtype))
    solution = solver(problem, grid(bits, 32, symmetric))
    true_R = layer_loss(problem.weight_RC, solution.values(torch.float64), damped(problem.hessian_CC, solution.damping))
    assert solution.damping == 0.01
    assert solution.certificate == pytest.approx(float(true_R.sum()), rel=tolerance)
    torch.testing.assert_close(solution.loss_R.double(), true_R, rtol=10 * tolerance, atol=0)
    assert solution.loss_R.shape == (16,) and (solution.loss_R > 0).all()


def test_loss_of_values_damped_and_as_measured() -> None:
    problem = layer(dead=DEAD)
    values_RC = sweep(problem, grid()).values()
    for damping, hessian_CC in ((None, problem.hessian_CC), (0.03, damped(problem.hessian_CC, 0.03))):
        expected_R = layer_loss(problem.weight_RC, values_RC, hessian_CC)
        torch.testing.assert_close(loss_R(problem, values_RC, damping), expected_R, rtol=1e-9, atol=0)


# --- the authors' code on a real layer ------------------------------------------------------------------------------


CELLS = [
    *(f"gptq_b{bits}_{groups}" for bits in (2, 3, 4) for groups in ("row", "g64", "row_act", "g64_act_static")),
    *("gptq_b4_g64_act_static_sym", "gptq_b3_g64_act_static_mse", "gptq_b4_g32", "gptq_ternary_row"),
]


@cache
def golden(cell: str) -> tuple[LayerProblem, Tensor]:
    """The real layer, and the weights that the authors' code made of it."""
    with np.load(DATA / "golden-layer.npz") as file:
        problem = LayerProblem(torch.from_numpy(file["weight"]), torch.from_numpy(file["hessian"]))
    with np.load(DATA / "golden-gptq.npz") as file:
        assert set(file) == set(CELLS)
        return problem, torch.from_numpy(file[cell])


def golden_grid(cell: str, search: str, scale_dtype: torch.dtype) -> Grid:
    words = cell.split("_")[1:]
    bits = 1.58 if "ternary" in words else int(words[0][1:])
    group_size = next((int(word[1:]) for word in words if word in ("g32", "g64")), None)
    return Grid(bits, group_size, bits == 1.58 or "sym" in words, search, scale_dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("cell", [cell for cell in CELLS if "ternary" not in cell])  # theirs is another grid: data/
def test_papers_settings_give_the_authors_values(cell: str) -> None:
    problem, theirs_RC = golden(cell)
    rule = golden_grid(cell, "mse" if "mse" in cell else "minmax", torch.float32)
    in_order = "act" not in cell
    updated = in_order and rule.group_size is not None
    ours = sweep(problem, rule, "natural" if in_order else "activation", "updated" if updated else "original")
    same_RC = torch.isclose(ours.values(), theirs_RC, rtol=1e-5, atol=1e-6)
    assert float(same_RC.double().mean()) >= 0.995
    their_loss = float(layer_loss(problem.weight_RC, theirs_RC, problem.hessian_CC).sum())
    our_loss = float(layer_loss(problem.weight_RC, ours.values(), problem.hessian_CC).sum())
    assert our_loss == pytest.approx(their_loss, rel=0.005)


@cache
def default_losses(rule: Grid) -> tuple[float, float]:
    """Of the real layer with all defaults: refined, and swept only."""
    problem, _ = golden(CELLS[0])
    swept = sweep(problem, rule)
    values = (refine(problem, swept).values(), swept.values())
    one, other = (float(layer_loss(problem.weight_RC, v, problem.hessian_CC).sum()) for v in values)
    return one, other


@pytest.mark.parametrize("cell", CELLS)
def test_default_settings_lose_less_than_the_authors(cell: str) -> None:
    problem, theirs_RC = golden(cell)
    refined_loss, swept_loss = default_losses(golden_grid(cell, "hessian", torch.bfloat16))
    assert refined_loss < swept_loss < float(layer_loss(problem.weight_RC, theirs_RC, problem.hessian_CC).sum())


# --- what must not matter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("slab", [1, 32, 48, 160])
@pytest.mark.parametrize("together", [32, 100, 4096])
def test_slabs_do_not_matter(slab: int, together: int, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, rule = layer(columns=160), grid(3, 32, False)
    usual = sweep(problem, rule, order)  # 128 and 32
    monkeypatch.setattr("featherweight.core.sweep.TOGETHER", together)
    assert_same(sweep(problem, rule, order, slab=slab), usual)


@pytest.mark.parametrize("solver", [rounded, swept, swept_updated, refined])
def test_rows_are_solved_alone(solver) -> None:  # type: ignore[no-untyped-def]
    problem = layer(rows=24)
    order_R = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    shuffled = solver(replace(problem, weight_RC=problem.weight_RC[order_R]), grid(3, 32, False))
    whole = solver(problem, grid(3, 32, False))
    assert torch.equal(shuffled.codes_RC, whole.codes_RC[order_R])
    assert torch.equal(shuffled.scales_RG, whole.scales_RG[order_R])
    assert_same(solver(replace(problem, weight_RC=problem.weight_RC[5:9]), grid(3, 32, False)), whole.rows(5, 9))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("solver", [rounded, swept, swept_updated, refined])
def test_stacked_layers_are_solved_alone(solver, symmetric) -> None:  # type: ignore[no-untyped-def]
    alone = [layer(seed=seed, dead=dead) for seed, dead in ((1, ()), (2, DEAD), (3, ()))]
    stacked = LayerProblem(*(torch.stack([getattr(p, n) for p in alone]) for n in ("weight_RC", "hessian_CC")))
    solution = solver(stacked, grid(3, 32, symmetric))
    assert solution.codes_RC.shape == (3, 8, 128) and solution.scales_RG.shape == (3, 8, 4)
    tensors = [f.name for f in fields(Solution) if isinstance(getattr(solution, f.name), Tensor)]
    for e, problem in enumerate(alone):
        part = replace(solution, **{name: getattr(solution, name)[e] for name in tensors})
        assert_same(part, solver(problem, grid(3, 32, symmetric)))


def test_activation_order_goes_with_the_columns() -> None:
    """Columns may be renamed within a group, and groups among themselves: the layer is the same."""
    problem, generator = layer(columns=128), torch.Generator().manual_seed(5)
    inside = torch.stack([torch.randperm(32, generator=generator) for _ in range(4)])
    order_C = (inside + 32 * torch.tensor([2, 0, 3, 1]).unsqueeze(-1)).flatten()
    moved = LayerProblem(problem.weight_RC[:, order_C], problem.hessian_CC[order_C][:, order_C])
    for rule in (grid(4), grid(3, 32, False)):
        there, here = sweep(moved, rule), sweep(problem, rule)
        assert torch.equal(there.codes_RC, here.codes_RC[:, order_C])
        assert torch.equal(there.scales_RG, here.scales_RG[:, [2, 0, 3, 1]])


@pytest.mark.parametrize("solver", [rounded, swept, swept_updated, refined])
def test_the_unit_of_the_inputs_does_not_matter(solver) -> None:  # type: ignore[no-untyped-def]
    problem = layer()
    other = solver(replace(problem, hessian_CC=problem.hessian_CC * 2.0**-14), grid(3, 32, False))
    same = solver(problem, grid(3, 32, False))
    assert_same(replace(other, loss_R=other.loss_R * 2.0**14), same)


@pytest.mark.parametrize("solver", [rounded, swept, swept_updated, refined])
@pytest.mark.parametrize("rows", [1, 8])
def test_same_input_same_bytes_and_input_untouched(solver, rows) -> None:  # type: ignore[no-untyped-def]
    weight_RC, hessian_CC = (t.float() for t in random_layer(rows, 128, seed=2, dead=DEAD))
    problem = LayerProblem(weight_RC.clone(), hessian_CC.clone())
    first, second = solver(problem, grid(3, 32, False)), solver(problem, grid(3, 32, False))
    assert_same(first, second, rtol=0)
    assert torch.equal(problem.weight_RC, weight_RC) and torch.equal(problem.hessian_CC, hessian_CC)


@pytest.mark.parametrize(("columns", "layers"), [(7, None), (33, 2), (150, None)])
def test_triangles_are_inverted_in_pieces(columns: int, layers: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that do not divide the columns, pairs of them and what is left."""
    monkeypatch.setattr("featherweight.core.triangle.WHOLE", 8)
    lead = () if layers is None else (layers,)
    draw = torch.randn(*lead, columns, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lower_CC = draw.tril(-1) / columns**0.5 + torch.diag_embed(draw.diagonal(dim1=-2, dim2=-1).abs() + 1)
    garbage_CC = lower_CC + draw.triu(1)  # what lies above the diagonal is nobody's
    torch.testing.assert_close(inverse_lower(garbage_CC), torch.linalg.inv(lower_CC))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in pieces, multiplied here as a tensor core does it: 16 bits into float32."""

    def add_(total_AB: Tensor, one_AK: Tensor, other_KB: Tensor, alpha: float = 1.0, beta: float = 1.0) -> None:
        total_AB.copy_((total_AB * beta if beta else 0.0) + alpha * (one_AK.float() @ other_KB.float()))

    monkeypatch.setattr(products, "split_pays", lambda matrix: matrix.shape[-1] >= 16)
    monkeypatch.setattr(products, "_multiplied", lambda one, other: one.float() @ other.float())
    for room in (products, triangle):
        monkeypatch.setattr(room, "add_", add_)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("lead", [(), (2,)], ids=["layer", "layers"])
def test_products_in_pieces(lead: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(*lead, *shape, generator=generator) for shape in ((30, 80), (80, 20)))
    wanted = one.double() @ other.double()
    assert float((products.times(one, other) - wanted).norm() / wanted.norm()) < 3e-5
    assert float((one.bfloat16() @ other.bfloat16() - wanted).norm() / wanted.norm()) > 1e-3  # what one piece gives


@pytest.mark.usefixtures("as_on_a_gpu")
def test_pulls_follow_what_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    hessian_ECC, delta_ECR = torch.randn(2, 48, 48, generator=generator), torch.randn(2, 48, 5, generator=generator)
    pulls = products.Pulls(hessian_ECC, delta_ECR)
    assert pulls.split
    for at in (slice(0, 20), slice(20, 40), slice(40, 48)):
        wanted = hessian_ECC[:, at] @ delta_ECR
        assert float((pulls.of(at) - wanted).norm() / wanted.norm()) < 3e-5
        delta_ECR[:, at] += torch.randn(2, at.stop - at.start, 5, generator=generator)


@pytest.mark.parametrize(("columns", "layers"), [(7, None), (200, None), (130, 3)])
def test_the_factor_in_place(columns: int, layers: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that do not divide the columns; what lies under the diagonal is nobody's."""
    for name, size in (("BLOCK", 48), ("STACKED_BLOCK", 32), ("WHOLE", 16), ("PANELS", 2)):
        monkeypatch.setattr(f"featherweight.core.triangle.{name}", size)
    lead = () if layers is None else (layers,)
    draw = torch.Generator().manual_seed(0)
    x_TC = torch.randn(*lead, 3 * columns, columns, generator=draw, dtype=torch.float64)
    hessian_CC = x_TC.mT @ x_TC
    root_CC = hessian_CC + torch.randn(hessian_CC.shape, generator=draw, dtype=torch.float64).tril(-1)
    blocks = root_(root_CC)
    assert torch.equal(root_CC, root_CC.triu()) and blocks is not None
    for (own, found_ENN), (_, wanted_ENN) in zip(blocks, inverses(root_CC), strict=True):
        torch.testing.assert_close(found_ENN, wanted_ENN)
        assert own.stop - own.start == found_ENN.shape[-1]
    torch.testing.assert_close(root_CC @ root_CC.mT, hessian_CC)
    assert not root_(-hessian_CC)


def test_the_factor_in_place_is_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_RC, hessian_CC = random_layer(4, 128, seed=3, dead=DEAD)
    problem = LayerProblem(weight_RC, hessian_CC)
    usual = problem.factor()
    monkeypatch.setattr("featherweight.core.problem.in_place_pays", lambda matrix_CC: True)
    in_place = problem.factor()
    assert torch.equal(in_place.order_C, usual.order_C)
    torch.testing.assert_close(in_place.root_CC, usual.root_CC)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("make_", [root_, partial(shared_root_, helpers=ALONE)])
def test_the_factor_in_place_with_products_in_pieces(
    make_: Callable[[Tensor], Blocks | None], unit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exact as float32's own, in any unit, with inputs a thousand times as large as others."""
    for name, size in (("BLOCK", 48), ("WHOLE", 16), ("PANELS", 2)):
        monkeypatch.setattr(f"featherweight.core.triangle.{name}", size)
    for module in ("triangle", "shared_factor"):
        monkeypatch.setattr(f"featherweight.core.{module}.split_pays", lambda matrix: True)
    x_TC = torch.randn(600, 200, generator=torch.Generator().manual_seed(0))
    x_TC[:, ::50] *= 1000
    hessian_CC = x_TC.T @ x_TC / len(x_TC) * unit
    root_CC = hessian_CC.clone()
    assert make_(root_CC)
    upper_CC = torch.linalg.inv(root_CC.double())
    found_CC = upper_CC @ hessian_CC.double() @ upper_CC.T
    torch.testing.assert_close(found_CC, torch.eye(200, dtype=torch.float64), rtol=0, atol=3e-6)


@pytest.mark.parametrize("harm", [1.02, float("nan")])
def test_a_factor_that_is_not_exact_enough_is_made_again(harm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def inexact(matrix_CC: Tensor) -> Blocks | None:
        matrix_CC *= harm
        return root_(matrix_CC)

    problem = LayerProblem(*random_layer(4, 128, seed=3, dead=DEAD))
    usual = problem.factor()
    monkeypatch.setattr("featherweight.core.problem.in_place_pays", lambda matrix_CC: True)
    monkeypatch.setattr("featherweight.core.problem.root_", inexact)
    assert torch.equal(problem.factor().root_CC, usual.root_CC)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_triangles_without_most_of_their_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_RC, hessian_CC = (t.float() for t in random_layer(4, 128, seed=3))
    factor = LayerProblem(weight_RC, hessian_CC).factor()
    plain_RC = weight_RC @ factor.inverse()
    monkeypatch.setattr("featherweight.core.problem.split_pays", lambda matrix: True)
    monkeypatch.setattr("featherweight.core.triangle.BLOCK", 40)
    assert float((factor.solve(weight_RC) - plain_RC).norm() / plain_RC.norm()) < 1e-4
