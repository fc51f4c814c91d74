"""Sums of products on a CPU's matrix unit, or its vectors of bfloat16 (`native/gram.c`): exact products, float32 sums.

Shapes: T tokens, A and B channels, R rows, C columns, G groups of N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.native import gram as native_gram
from featherweight.native import run

PANEL, STEP, ROWS = 32, 32, 16  # channels and tokens of a panel's tiles, and rows of a tile, as `gram.c` has them
TOKENS = 2048  # laid out at a time
THREAD_WORK = 1 << 24  # products of one thread, below which waking it takes longer


def usable(tensor: Tensor) -> bool:
    """On a CPU that has either, where a compiler was found."""
    return tensor.device.type == "cpu" and bool(native_gram())


def sums(inputs: Tensor) -> bool:
    """Whether `add_` takes inputs (T x A) and pays for them."""
    return inputs.dtype == torch.bfloat16 and len(inputs) >= STEP and usable(inputs)


def add_(sum_AB: Tensor, a_TA: Tensor, b_TB: Tensor) -> None:
    """sum += a^T b, for bfloat16; where a is b, on or above the diagonal of panels alone."""
    upper, (rows, columns) = a_TA is b_TB, sum_AB.shape
    for some_TA, some_TB in zip(a_TA.split(TOKENS), b_TB.split(TOKENS), strict=True):
        turned, pairs = _tiles(some_TA), _tiles(some_TB)
        if upper:
            _lay_out(some_TB, pairs, turned)
        else:
            _lay_out(some_TA, None, turned)
            _lay_out(some_TB, pairs, None)
        threads = max(1, rows * columns * len(some_TB) // THREAD_WORK)
        sizes = (-(-len(some_TB) // STEP), rows, columns, sum_AB, sum_AB.stride(0), int(upper))
        run("add_up", (turned, pairs, *sizes, torch.zeros(1, dtype=torch.int64)), threads, threads, native_gram())


def mirror_(sum_CC: Tensor) -> Tensor:
    """What `add_` left out below the diagonal of panels."""
    for start in range(PANEL, len(sum_CC), PANEL):
        sum_CC[start : start + PANEL, :start] = sum_CC[:start, start : start + PANEL].T
    return sum_CC


def weighs(weight_RC: Tensor, width: int) -> bool:
    """Whether `weigh` serves codes of this layer in groups of this width."""
    return weight_RC.dim() == 2 and weight_RC.dtype == torch.float32 and not width % STEP and usable(weight_RC)


def halved(hessian_CC: Tensor) -> tuple[Tensor, Tensor]:
    """H as `weigh` reads it: in bfloat16 and what that leaves, in tiles."""
    first_CC = hessian_CC.to(torch.bfloat16)
    halves = first_CC, (hessian_CC - first_CC).to(torch.bfloat16)
    pairs = _tiles(halves[0]), _tiles(halves[1])
    for half_CC, tiles in zip(halves, pairs, strict=True):
        _lay_out(half_CC, tiles, None)
    return pairs


def weigh(shift_RGN: Tensor, halves: tuple[Tensor, Tensor]) -> Tensor:
    """`refine`'s K H K^T of every row, R x G x G, its lower triangle written; off by 1e-6 of its norm.

    `shift_RGN` are codes less their zeros: whole numbers of at most 8 bits, which bfloat16 holds.
    """
    rows, groups, width = shift_RGN.shape
    codes_RC = functional.pad(shift_RGN.flatten(1).to(torch.bfloat16), (0, 0, 0, -rows % ROWS))
    found_RGG = shift_RGN.new_empty(len(codes_RC), groups, groups)
    threads = shift_RGN.numel() * groups * width // THREAD_WORK
    arguments = (codes_RC, *halves, found_RGG, groups * width, width)
    run("weigh", arguments, len(codes_RC) // ROWS, threads, native_gram())
    return found_RGG[:rows]


def _tiles(x_TC: Tensor) -> Tensor:
    """Room for x in tiles."""
    return x_TC.new_empty(-(-x_TC.shape[1] // PANEL) * -(-len(x_TC) // STEP) * PANEL * STEP)


def _lay_out(x_TC: Tensor, pairs: Tensor | None, turned: Tensor | None) -> None:
    x_TC = x_TC if x_TC.stride(1) == 1 else x_TC.contiguous()
    steps, places = -(-len(x_TC) // STEP), (0 if place is None else place for place in (pairs, turned))
    arguments = (x_TC, *x_TC.shape, x_TC.stride(0), *places, steps)
    run("lay_out", arguments, steps, x_TC.numel() * STEP // THREAD_WORK, native_gram())
