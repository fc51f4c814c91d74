"""What a format is: a named pair of pure functions, Solution to named tensors and back, and what it can hold.

Shapes: R outputs, C inputs, G groups, W 32-bit words.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.errors import RequestError

__all__ = ["THE_MATRIX", "Format", "Grid", "Solution", "as_stored", "require_storable", "solution_of", "take"]

THE_MATRIX = "the matrix"
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Format(ABC):
    """One layout on disk. A matrix `NAME.weight` becomes the tensors `NAME.<suffix>`; a bias stays as it is.

    Attributes:
        name: how the user, and `by_name`, call it.
    """

    name: str

    @abstractmethod
    def check(self, name: str, rows: int, columns: int, grid: Grid) -> None:
        """Raise RequestError when a matrix called `name` with this shape and grid cannot be stored."""

    @abstractmethod
    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype scales must be rounded to before weights are, for a model of `model_dtype`."""

    @abstractmethod
    def lowest_zero(self, grid: Grid) -> int:
        """The smallest zero code that can be stored."""

    @abstractmethod
    def suffixes(self, grid: Grid) -> tuple[str, ...]:
        """The names of the tensors of one matrix, without the matrix's own."""

    @abstractmethod
    def pack(self, solution: Solution, name: str = THE_MATRIX) -> dict[str, Tensor]:
        """The tensors of a solution by suffix, contiguous; RequestError when the format cannot hold it."""

    @abstractmethod
    def shape(self, tensors: Mapping[str, Tensor], grid: Grid, name: str = THE_MATRIX) -> tuple[int, int]:
        """Rows and columns of the matrix in these tensors; RequestError when their shapes contradict each other."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, name: str = THE_MATRIX) -> Solution:
        """The solution in these tensors: codes, scales and zeros bit for bit, loss_R zero (files keep no certificate).

        Its grid is `as_stored`: ternary comes back as 2 bits, with the scale dtype that was found.
        """

    @abstractmethod
    def config(
        self,
        grid: Grid,
        ignore: Sequence[str] = (),
        *,
        targets: Sequence[str] = ("Linear",),
        meta: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Args:
            grid: the one grid of all compressed matrices.
            ignore: module names left as they were, or "re:" and a regular expression.
            targets: module class names that are compressed (where the format says so).
            meta: remarks about how it was made (where the format has room for them).
        """

    @abstractmethod
    def read(self, config: Mapping[str, Any]) -> Grid:
        """The grid a `quantization_config` describes; RequestError for anything we could not read faithfully.

        Files do not say how scales were searched for: `search`, `mirror` and `scale_dtype` are the defaults.
        """


def as_stored(grid: Grid, scale_dtype: torch.dtype) -> Grid:
    """The grid a file can speak of: ternary is stored as (and read as) two bits."""
    return replace(grid, bits=grid.stored_bits, scale_dtype=scale_dtype)


def solution_of(codes_RC: Tensor, scales_RG: Tensor, zeros_RG: Tensor, grid: Grid) -> Solution:
    """A solution read from a file, which keeps no certificate: its loss is zero."""
    loss_R = torch.zeros(codes_RC.shape[0], dtype=torch.float32, device=codes_RC.device)
    return Solution(codes_RC, scales_RG, zeros_RG, as_stored(grid, scales_RG.dtype), loss_R)


def require_storable(format: Format, solution: Solution, name: str) -> None:
    """What every format asks of a solution before it packs it; raises RequestError."""
    shape = tuple(solution.codes_RC.shape)
    if len(shape) != 2:
        raise RequestError(f"{name} has shape {shape}, and {format.name} stores 2 axes: pack one expert at a time.")
    grid, scales_RG, zeros_RG = solution.grid, solution.scales_RG, solution.zeros_RG
    format.check(name, *shape, replace(grid, scale_dtype=scales_RG.dtype))
    assert scales_RG.shape == zeros_RG.shape == (shape[0], shape[1] // grid.width(shape[1])), "groups disagree"
    if not bool(torch.isfinite(scales_RG).all()):
        raise RequestError(
            f"{name} has a scale beyond the {torch.finfo(scales_RG.dtype).max:g} that {scales_RG.dtype} can hold: "
            "keep this matrix as it is (ignore) or use a format with wider scales."
        )
    lowest, highest = (int(z) for z in zeros_RG.aminmax())
    if grid.symmetric and (lowest, highest) != (grid.middle, grid.middle):
        raise RequestError(
            f"{name} has zeros {lowest} .. {highest}, and a symmetric {format.name} file implies {grid.middle}: "
            "use an asymmetric grid."
        )
    if lowest < format.lowest_zero(grid):
        raise RequestError(
            f"{name} has a zero of {lowest}, and {format.name} stores {format.lowest_zero(grid)} or more: use --format "
            "gptq_v2 or compressed-tensors."
        )


def take(tensors: Mapping[str, Tensor], suffix: str, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """tensors[suffix], or RequestError when it is missing or not of `shape`."""
    if suffix not in tensors:
        present = ", ".join(sorted(tensors)) or "nothing"
        raise RequestError(f"{name} has no {suffix}, only {present}: the file is incomplete.")
    tensor = tensors[suffix]
    if shape is not None and tuple(tensor.shape) != shape:
        raise RequestError(
            f"{name}.{suffix} has shape {tuple(tensor.shape)}, and its neighbours and the config ask for {shape}: "
            "one of them belongs to another checkpoint."
        )
    return tensor
