"""Our own layout for what no engine stores: pruned matrices without their zeros. Written down in docs/formats.md.

    weight_shape       int64 [2]                        R, C
    weight_mask        uint8 [R, ceil(C/8)]             a bit a weight, 1 is kept
    weight_index       int32 [R, words(C*n/m, b)]       N:M instead: b-bit places of the kept in their run of m
    weight_values      float [K] or [R, C*n/m]          the kept weights, row by row, or, of rounded ones:
    weight_kept        int64 [1]                        K, how many are kept (unstructured)
    weight_packed      int32 [words(K)] or [R, words]   their codes
    weight_scale       float [R, G]                     the model's dtype
    weight_zero_point  int32 [words(R), G]              asymmetric only, along the outputs

Indices are stored where they are no longer than a mask, n * ceil(log2 m) <= m (1:4, 2:4, 2:8, but not 4:8): for 2:4
they are what sparse tensor cores read. Words are `codec.bits`. A matrix that is not pruned has neither mask nor index.
Every redundancy is checked on reading: a damaged file is an error, and never a wrong weight where a count can tell.

Shapes: R outputs, C inputs, G groups, K kept weights, P runs of m inputs in a row, N kept or all inputs of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from featherweight.codec import pack_dense, pack_flags, unpack_dense, unpack_flags, words_for
from featherweight.core.rules import Grid, Joint, Pattern, Rule, parts
from featherweight.core.solution import AnySolution, Solution, SparseSolution
from featherweight.errors import RequestError
from featherweight.formats import own_config
from featherweight.formats.base import (
    SCALE_DTYPES,
    THE_MATRIX,
    Format,
    as_stored,
    check_grid,
    require_storable,
    require_two_axes,
    take,
)
from featherweight.formats.rows import grid_rows
from featherweight.formats.rules import Rules

FLOATS = SCALE_DTYPES
DAMAGED = "the file is damaged: download or write it again."


@dataclass(frozen=True)
class Sparse(Format):
    """Patterns, grids or both, each matrix its own."""

    name: str = "sparse"
    embeddings: ClassVar[bool] = True

    def check(self, name: str, rows: int, columns: int, rule: Rule) -> None:
        grid, pattern = parts(rule)
        if pattern is not None:
            pattern.check(columns, name)
        if grid is not None:
            check_grid(self.name, name, columns, grid)

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return model_dtype

    def lowest_zero(self, grid: Grid) -> int:
        return 0

    def suffixes(self, rule: Rule) -> tuple[str, ...]:
        grid, pattern = parts(rule)
        mask = () if pattern is None else ("weight_index",) if indexed(pattern) else ("weight_mask",)
        if grid is None:
            return ("weight_shape", *mask, "weight_values")
        kept = () if pattern is None or pattern.of else ("weight_kept",)
        zeros = () if grid.symmetric else ("weight_zero_point",)
        return ("weight_shape", *mask, *kept, "weight_packed", "weight_scale", *zeros)

    def pack(
        self, solution: AnySolution, name: str = THE_MATRIX, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        content_RC = solution.codes_RC if isinstance(solution, Solution) else solution.values_RC
        rows, columns = require_two_axes(self, content_RC, name)
        tensors = _pack_mask(solution, name) if solution.pattern is not None else {}
        if isinstance(solution, Solution):
            require_storable(self, solution, name)
            tensors |= _pack_codes(solution)
        else:
            self.check(name, rows, columns, solution.rule)
            tensors["weight_values"] = _kept_values(solution, dtype or content_RC.dtype, name)
        tensors["weight_shape"] = torch.tensor(content_RC.shape, dtype=torch.int64, device=content_RC.device)
        return {suffix: tensors[suffix] for suffix in self.suffixes(solution.rule)}

    def shape(self, tensors: Mapping[str, Tensor], rule: Rule, name: str = THE_MATRIX) -> tuple[int, int]:
        rows, columns = (int(n) for n in _typed(tensors, "weight_shape", name, (torch.int64,), (2,)).tolist())
        if rows < 1 or columns < 1:
            raise RequestError(f"{name}.weight_shape says {rows} x {columns}, and 1 x 1 is the least: {DAMAGED}")
        self.check(name, rows, columns, rule)
        grid, pattern = parts(rule)
        kept = columns
        if pattern is not None and indexed(pattern):
            kept = columns // pattern.of * pattern.keep
            _typed(tensors, "weight_index", name, (torch.int32,), (rows, words_for(kept, index_bits(pattern))))
        elif pattern is not None:
            kept = columns // pattern.of * pattern.keep if pattern.of else -1
            _typed(tensors, "weight_mask", name, (torch.uint8,), (rows, -(-columns // 8)))
        if grid is None:
            _typed(tensors, "weight_values", name, FLOATS, None if kept < 0 else (rows, kept))
            return rows, columns
        words = None if kept < 0 else (rows, words_for(kept, grid.stored_bits))
        _typed(tensors, "weight_packed", name, (torch.int32,), words)
        groups = columns // grid.width(columns, name)
        _typed(tensors, "weight_scale", name, FLOATS, (rows, groups))
        if not grid.symmetric:
            packed_rows = words_for(rows, grid.stored_bits)
            _typed(tensors, "weight_zero_point", name, (torch.int32,), (packed_rows, groups))
        return rows, columns

    def unpack(self, tensors: Mapping[str, Tensor], rule: Rule, name: str = THE_MATRIX) -> AnySolution:
        rows, columns = self.shape(tensors, rule, name)
        grid, pattern = parts(rule)
        keep_RC = None if pattern is None else _unpack_mask(tensors, pattern, columns, name)
        loss_R = torch.zeros(rows, dtype=torch.float32, device=tensors["weight_shape"].device)
        if grid is None:
            assert pattern is not None and keep_RC is not None
            values = tensors["weight_values"]
            _require_count(keep_RC, values.numel(), "weight_values holds", name)
            values_RC = values.new_zeros(rows, columns).masked_scatter_(keep_RC, values)
            return SparseSolution(values_RC, keep_RC, pattern, loss_R)
        scales_RG = tensors["weight_scale"]
        zeros_RG = _unpack_zeros(tensors, grid, rows, scales_RG)
        codes_RC = _unpack_codes(tensors, Joint(grid, pattern) if pattern else grid, keep_RC, zeros_RG, columns, name)
        stored = as_stored(grid, scales_RG.dtype)
        return Solution(codes_RC, scales_RG, zeros_RG, stored, loss_R, keep_RC=keep_RC, pattern=pattern)

    def unpack_rows(self, tensors: Mapping[str, Tensor], rule: Rule, index_N: Tensor, columns: int) -> Solution:
        grid, pattern = parts(rule)
        if grid is None or pattern is not None:
            return super().unpack_rows(tensors, rule, index_N, columns)
        return grid_rows(tensors, grid, index_N, columns)

    def config(
        self,
        rules: Mapping[str, Rule],
        ignore: Sequence[str] = (),
        *,
        targets: Sequence[str] = ("Linear",),
        meta: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As `Format.config`; there is no room for `meta`, and `targets` are the linear layers."""
        return own_config.write(self.name, rules, ignore)

    def read(self, config: Mapping[str, Any]) -> Rules:
        return own_config.read(self.name, config)


def index_bits(pattern: Pattern) -> int:
    """Bits of a kept weight's place in its run: ceil(log2 m)."""
    return (pattern.of - 1).bit_length()


def indexed(pattern: Pattern) -> bool:
    """Whether places are stored, and not a mask: where they take no more bits."""
    return bool(pattern.of) and pattern.keep * index_bits(pattern) <= pattern.of


def _typed(
    tensors: Mapping[str, Tensor],
    suffix: str,
    name: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None,
) -> Tensor:
    """tensors[suffix] of one of these dtypes and this shape (None: one axis); RequestError otherwise."""
    tensor = take(tensors, suffix, name, shape)
    if tensor.dtype not in dtypes or (shape is None and tensor.ndim != 1):
        raise RequestError(
            f"{name}.{suffix} is {tensor.dtype} with {tensor.ndim} axes, and {' or '.join(map(str, dtypes))} with "
            f"{1 if shape is None else len(shape)} is read: {DAMAGED}"
        )
    return tensor


def _pack_mask(solution: AnySolution, name: str) -> dict[str, Tensor]:
    pattern, keep_RC = solution.pattern, solution.keep_RC
    assert pattern is not None and keep_RC is not None, "a pruned layer has a mask"
    if not pattern.of:
        return {"weight_mask": pack_flags(keep_RC)}
    pattern.check(keep_RC.shape[1], name)
    keep_RPN = keep_RC.unflatten(-1, (-1, pattern.of))
    fewest, most = (int(n) for n in keep_RPN.sum(-1, dtype=torch.uint8).aminmax())
    if (fewest, most) != (pattern.keep, pattern.keep):
        raise RequestError(
            f"{name} keeps {fewest} to {most} weights of each {pattern.of}, and {pattern} is {pattern.keep}: "
            "store it as unstructured sparsity."
        )
    if not indexed(pattern):
        return {"weight_mask": pack_flags(keep_RC)}
    places_N = torch.arange(pattern.of, dtype=torch.uint8, device=keep_RC.device)
    places_RK = places_N.expand(keep_RPN.shape).masked_select(keep_RPN).view(keep_RC.shape[0], -1)
    return {"weight_index": pack_dense(places_RK, index_bits(pattern))}


def _unpack_mask(tensors: Mapping[str, Tensor], pattern: Pattern, columns: int, name: str) -> Tensor:
    """keep_RC, bool; RequestError for a mask or indices that no `_pack_mask` writes."""
    if indexed(pattern):
        kept = columns // pattern.of * pattern.keep
        places_RK = unpack_dense(tensors["weight_index"], index_bits(pattern), kept)
        places_RPN = places_RK.unflatten(-1, (-1, pattern.keep))
        rising = bool((places_RPN[..., 1:] > places_RPN[..., :-1]).all())
        if not rising or int(places_RPN.max()) >= pattern.of:
            raise RequestError(
                f"{name}.weight_index has places that do not rise from 0 to {pattern.of - 1} in a run: {DAMAGED}"
            )
        shape = (*places_RPN.shape[:-1], pattern.of)
        keep_RPN = torch.zeros(shape, dtype=torch.bool, device=places_RK.device)
        return keep_RPN.scatter_(-1, places_RPN.long(), True).flatten(-2)
    flags = unpack_flags(tensors["weight_mask"])
    if bool(flags[:, columns:].any()):
        raise RequestError(f"{name}.weight_mask has bits behind its {columns} columns, where 0 belongs: {DAMAGED}")
    keep_RC = flags[:, :columns].contiguous()
    if pattern.of:
        kept_RP = keep_RC.unflatten(-1, (-1, pattern.of)).sum(-1, dtype=torch.uint8)
        if bool((kept_RP != pattern.keep).any()):
            wrong = int(kept_RP[kept_RP != pattern.keep][0])
            raise RequestError(
                f"{name}.weight_mask keeps {wrong} of {pattern.of} weights, and {pattern} is {pattern.keep}: {DAMAGED}"
            )
    return keep_RC


def _kept_values(solution: SparseSolution, dtype: torch.dtype, name: str) -> Tensor:
    """The kept weights in the stored dtype: in one row, or of N:M in R rows."""
    values_RC, keep_RC = solution.values_RC, solution.keep_RC
    if dtype not in FLOATS:
        raise RequestError(f"{name} is {dtype}, and sparse stores {', '.join(map(str, FLOATS))}: give one of them.")
    assert not bool(values_RC.masked_select(~keep_RC).any()), "a pruned weight is not zero"
    kept = values_RC.masked_select(keep_RC).to(dtype)
    if not bool(torch.isfinite(kept).all()):
        raise RequestError(
            f"{name} has a weight beyond the {torch.finfo(dtype).max:g} that {dtype} can hold: keep this matrix as it "
            "is (ignore) or use a wider dtype."
        )
    return kept.view(values_RC.shape[0], -1) if solution.pattern.of else kept


def _pack_codes(solution: Solution) -> dict[str, Tensor]:
    bits, codes_RC, keep_RC = solution.grid.stored_bits, solution.codes_RC, solution.keep_RC
    tensors = {
        "weight_scale": solution.scales_RG.contiguous(),
        "weight_zero_point": pack_dense(solution.zeros_RG.T, bits).T.contiguous(),
    }
    if solution.pattern is None:
        return tensors | {"weight_packed": pack_dense(codes_RC, bits)}
    assert keep_RC is not None
    width = codes_RC.shape[1] // solution.zeros_RG.shape[1]
    off_RC = codes_RC != solution.zeros_RG.repeat_interleave(width, -1)
    assert not bool((off_RC & ~keep_RC).any()), "a pruned weight is not zero"
    kept = codes_RC.masked_select(keep_RC)
    tensors["weight_kept"] = torch.tensor([kept.numel()], dtype=torch.int64, device=codes_RC.device)
    kept = kept.view(codes_RC.shape[0], -1) if solution.pattern.of else kept
    return tensors | {"weight_packed": pack_dense(kept, bits)}


def _unpack_zeros(tensors: Mapping[str, Tensor], grid: Grid, rows: int, scales_RG: Tensor) -> Tensor:
    if grid.symmetric:
        return torch.full(scales_RG.shape, grid.middle, dtype=torch.uint8, device=scales_RG.device)
    return unpack_dense(tensors["weight_zero_point"].T, grid.stored_bits, rows).T.contiguous()


def _unpack_codes(
    tensors: Mapping[str, Tensor], rule: Rule, keep_RC: Tensor | None, zeros_RG: Tensor, columns: int, name: str
) -> Tensor:
    """codes_RC with the zero of its group in every pruned place."""
    grid, pattern = parts(rule)
    assert grid is not None
    words, bits = tensors["weight_packed"], grid.stored_bits
    if pattern is None or keep_RC is None:
        return unpack_dense(words, bits, columns)
    if pattern.of:
        kept = unpack_dense(words, bits, columns // pattern.of * pattern.keep)
    else:
        count = int(_typed(tensors, "weight_kept", name, (torch.int64,), (1,)))
        _require_count(keep_RC, count, "weight_kept says", name)
        take(tensors, "weight_packed", name, (words_for(count, bits),))
        kept = unpack_dense(words, bits, count)
    codes_RC = zeros_RG.repeat_interleave(columns // zeros_RG.shape[1], -1)
    return codes_RC.masked_scatter_(keep_RC, kept)


def _require_count(keep_RC: Tensor, count: int, says: str, name: str) -> None:
    kept = int(keep_RC.sum())
    if kept != count:
        raise RequestError(f"{name}.weight_mask keeps {kept} weights, and {name}.{says} {count}: {DAMAGED}")
