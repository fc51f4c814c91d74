"""Ternary and 2-bit matrices in fewer bits than their codes have: what `codec` makes of them, and their scales.

    weight_header      uint8 [16]              the codec's header: shape, code, version
    weight_row_words   uint8 or uint16 [R]     the words of each row; [0] where all rows have as many
    weight_stream      int32 [words]           the words
    weight_checksums   int32 [ceil(R/32)]      a CRC-32 for each 32 rows
    weight_scale       bf16 or fp16 [R, G]
    weight_zero_point  int32 [words(R), G]     asymmetric only, 2-bit words along the outputs

What is encoded is (code - zero) mod 4, so that the weight 0 is the same symbol in every group, whatever the group's
zero is: it is the commonest weight, and its share is what the bytes hang on. Written down in docs/formats.md.

Shapes: R outputs, C inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from featherweight.codec import (
    Encoded,
    check,
    decode,
    encode,
    entropy_bits,
    pack_dense,
    unpack_dense,
    words_for,
    zero_share,
)
from featherweight.codec.encoded import MOST_COLUMNS
from featherweight.core.rules import Grid, Rule, parts
from featherweight.core.solution import AnySolution, Solution
from featherweight.errors import RequestError
from featherweight.formats import own_config
from featherweight.formats.base import THE_MATRIX, Format, check_grid, require_codes, solution_of, take
from featherweight.formats.rules import CONFIG, Rules, require_grid

BITS = 2
SCALES = (torch.bfloat16, torch.float16)
# The codec's parts, by our suffixes.
PARTS = {
    "weight_header": "header",
    "weight_row_words": "row_words",
    "weight_stream": "stream",
    "weight_checksums": "checksums",
}


@dataclass(frozen=True)
class Sub1(Format):
    """Codes of two bits or ternary ones, by group or by row, entropy-coded; damage is found by checksums.

    Pruned weights are zeros like the others, and what makes the code short: the mask is not read back.
    """

    name: str = "sub1"
    shape_in: ClassVar[str] = "weight_header"

    def check(self, name: str, rows: int, columns: int, rule: Rule) -> None:
        grid = require_grid(self.name, rule, name)
        if grid.stored_bits != BITS:
            raise RequestError(
                f"{name} is to have {grid.bits} bits, and {self.name} stores 1.58 (ternary) or {BITS}: use --bits 1.58 "
                "or --format compressed-tensors."
            )
        if columns > MOST_COLUMNS:
            raise RequestError(
                f"{name} has {columns} inputs, and {self.name} stores {MOST_COLUMNS} at most: ignore it."
            )
        check_grid(self.name, name, columns, grid)
        if grid.scale_dtype not in SCALES:
            raise RequestError(
                f"{name} has {grid.scale_dtype} scales, and {self.name} stores {' or '.join(map(str, SCALES))}: use "
                "one of these."
            )

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return model_dtype if model_dtype in SCALES else torch.float16

    def lowest_zero(self, grid: Grid) -> int:
        return 0

    def suffixes(self, rule: Rule) -> tuple[str, ...]:
        zeros = () if require_grid(self.name, rule, THE_MATRIX).symmetric else ("weight_zero_point",)
        return (*PARTS, "weight_scale", *zeros)

    def pack(
        self, solution: AnySolution, name: str = THE_MATRIX, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        solution = require_codes(self, solution, name)
        found = encode(_symbols(solution)).tensors()
        # A tensor that is not there would be one of unequal suffixes for equal rules; one of no words is as good.
        found.setdefault("row_words", torch.empty(0, dtype=torch.uint8))
        tensors = {suffix: found[part] for suffix, part in PARTS.items()}
        tensors["weight_scale"] = solution.scales_RG.contiguous()
        if not solution.grid.symmetric:
            tensors["weight_zero_point"] = pack_dense(solution.zeros_RG.T, BITS).T.contiguous()
        return tensors

    def metrics(self, solution: AnySolution) -> dict[str, float]:
        """The share of weights that are zero, and the entropy of codes in bits a weight: what no code of single
        weights can do better than."""
        assert isinstance(solution, Solution)
        symbols_RC = _symbols(solution)
        return {"zero_share": zero_share(symbols_RC), "entropy_bits": entropy_bits(symbols_RC)}

    def shape(self, tensors: Mapping[str, Tensor], rule: Rule, name: str = THE_MATRIX) -> tuple[int, int]:
        header = self.encoded(tensors, name).header
        rows, columns = header.rows, header.columns
        grid = require_grid(self.name, rule, name)
        scales = take(tensors, "weight_scale", name, (rows, columns // grid.width(columns, name)))
        if scales.dtype not in SCALES:
            raise RequestError(f"{name}.weight_scale is {scales.dtype}, and {' or '.join(map(str, SCALES))} is read.")
        if not grid.symmetric:
            take(tensors, "weight_zero_point", name, (words_for(rows, BITS), scales.shape[1]))
        return rows, columns

    def encoded(self, tensors: Mapping[str, Tensor], name: str = THE_MATRIX) -> Encoded:
        """The codec's part of a matrix, its checksums not yet looked at: symbols are (code - zero) mod 4.

        Raises RequestError for tensors that are missing or contradict each other, and for another version of the codec.
        """
        found = {part: take(tensors, suffix, name) for suffix, part in PARTS.items()}
        if not found["row_words"].numel():
            del found["row_words"]
        return Encoded.from_tensors(found, name)

    def zeros(self, tensors: Mapping[str, Tensor], grid: Grid) -> Tensor:
        """The code of the weight 0 in each group, uint8 of shape (R, G)."""
        scales_RG = tensors["weight_scale"]
        if grid.symmetric:
            return torch.full(scales_RG.shape, grid.middle, dtype=torch.uint8, device=scales_RG.device)
        return unpack_dense(tensors["weight_zero_point"].T, BITS, len(scales_RG)).T.contiguous()

    def verify(self, tensors: Mapping[str, Tensor], name: str) -> None:
        check(self.encoded(tensors, name), name)

    def unpack(self, tensors: Mapping[str, Tensor], rule: Rule, name: str = THE_MATRIX) -> Solution:
        """As `Format.unpack`; RequestError, too, where a checksum says that codes are not what was written."""
        grid = require_grid(self.name, rule, name)
        self.shape(tensors, grid, name)
        symbols_RC = decode(self.encoded(tensors, name), name)
        return solution_from(symbols_RC, tensors["weight_scale"], self.zeros(tensors, grid), grid)

    def config(
        self,
        rules: Mapping[str, Rule],
        ignore: Sequence[str] = (),
        *,
        targets: Sequence[str] = ("Linear",),
        meta: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As `Format.config`; there is no room for `meta`, and `targets` are the linear layers."""
        grids = {name: require_grid(self.name, rule, name) for name, rule in rules.items()}
        return own_config.write(self.name, grids, ignore)

    def read(self, config: Mapping[str, Any]) -> Rules:
        rules = own_config.read(self.name, config)
        for rule in rules.distinct:
            grid, pattern = parts(rule)
            if grid is None or pattern is not None:
                raise RequestError(f"{CONFIG} has the rule {rule}, and {self.name} has grids alone: correct it.")
        return rules


def solution_from(symbols_RC: Tensor, scales_RG: Tensor, zeros_RG: Tensor, grid: Grid) -> Solution:
    """The solution of symbols as they are encoded; all rows of a matrix, or the same some of each."""
    zeros_RG1 = zeros_RG.unsqueeze(-1)
    codes_RGN = (symbols_RC.unflatten(-1, (scales_RG.shape[1], -1)) + zeros_RG1) & 3
    return solution_of(codes_RGN.flatten(-2), scales_RG, zeros_RG, grid)


def _symbols(solution: Solution) -> Tensor:
    """(code - zero) mod 4, uint8 of shape (R, C)."""
    codes_RGN = solution.codes_RC.unflatten(-1, (solution.scales_RG.shape[1], -1))
    symbols_RC: Tensor = ((codes_RGN - solution.zeros_RG.unsqueeze(-1)) & 3).flatten(-2)
    return symbols_RC
