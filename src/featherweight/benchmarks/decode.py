"""Products of few tokens by packed weights on one GPU: time, bytes and error of one shape.

Shapes: R outputs, C inputs, G groups, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.benchmarks.timing import copies, median_us
from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.kernels import wna16


@dataclass(frozen=True)
class Cell:
    """What was measured.

    Attributes:
        us: microseconds a launch.
        weight_bytes: of the packed matrix, scales and zeros included.
        gbps: those and both activations over the time.
        error: relative Frobenius distance from the float64 product of the same inputs, beyond rounding it once.
    """

    tokens: int
    us: float
    weight_bytes: int
    gbps: float
    error: float


def random_solution(grid: Grid, rows: int, columns: int, dtype: torch.dtype) -> Solution:
    """Random codes and zeros, small positive scales, on the GPU."""
    codes = torch.randint(grid.bottom, grid.top + 1, (rows, columns), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(rows, columns // grid.width(columns), device="cuda") * 0.01 + 0.001).to(dtype)
    zeros = torch.full(scales.shape, grid.middle, dtype=torch.uint8, device="cuda")
    if not grid.symmetric:
        zeros.random_(0, grid.top + 1)
    return Solution(codes, scales, zeros, grid, torch.zeros(rows))


def excess_error(got_TR: Tensor, x_TC: Tensor, weights: Solution) -> float:
    """The relative error beyond that of rounding the exact product once."""
    rows = got_TR.shape[1]
    parts = [weights.rows(r, min(r + 4096, rows)).values(torch.float64) for r in range(0, rows, 4096)]
    exact_TR = torch.cat([x_TC.double() @ part.T for part in parts], 1)
    rounded = (exact_TR.to(got_TR.dtype).double() - exact_TR).norm()
    error = (got_TR.double() - exact_TR).norm()
    return float((error**2 - rounded**2).clamp_min(0).sqrt() / exact_TR.norm())


def measure(
    grid: Grid, rows: int, columns: int, tokens: Sequence[int], dtype: torch.dtype, early: bool = True
) -> Iterator[Cell]:
    """One matrix at several numbers of tokens. With `early` a launch may start before the one in front has ended.

    Raises CompileError where the kernel cannot be compiled.
    """
    weights = random_solution(grid, rows, columns, dtype)
    blocks, layout = wna16.repack(weights)
    kernel = wna16.kernels(blocks.device, dtype, layout)
    sets = [blocks, *(blocks.clone() for _ in range(copies(blocks.numel()) - 1))]
    torch.cuda.synchronize()
    was, kernel.early = kernel.early, early
    try:
        for count in tokens:
            x_TC = torch.randn(count, columns, device="cuda", dtype=dtype)
            us = median_us([lambda b=each, x=x_TC: kernel.product(x, b, None, rows) for each in sets])  # type: ignore[misc]
            gbps = (blocks.numel() + 2 * count * (rows + columns)) / us / 1e3
            error = excess_error(kernel.product(x_TC, blocks, None, rows), x_TC, weights)
            yield Cell(count, us, blocks.numel(), gbps, error)
    finally:
        kernel.early = was
