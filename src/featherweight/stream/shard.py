"""What the shard of a block holds, matrix by matrix and for what experts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from featherweight.models.checkpoint import Checkpoint
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
