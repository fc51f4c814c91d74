"""sum += a^T b in float32 of bfloat16 matrices, by the tiles of `amx.c`: every product is exact.

Shapes: T tokens, A and B columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.native import amx, run

PANEL, STEP, LEAST = 32, 32, 16  # columns laid out together, tokens of one instruction, columns of a tile
LEAST_WORK, LEAST_COPY = 1 << 26, 1 << 18  # products, and numbers laid out, for each thread: less than waking it takes


def takes(sum_AB: Tensor, a_TA: Tensor, b_TB: Tensor) -> bool:
    """Whether `accumulate` can do it, on this machine."""
    on_cpu = sum_AB.device.type == "cpu" and sum_AB.dtype == torch.float32 and sum_AB.stride(1) == 1
    halves = a_TA.dtype == b_TB.dtype == torch.bfloat16
    whole = not a_TA.shape[1] % LEAST and not b_TB.shape[1] % LEAST
    return on_cpu and halves and whole and amx() is not None


def accumulate(sum_AB: Tensor, a_TA: Tensor, b_TB: Tensor) -> None:
    """sum += a^T b, in place; `takes` says when."""
    pairs_b = _pairs(b_TB)
    pairs_a = pairs_b if a_TA is b_TB else _pairs(a_TA)
    tokens = -(-len(a_TA) // STEP) * STEP
    arguments = (pairs_a, pairs_b, tokens, *sum_AB.shape, sum_AB, sum_AB.stride(0))
    run("accumulate", arguments, -(-sum_AB.shape[0] // PANEL), tokens * sum_AB.numel() // LEAST_WORK)


def _pairs(a_TA: Tensor) -> Tensor:
    """As tiles want the second factor; tokens filled up with zeros to whole steps."""
    tokens, columns = a_TA.shape
    missing = -tokens % STEP
    whole_TA = functional.pad(a_TA, (0, 0, 0, missing)) if missing else a_TA.contiguous()
    panels = -(-columns // PANEL)
    pairs = torch.empty(panels * PANEL * len(whole_TA), dtype=torch.bfloat16)
    run("pair_up", (whole_TA, len(whole_TA), columns, pairs), panels, whole_TA.numel() // LEAST_COPY)
    return pairs
