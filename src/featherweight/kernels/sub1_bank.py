"""Entropy-coded ternary matrices as `csrc/sub1.cu` finds them.

What is kept beside a matrix's own tensors is where its rows start, 32 bits a row.

Shapes: R outputs, C inputs, G groups, T tokens (any leading axes), E experts, M matrices of an expert, N pairs of a
token and an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.codec import Encoded, check, decode, encode
from featherweight.codec.encoded import KINDS, TILE_ROWS
from featherweight.formats import Sub1
from featherweight.formats.base import THE_MATRIX
from featherweight.kernels.sub1_launch import (
    MOST_EXPERTS,
    MOST_PAIRS,
    STRIDES,
    WIDTHS,
    block_bytes,
    lay_out,
    register,
    stride_of,
    up,
)

FEWEST_WARPS = 4  # of a CTA; with fewer, weights made floats are faster


@dataclass(frozen=True)
class Bank:
    """Matrices of one shape on a GPU, M of each expert, as the kernel finds them.

    Attributes:
        table: int64 of shape (E, M, 4): addresses of words, row starts and scales, then kind and bits.
        codes: bit b: runs of b bits occur; bit 0: bitmaps.
        stride: bytes from a column of x to the next in shared memory.
        stage_bytes: of the largest tile.
        held: what the table points to.
    """

    table: Tensor
    rows: int
    columns: int
    codes: int
    stride: int
    stage_bytes: int
    held: tuple[Tensor, ...]

    @classmethod
    def of(cls, matrices: Sequence[Sequence[Entry]]) -> Bank:
        """E times M entries, all of one shape on one device."""
        first = matrices[0][0]
        flat = [entry for row in matrices for entry in row]
        assert all((entry.rows, entry.columns) == (first.rows, first.columns) for entry in flat)
        table = torch.tensor([[entry.row() for entry in row] for row in matrices], dtype=torch.int64)
        codes = 0
        for entry in flat:
            codes |= 1 << (entry.encoded.header.bits if entry.encoded.header.kind == "runs" else 0)
        held = tuple(tensor for entry in flat for tensor in entry.tensors())
        most = max(entry.stage_bytes for entry in flat)
        device = first.starts_R.device
        stride = stride_of(len(matrices), first.columns, most, block_bytes(device))
        return cls(table.to(device), first.rows, first.columns, codes, stride, most, held)

    def products(self, x_TC: Tensor, expert_N: Tensor, choices: int) -> Tensor:
        """V x for every pair: N x M x R. Pair n is of token n // choices and expert expert_N[n] (int64); those of no
        expert (below 0, E or more) are left unwritten."""
        register()
        y: Tensor = torch.ops.featherweight.sub1_products(
            x_TC.contiguous(), expert_N, self.table, choices, self.rows, self.codes, self.stride, self.stage_bytes
        )
        return y


@dataclass(frozen=True)
class Entry:
    """One matrix on a GPU.

    Attributes:
        starts_R: int32, the word each row starts with, R + 1.
        scales_RG: float16 or bfloat16.
    """

    encoded: Encoded
    starts_R: Tensor
    scales_RG: Tensor

    @classmethod
    def of(cls, encoded: Encoded, scales_RG: Tensor) -> Entry:
        return cls(encoded, encoded.row_offsets.to(torch.int32), scales_RG.contiguous())

    @property
    def rows(self) -> int:
        return self.encoded.header.rows

    @property
    def columns(self) -> int:
        return self.encoded.header.columns

    @property
    def stage_bytes(self) -> int:
        """Bytes that hold the words of any tile, from a multiple of 16 bytes on."""
        edges = torch.cat((self.starts_R[:-1:TILE_ROWS], self.starts_R[-1:]))
        return 4 * up(int(edges.diff().max()) + 3, 4)

    @property
    def device(self) -> torch.device:
        return self.starts_R.device

    def tensors(self) -> tuple[Tensor, ...]:
        return self.encoded.stream_N, self.starts_R, self.scales_RG

    def row(self) -> list[int]:
        """Its row of a table: the struct Matrix of csrc/sub1.cu."""
        header = self.encoded.header
        order = sum(level << 2 * place for place, level in enumerate(header.levels))
        kind = KINDS.index(header.kind) | order << 8 | header.values << 16
        kind |= (self.scales_RG.dtype == torch.bfloat16) << 30 | (header.levels[1:2] == (3,)) << 31
        return [*(tensor.data_ptr() for tensor in self.tensors()), kind | header.bits << 32]


def entry_of(format: Sub1, tensors: Mapping[str, Tensor], name: str = THE_MATRIX) -> Entry:
    """A matrix as the fused kernel reads it; what it cannot read is encoded again as a bitmap, and has the same codes.

    Raises RequestError where a checksum does not hold.
    """
    encoded = format.encoded(tensors, name)
    check(encoded, name)
    header = encoded.header
    ternary = header.levels[0] == 0 and set(header.levels) <= {0, 1, 3}
    runs = header.kind == "runs" and header.bits in WIDTHS and len(header.levels) == 3
    if ternary and not runs and header.kind != "bitmap":
        encoded = moved(encode(decode(encoded, name), ("bitmap",)), tensors["weight_scale"].device)
    return Entry.of(encoded, tensors["weight_scale"])


def moved(encoded: Encoded, device: torch.device) -> Encoded:
    """The same on another device."""
    lengths = None if encoded.row_words_R is None else encoded.row_words_R.to(device)
    return Encoded(encoded.header, encoded.stream_N.to(device), lengths, encoded.checksums_K.to(device))


def fused(entry: Entry) -> bool:
    """Whether the kernel multiplies by this matrix as it is."""
    header = entry.encoded.header
    layout = lay_out(
        MOST_PAIRS, MOST_EXPERTS, header.columns, STRIDES[-1], entry.stage_bytes, block_bytes(entry.device)
    )
    whole = header.kind == "bitmap" or (header.kind == "runs" and header.bits in WIDTHS and header.values == 2)
    return (
        whole
        and header.levels[0] == 0
        and set(header.levels) <= {0, 1, 3}
        and entry.scales_RG.shape[1] == 1
        and layout.warps >= FEWEST_WARPS
    )
