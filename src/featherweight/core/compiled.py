"""The column loops and the search for scales on CPUs by C (`native/loops.c`), where a compiler is to be had.

A column of a slab is some ten operations on R numbers, which NumPy and torch each take a call for; in C a slab of 64
rows stays in a core's cache from its first column to its last. Float32 alone; elsewhere the callers' own loops do it.

Shapes: E layers of one shape, N columns of a slab, R rows; of searches G groups of a row, N inputs of a group and K
candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.core.rules import Pattern
from featherweight.native import loops, run

LANES, LARGEST = 64, 32  # rows of a task and columns of an N:M group, as `loops.c` has them
TASK_WORK = 1 << 15  # weights for each thread, below which waking it takes longer


def usable(tensor: Tensor) -> bool:
    """On a CPU, in float32, where a compiler was found."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and bool(loops())


def sweep_slab(
    pull_ENR: Tensor,
    root_ECC: Tensor,
    weight_ECR: Tensor,
    scale_EGR: Tensor,
    zero_EGR: Tensor,
    group_EC: Tensor,
    keep_ECR: Tensor | None,
    moved_ENR: Tensor,
    code_ECR: Tensor,
    loss_ER: Tensor,
    at: slice,
    levels: tuple[int, int],
) -> bool:
    """`fused.sweep_slab` of a CPU: the same arguments, written the same way; False where the loop has to do it."""
    if not usable(weight_ECR):
        return False
    layers, columns, rows = weight_ECR.shape
    owed_ENN = root_ECC[:, at, at].mT.contiguous()
    tensors = (pull_ENR.contiguous(), owed_ENN, weight_ECR, scale_EGR, zero_EGR, group_EC.contiguous(), keep_ECR)
    sizes = (rows, columns, scale_EGR.shape[1], at.start, at.stop - at.start, *levels, moved_ENR.stride(0))
    _rows("sweep_slab", (*tensors, moved_ENR, code_ECR, loss_ER), sizes, layers)
    return True


def descend_slab(
    pull_ENR: Tensor,
    hessian_ECC: Tensor,
    value_ECR: Tensor,
    scale_EGR: Tensor,
    zero_EGR: Tensor,
    free_ECR: Tensor | None,
    delta_ECR: Tensor,
    code_ECR: Tensor,
    gain_ER: Tensor,
    at: slice,
    levels: tuple[int, int],
    price_E: Tensor | None = None,
) -> bool:
    """`fused.descend_slab` of a CPU: the same arguments, written the same way; False where the loop has to do it."""
    if not usable(value_ECR):
        return False
    layers, columns, rows = value_ECR.shape
    tensors = (pull_ENR.contiguous(), hessian_ECC, value_ECR, scale_EGR, zero_EGR, free_ECR, price_E)
    sizes = (rows, columns, scale_EGR.shape[1], at.start, at.stop - at.start, *levels)
    _rows("descend_slab", (*tensors, delta_ECR, code_ECR, gain_ER), sizes, layers)
    return True


def prune_slab(
    weight_NR: Tensor, kept_NR: Tensor, upper_NN: Tensor, price_N: Tensor, choosing: Pattern | None
) -> Tensor | None:
    """Prunes a slab in place, choosing N:M masks on the way; its scaled errors, or None where the loop has to do it."""
    if not usable(weight_NR) or (choosing and choosing.of > LARGEST):
        return None
    error_NR, owed_NN = torch.empty_like(weight_NR), upper_NN.mT.contiguous()
    group = (choosing.of, choosing.keep) if choosing else (0, 0)
    tensors = (weight_NR, kept_NR, owed_NN, price_N.contiguous(), error_NR)
    assert weight_NR.is_contiguous() and kept_NR.is_contiguous()
    columns, rows = weight_NR.shape
    run("prune_slab", (*tensors, rows, columns, *group), -(-rows // LANES), weight_NR.numel() // TASK_WORK, loops())
    return error_NR


def least(
    weight_BN: Tensor, importance_IN: Tensor, scale_KB: Tensor, zero_KB: Tensor | None, bounds: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """What the best of K scales (below zero: the mirrored grid) and zeros costs each of B groups, and which it is, the
    first of those that cost the same; int64.

    A group costs the sum of its errors squared times `importance`, of which group b has row b % I. `bounds` are the
    lowest and the highest code, and the zero of all where no zeros are given.
    """
    groups, width = weight_BN.shape
    cost_B, place_B = weight_BN.new_full((groups,), torch.inf), torch.zeros(groups, dtype=torch.int64)
    tensors = (weight_BN, importance_IN, scale_KB.float().contiguous(), zero_KB, cost_B, place_B)
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    sizes = (groups, width, len(scale_KB), len(importance_IN), *bounds)
    run("least", (*(0 if t is None else t for t in tensors), *sizes), groups, weight_BN.numel() // TASK_WORK, loops())
    return cost_B, place_B


def _rows(name: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], layers: int) -> None:
    """A loop over some rows of every layer at a time; `sizes` begins with the rows, its fifth is the slab's columns."""
    tasks, work = layers * -(-sizes[0] // LANES), layers * sizes[0] * sizes[4]
    run(name, (*(0 if t is None else t for t in tensors), *sizes), tasks, work // TASK_WORK, loops())
