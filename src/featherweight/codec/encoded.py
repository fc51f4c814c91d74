"""An encoded matrix: a header, the words of its rows end to end, their lengths, and a checksum for each 32 rows.

`docs/formats.md` has the layout byte by byte. Nothing is decoded here.

Shapes: R rows, C columns, K tiles (of 32 rows, the last of what is left), N words of all rows end to end.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from featherweight.codec.bits import words_for
from featherweight.codec.entropy import MOST_LEVELS
from featherweight.codec.rows import offsets_of
from featherweight.errors import RequestError

Kind = Literal["plain", "bitmap", "runs", "dictionary"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # their numbers in a file

VERSION = 1
TILE_ROWS = 32
MOST_COLUMNS = 1 << 17  # so that the words of a row are counted in 16 bits, whatever the code
SHARES = 64  # P(0) is kept in 64ths
HEADER = struct.Struct("<BBBBBBHII")
# What the header's third byte, the bits of a symbol or codeword, may be.
BITS: dict[Kind, tuple[int, ...]] = {
    "plain": (1, 2),
    "bitmap": (1,),
    "runs": (2, 3, 4, 5, 6, 7, 8),
    "dictionary": (10, 16),
}
MOST_LEVELS_OF: dict[Kind, int] = {"plain": 4, "bitmap": 3, "runs": 4, "dictionary": 3}


@dataclass(frozen=True)
class Header:
    """What decoding must know beside the words.

    Attributes:
        kind: how rows are written; `bits` is its parameter.
        levels: the codes that occur, the commonest first; what is written are their places in here.
        zero_share_64ths: P(0) of a dictionary, 0 with the other kinds.
    """

    kind: Kind
    bits: int
    levels: tuple[int, ...]
    rows: int
    columns: int
    zero_share_64ths: int = 0

    @property
    def values(self) -> int:
        """Levels beside the commonest; 1 where there are none, for codes have to stand for something."""
        return max(1, len(self.levels) - 1)

    @property
    def fixed_words(self) -> int | None:
        """Words of every row, where all have the same number."""
        return words_for(self.columns, self.bits) if self.kind == "plain" else None

    @property
    def tiles(self) -> int:
        return -(-self.rows // TILE_ROWS)

    def to_bytes(self) -> bytes:
        order = sum(level << 2 * place for place, level in enumerate(self.levels))
        kind = KINDS.index(self.kind)
        share = self.zero_share_64ths
        return HEADER.pack(VERSION, kind, self.bits, len(self.levels), order, share, 0, self.rows, self.columns)

    @classmethod
    def from_bytes(cls, raw: bytes, name: str) -> Header:
        """Raises RequestError for what no encoder of this version writes."""
        if raw[:1] and raw[0] != VERSION:
            raise RequestError(
                f"{name} is encoded by version {raw[0]} of the codec and this featherweight reads version {VERSION} "
                "only: install a newer one, or make the file again."
            )
        if len(raw) != HEADER.size:
            raise RequestError(f"{name}'s codec header has {len(raw)} bytes, not {HEADER.size}: get the file again.")
        _, kind, bits, count, order, share, _, rows, columns = HEADER.unpack(raw)
        levels = tuple(order >> 2 * place & 3 for place in range(min(count, MOST_LEVELS)))
        header = cls(KINDS[kind % len(KINDS)], bits, levels, rows, columns, share)
        if header.to_bytes() != raw or not header.sound():
            raise RequestError(f"{name}'s codec header, {raw.hex()}, is of no known code: get the file again.")
        return header

    def sound(self) -> bool:
        """Whether these fields can stand together."""
        shares = range(SHARES // 3 + 1, SHARES) if self.kind == "dictionary" else range(1)
        return (
            self.bits in BITS[self.kind]
            and 1 <= len(set(self.levels)) == len(self.levels) <= MOST_LEVELS_OF[self.kind]
            and (self.kind not in ("plain", "runs") or self.values < 1 << self.bits)
            and self.zero_share_64ths in shares
            and self.rows > 0
            and 0 < self.columns <= MOST_COLUMNS
        )


@dataclass(frozen=True)
class Encoded:
    """A matrix of R x C codes below 4.

    Attributes:
        header: kind and shape.
        stream_N: int32, the words of row after row.
        row_words_R: the words of each row, uint8 where all are below 256 and else uint16; None where
            `header.fixed_words` says it.
        checksums_K: int32, the CRC-32 of each tile.
    """

    header: Header
    stream_N: Tensor
    row_words_R: Tensor | None
    checksums_K: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """What goes into a file."""
        header = torch.frombuffer(bytearray(self.header.to_bytes()), dtype=torch.uint8)
        lengths = {} if self.row_words_R is None else {"row_words": self.row_words_R}
        return {"header": header, **lengths, "stream": self.stream_N, "checksums": self.checksums_K}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> Encoded:
        """The inverse of `tensors`. Raises RequestError where the tensors of `name` cannot belong together.

        What the words hold is not looked at: `check` does that, and so does decoding for the tiles it reads.
        """
        for part in ("header", "stream", "checksums"):
            if part not in tensors:
                raise RequestError(
                    f"{name} has no tensor {part!r}, only {', '.join(sorted(tensors))}: get the file again."
                )
        raw = expect(tensors["header"], torch.uint8, tensors["header"].numel(), "header", name)
        header = Header.from_bytes(bytes(raw.tolist()), name)
        if ("row_words" in tensors) != (header.fixed_words is None):
            has = "has" if "row_words" in tensors else "has no"
            raise RequestError(f"{name} {has} tensor 'row_words', unlike what {header.kind} is: get the file again.")
        lengths = tensors.get("row_words")
        if lengths is not None:
            dtype = torch.uint8 if lengths.dtype == torch.uint8 else torch.uint16
            lengths = expect(lengths, dtype, header.rows, "row_words", name)
        stream = expect(tensors["stream"], torch.int32, tensors["stream"].numel(), "stream", name)
        return cls(header, stream, lengths, expect(tensors["checksums"], torch.int32, header.tiles, "checksums", name))

    @cached_property
    def row_offsets(self) -> Tensor:
        """The word in `stream_N` where each row starts, and where the last one ends: int64 of shape (R + 1,)."""
        if self.row_words_R is not None:
            return offsets_of(self.row_words_R.to(torch.int64))
        return torch.arange(self.header.rows + 1, device=self.stream_N.device) * (self.header.fixed_words or 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """All of them: header, lengths, words, checksums."""
        return 8 * self.nbytes / (self.header.rows * self.header.columns)


def lengths_dtype(lengths_R: Tensor) -> torch.dtype:
    """What `row_words` is stored as."""
    return torch.uint8 if int(lengths_R.max()) < 256 else torch.uint16


def expect(tensor: Tensor, dtype: torch.dtype, count: int, part: str, name: str) -> Tensor:
    """`tensor`, one-dimensional of `count` elements; RequestError where it is not."""
    if tensor.dtype != dtype or tensor.shape != (count,):
        raise RequestError(
            f"{name}'s tensor {part!r} is {tensor.dtype} of shape {list(tensor.shape)}, "
            f"where {dtype} of shape [{count}] belongs: get the file again."
        )
    return tensor


def tile_checksums(encoded: Encoded, tiles: range) -> list[int]:
    """CRC-32 of each tile: of the header, the tile's number (4 bytes), its rows' lengths (2 each) and their words.

    With the header and the number in it, neither a tile of another matrix nor another tile of this one can pass.
    """
    first, last = tiles.start * TILE_ROWS, min(tiles.stop * TILE_ROWS, encoded.header.rows)
    offsets = encoded.row_offsets[first : last + 1].cpu()
    # Slices of a stream that was cut short are short themselves, and do not pass.
    stream = encoded.stream_N[offsets[0] : offsets[-1]].cpu().numpy().tobytes()
    lengths = offsets.diff().to(torch.uint16).numpy().tobytes()
    edges = (4 * (torch.cat((offsets[:-1:TILE_ROWS], offsets[-1:])) - offsets[0])).tolist()
    of_header = zlib.crc32(encoded.header.to_bytes())
    found = []
    for place, tile in enumerate(tiles):
        crc = zlib.crc32(tile.to_bytes(4, "little"), of_header)
        crc = zlib.crc32(lengths[2 * TILE_ROWS * place : 2 * TILE_ROWS * (place + 1)], crc)
        found.append(zlib.crc32(stream[edges[place] : edges[place + 1]], crc))
    return found


def check(encoded: Encoded, name: str, tiles: range | None = None) -> None:
    """Raises RequestError where a tile (of `tiles`, or any) is not what was written, or words are left over."""
    tiles = range(encoded.header.tiles) if tiles is None else tiles
    stored = [crc & 0xFFFFFFFF for crc in encoded.checksums_K[tiles.start : tiles.stop].tolist()]
    for tile, want, found in zip(tiles, stored, tile_checksums(encoded, tiles), strict=True):
        if found != want:
            last = min((tile + 1) * TILE_ROWS, encoded.header.rows) - 1
            raise RequestError(
                f"{name} is damaged in tile {tile} (rows {tile * TILE_ROWS} to {last}): "
                f"its checksum is {found:08x}, the file has {want:08x}; get the file again."
            )
    if int(encoded.row_offsets[-1]) != len(encoded.stream_N):
        raise RequestError(
            f"{name} has {len(encoded.stream_N)} words, and its rows take {int(encoded.row_offsets[-1])}: "
            "get the file again."
        )
