"""SparseGPT's sweep against elimination by explicit inverses, its certificate, and the authors' code.

Shapes: R rows, C columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featherweight.core.greedy import least_squares, obs
from featherweight.core.problem import LayerProblem
from featherweight.core.prune import prune
from featherweight.core.rules import Pattern
from featherweight.errors import RequestError
from oracles import damped, layer_loss, random_layer

DATA = Path(__file__).parent / "data"


def layer(rows: int = 8, columns: int = 64, seed: int = 0) -> LayerProblem:
    weight_RC, hessian_CC = random_layer(rows, columns, seed)
    return LayerProblem(weight_RC, hessian_CC, damping=0.01)


def prune_by_definition(problem: LayerProblem, pattern: Pattern, slab: int) -> Tensor:
    """Column after column, the inverse of what is left taken anew; masks when a slab or a group begins."""
    damped_CC = damped(problem.hessian_CC, 0.01)
    weight_RC, columns = problem.weight_RC.clone(), problem.weight_RC.shape[-1]
    kept_RC = torch.ones_like(weight_RC, dtype=torch.bool)
    later = [torch.linalg.inv(damped_CC[j:, j:]) for j in range(columns)]
    price_C = torch.stack([1 / inverse[0, 0] for inverse in later])
    for j in range(columns):
        worth_RC = weight_RC.square() * price_C
        if pattern.of and j % pattern.of == 0:
            for row in range(len(weight_RC)):
                worst = worth_RC[row, j : j + pattern.of].argsort()[: pattern.of - pattern.keep]
                kept_RC[row, j + worst] = False
        elif not pattern.of and j % slab == 0:
            part_RN = worth_RC[:, j : j + slab].unflatten(-1, (-1, pattern.block)).sum(-1)
            worst = part_RN.flatten().argsort()[: round(pattern.sparsity * part_RN.numel())]
            mask_R = torch.ones(part_RN.numel(), dtype=torch.bool)
            mask_R[worst] = False
            kept_RC[:, j : j + slab] = mask_R.view_as(part_RN).repeat_interleave(pattern.block, -1)
        error_R = torch.where(kept_RC[:, j], 0.0, weight_RC[:, j])
        weight_RC[:, j:] -= torch.outer(error_R, later[j][0] / later[j][0, 0])
        weight_RC[~kept_RC[:, j], j] = 0
    return weight_RC


@pytest.mark.parametrize(
    "pattern", [Pattern(0.5), Pattern(keep=2, of=4), Pattern(keep=3, of=8), Pattern(0.25, block=4)], ids=str
)
def test_prune_is_elimination(pattern: Pattern) -> None:
    problem = layer()
    solution = prune(problem, pattern, slab=16)
    torch.testing.assert_close(solution.values_RC, prune_by_definition(problem, pattern, 16), rtol=1e-9, atol=1e-12)
    damped_CC = damped(problem.hessian_CC, 0.01)
    expected_R = layer_loss(problem.weight_RC, solution.values_RC, damped_CC)
    torch.testing.assert_close(solution.loss_R, expected_R, rtol=1e-9, atol=0)
    single = LayerProblem(problem.weight_RC.float(), problem.hessian_CC.float(), damping=0.01)
    assert prune(single, pattern, slab=16).certificate == pytest.approx(solution.certificate, rel=1e-3)


@pytest.mark.parametrize("changes", [{}, {"saliency": "wanda"}, {"scope": "row"}, {"slab": 1000}], ids=str)
def test_choices_of_the_mask(changes: dict[str, Any]) -> None:
    """Exact sparsity whatever competes; solving the support anew is never worse, nor is greedy than either."""
    problem = layer(columns=96)
    solution = prune(problem, Pattern(0.5), **changes)
    assert solution.sparsity == 0.5 and torch.equal(solution.keep_RC, solution.values_RC != 0)
    if changes.get("scope") == "row":
        assert (solution.keep_RC.sum(-1) == 48).all()
    again = least_squares(problem, solution.keep_RC, solution.pattern, solution.damping)
    assert obs(problem, Pattern(0.5)).certificate < again.certificate < solution.certificate


def test_a_mask_from_outside() -> None:
    problem = layer()
    keep_RC = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) > 0.3
    solution = prune(problem, Pattern(0.3), keep_RC=keep_RC)
    assert torch.equal(solution.keep_RC, keep_RC) and not solution.values_RC[~keep_RC].any()
    own = prune(problem, Pattern(keep=2, of=4))
    again = prune(problem, own.pattern, keep_RC=own.keep_RC)
    torch.testing.assert_close(again.values_RC, own.values_RC, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("sparsegpt_50", Pattern(0.5)),
        ("sparsegpt_2to4", Pattern(keep=2, of=4)),
        ("sparsegpt_4to8", Pattern(keep=4, of=8)),
    ],
)
def test_prune_is_the_authors_code(name: str, pattern: Pattern) -> None:
    with np.load(DATA / "golden-layer.npz") as file:
        weight_RC, hessian_CC = torch.from_numpy(file["weight"]), torch.from_numpy(file["hessian"])
    with np.load(DATA / "golden-sparsegpt.npz") as file:
        theirs_RC = torch.from_numpy(file[name])
    problem = LayerProblem(weight_RC, hessian_CC, 8192, 0.01, "k_proj")

    def loss(values_RC: Tensor) -> float:
        delta_RC = (weight_RC - values_RC).double()
        return float(((delta_RC @ hessian_CC.double()) * delta_RC).sum())

    solution = prune(problem, pattern)
    assert ((theirs_RC != 0) == solution.keep_RC).double().mean() > 0.98
    assert loss(solution.values_RC) == pytest.approx(loss(theirs_RC), rel=0.01)
    again = loss(least_squares(problem, solution.keep_RC, pattern, 0.01).values_RC)
    assert 0.75 * loss(theirs_RC) < again < 0.95 * loss(theirs_RC)  # the paper: 10 to 20 % from exact


def test_the_problem_is_left_as_it_is() -> None:
    """Also where its transpose is contiguous already, and a view would do: one row, or weights kept as C x R."""
    for weight_RC in (layer(rows=1).weight_RC, layer().weight_RC.T.contiguous().T):
        before_RC = weight_RC.clone()
        prune(LayerProblem(weight_RC, layer().hessian_CC, damping=0.01), Pattern(0.5))
        assert torch.equal(weight_RC, before_RC)


def test_patterns_that_do_not_divide() -> None:
    with pytest.raises(RequestError, match="the layer has 64 inputs, which 2:5 sparsity does not divide"):
        prune(layer(), Pattern(keep=2, of=5))
