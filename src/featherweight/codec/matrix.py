"""Matrices of two to four levels in as few bytes as one of the codes here needs, and back, whole or some rows of them.

Shapes: R rows, C columns, N words of all rows end to end, W words of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from featherweight.codec import dictionary, plain, runs
from featherweight.codec.bits import unpack_dense
from featherweight.codec.choose import candidates
from featherweight.codec.encoded import (
    MOST_COLUMNS,
    SHARES,
    TILE_ROWS,
    Encoded,
    Header,
    Kind,
    check,
    lengths_dtype,
    tile_checksums,
)
from featherweight.codec.entropy import MOST_LEVELS, level_counts
from featherweight.codec.rows import each, end_to_end, side_by_side

WRITTEN: tuple[Kind, ...] = ("plain", "bitmap", "runs")
# Weights worked on at a time: what fits the caches of a CPU, or keeps a GPU busy.
CPU_CHUNK, GPU_CHUNK = 1 << 20, 1 << 26


def encode(codes_RC: Tensor, kinds: Sequence[Kind] = WRITTEN) -> Encoded:
    """Encode codes below 4 (uint8, at most 131,072 columns) in whatever of `kinds` takes the fewest bytes.

    Codes mean nothing here: the commonest is taken for the zero, whichever it is. Plain codes can hold everything,
    bitmaps and dictionaries up to three levels. The result is on the CPU, as a file wants it; the work is done where
    the codes are. Dictionaries have to be asked for: no kernel reads them. They are then tried where a sample of the
    matrix says that one may be the smallest.
    """
    assert codes_RC.ndim == 2 and codes_RC.numel() and codes_RC.shape[1] <= MOST_COLUMNS, codes_RC.shape
    rows, columns = codes_RC.shape
    counts = level_counts(codes_RC)
    commonest = counts.index(max(counts))
    levels = [commonest, *(code for code in range(MOST_LEVELS) if counts[code] and code != commonest)]
    chunks = relabel(codes_RC, {code: place for place, code in enumerate(levels)}).split(chunk_rows(codes_RC))
    share = counts[commonest] / codes_RC.numel()
    found = candidates(chunks, len(levels), share, kinds)
    assert found, f"none of {', '.join(kinds)} holds {len(levels)} levels"
    best = min(found, key=lambda candidate: candidate.nbytes)
    header = Header(best.kind, best.bits, tuple(levels), rows, columns, best.zero_share_64ths)
    written = best.write()
    stream_N = torch.cat([end_to_end(*rows) for rows in written]).cpu()
    lengths_R = torch.cat([lengths for _, lengths in written]).cpu()
    row_words_R = lengths_R.to(lengths_dtype(lengths_R)) if header.fixed_words is None else None
    blank = Encoded(header, stream_N, row_words_R, torch.zeros(header.tiles, dtype=torch.int32))
    checksums = np.array(tile_checksums(blank, range(header.tiles)), dtype=np.uint32)
    return Encoded(header, stream_N, row_words_R, torch.from_numpy(checksums.view(np.int32)))


def decode(encoded: Encoded, name: str) -> Tensor:
    """All codes, uint8 of shape (R, C), on the device of the stream. Raises RequestError naming a damaged tile."""
    check(encoded, name)
    return decode_checked(encoded, 0, encoded.header.rows)


def decode_rows(encoded: Encoded, start: int, stop: int, name: str) -> Tensor:
    """The codes of rows start .. stop - 1: uint8 of shape (stop - start, C); only their tiles are read and checked.

    Raises RequestError naming `name` and the tile where one of these is not what was written.
    """
    assert 0 <= start < stop <= encoded.header.rows, (start, stop, encoded.header.rows)
    check(encoded, name, range(start // TILE_ROWS, -(-stop // TILE_ROWS)))
    return decode_checked(encoded, start, stop)


def decode_checked(encoded: Encoded, start: int, stop: int) -> Tensor:
    """`decode_rows` of tiles whose checksums are known to hold."""
    header = encoded.header
    codes_RC = torch.empty(stop - start, header.columns, dtype=torch.uint8, device=encoded.stream_N.device)
    row_offsets = encoded.row_offsets

    def decode_part(at: int) -> None:
        part_RC = codes_RC[at : at + step]
        offsets = row_offsets[start + at : start + at + len(part_RC) + 1]
        words_RW = side_by_side(
            encoded.stream_N[offsets[0] : offsets[-1]], offsets.diff(), fill=-1 if header.kind == "runs" else 0
        )
        part_RC.copy_(relabel(decode_words(header, words_RW), dict(enumerate(header.levels))))

    step = chunk_rows(codes_RC)
    each(decode_part, range(0, len(codes_RC), step), codes_RC.device)
    return codes_RC


def decode_words(header: Header, words_RW: Tensor) -> Tensor:
    """The levels of rows of words that lie side by side, uint8 of shape (R, C)."""
    if header.kind == "plain":
        return unpack_dense(words_RW, header.bits, header.columns)
    if header.kind == "bitmap":
        return plain.decode(words_RW, header.columns)
    if header.kind == "runs":
        return runs.decode(words_RW, header.bits, header.values, header.columns)
    table = dictionary.dictionary(header.bits, header.zero_share_64ths / SHARES, words_RW.device)
    return dictionary.decode(words_RW, table, header.columns)


def chunk_rows(codes_RC: Tensor) -> int:
    """Rows to work on at a time, a multiple of a tile's."""
    return max(1, (GPU_CHUNK if codes_RC.is_cuda else CPU_CHUNK) // codes_RC.shape[1] // TILE_ROWS) * TILE_ROWS


def relabel(codes: Tensor, names: dict[int, int]) -> Tensor:
    """Codes by other names; `codes` itself where all keep theirs."""
    if all(old == new for old, new in names.items()):
        return codes
    # All four names in one byte, shifted to the one that is asked for.
    table = torch.tensor(sum(new << 2 * old for old, new in names.items()), dtype=torch.uint8, device=codes.device)
    return (table >> (codes << 1)) & 3
