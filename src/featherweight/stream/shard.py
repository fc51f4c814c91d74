"""What the shard of a block holds, matrix by matrix and for what experts share; and whether all of it is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.core.solution import AnySolution, Solution
from featherweight.errors import FeatherweightError
from featherweight.models.checkpoint import Checkpoint
from featherweight.models.headers import read_entries
from featherweight.models.tree import Block, Matrix


def block_tensors(
    checkpoint: Checkpoint, block: Block, packed: Mapping[str, Mapping[str, Tensor]], plain: bool
) -> dict[str, Tensor]:
    """Every tensor of a block's shard by name: the packed matrices (by `Matrix.path`), and all others as they were.

    Experts that had one tensor between them get tensors of their own, under the names of their matrices, and so do
    their biases; in a `plain` format they go back where they were.
    """
    shared = {
        matrix.bias: None for matrix in block.matrices if matrix.bias is not None and matrix.bias_part is not None
    }
    gone = {matrix.weight for matrix in block.matrices} | (set() if plain else set(shared))
    tensors = checkpoint.read([name for name in block.tensors if name not in gone])
    biases = {} if plain else checkpoint.read(shared)
    for matrix in block.matrices:
        if plain and matrix.part is not None:
            if matrix.weight not in tensors:
                tensors[matrix.weight] = torch.empty(
                    checkpoint.shape(matrix.weight), dtype=checkpoint.dtype(matrix.weight)
                )
            matrix.part.of(tensors[matrix.weight]).copy_(packed[matrix.path]["weight"])
            continue
        tensors |= {f"{matrix.name}.{suffix}": tensor.cpu() for suffix, tensor in packed[matrix.path].items()}
        if not plain and matrix.bias is not None and matrix.bias_part is not None:
            tensors[f"{matrix.name}.bias"] = matrix.bias_part.of(biases[matrix.bias]).clone()
    return tensors


def plain_weight(file: Any, matrix: Matrix) -> Tensor:
    """A matrix's own weight from an open shard of a plain format."""
    if matrix.part is None:
        weight: Tensor = file.get_tensor(f"{matrix.name}.weight")
        return weight
    expert = matrix.part.expert
    of_expert: Tensor = file.get_slice(matrix.weight)[expert : expert + 1]
    return replace(matrix.part, expert=0).of(of_expert)


def require_all(
    matrices: Iterable[Matrix], rows: Sequence[Mapping[str, Any]], shards: Iterable[Path], plain: bool
) -> None:
    """Every one of the matrices has one line in the journal, and its tensors in the shards are as large as it says.

    In a `plain` format experts may share a tensor. Raises FeatherweightError naming the first
    matrix that is missing, or whose bytes differ.
    """
    wanted = {matrix.name: matrix for matrix in matrices}
    told = {row["name"]: row["bytes"] for row in rows}
    if len(rows) != len(wanted) or told.keys() != wanted.keys():
        odd = min(told.keys() ^ wanted.keys(), default="a matrix twice")
        raise FeatherweightError(
            f"the journal has {len(rows)} matrices and the model {len(wanted)}, {odd} is not in both: please "
            "report this."
        )
    expected: dict[str, int] = {}
    for name, matrix in wanted.items():
        home = name if matrix.part is None or not plain else matrix.weight
        expected[home] = expected.get(home, 0) + told[name]
    stored = dict.fromkeys(expected, 0)
    for shard in shards:
        for name, entry in read_entries(shard.parent, shard.name).items():
            owner = name if name in stored else name.rpartition(".")[0]
            if owner in stored and name != f"{owner}.bias":
                stored[owner] += entry.nbytes
    wrong = [name for name, nbytes in expected.items() if stored[name] != nbytes]
    if wrong:
        raise FeatherweightError(
            f"{wrong[0]} takes {stored[wrong[0]]} bytes in the shards and {expected[wrong[0]]} in the journal "
            f"({len(wrong)} such matrices): please report this."
        )


def require_same(matrix: Matrix, solution: AnySolution, stored: AnySolution) -> None:
    """What is stored must say what the solver found, code by code and scale by scale."""
    if isinstance(solution, Solution) and not isinstance(stored, Solution):  # a plain format keeps their values
        dtype = stored.values_RC.dtype
        solution = replace(stored, values_RC=solution.values().to(dtype))
    fields = ("codes_RC", "scales_RG", "zeros_RG") if isinstance(solution, Solution) else ("values_RC",)
    for field in fields:
        found = getattr(stored, field)
        if not torch.equal(getattr(solution, field).to(found.device), found):
            raise FeatherweightError(
                f"{matrix.name}: its {field} as they are stored differ from the solution's: please report this."
            )
