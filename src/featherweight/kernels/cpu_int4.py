"""Products on CPUs with codes of up to four bits and bfloat16 activations.

In C where there is a compiler (`cpu_native`), which holds the codes once and gives the stored tensors back. Where there
is none, by torch's own 4-bit operator for few tokens and by `tiles` for more, each with its own order of the codes.

That operator computes V = (q - 8) * scale + offset from 4-bit q, with scale and offset of each group in the dtype of
the activations. Codes of any width up to 4 bits are moved to q = code - middle + 8, which leaves an offset of
(middle - zero) * scale: nothing for symmetric grids, and little for others. (With q = code, the first thing tried,
2-bit weights were small differences of large rounded terms, and 2 % wrong.) Scales and offsets are rounded to bfloat16
first, where the reference rounds each weight: the same relative step, but taken by a whole group together.

bfloat16 only: with float32 or float16 the operator was measured 10 to 300 times slower than a dense product
(torch 2.13, 4096 x 4096, 1 .. 256 tokens), with bfloat16 5 times faster at one token and 4 times slower at 256.

Source: torch's `_convert_weight_to_int4pack_for_cpu` and `_weight_int4pack_mm_for_cpu`, undocumented;
what is said of them here was measured.
Shapes: R outputs, C inputs, G groups, T tokens (any leading axes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from featherweight.formats import parts
from featherweight.formats.base import Format, Rule, Solution
from featherweight.kernels import cpu_native, tiles
from featherweight.kernels.base import Case, Kernel, Restorable, Run, require_input, require_no_backward

FEW_TOKENS = 32  # that torch's operator multiplies faster than floats are made of codes
Multiply = Callable[[Tensor], Tensor]
WIDTHS = (256, 128, 64, 32)
ROW_MULTIPLE = 16
MIDDLE = 8


@dataclass(frozen=True)
class CpuInt4(Kernel):
    """Weights stay packed in memory, repacked once."""

    name: str = "cpu-int4"

    def refusal(self, case: Case) -> str | None:
        grid, pattern = parts(case.rule)
        if grid is None:
            return f"it multiplies by codes, and the weights are floats, pruned ({pattern})"
        width = grid.group_size or case.columns
        if case.device.type != "cpu":
            return f"it runs on cpu, and the layer is on {case.device.type}"
        if case.dtype != torch.bfloat16:
            return f"it is fast with torch.bfloat16 only, and the activations are {case.dtype}"
        if grid.stored_bits > 4:
            return f"it holds 4 bits, and the codes have {grid.stored_bits}"
        if case.rows % ROW_MULTIPLE:
            return f"it needs outputs in multiples of {ROW_MULTIPLE}, and there are {case.rows}"
        if width % WIDTHS[-1]:
            return f"it needs groups of a multiple of {WIDTHS[-1]}, and they have {width}"
        return None

    def prepare(self, format: Format, rule: Rule, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Run:
        solution = format.unpack(tensors, rule)
        assert isinstance(solution, Solution)
        in_c = cpu_native.library() is not None
        multiply, stored = _in_c(solution) if in_c else (_by_torch(solution, dtype), None)
        columns, device = solution.codes_RC.shape[1], solution.codes_RC.device

        def run(x_TC: Tensor, bias_R: Tensor | None) -> Tensor:
            require_no_backward(self.name, x_TC)
            require_input(x_TC, columns, dtype, device)
            y_TR = multiply(x_TC)
            return y_TR if bias_R is None else y_TR + bias_R

        return run if stored is None else Restorable(run, stored)


def _in_c(solution: Solution) -> tuple[Multiply, Callable[[], Solution] | None]:
    """The product, and what makes the solution of what it holds: None of a pruned one, whose mask it does not hold."""
    cpu_native.register()
    packed = cpu_native.pack(solution)
    grid, dtype, pruned = solution.grid, solution.scales_RG.dtype, solution.keep_RC is not None
    stored = None if pruned else partial(cpu_native.unpack, packed, grid, dtype)
    return partial(cpu_native.call, packed=packed), stored


def _by_torch(solution: Solution, dtype: torch.dtype) -> Multiply:
    rows = len(solution.codes_RC)
    packed, scales_GR2, width = _repack(solution, dtype)
    tiles.register()
    many = tiles.pack(solution)

    def multiply(x_TC: Tensor) -> Tensor:
        flat_TC = x_TC.reshape(-1, x_TC.shape[-1])
        if len(flat_TC) > FEW_TOKENS:
            return tiles.call(x_TC, many, None)
        y_TR = torch._weight_int4pack_mm_for_cpu(flat_TC, packed, width, scales_GR2)
        return y_TR.view(*x_TC.shape[:-1], rows)

    return multiply


def _repack(solution: Solution, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """The operator's own order of codes, its scales and offsets [G, R, 2], and the group width it is told.

    A group wider than the operator knows (a whole row, say) is several of its groups with equal scales.
    """
    codes_RC, scales_RG = solution.codes_RC, solution.scales_RG.float()
    group = codes_RC.shape[1] // scales_RG.shape[1]
    width = next(w for w in WIDTHS if group % w == 0)
    shift = MIDDLE - solution.grid.middle
    offsets_RG = (solution.grid.middle - solution.zeros_RG.float()) * scales_RG
    scales_RG2 = torch.stack((scales_RG, offsets_RG), dim=-1).repeat_interleave(group // width, dim=1)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes_RC.to(torch.int32) + shift, 1)
    return packed, scales_RG2.transpose(0, 1).to(dtype).contiguous(), width
