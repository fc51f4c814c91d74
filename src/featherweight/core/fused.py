"""Whether, and how, a slab of columns is decided by one kernel; where not, the callers' own torch loops do it.

Shapes: E layers of one shape, N columns of a slab, R rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import FallbackWarning

ROWS = 16  # of a program: a warp holds a slab of them in registers
_failed: list[str] = []  # why, once it has


def sweep_slab(
    weight_ENR: Tensor,
    upper_ENN: Tensor,
    scale_ENR: Tensor,
    zero_ENR: Tensor,
    keep_ENR: Tensor | None,
    levels: tuple[int, int],
) -> tuple[Tensor, Tensor] | None:
    """Scaled errors (E x N x R) and codes (uint8) of `sweep`'s columns; None where the loop has to do it.

    `levels` are the lowest and the highest code; `keep_ENR` 1 where a weight may differ from zero.
    """
    if not usable(weight_ENR):
        return None
    inputs = (weight_ENR, upper_ENN, scale_ENR, zero_ENR, keep_ENR)
    found = _outputs(weight_ENR)
    done = _launch(lambda kernels: kernels.sweep_slab, inputs, found, levels, HAS_KEEP=keep_ENR is not None)
    return found if done else None


def descend_slab(
    pull_ENR: Tensor,
    hessian_ENN: Tensor,
    value_ENR: Tensor,
    scale_ENR: Tensor,
    zero_ENR: Tensor,
    free_ENR: Tensor | None,
    levels: tuple[int, int],
) -> tuple[Tensor, Tensor] | None:
    """How far `refine.descend`'s values move (E x N x R) and their codes; None where the loop has to do it."""
    if not usable(pull_ENR):
        return None
    inputs = (pull_ENR, hessian_ENN, value_ENR, scale_ENR, zero_ENR, free_ENR)
    found = _outputs(pull_ENR)
    done = _launch(lambda kernels: kernels.descend_slab, inputs, found, levels, HAS_FREE=free_ENR is not None)
    return found if done else None


def usable(tensor: Tensor) -> bool:
    """On a GPU, in float32, until it has failed once."""
    return tensor.is_cuda and tensor.dtype == torch.float32 and not _failed


def _outputs(like_ENR: Tensor) -> tuple[Tensor, Tensor]:
    """Room for one number and one code a weight."""
    number_ENR = torch.empty(like_ENR.shape, dtype=like_ENR.dtype, device=like_ENR.device)
    return number_ENR, torch.empty_like(number_ENR, dtype=torch.uint8)


def _launch(
    pick: Callable[[Any], Any],
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    levels: tuple[int, int],
    **constants: bool,
) -> bool:
    """Runs a kernel over all rows and layers; False, with one warning, where Triton cannot.

    The first input says how many there are; one that is None is not read.
    """
    assert inputs[0] is not None
    layers, columns, rows = inputs[0].shape
    tensors = [inputs[0] if tensor is None else tensor.contiguous() for tensor in inputs]
    try:
        from featherweight.core import triton_slabs

        tile = max(16, 1 << (columns - 1).bit_length())
        grid = (-(-rows // ROWS), layers)
        kernel = pick(triton_slabs)[grid]
        kernel(*tensors, *outputs, rows, columns, *levels, TILE=tile, ROWS=ROWS, num_warps=1, **constants)
    except Exception as error:  # a missing compiler, an old GPU, a driver: Triton raises a kind of its own for each
        _failed.append(f"{type(error).__name__}: {error}")
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        warnings.warn(
            f"Triton cannot run here ({reason}): columns are solved by torch, many times slower.",
            FallbackWarning,
            stacklevel=2,
        )
        return False
    return True
