"""ExactOBS and OBQ against their definition by explicit inverses, brute force, and the authors' code.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import heapq
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from featherweight.core import greedy
from featherweight.core.blocked import obq_by_slabs, obs_by_slabs
from featherweight.core.greedy import Trace, least_squares, obq, obs, prune_trace
from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid, Pattern
from featherweight.errors import RequestError
from oracles import damped, layer_loss, levels, nearest, random_layer

DATA = Path(__file__).parent / "data"
PATTERNS = [
    Pattern(0.5),
    Pattern(keep=2, of=4),
    Pattern(keep=1, of=4),
    Pattern(keep=4, of=8),
    Pattern(0.5, block=4),
]


def layer(rows: int = 5, columns: int = 48, seed: int = 0) -> LayerProblem:
    weight_RC, hessian_CC = random_layer(rows, columns, seed)
    return LayerProblem(weight_RC, hessian_CC, damping=0.01)


def prune_by_definition(weight_C: Tensor, damped_CC: Tensor, pattern: Pattern) -> tuple[list[int], list[float], Tensor]:
    """One row by OBS as it is written down: the inverse of what is left, taken anew at every step.

    Returns the blocks in the order they go, the cost of each, and the weights after the last step."""
    left, weight_C, order, cost = list(range(len(weight_C))), weight_C.clone(), [], []
    gone: dict[int, int] = {}
    steps = len(weight_C) // pattern.block
    if pattern.of:
        steps = len(weight_C) // pattern.of * (pattern.of - pattern.keep)
    for _ in range(steps):
        inverse_CC = torch.linalg.inv(damped_CC[left][:, left])
        best: tuple[float, int, list[int]] | None = None
        for start in range(0, len(weight_C), pattern.block):
            if start not in left or (pattern.of and gone.get(start // pattern.of, 0) == pattern.of - pattern.keep):
                continue
            at = [left.index(start + inside) for inside in range(pattern.block)]
            w_b = weight_C[[left[i] for i in at]]
            price = float(w_b @ torch.linalg.solve(inverse_CC[at][:, at], w_b))
            if best is None or price < best[0]:
                best = (price, start, at)
        assert best is not None
        price, start, at = best
        w_b = weight_C[[left[i] for i in at]]
        weight_C[left] -= inverse_CC[:, at] @ torch.linalg.solve(inverse_CC[at][:, at], w_b)
        weight_C[start : start + pattern.block] = 0
        left = [column for column in left if not start <= column < start + pattern.block]
        gone[start // (pattern.of or 1)] = gone.get(start // (pattern.of or 1), 0) + 1
        order.append(start // pattern.block)
        cost.append(price)
    return order, cost, weight_C


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_exact_obs_is_its_definition(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "PENDING", 5)  # so that the matrix is brought up to date, and shrinks, many times
    problem = layer(3, 32)
    trace = prune_trace(problem, pattern, problem.factor("natural"))
    damped_CC, found = damped(problem.hessian_CC, 0.01), obs(problem, pattern)
    for row, weight_C in enumerate(problem.weight_RC):
        order, cost, values_C = prune_by_definition(weight_C, damped_CC, pattern)
        assert trace.order_RC[row].tolist() == order
        torch.testing.assert_close(trace.cost_RC[row], torch.tensor(cost, dtype=torch.float64), rtol=1e-9, atol=1e-12)
        if pattern.of:
            torch.testing.assert_close(found.values_RC[row], values_C, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_obs_keeps_its_pattern_and_its_word(pattern: Pattern) -> None:
    """The certificate is the loss; the sparsity is exact; nothing else with this support is better."""
    problem = layer(rows=7)
    solution = obs(problem, pattern)
    assert not solution.values_RC[~solution.keep_RC].any()
    damped_CC = damped(problem.hessian_CC, 0.01)
    expected_R = layer_loss(problem.weight_RC, solution.values_RC, damped_CC)
    torch.testing.assert_close(solution.loss_R, expected_R, rtol=1e-9, atol=0)
    if pattern.of:
        kept = solution.keep_RC.unflatten(-1, (-1, pattern.of)).sum(-1)
        assert (kept == pattern.keep).all()
    else:
        assert solution.keep_RC.sum() == 7 * 48 // 2
        blocks = solution.keep_RC.unflatten(-1, (-1, pattern.block))
        assert torch.equal(blocks.any(-1), blocks.all(-1))
    gradient_RC = (solution.values_RC - problem.weight_RC) @ damped_CC
    assert gradient_RC[solution.keep_RC].abs().max() < 1e-9 * gradient_RC.abs().max()
    single = LayerProblem(problem.weight_RC.float(), problem.hessian_CC.float(), damping=0.01)
    assert abs(obs(single, pattern).certificate / solution.certificate - 1) < 1e-3


@pytest.mark.parametrize("gone", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_mask_bounds_greedy_from_below(seed: int, gone: int) -> None:
    problem = layer(rows=1, columns=8, seed=seed)
    costs = []
    for zeros in combinations(range(8), gone):
        keep_RC = torch.ones(1, 8, dtype=torch.bool)
        keep_RC[0, list(zeros)] = False
        costs.append(least_squares(problem, keep_RC, Pattern(), 0.01).certificate)
    found = obs(problem, Pattern(gone / 8)).certificate
    assert min(costs) * (1 - 1e-9) <= found < sorted(costs)[len(costs) // 4]


def test_rows_are_merged_as_a_heap_would() -> None:
    """The cheapest next step of any row is taken, even where a row's steps get cheaper."""
    cost_RC = torch.rand(9, 20, generator=torch.Generator().manual_seed(0))
    trace = Trace(torch.arange(20).expand(9, 20), cost_RC)
    heads, counts = [(float(row[0]), number, 0) for number, row in enumerate(cost_RC)], [0] * 9
    heapq.heapify(heads)
    for total in range(1, 181):
        _, number, step = heapq.heappop(heads)
        counts[number] += 1
        if step + 1 < 20:
            heapq.heappush(heads, (float(cost_RC[number, step + 1]), number, step + 1))
        if total in (1, 7, 60, 90, 180):
            taken = trace.counts(total)
            paid = sum(float(row[: int(n)].sum()) for row, n in zip(cost_RC, taken, strict=True))
            expected = sum(float(row[:n].sum()) for row, n in zip(cost_RC, counts, strict=True))
            assert int(taken.sum()) == total and paid == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("sparsity", "zeros"), [(0.0, 0), (1 / 240, 1), (0.37, 89), (0.999, 240)])
def test_sparsity_is_exact_to_one_weight(sparsity: float, zeros: int) -> None:
    problem = layer()
    assert int((~obs(problem, Pattern(sparsity)).keep_RC).sum()) == zeros


def test_rows_in_flight_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, grid = layer(rows=9), Grid(3, 16, False, "minmax", torch.float32)
    whole, rounded = obs(problem, Pattern(0.4)), obq(problem, grid)
    monkeypatch.setattr(greedy, "ROW_BYTES", {"cpu": 4 * 48 * 48 * 8})
    assert torch.equal(obs(problem, Pattern(0.4)).keep_RC, whole.keep_RC)
    assert torch.equal(obq(problem, grid).codes_RC, rounded.codes_RC)


@pytest.mark.filterwarnings("ignore:.*needs more than damping")
def test_a_damping_that_had_to_climb_is_the_one_that_counts() -> None:
    """An indefinite H: the certificate is that of the H that was worked with, whichever solver."""
    problem = layer()
    shift = 0.05 * problem.hessian_CC.diagonal().mean()
    hessian_CC = problem.hessian_CC - shift * torch.eye(48, dtype=torch.float64)
    hard = LayerProblem(problem.weight_RC, hessian_CC, damping=0.01)
    pruned, rounded = obs(hard, Pattern()), obq(hard, Grid(4, 16))
    assert pruned.damping == rounded.damping > 0.01
    damped_CC = damped(hessian_CC, pruned.damping)
    for solution, values_RC in ((pruned, pruned.values_RC), (rounded, rounded.values(torch.float64))):
        expected_R = layer_loss(problem.weight_RC, values_RC, damped_CC)
        torch.testing.assert_close(solution.loss_R, expected_R, rtol=1e-8, atol=0)


# --- OBQ


def round_by_definition(weight_C: Tensor, damped_CC: Tensor, levels_CL: Tensor, step: float) -> tuple[Tensor, float]:
    """One row by OBQ as it is written down; values and cost."""
    left, weight_C, paid = list(range(len(weight_C))), weight_C.clone(), 0.0
    for _ in range(len(weight_C)):
        inverse_CC = torch.linalg.inv(damped_CC[left][:, left])
        goal = torch.stack([nearest(weight_C[column], levels_CL[column]) for column in left])
        error = (weight_C[left] - goal).square()
        at = int((error / inverse_CC.diagonal()).argmin())
        if bool((error > step**2 / 4).any()) and weight_C[left[at]] != 0:
            at = int(error.argmax())
        delta = weight_C[left[at]] - goal[at]
        paid += float(delta**2 / inverse_CC[at, at])
        weight_C[left] -= inverse_CC[:, at] * delta / inverse_CC[at, at]
        weight_C[left[at]] = goal[at]
        del left[at]
    return weight_C, paid


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False), (2, False), (1.58, True)])
def test_obq_is_its_definition(bits: float, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "PENDING", 5)
    problem = layer(rows=4, columns=32)
    solution = obq(problem, Grid(bits, None, symmetric, "minmax", torch.float32, False))
    levels_RCL, values_RC = levels(solution), solution.values(torch.float64)
    damped_CC = damped(problem.hessian_CC, 0.01)
    for row, weight_C in enumerate(problem.weight_RC):
        step = float(solution.scales_RG[row, 0])
        values_C, paid = round_by_definition(weight_C, damped_CC, levels_RCL[row], step)
        torch.testing.assert_close(values_RC[row], values_C, rtol=1e-9, atol=1e-12)
        assert float(solution.loss_R[row]) == pytest.approx(paid, rel=1e-9)
    expected_R = layer_loss(problem.weight_RC, values_RC, damped_CC)
    torch.testing.assert_close(solution.loss_R, expected_R, rtol=1e-9, atol=0)


# --- the authors' code


def golden(name: str, code: str = "obc") -> tuple[LayerProblem, Tensor]:
    with np.load(DATA / "golden-layer.npz") as file:
        weight_RC, hessian_CC = torch.from_numpy(file["weight"]), torch.from_numpy(file["hessian"])
    with np.load(DATA / f"golden-{code}.npz") as file:
        return LayerProblem(weight_RC, hessian_CC, 8192, 0.01, "k_proj"), torch.from_numpy(file[name])


def undamped(problem: LayerProblem, values_RC: Tensor) -> float:
    delta_RC = (problem.weight_RC - values_RC).double()
    return float(((delta_RC @ problem.hessian_CC.double()) * delta_RC).sum())


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("obs_50", Pattern(0.5)),
        ("obs_75", Pattern(0.75)),
        ("obs_2to4", Pattern(keep=2, of=4)),
        ("obs_block4_50", Pattern(0.5, block=4)),
    ],
)
def test_exact_obs_is_the_authors_code(name: str, pattern: Pattern) -> None:
    """Nearly the same masks (theirs counts cheap late steps without the dear ones before them), never a worse loss."""
    problem, theirs_RC = golden(name)
    solution = obs(problem, pattern)
    assert solution.sparsity == pytest.approx(float((theirs_RC == 0).double().mean()), abs=1e-4)
    assert ((theirs_RC != 0) == solution.keep_RC).double().mean() > 0.99
    assert undamped(problem, solution.values_RC) <= undamped(problem, theirs_RC) * (1 if pattern.block > 1 else 1.0001)


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("obq_b4_sym_mse", Grid(4, None, True, "mse", torch.float32, False)),
        ("obq_b3_asym", Grid(3, None, False, "minmax", torch.float32)),
        ("obq_b2_asym_mse", Grid(2, None, False, "mse", torch.float32)),
    ],
)
def test_obq_is_the_authors_code(name: str, grid: Grid) -> None:
    problem, theirs_RC = golden(name)
    # Theirs is float32: a tie falls one way or the other with the order of a sum, and a row or two of 64 with it.
    in_full = replace(problem, weight_RC=problem.weight_RC.double(), hessian_CC=problem.hessian_CC.double())
    values_RC = obq(in_full, grid).values()
    assert ((values_RC - theirs_RC).abs() < 1e-4 * theirs_RC.abs().max()).double().mean() > 0.98
    assert undamped(problem, values_RC) == pytest.approx(undamped(problem, theirs_RC), rel=0.01)


# --- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be at least 0 and less than 1, not 1.0"),
        ({"sparsity": -0.1}, "not -0.1"),
        ({"keep": 4, "of": 4}, "not 4:4"),
        ({"keep": 2}, "not 2:0"),
        ({"keep": 2, "of": 64}, "at most 32 weights, not 2:64"),
        ({"block": 0}, "not 0"),
        ({"keep": 2, "of": 4, "block": 4}, "and 1 with N:M sparsity, not 4"),
    ],
)
def test_patterns_that_make_no_sense(changes: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Pattern(**changes)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (Pattern(keep=2, of=5), "the layer has 48 inputs, which 2:5 sparsity does not divide"),
        (Pattern(block=7), "the layer has 48 inputs, which blocks of 7 do not divide"),
    ],
)
def test_patterns_that_do_not_divide(pattern: Pattern, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        obs(layer(), pattern)


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(keep=2, of=4), Pattern(0.5, block=4)], ids=str)
def test_one_slab_is_the_exact_greedy(pattern: Pattern) -> None:
    """By slabs: equal to the whole where there is one; certified, obedient and little worse where there are four."""
    problem = layer(8, 64)
    exact, whole = obs(problem, pattern), obs_by_slabs(problem, pattern, 64)
    torch.testing.assert_close(whole.values_RC, exact.values_RC, rtol=1e-8, atol=1e-10)
    slabs = obs_by_slabs(problem, pattern, 16)
    damped_CC = damped(problem.hessian_CC, problem.damping)
    torch.testing.assert_close(
        slabs.loss_R, layer_loss(problem.weight_RC, slabs.values_RC, damped_CC), rtol=1e-8, atol=0
    )
    assert slabs.sparsity == exact.sparsity and not slabs.values_RC[~slabs.keep_RC].any()
    assert exact.certificate <= slabs.certificate * 1.02 and slabs.certificate < 1.6 * exact.certificate
    counted = obs_by_slabs(problem, pattern, 16, keep_RC=exact.keep_RC)
    assert torch.equal(
        counted.keep_RC.unflatten(-1, (4, 16)).sum((0, 2)), exact.keep_RC.unflatten(-1, (4, 16)).sum((0, 2))
    )


def test_obq_by_slabs() -> None:
    problem, grid = layer(8, 64), Grid(3, 16, scale_dtype=torch.float32)
    exact, whole, slabs = obq(problem, grid), obq_by_slabs(problem, grid, 64), obq_by_slabs(problem, grid, 16)
    assert torch.equal(whole.codes_RC, exact.codes_RC)
    damped_CC = damped(problem.hessian_CC, problem.damping)
    actual_R = layer_loss(problem.weight_RC, slabs.values(torch.float64), damped_CC)
    torch.testing.assert_close(slabs.loss_R, actual_R, rtol=1e-5, atol=0)
    assert slabs.certificate < 1.2 * exact.certificate
