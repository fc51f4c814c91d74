"""Products with entropy-coded weights, a few rows of them at a time: decoded, multiplied, forgotten.

Between calls there are the bytes of the file and nothing else, and within one no more weights than a tile has: a matrix
is never dense. Checksums are verified once, when the layer is prepared.

Shapes: R outputs, C inputs, G groups, T tokens (any leading axes), N nonzero weights of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.codec import Encoded, check
from featherweight.codec.encoded import TILE_ROWS
from featherweight.codec.matrix import decode_checked
from featherweight.formats import Grid, Sub1, parts
from featherweight.formats.base import THE_MATRIX, Format, Rule
from featherweight.formats.sub1 import solution_from
from featherweight.kernels import sub1_cpu
from featherweight.kernels.base import Case, Kernel, Run
from featherweight.kernels.reference import dequantize

TILE_WEIGHTS = {"cpu": 1 << 19, "cuda": 1 << 24}  # decoded at a time: what fits a core's cache, or keeps a GPU busy
FEW_TOKENS = 128  # up to so many, picking columns is faster than multiplying by zeros

Tile = Callable[[int, int], Tensor]
"""(start, stop) -> y_TR of the rows start .. stop-1."""


@dataclass(frozen=True)
class Sub1Tiles(Kernel):
    """Decodes in every call, tile by tile: as small in memory as on disk."""

    name: str = "sub1-tiles"

    def refusal(self, case: Case) -> str | None:
        return None if isinstance(case.format, Sub1) else f"it decodes sub1, and the weights are {case.format.name}"

    def prepare(self, format: Format, rule: Rule, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Run:
        grid, _ = parts(rule)
        assert isinstance(format, Sub1) and grid is not None
        rows, columns = format.shape(tensors, rule)
        encoded = format.encoded(tensors)
        check(encoded, THE_MATRIX)
        scales_RG = tensors["weight_scale"]
        device = scales_RG.device.type
        header = encoded.header
        if device == "cpu" and grid.symmetric and header.kind in sub1_cpu.KINDS and header.levels[0] == 0:
            begin = _picking(encoded, scales_RG, grid, dtype)
        else:
            begin = _decoding(encoded, scales_RG, format.zeros(tensors, grid), grid, dtype)
        tile = max(1, TILE_WEIGHTS[device] // columns // TILE_ROWS) * TILE_ROWS

        def run(x_TC: Tensor, bias_R: Tensor | None) -> Tensor:
            flat_TC = x_TC.reshape(-1, columns)
            product, y_TR = begin(flat_TC), torch.empty(len(flat_TC), rows, dtype=dtype, device=x_TC.device)
            for at in range(0, rows, tile):  # results among the tiles' temporaries would keep these from being reused
                y_TR[:, at : at + tile] = product(at, min(at + tile, rows))
            y_TR = y_TR.view(*x_TC.shape[:-1], rows)
            return y_TR if bias_R is None else y_TR + bias_R

        return run


def _decoding(
    encoded: Encoded, scales_RG: Tensor, zeros_RG: Tensor, grid: Grid, dtype: torch.dtype
) -> Callable[[Tensor], Tile]:
    """Any code on any device: tiles of weights, zeros among them."""

    def begin(x_TC: Tensor) -> Tile:
        def product(start: int, stop: int) -> Tensor:
            symbols_RC = decode_checked(encoded, start, stop)
            part = solution_from(symbols_RC, scales_RG[start:stop], zeros_RG[start:stop], grid)
            return functional.linear(x_TC, dequantize(part, dtype))

        return product

    return begin


def _picking(encoded: Encoded, scales_RG: Tensor, grid: Grid, dtype: torch.dtype) -> Callable[[Tensor], Tile]:
    """On a CPU, where zeros are the commonest: with few tokens, columns of x^T are picked, in float32."""
    columns = encoded.header.columns
    width, groups = grid.width(columns), scales_RG.shape[1]
    worth = {symbol: float((symbol + grid.middle) % 4 - grid.middle) for symbol in (1, 2, 3)}

    def found(start: int, stop: int) -> sub1_cpu.Nonzeros:
        entries = sub1_cpu.nonzeros(encoded, start, stop, worth)
        if groups == 1:
            return entries
        places_N = entries.rows_N * groups + (entries.columns_N // width).clamp_(max=groups - 1)
        return replace(entries, values_N=entries.values_N * scales_RG[start:stop].float().take(places_N))

    def of_rows(start: int, stop: int) -> Tensor:
        """What is left to multiply each row by."""
        return scales_RG[start:stop].float() if groups == 1 else torch.ones(stop - start, 1)

    def begin(x_TC: Tensor) -> Tile:
        if len(x_TC) > FEW_TOKENS:

            def many(start: int, stop: int) -> Tensor:
                values_RC = found(start, stop).dense(columns) * of_rows(start, stop)
                return functional.linear(x_TC, values_RC.to(dtype))

            return many
        x_CT = functional.pad(x_TC.float().T, (0, 0, 0, 1)).contiguous()
        return lambda start, stop: (found(start, stop).times(x_CT) * of_rows(start, stop)).T

    return begin
