"""What a format is: a named pair of pure functions, solution to named tensors and back, and what it can hold.

Shapes: R outputs, C inputs, G groups, W 32-bit words.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from featherweight.core.rules import Grid, Rule
from featherweight.core.solution import AnySolution, Solution
from featherweight.errors import RequestError
from featherweight.formats.rules import Rules, require_grid

__all__ = [
    "SCALE_DTYPES",
    "THE_MATRIX",
    "AnySolution",
    "Format",
    "Grid",
    "Rule",
    "Rules",
    "Solution",
    "as_stored",
    "require_codes",
    "require_storable",
    "require_two_axes",
    "solution_of",
    "take",
]

THE_MATRIX = "the matrix"
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Format(ABC):
    """One layout on disk. A matrix `NAME.weight` becomes the tensors `NAME.<suffix>`; a bias stays as it is.

    Attributes:
        name: how the user, and `by_name`, call it.
        plain: whether its one tensor is the module's own `weight`: to be written as the module holds it (Conv1D:
            C x R), and read back as floats.
        embeddings: whether an embedding can be stored in it.
        shape_in: the suffix of the one tensor whose numbers `shape` reads, where it reads any.
    """

    name: str
    plain: ClassVar[bool] = False
    embeddings: ClassVar[bool] = False
    shape_in: ClassVar[str] = "weight_shape"

    @abstractmethod
    def check(self, name: str, rows: int, columns: int, rule: Rule) -> None:
        """Raise RequestError when a matrix called `name` with this shape and rule cannot be stored."""

    @abstractmethod
    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype scales must be rounded to before weights are, for a model of `model_dtype`."""

    @abstractmethod
    def lowest_zero(self, grid: Grid) -> int:
        """The smallest zero code that can be stored."""

    @abstractmethod
    def suffixes(self, rule: Rule) -> tuple[str, ...]:
        """The names of the tensors of one matrix, without the matrix's own; the first is the same for every rule."""

    @abstractmethod
    def pack(
        self, solution: AnySolution, name: str = THE_MATRIX, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The tensors of a solution by suffix, contiguous; RequestError when the format cannot hold it.

        `dtype` is the model's: what values stored as floats are rounded to (None: the one they have). Codes, and
        scales, whose dtype the grid says, do not depend on it.
        """

    def metrics(self, solution: AnySolution) -> dict[str, float]:
        """What is worth a line in the journal about a solution as this format stores it, beside its bytes."""
        return {}

    @abstractmethod
    def shape(self, tensors: Mapping[str, Tensor], rule: Rule, name: str = THE_MATRIX) -> tuple[int, int]:
        """Rows and columns of the matrix in these tensors; RequestError when their shapes contradict each other.

        Of `shape_in` the numbers are read, of other tensors only shapes and dtypes: they may be on meta.
        """

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], rule: Rule, name: str = THE_MATRIX) -> AnySolution:
        """The solution in these tensors: codes, scales, zeros and mask (of a format that stores one) bit for bit,
        loss_R zero (files keep no certificate).

        Its grid is `as_stored`: ternary comes back as 2 bits, with the scale dtype that was found.
        """

    def verify(self, tensors: Mapping[str, Tensor], name: str) -> None:  # noqa: B027 (most formats have no checksum)
        """Raise RequestError naming the matrix where checksums, of a format that stores any, find damage: for those who
        load it without unpacking it."""

    def unpack_rows(self, tensors: Mapping[str, Tensor], rule: Rule, index_N: Tensor, columns: int) -> Solution:
        """`unpack` of the rows `index_N` (int64) alone, in that order: how an embedding looks tokens up.

        RequestError where the format or the rule stores linear layers only.
        """
        raise RequestError(f"{self.name} with the rule {rule} stores linear layers only: convert the checkpoint.")

    def code_words(self, tensors: Mapping[str, Tensor], rule: Rule) -> Tensor | None:
        """The codes of a matrix as they lie in these tensors, where that is `codec.bits`' stream along the inputs:
        int32, R x W, a view of any strides; None where it is not."""
        return None

    @abstractmethod
    def config(
        self,
        rules: Mapping[str, Rule],
        ignore: Sequence[str] = (),
        *,
        targets: Sequence[str] = ("Linear",),
        meta: Mapping[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """The `quantization_config` of config.json; None for a checkpoint that has none.

        Args:
            rules: of every compressed matrix, by its name on disk.
            ignore: module names left as they were, or "re:" and a regular expression.
            targets: module class names that are compressed (where the format says so, and all obey one rule).
            meta: remarks about how it was made (where the format has room for them).
        """

    @abstractmethod
    def read(self, config: Mapping[str, Any]) -> Rules:
        """The rules a `quantization_config` describes; RequestError for anything we could not read faithfully.

        Files do not say how scales were searched for: `search`, `mirror` and `scale_dtype` are the defaults.
        """


def check_grid(format: str, name: str, columns: int, grid: Grid) -> None:
    """Raises RequestError where the groups do not divide the columns or scales are of a dtype that is not stored."""
    grid.width(columns, name)
    if grid.scale_dtype not in SCALE_DTYPES:
        raise RequestError(
            f"{name} has {grid.scale_dtype} scales, and {format} stores {', '.join(map(str, SCALE_DTYPES))}: "
            "use the model's dtype."
        )


def as_stored(grid: Grid, scale_dtype: torch.dtype) -> Grid:
    """The grid a file can speak of: ternary is stored as (and read as) two bits."""
    return replace(grid, bits=grid.stored_bits, scale_dtype=scale_dtype)


def solution_of(codes_RC: Tensor, scales_RG: Tensor, zeros_RG: Tensor, grid: Grid) -> Solution:
    """A solution read from a file, which keeps no certificate: its loss is zero."""
    loss_R = torch.zeros(codes_RC.shape[0], dtype=torch.float32, device=codes_RC.device)
    return Solution(codes_RC, scales_RG, zeros_RG, as_stored(grid, scales_RG.dtype), loss_R)


def require_two_axes(format: Format, tensor: Tensor, name: str) -> tuple[int, int]:
    """Rows and columns; RequestError for another number of axes."""
    shape = tuple(tensor.shape)
    if len(shape) != 2:
        raise RequestError(f"{name} has shape {shape}, and {format.name} stores 2 axes: pack one expert at a time.")
    return shape


def require_codes(format: Format, solution: AnySolution, name: str) -> Solution:
    """The solution, for formats that hold codes only: `require_storable`, and RequestError where it has none."""
    require_grid(format.name, solution.rule, name)
    assert isinstance(solution, Solution)
    require_storable(format, solution, name)
    return solution


def require_storable(format: Format, solution: Solution, name: str) -> None:
    """What every format asks of a solution before it packs its codes; raises RequestError."""
    shape = require_two_axes(format, solution.codes_RC, name)
    grid, scales_RG, zeros_RG = solution.grid, solution.scales_RG, solution.zeros_RG
    format.check(name, *shape, replace(solution, grid=replace(grid, scale_dtype=scales_RG.dtype)).rule)
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
