"""What a matrix may be asked to become, and how many bytes it then takes in a file.

Shapes: R outputs, C inputs, G groups of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from featherweight.core.rules import Grid, Joint, Pattern, Rule, Search, parts
from featherweight.errors import RequestError

Layout = Callable[[Rule | None, int, int], int]
"""(rule, R, C) -> bytes of one matrix in some format; the rule None is the matrix as it is."""

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
SPARSITIES = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RUNS = ((2, 4), (4, 8))
VALUE_BITS = 16  # of a weight that is stored as it is, and of a scale
SHAPE_BYTES = 16  # two int64: rows and columns
DENSE = "dense"


def stored_bytes(rule: Rule | None, rows: int, columns: int) -> int:
    """Bytes of a matrix: grids as compressed-tensors `pack-quantized` has them, patterns as mask (or index) + values.

    A grid: every row's codes in whole 32-bit words, R x G 16-bit scales, with zeros (asymmetric) every group's packed
    along the rows, and the shape. A pattern: the cheaper of one bit a weight and ceil(log2 M) bits a kept weight, and
    the kept weights in 16 bits, or in the grid's with its scales and zeros.
    """
    if rule is None:
        return rows * columns * VALUE_BITS // 8
    if isinstance(rule, Grid):
        return rows * _words(columns, rule.stored_bits) * 4 + _scale_bytes(rule, rows, columns) + SHAPE_BYTES
    pattern, grid = (rule.pattern, rule.grid) if isinstance(rule, Joint) else (rule, None)
    kept = kept_weights(rule, rows, columns)
    position_bits = rows * columns // pattern.block
    if pattern.of:
        position_bits = min(position_bits, kept * math.ceil(math.log2(pattern.of)))
    value_bits = kept * (VALUE_BITS if grid is None else grid.stored_bits)
    scale_bytes = 0 if grid is None else _scale_bytes(grid, rows, columns)
    return -(-position_bits // 8) + -(-value_bits // 8) + scale_bytes + SHAPE_BYTES


def kept_weights(rule: Rule | None, rows: int, columns: int) -> int:
    """How many weights of a matrix may differ from zero under a rule."""
    if rule is None or isinstance(rule, Grid):
        return rows * columns
    pattern = rule.pattern if isinstance(rule, Joint) else rule
    if pattern.of:
        return rows * columns // pattern.of * pattern.keep
    blocks = rows * columns // pattern.block
    return (blocks - round(pattern.sparsity * blocks)) * pattern.block


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _scale_bytes(grid: Grid, rows: int, columns: int) -> int:
    groups = columns // grid.width(columns)
    zeros = 0 if grid.symmetric else _words(rows, grid.stored_bits) * groups * 4
    return rows * groups * grid.scale_dtype.itemsize + zeros


@dataclass(frozen=True)
class Option:
    """One thing a matrix may become.

    Attributes:
        label: what it is called in tables and databases, such as "3b-g64" or "2:4+4b-g128".
        rule: what the solver is asked for; None leaves the matrix as it is.
        layout: its bytes in the target format, `stored_bytes` unless given.
    """

    label: str
    rule: Rule | None
    layout: Layout = field(default=stored_bytes, compare=False)

    @classmethod
    def of(cls, rule: Rule | None, layout: Layout = stored_bytes) -> Option:
        """An option with the label of its rule."""
        return cls(label_of(rule), rule, layout)

    def bytes(self, rows: int, columns: int) -> int:
        """Stored bytes of a matrix of R x C."""
        return self.layout(self.rule, rows, columns)

    def fits(self, columns: int) -> bool:
        """Whether its groups and patterns divide the columns."""
        try:
            grid, pattern = parts(self.rule)
            if grid is not None:
                grid.width(columns)
            if pattern is not None:
                pattern.check(columns)
        except RequestError:
            return False
        return True


def label_of(rule: Rule | None) -> str:
    """ "4b-g64", "3b-g128-asym", "8b-row", "50%", "2:4", "2:4+4b-g128", "dense"."""
    grid, pattern = parts(rule)
    names = []
    if pattern is not None:
        block = f"-b{pattern.block}" if pattern.block > 1 else ""
        names.append(f"{pattern.keep}:{pattern.of}" if pattern.of else f"{100 * pattern.sparsity:g}%{block}")
    if grid is not None:
        group = "row" if grid.group_size is None else f"g{grid.group_size}"
        names.append(f"{grid.bits:g}b-{group}{'' if grid.symmetric else '-asym'}")
    return "+".join(names) or DENSE


def table_layout(table: Mapping[tuple[str, int, int], int]) -> Layout:
    """A layout from measured bytes by (label, R, C); asking for anything else raises RequestError."""

    def look_up(rule: Rule | None, rows: int, columns: int) -> int:
        key = (label_of(rule), rows, columns)
        if key not in table:
            raise RequestError(f"the table of bytes has no entry for {key[0]} of {rows} x {columns}: add it.")
        return table[key]

    return look_up


def menu(
    grids: bool = True,
    patterns: bool = True,
    joint: bool = True,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    layout: Layout = stored_bytes,
    search: Search = "hessian",
    bits: Sequence[int] = BITS,
    group_sizes: Sequence[int] = GROUPS,
) -> tuple[Option, ...]:
    """The options we try by default: every width and group size, the usual sparsities, and both with 4 bits.

    Args:
        grids, patterns, joint: which kinds the target format can hold, or the request asks for.
        symmetric, scale_dtype, search: of all grids.
        bits, group_sizes: of the grids without a pattern.
    """

    def grid(width: int, group_size: int) -> Grid:
        return Grid(width, group_size, symmetric, search, scale_dtype)

    all_patterns = [Pattern(s) for s in SPARSITIES] + [Pattern(keep=keep, of=of) for keep, of in RUNS]
    rules: list[Rule] = []
    if grids:
        rules += [grid(width, group_size) for width in bits for group_size in group_sizes]
    if patterns:
        rules += all_patterns
    if joint:
        rules += [Joint(grid(4, 128), p) for p in all_patterns if p.of or p.sparsity in (0.25, 0.5, 0.7)]
        rules += [Joint(grid(4, 64), p) for p in all_patterns if p.of]
    return tuple(Option.of(rule, layout) for rule in rules)


def fitting(options: Iterable[Option], columns: int, name: str = "the matrix") -> tuple[Option, ...]:
    """The options that divide the columns; raises RequestError where none does."""
    options = tuple(options)
    found = tuple(option for option in options if option.fits(columns))
    if not found:
        raise RequestError(
            f"{name} has {columns} inputs, which none of {', '.join(o.label for o in options)} divides: add an option "
            "with other groups, or leave this matrix as it is."
        )
    return found
