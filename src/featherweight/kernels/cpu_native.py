"""Products with 4-bit codes in C: `native/amx.c` where the CPU multiplies tiles of bfloat16, `native/int4.c` elsewhere.

Few tokens wait for the weights to come from memory: codes are multiplied as they are and sums of a group scaled in
float32, one or two tokens as whole numbers by vectors (`int4.c` again), more by tiles; by vectors alone that is quicker
than bfloat16 for hundreds of tokens. For more yet weights are those of the reference kernel bit for bit, made floats
some rows at a time.

The operator `featherweight::int4_cpu` is what torch.compile sees; it has no gradients.

Shapes: R outputs, C inputs, G groups, T tokens (any leading axes), P panels of 32 outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.formats.base import Grid, Solution
from featherweight.native import amx, has_byte_products, huge_pages, int4, run

PANEL, HALF, WORD = 32, 16, 8  # outputs of a panel and of a tile; codes of a word
FEW, FEW_BY_VECTORS, FEW_BY_LOOPS = 64, 192, 8  # tokens that multiply codes, at most: by tiles, vectors, plain C
AT_ONCE = 32  # of them, in one pass over the weights
BEFORE_TILES = 2  # tokens that vectors multiply faster than tiles, which take as long for 16
TOGETHER = 3  # panels that are floats at a time: 0.75 MB of 4096 inputs, in a cache of 2 MB that two threads may share
TOKENS = 512  # of one pass over the weights, which makes all of them floats: 4 MB of x of 4096 inputs
FLOATS = 1 << 22  # weights of one product of torch's, 8 MB of floats; x is laid out for each of them anew
LEAST_WORK, LEAST_FEW = 1 << 20, 1 << 17  # weights for each thread, below which waking it takes longer


@dataclass(frozen=True)
class Packed:
    """Codes, scales and zeros as `amx.c` and `int4.c` lay them out, and the outputs they are for."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    rows: int


def library() -> Any:
    """The functions in C for this CPU; None where nothing compiles."""
    return amx() or int4()


def pack(solution: Solution) -> Packed:
    """A solution of codes below 16, with groups of a multiple of 32 inputs and outputs a multiple of 16."""
    rows, columns = solution.codes_RC.shape
    missing = -rows % PANEL
    fields = functional.pad(solution.codes_RC, (0, 0, 0, missing)).view(-1, 2, HALF, columns // WORD, WORD)
    codes = torch.empty(fields.shape[0], columns // WORD, 2, HALF, dtype=torch.int32)
    huge_pages(codes)
    words = codes.permute(0, 2, 3, 1).copy_(fields[..., 0])
    for at in range(1, WORD):
        words |= fields[..., at].to(torch.int32) << 4 * at
    scales, zeros = (
        functional.pad(tensor, (0, 0, 0, missing)).view(-1, 2, HALF, tensor.shape[1]).permute(0, 3, 1, 2).contiguous()
        for tensor in (solution.scales_RG.float(), solution.zeros_RG)
    )
    return Packed(codes, scales, zeros, rows)


def unpack(packed: Packed, grid: Grid, scales: torch.dtype) -> Solution:
    """The solution that `pack` was given: of this grid, with scales of this dtype."""
    shifts = torch.arange(0, WORD * 4, 4, dtype=torch.int32)
    codes = torch.empty(len(packed.codes), 2, HALF, packed.codes.shape[1], WORD, dtype=torch.uint8)
    for at, shift in enumerate(shifts.tolist()):
        codes[..., at] = (packed.codes >> shift & 15).permute(0, 2, 3, 1)
    scales_RG, zeros_RG = (
        tensor.permute(0, 2, 3, 1).flatten(0, 2)[: packed.rows].contiguous() for tensor in (packed.scales, packed.zeros)
    )
    codes_RC = codes.view(-1, packed.codes.shape[1] * WORD)[: packed.rows]
    return Solution(codes_RC, scales_RG.to(scales), zeros_RG, grid, torch.zeros(packed.rows))


def call(x_TC: Tensor, packed: Packed) -> Tensor:
    """y_TR = x_TC V^T, bfloat16."""
    arguments = x_TC, packed.codes, packed.scales, packed.zeros, packed.rows
    if type(x_TC) is Tensor and not torch.compiler.is_compiling():
        return _multiply(*arguments)  # the dispatcher's way to Python takes as long as a small product
    y_TR: Tensor = torch.ops.featherweight.int4_cpu(*arguments)
    return y_TR


@cache
def register() -> torch.library.Library:
    """Make the operator known to torch, once; the library must stay alive."""
    library = torch.library.Library("featherweight", "FRAGMENT")
    library.define("int4_cpu(Tensor x, Tensor codes, Tensor scales, Tensor zeros, int rows) -> Tensor")
    library.impl("int4_cpu", _multiply, "CPU")
    torch.library.register_fake("featherweight::int4_cpu", _shape, lib=library)
    return library


def _shape(x_TC: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, rows: int) -> Tensor:
    return x_TC.new_empty((*x_TC.shape[:-1], rows))


def _multiply(x_TC: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, rows: int) -> Tensor:
    columns, y_TR = x_TC.shape[-1], x_TC.new_empty((*x_TC.shape[:-1], rows))
    tokens, group = x_TC.numel() // columns, columns // scales.shape[1]
    if tokens == 0:
        return y_TR
    tiles, x_TC = amx(), x_TC.contiguous()
    if tokens <= _few(tiles):
        few = (int4() if tokens <= BEFORE_TILES else tiles) or library()
        for start in range(0, tokens, AT_ONCE):
            some = min(AT_ONCE, tokens - start)
            at_x, at_y = x_TC.data_ptr() + 2 * start * columns, y_TR.data_ptr() + 2 * start * rows  # of bfloat16
            arguments = (at_x, some, columns, codes, scales, zeros, group, rows, at_y)
            run("few", arguments, len(codes), rows * columns // LEAST_FEW, few)
        return y_TR
    huge_pages(y_TR)
    through = _through_floats if tiles is None else _through_tiles
    through(x_TC.view(-1, columns), Packed(codes, scales, zeros, rows), y_TR.view(-1, rows))
    return y_TR


def _few(tiles: Any) -> int:
    """Tokens that multiply codes as they are, at most."""
    if tiles is not None:
        return FEW
    return FEW_BY_VECTORS if has_byte_products() else FEW_BY_LOOPS


def _through_tiles(x_TC: Tensor, packed: Packed, y_TR: Tensor) -> None:
    """Passes over the weights, for some tokens each."""
    columns, rows = x_TC.shape[1], packed.rows
    group = columns // packed.scales.shape[1]
    for some_TC, some_TR in zip(x_TC.split(TOKENS), y_TR.split(TOKENS), strict=True):
        tokens, blocks = len(some_TC), -(-len(some_TC) // PANEL)
        tiles = x_TC.new_empty(blocks * PANEL * columns)
        run("lay_out", (some_TC, tokens, columns, tiles), blocks, tokens * columns // LEAST_WORK)
        weights = (packed.codes, packed.scales, packed.zeros, group)
        arguments = (tiles, tokens, columns, *weights, rows, some_TR, TOGETHER)
        run("multiply", arguments, len(packed.codes), rows * columns // LEAST_WORK)


def _through_floats(x_TC: Tensor, packed: Packed, y_TR: Tensor) -> None:
    """torch's products with some panels at a time."""
    columns, rows = x_TC.shape[1], packed.rows
    step = max(1, FLOATS // (columns * PANEL))
    value_RC = x_TC.new_empty(min(step, len(packed.codes)) * PANEL, columns)
    huge_pages(value_RC)
    for start in range(0, len(packed.codes), step):
        panels = slice(start, start + step)
        codes, some = packed.codes[panels], slice(start * PANEL, min((start + step) * PANEL, rows))
        arguments = (codes, packed.scales[panels], packed.zeros[panels], columns, columns // packed.scales.shape[1])
        run("floats", (*arguments, value_RC), len(codes), codes.numel() * WORD // LEAST_FEW, int4())
        torch.mm(x_TC, value_RC[: some.stop - some.start].T, out=y_TR[:, some])
