"""EfficientQAT's own files (their --real_quant), 2, 3 and 4 bits: near GPTQ's layout, and its own at 3.

    qweight  int32   [ceil(C / k), R]   codes, k = 32 // bits of them a word from the lowest bit up, along the inputs
    qzeros   int32   [G, ceil(R / k)]   zeros, in the same way along the outputs; the zero itself, as in gptq_v2
    scales   float16 [G, R]             float32 after E2E-QP
    g_idx    int32   [C]                not used: input // group size

A word has k codes and no more: at 3 bits 10 of them and two bits of nothing (3.2 bits a weight), where GPTQ's codes lie
in one stream. Their config.json says nothing of all this, so one has to be given:
`"quantization_config": {"quant_method": "efficientqat", "bits": 3, "group_size": 128}`.

Source: OpenGVLab/EfficientQAT, quantize/int_linear_real.py; no code of theirs is run in our tests.
Shapes: R outputs, C inputs, G groups, W words, K codes of a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.core.rules import Grid, Rule
from featherweight.core.solution import AnySolution, Solution
from featherweight.errors import RequestError
from featherweight.formats.base import THE_MATRIX, Format, check_grid, require_codes, solution_of, take
from featherweight.formats.rules import CONFIG, Rules, require_grid

BITS = (2, 3, 4)


@dataclass(frozen=True)
class EfficientQat(Format):
    """Asymmetric codes of 2, 3 or 4 bits; read, tuned and written back, and not offered for new files: no engine loads
    them as they are."""

    name: str = "efficientqat"

    def check(self, name: str, rows: int, columns: int, rule: Rule) -> None:
        grid = require_grid(self.name, rule, name)
        if grid.stored_bits not in BITS or grid.symmetric:
            raise RequestError(
                f"{name} wants {grid}, and {self.name} has asymmetric grids of 2, 3 or 4 bits: use gptq."
            )
        check_grid(self.name, name, columns, grid)

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def lowest_zero(self, grid: Grid) -> int:
        return 0

    def suffixes(self, rule: Rule) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales", "g_idx")

    def pack(
        self, solution: AnySolution, name: str = THE_MATRIX, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        solution = require_codes(self, solution, name)
        bits, columns = solution.grid.stored_bits, solution.codes_RC.shape[1]
        places_C = torch.arange(columns, dtype=torch.int32, device=solution.codes_RC.device)
        return {
            "qweight": _packed(solution.codes_RC, bits).T.contiguous(),
            "qzeros": _packed(solution.zeros_RG.T, bits),
            "scales": solution.scales_RG.T.contiguous(),
            "g_idx": places_C // solution.grid.width(columns),
        }

    def shape(self, tensors: Mapping[str, Tensor], rule: Rule, name: str = THE_MATRIX) -> tuple[int, int]:
        grid = require_grid(self.name, rule, name)
        together = 32 // grid.stored_bits
        words, rows = take(tensors, "qweight", name).shape
        columns = take(tensors, "g_idx", name).numel()
        groups = columns // grid.width(columns, name)
        if words != -(-columns // together):
            raise RequestError(
                f"{name}.qweight has {words} words for {columns} inputs, and at {grid.stored_bits} bits "
                f"{-(-columns // together)} hold them: correct bits in {CONFIG}."
            )
        take(tensors, "scales", name, (groups, rows))
        take(tensors, "qzeros", name, (groups, -(-rows // together)))
        return rows, columns

    def unpack(self, tensors: Mapping[str, Tensor], rule: Rule, name: str = THE_MATRIX) -> Solution:
        grid = require_grid(self.name, rule, name)
        rows, columns = self.shape(tensors, grid, name)
        codes_RC = _unpacked(tensors["qweight"].T, grid.stored_bits, columns)
        zeros_RG = _unpacked(tensors["qzeros"], grid.stored_bits, rows).T.contiguous()
        return solution_of(codes_RC, tensors["scales"].T.contiguous(), zeros_RG, grid)

    def config(
        self,
        rules: Mapping[str, Rule],
        ignore: Sequence[str] = (),
        *,
        targets: Sequence[str] = ("Linear",),
        meta: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        grids = {require_grid(self.name, rule, name) for name, rule in rules.items()}
        if len(grids) > 1:
            raise RequestError(f"{len(grids)} rules were asked for, and an {self.name} file has 1: use gptq_v2.")
        grid = grids.pop()
        return {"quant_method": self.name, "bits": grid.stored_bits, "group_size": grid.group_size or -1}

    def read(self, config: Mapping[str, Any]) -> Rules:
        bits, size = config.get("bits"), config.get("group_size")
        if bits not in BITS:
            raise RequestError(f"{CONFIG}.bits is {bits}, and {self.name} has 2, 3 or 4: say which.")
        if not isinstance(size, int) or size == 0 or size < -1:
            raise RequestError(f"{CONFIG}.group_size is {size}, and {self.name} needs it, or -1 for rows: say which.")
        return Rules(default=Grid(bits=bits, group_size=None if size == -1 else size, symmetric=False))


def _packed(codes_N: Tensor, bits: int) -> Tensor:
    """32 // bits codes a word along the last axis, int32; the last word is filled up with zeros."""
    together = 32 // bits
    padded_N = torch.nn.functional.pad(codes_N.to(torch.int64), (0, -codes_N.shape[-1] % together))
    shifts_K = bits * torch.arange(together, device=codes_N.device)
    words_W = (padded_N.unflatten(-1, (-1, together)) << shifts_K).sum(-1)
    return torch.where(words_W >= 1 << 31, words_W - (1 << 32), words_W).to(torch.int32)


def _unpacked(words_W: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `_packed`: the first `count` codes of each row, uint8."""
    shifts_K = bits * torch.arange(32 // bits, dtype=torch.int32, device=words_W.device)
    codes_WK = (words_W.unsqueeze(-1) >> shifts_K) & ((1 << bits) - 1)
    return codes_WK.flatten(-2)[..., :count].to(torch.uint8).contiguous()
