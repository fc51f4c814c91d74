"""No layout at all: an ordinary `weight`, with its zeros in place, that every engine loads as a dense checkpoint.

    weight  float [R, C]  the model's dtype

There is no quantization_config, so nothing in the folder says how it was made but featherweight.json.
Packing and unpacking are of R x C; a module that holds its weight as C x R (Conv1D) wants it transposed in the file.
Shapes: R outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from featherweight.core.rules import Grid, Pattern, Rule, parts
from featherweight.core.solution import AnySolution, SparseSolution
from featherweight.errors import RequestError
from featherweight.formats.base import SCALE_DTYPES, THE_MATRIX, Format, Rules, require_two_axes, take


@dataclass(frozen=True)
class Dense(Format):
    """Any solution as the floats it stands for, nothing saved.

    Meant for pruned weights. A grid is taken too, with or without a pattern: that is what is called fake-quantised, a
    checkpoint of full size with the rounded values, for research. Codes are not read back from it.
    """

    name: str = "dense"
    plain: ClassVar[bool] = True

    def check(self, name: str, rows: int, columns: int, rule: Rule) -> None:
        grid, pattern = parts(rule)
        if grid is not None:
            grid.width(columns, name)
        if pattern is not None:
            pattern.check(columns, name)

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return model_dtype

    def lowest_zero(self, grid: Grid) -> int:
        return 0

    def suffixes(self, rule: Rule) -> tuple[str, ...]:
        return ("weight",)

    def pack(
        self, solution: AnySolution, name: str = THE_MATRIX, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """As `Format.pack`; without `dtype`, codes become floats of the dtype of their scales."""
        if isinstance(solution, SparseSolution):
            exact_RC, dtype = solution.values_RC, dtype or solution.values_RC.dtype
        else:
            exact_RC, dtype = solution.values(torch.float32), dtype or solution.scales_RG.dtype
        self.check(name, *require_two_axes(self, exact_RC, name), solution.rule)
        if dtype not in SCALE_DTYPES:
            raise RequestError(f"{name} is {dtype}, and {self.name} stores {', '.join(map(str, SCALE_DTYPES))}.")
        values_RC = exact_RC.to(dtype).contiguous()
        if not bool(torch.isfinite(values_RC).all()):
            raise RequestError(
                f"{name} has a weight beyond the {torch.finfo(dtype).max:g} that {dtype} can hold: keep this matrix "
                "as it is (ignore) or use a wider dtype."
            )
        return {"weight": values_RC}

    def shape(self, tensors: Mapping[str, Tensor], rule: Rule, name: str = THE_MATRIX) -> tuple[int, int]:
        rows, columns = require_two_axes(self, take(tensors, "weight", name), name)
        self.check(name, rows, columns, rule)
        return rows, columns

    def unpack(self, tensors: Mapping[str, Tensor], rule: Rule, name: str = THE_MATRIX) -> SparseSolution:
        """The floats as a pruned layer whose mask is what differs from zero; of a grid, with the pattern "any"."""
        rows, _ = self.shape(tensors, rule, name)
        values_RC = tensors["weight"]
        pattern = parts(rule)[1] or Pattern(sparsity=0.0)
        loss_R = torch.zeros(rows, dtype=torch.float32, device=values_RC.device)
        return SparseSolution(values_RC, values_RC != 0, pattern, loss_R)

    def config(
        self,
        rules: Mapping[str, Rule],
        ignore: Sequence[str] = (),
        *,
        targets: Sequence[str] = ("Linear",),
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """None: a dense checkpoint has no quantization_config."""
        return None

    def read(self, config: Mapping[str, Any]) -> Rules:
        raise RequestError("a dense checkpoint has no quantization_config to read: take it out of config.json.")
