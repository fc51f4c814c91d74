"""Blocks whose experts do not fit: they stay in the files, and are in memory while they are solved, some at a time.

Shapes: R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Rule
from featherweight.core.solution import AnySolution
from featherweight.core.solve import Choices, solve
from featherweight.models.experts import Experts, find_experts
from featherweight.models.offload import apart_in, taken_out, with_weights
from featherweight.models.tree import Matrix, ModelTree
from featherweight.recipe import Recipe
from featherweight.stream.groups import BlockView, Solved
from featherweight.stream.hidden import free_memory_bytes
from featherweight.stream.parallel import ALONE, World

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # of the sums of experts that are solved together
SHARE = 0.25  # of the free memory that a block's experts may take as floats: solving them takes as much again, and more


def room_for_experts(
    tree: ModelTree, recipe: Recipe, device: torch.device, dtype: torch.dtype, low: bool, world: World = ALONE
) -> int | None:
    """How many bytes of a block's experts are held at a time, the others in the files; None: all of them.

    All are held where they take no more than SHARE of the memory that is free, beside what is made of them, unless it
    is `low`; and where training goes through them again and again. All processes do as the first finds it.
    """
    inside = [f"{path}." for path, _ in find_experts(tree.model)]
    most = max(
        (
            dtype.itemsize
            * sum(m.rows * m.columns for m in block.matrices if f"{block.module}.{m.path}".startswith(tuple(inside)))
            for block in tree.blocks
        ),
        default=0,
    )
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes() // world.size
    held = not most or recipe.trains or (not low and most <= SHARE * free)
    found: int | None = world.first(None if held else min(CHUNK_BYTES[device.type], int(SHARE * free)))
    return found


def put_away(
    view: BlockView, path: str, experts: Experts, solutions: Mapping[str, AnySolution]
) -> Mapping[str, Solved]:
    """What is solved of experts that are apart, packed, and those experts made of that from now on."""
    if view.keep is None:
        return solutions
    matrices = {matrix.path: matrix for matrix in view.matrices}
    kept = {at: view.keep(matrices[at], solution) for at, solution in solutions.items()}
    for at in kept:
        view.originals.pop(at, None)
    for number, expert in apart_in(experts).items():
        mine = {
            at.removeprefix(f"{path}.{number}."): each
            for at, each in kept.items()
            if at.startswith(f"{path}.{number}.")
        }
        if mine:
            expert.compressed = partial(
                with_weights, expert.original, {leaf: each.values for leaf, each in mine.items()}
            )
    return kept


def round_experts(view: BlockView, rules: Mapping[str, Rule], choices: Choices) -> dict[str, Solved]:
    """Every matrix of every expert of a block, by itself and without inputs."""
    solutions: dict[str, Solved] = {}
    for path, experts in find_experts(view.module):
        for number in range(len(experts)):
            inside = [matrix for matrix in view.matrices if matrix.path.startswith(f"{path}.{number}.")]
            with taken_out(experts, [number]):
                solved = {
                    matrix.path: solve(rtn_problem(view, matrix), rules[matrix.path], choices) for matrix in inside
                }
            solutions |= put_away(view, path, experts, solved)
    return solutions


def rtn_problem(view: BlockView, matrix: Matrix) -> LayerProblem:
    weight_RC = view.weight(matrix)
    return LayerProblem(weight_RC, torch.eye(matrix.columns, device=weight_RC.device), 0, 0.0, matrix.name)
