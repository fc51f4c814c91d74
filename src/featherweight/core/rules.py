"""What a weight may become: the grids and the sparsity patterns.

Shapes: R outputs, C inputs, G groups; N = columns of one group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from featherweight.errors import RequestError

Search = Literal["minmax", "mse", "hessian"]
BITS = (1.58, 2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Grid:
    """Evenly spaced levels: value = (code - zero) * scale, one scale (and zero) for each group of inputs.

    Attributes:
        bits: 2 .. 8, or 1.58 for the three levels -1, 0, 1 (stored as 2-bit codes 1, 2, 3).
        group_size: inputs that share a scale; None = the whole row.
        symmetric: zero is fixed at the middle code, so nothing but the scale is stored.
        search: how the scale (and zero) is chosen: the extremes, or the least squared error, plain or weighted by H.
        scale_dtype: what the file stores; scales are rounded to it *before* weights are rounded to them.
        mirror: with a symmetric grid and a search, also try negative scales: the grid has one level more on its
            negative side, and a mirrored group gets that level on the other.
    """

    bits: float = 4
    group_size: int | None = 128
    symmetric: bool = True
    search: Search = "hessian"
    scale_dtype: torch.dtype = torch.float16
    mirror: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise RequestError(
                f"bits must be one of {', '.join(map(str, BITS))}, not {self.bits}: choose one of these."
            )
        if self.ternary and not self.symmetric:
            raise RequestError("1.58 bits (ternary) has the levels -1, 0, 1 only: drop asymmetric or ask for 2 bits.")
        if self.group_size is not None and self.group_size < 1:
            raise RequestError(f"group size must be 1 or more (or the row), not {self.group_size}.")

    @property
    def ternary(self) -> bool:
        return self.bits == 1.58

    @property
    def stored_bits(self) -> int:
        """Bits of one code in a file: a ternary weight is stored in two."""
        return 2 if self.ternary else int(self.bits)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.stored_bits) - 1

    @property
    def bottom(self) -> int:
        """The smallest code: 0, but 1 for ternary (codes 1, 2, 3 around the middle 2)."""
        return 1 if self.ternary else 0

    @property
    def middle(self) -> int:
        """The code of 0.0 on a symmetric grid."""
        return 1 << (self.stored_bits - 1)

    def width(self, columns: int, name: str = "the matrix") -> int:
        """Columns of one group; raises RequestError when the group size does not divide `columns`."""
        width = self.group_size or columns
        if columns % width:
            fits = [g for g in (256, 128, 64, 32, 16, 8) if columns % g == 0][:3]
            raise RequestError(
                f"{name} has {columns} inputs, which the group size {width} does not divide: "
                f"use --group-size {' or '.join(map(str, fits)) or 'row'}{' or row' if fits else ''}."
            )
        return width

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest allowed code of each weight, in the dtype of `weight`; everything broadcasts."""
        return torch.clamp(torch.round(weight / scale) + zero, self.bottom, self.top)


@dataclass(frozen=True)
class Pattern:
    """Which weights are zero.

    Attributes:
        sparsity: the share of zeros in the layer, where nothing else is asked for.
        keep, of: N:M sparsity: so many weights are kept of each run of `of` neighbouring inputs (2 of 4); 0 and 0 for
            unstructured sparsity. (SparseGPT's own options count the zeros.)
        block: neighbouring inputs that are zero or kept together, with unstructured sparsity.
    """

    sparsity: float = 0.5
    keep: int = 0
    of: int = 0
    block: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise RequestError(f"sparsity must be at least 0 and less than 1, not {self.sparsity}.")
        if (self.keep or self.of) and not 0 < self.keep < self.of <= 32:
            raise RequestError(f"N:M sparsity keeps 1 or more of at most 32 weights, not {self.keep}:{self.of}.")
        if self.block < 1 or (self.of and self.block > 1):
            raise RequestError(f"blocks have 1 or more weights, and 1 with N:M sparsity, not {self.block}.")

    def check(self, columns: int, name: str = "the matrix") -> None:
        """Raises RequestError when the pattern does not divide the columns."""
        if self.of and columns % self.of:
            raise RequestError(
                f"{name} has {columns} inputs, which {self.keep}:{self.of} sparsity does not divide: "
                f"use an M that divides {columns}, or unstructured sparsity."
            )
        if columns % self.block:
            raise RequestError(f"{name} has {columns} inputs, which blocks of {self.block} do not divide: use others.")

    @classmethod
    def of_text(cls, text: str) -> Pattern:
        """ "0.5" (half of the weights are zero) or "2:4" (of four neighbours two are kept); RequestError otherwise."""
        found = re.fullmatch(r"(\d+):(\d+)|(\d*\.?\d+)", text.strip())
        if found is None:
            raise RequestError(f"sparsity {text!r}: give a share of zeros such as 0.5, or kept weights as 2:4.")
        return cls(sparsity=float(found[3])) if found[3] else cls(keep=int(found[1]), of=int(found[2]))

    @property
    def zeros(self) -> float:
        """The share of weights that are zero."""
        return 1 - self.keep / self.of if self.of else self.sparsity

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.of else f"{self.sparsity:g}"


@dataclass(frozen=True)
class Joint:
    """Both at once: zeros after a pattern, and the rest on a grid fitted to what is left."""

    grid: Grid
    pattern: Pattern


Rule = Grid | Pattern | Joint


def parts(rule: Rule | None) -> tuple[Grid | None, Pattern | None]:
    """The grid and the pattern of a rule, None for what it does not have; no rule at all has neither."""
    return (None, None) if rule is None else (grid_of(rule), pattern_of(rule))


def grid_of(rule: Rule) -> Grid | None:
    """The grid of a rule; None where weights stay floats."""
    return rule.grid if isinstance(rule, Joint) else rule if isinstance(rule, Grid) else None


def pattern_of(rule: Rule) -> Pattern | None:
    """The pattern of a rule; None where nothing is pruned."""
    return rule.pattern if isinstance(rule, Joint) else rule if isinstance(rule, Pattern) else None
