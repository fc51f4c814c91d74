"""Products with 4-bit codes on CPUs that multiply tiles of bfloat16 (`native/amx.c`), for more tokens than a few.

Weights are those of the reference kernel bit for bit, made floats some rows at a time in a core's cache; sums are
float32. Half as long as the bfloat16 product of a few tokens, which waits for memory, and about as long with thousands.

The operator `featherweight::int4_amx` is what torch.compile sees; it has no gradients.

Shapes: R outputs, C inputs, G groups, T tokens (any leading axes), P panels of 32 outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.formats.base import Solution
from featherweight.native import run

PANEL, HALF, WORD = 32, 16, 8  # outputs of a panel and of a tile; codes of a word
TOGETHER = 4  # panels that are floats at a time: 1 MB of 4096 inputs, half a core's cache
TOKENS = 256  # of one pass over the weights: x then stays near too
LEAST_WORK = 1 << 20  # weights for each thread, below which waking it takes longer


@dataclass(frozen=True)
class Packed:
    """Codes, scales and zeros as `amx.c` lays them out, and the outputs they are for."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    rows: int


def pack(solution: Solution) -> Packed:
    """A solution of codes below 16, with groups of a multiple of 32 inputs and outputs a multiple of 16."""
    rows, columns = solution.codes_RC.shape
    missing = -rows % PANEL
    fields = functional.pad(solution.codes_RC, (0, 0, 0, missing)).view(-1, 2, HALF, columns // WORD, WORD)
    words = fields[..., 0].to(torch.int32)
    for at in range(1, WORD):
        words |= fields[..., at].to(torch.int32) << 4 * at
    scales, zeros = (
        functional.pad(tensor, (0, 0, 0, missing)).view(-1, 2, HALF, tensor.shape[1]).permute(0, 3, 1, 2).contiguous()
        for tensor in (solution.scales_RG.float(), solution.zeros_RG)
    )
    return Packed(words.permute(0, 3, 1, 2).contiguous(), scales, zeros, rows)


def call(x_TC: Tensor, packed: Packed) -> Tensor:
    """y_TR = x_TC V^T, bfloat16."""
    y_TR: Tensor = torch.ops.featherweight.int4_amx(x_TC, packed.codes, packed.scales, packed.zeros, packed.rows)
    return y_TR


@cache
def register() -> torch.library.Library:
    """Make the operator known to torch, once; the library must stay alive."""
    library = torch.library.Library("featherweight", "FRAGMENT")
    library.define("int4_amx(Tensor x, Tensor codes, Tensor scales, Tensor zeros, int rows) -> Tensor")
    library.impl("int4_amx", _multiply, "CPU")
    torch.library.register_fake("featherweight::int4_amx", _shape, lib=library)
    return library


def _shape(x_TC: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, rows: int) -> Tensor:
    return x_TC.new_empty((*x_TC.shape[:-1], rows))


def _multiply(x_TC: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, rows: int) -> Tensor:
    columns = x_TC.shape[-1]
    flat_TC = x_TC.reshape(-1, columns).contiguous()
    y_TR = x_TC.new_empty(len(flat_TC), rows)
    packed = Packed(codes, scales, zeros, rows)
    for start in range(0, len(flat_TC), TOKENS):
        _some(flat_TC[start : start + TOKENS], packed, y_TR[start : start + TOKENS])
    return y_TR.view(*x_TC.shape[:-1], rows)


def _some(x_TC: Tensor, packed: Packed, y_TR: Tensor) -> None:
    """One pass over the weights."""
    tokens, columns = x_TC.shape
    group = columns // packed.scales.shape[1]
    blocks = -(-tokens // PANEL)
    tiles = x_TC.new_empty(blocks * PANEL * columns)
    run("lay_out", (x_TC, tokens, columns, tiles), blocks, tokens * columns // LEAST_WORK)
    arguments = (tiles, tokens, columns, packed.codes, packed.scales, packed.zeros, group, packed.rows, y_TR, TOGETHER)
    run("multiply", arguments, len(packed.codes), packed.rows * columns // LEAST_WORK)
