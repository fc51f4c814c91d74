"""K H K^T of every row of codes K, each group of columns apart, by one kernel on a GPU; on CPUs `tiles` has it.

Shapes: E layers, C columns, R rows, G groups of N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.core import fused

WIDTHS = (16, 32, 64, 128)  # groups whose columns a program multiplies at once


def halved(hessian_CC: Tensor) -> tuple[Tensor, Tensor]:
    """H as `gram` reads it: in bfloat16 and what that leaves; as it is, twice, where the kernel is interpreted."""
    if not hessian_CC.is_cuda:  # the interpreter knows no bfloat16
        return hessian_CC.contiguous(), hessian_CC.contiguous()
    found = fused.halves(hessian_CC, "apart", torch.bfloat16)
    if found is not None:
        return found[0], found[1]
    first_CC = hessian_CC.to(torch.bfloat16, memory_format=torch.contiguous_format)
    return first_CC, (hessian_CC - first_CC).to(torch.bfloat16)


def gram(shift_RGN: Tensor, halves: tuple[Tensor, Tensor]) -> Tensor | None:
    """`refine`'s K H K^T of every row, R x G x G, its lower triangle written; None where torch has to do it.

    `shift_RGN` are codes less their zeros: whole numbers of at most 8 bits; `halves` is H as `halved` gives it.
    """
    groups, width = shift_RGN.shape[-2:]
    if not usable(shift_RGN, width):
        return None
    rows, layers = shift_RGN.shape[-3], shift_RGN.shape[0] if shift_RGN.dim() == 4 else 1
    shift = shift_RGN.to(halves[0].dtype).contiguous()
    found_RGG = shift_RGN.new_empty((*shift_RGN.shape[:-1], groups))

    def launch() -> None:
        from featherweight.core import triton_gram

        each, warps, stages = _program(rows, width, shift.device)
        programs = (-(-rows // each), groups, layers)
        sizes = (rows, groups * width, groups)
        apart = halves[0].dtype == torch.bfloat16
        constants = {"SPAN": width, "ROWS": each, "HALVES": apart, "num_warps": warps, "num_stages": stages}
        triton_gram.gram[programs](shift, *halves, found_RGG, *sizes, **constants)

    return found_RGG if fused.launched(launch) else None


def _program(rows: int, width: int, device: torch.device) -> tuple[int, int, int]:
    """Rows, warps and stages of one of `gram`'s programs: what was fastest on an H100, if it fits into the memory."""
    if width < 128:
        return (128, 4, 3) if width == 64 else (128, 8, 2)
    return (256, 8, 2) if fused.roomy(device) and rows > 128 else (128, 4, 1)


def usable(weights: Tensor, width: int) -> bool:
    """Whether `gram` is a kernel for groups of this width."""
    return fused.usable(weights) and width in WIDTHS
