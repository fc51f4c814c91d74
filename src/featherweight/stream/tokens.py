"""Embedding and head, rounded: every token's row by itself, since no other row can make up for its error.

Shapes: R tokens, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.core.solve import Choices, solve
from featherweight.models.tree import Matrix, ModelTree

SLICE_ROWS = 1 << 14  # rounded at once: a vocabulary of 256,000 would take several times its own size


def round_tokens(tree: ModelTree, matrix: Matrix, grid: Grid, lowest_zero: int, device: torch.device) -> Solution:
    """The nearest codes on the least-squares grid of every group; nothing but the weights is needed for it."""
    weight_RC = tree.checkpoint.read([matrix.weight])[matrix.weight]
    identity_CC = torch.eye(matrix.columns, device=device)
    choices = Choices(method="rtn", lowest_zero=lowest_zero)
    parts: list[Solution] = []
    for part_RC in weight_RC.split(SLICE_ROWS):
        problem = LayerProblem(part_RC.to(device, torch.float32), identity_CC, 0, 0.0, matrix.name)
        solution = solve(problem, grid, choices)
        assert isinstance(solution, Solution)
        parts.append(solution)
    return _joined(parts)


def _joined(parts: Sequence[Solution]) -> Solution:
    """Solutions of neighbouring rows as one."""
    return replace(
        parts[0],
        codes_RC=torch.cat([part.codes_RC for part in parts]),
        scales_RG=torch.cat([part.scales_RG for part in parts]),
        zeros_RG=torch.cat([part.zeros_RG for part in parts]),
        loss_R=torch.cat([part.loss_R for part in parts]),
    )
