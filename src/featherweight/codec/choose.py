"""Which code takes the fewest bytes for a matrix: how many each would take, and how to write it.

Shapes: R rows, C columns, W words of the longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from featherweight.codec import dictionary, plain, runs
from featherweight.codec.bits import pack_dense, words_for
from featherweight.codec.encoded import SHARES, Kind, lengths_dtype
from featherweight.codec.rows import each

# A dictionary is tried on a sample of so many runs of so many columns, and in earnest where that says so.
SAMPLE_ROWS, SAMPLE_COLUMNS, SAMPLE_MARGIN = 512, 256, 1.01

Rows = tuple[Tensor, Tensor]  # words_RW side by side, and how many of each row count


@dataclass(frozen=True)
class Candidate:
    """A way to write the matrix: its bytes (words and lengths, which is all that differs), and how to do it."""

    nbytes: int
    kind: Kind
    bits: int
    write: Callable[[], list[Rows]]
    zero_share_64ths: int = 0


def candidates(chunks: Sequence[Tensor], levels: int, share: float, kinds: Sequence[Kind]) -> list[Candidate]:
    """What can hold so many levels, of chunks of a matrix (uint8, (R, C) each) whose share of zeros is `share`."""
    columns = chunks[0].shape[1]
    values = max(1, levels - 1)  # of one level alone too, for symbols have to stand for something
    found: list[Candidate] = []
    if "plain" in kinds:
        found.append(plain_candidate(chunks, values))
    device = chunks[0].device
    nonzero = []
    if {"bitmap", "runs"} & set(kinds):
        nonzero = each(lambda chunk: runs.find_runs(chunk, values), chunks, device)
    if "bitmap" in kinds and values <= 2:
        lengths_R = torch.cat([plain.row_words(part.counts_R, columns) for part in nonzero])
        found.append(Candidate(nbytes_of(lengths_R), "bitmap", 1, lambda: each(plain.encode, chunks, device)))
    if "runs" in kinds:
        found.append(runs_candidate(nonzero, columns))
    if "dictionary" in kinds and values <= 2:
        smallest = min((other.nbytes for other in found), default=None)
        found += dictionary_candidates(chunks, share, smallest)
    return found


def nbytes_of(lengths_R: Tensor) -> int:
    """Bytes of rows of so many words, and of their lengths."""
    return 4 * int(lengths_R.sum()) + lengths_dtype(lengths_R).itemsize * len(lengths_R)


def plain_candidate(chunks: Sequence[Tensor], values: int) -> Candidate:
    """Codes of one or two bits in words."""
    rows, columns, bits = sum(map(len, chunks)), chunks[0].shape[1], values.bit_length()
    words = words_for(columns, bits)

    def write() -> list[Rows]:
        return [(pack_dense(chunk, bits), torch.full((len(chunk),), words, device=chunk.device)) for chunk in chunks]

    return Candidate(4 * words * rows, "plain", bits, write)


def runs_candidate(found: Sequence[runs.Runs], columns: int) -> Candidate:
    """Run lengths, of the width that takes the fewest words.

    A histogram of the gaps gives the bits of every width. Words need the rows, and are counted for those widths alone
    whose bits do not already take more than the best.
    """
    values, device = found[0].values, found[0].gaps_N.device
    gaps = torch.stack(each(lambda part: torch.bincount(part.gaps_N, minlength=columns), found, device)).sum(0)
    ladder = torch.arange(columns, device=gaps.device)
    widths = [bits for bits in runs.WIDTHS if values < 1 << bits]
    symbols = torch.stack([(gaps * runs.Alphabet(bits, values).symbols_for(ladder)).sum() for bits in widths]).tolist()
    at_least = sorted((count * bits / 8, bits) for count, bits in zip(symbols, widths, strict=True))
    choices: list[tuple[int, int]] = []
    for bound, bits in at_least:
        if not choices or bound < min(choices)[0]:
            choices.append((nbytes_of(torch.cat(each(partial(runs.row_words, bits=bits), found, device))), bits))
    nbytes, best = min(choices)
    return Candidate(nbytes, "runs", best, lambda: each(lambda part: runs.encode(part, best), found, device))


def dictionary_candidates(chunks: Sequence[Tensor], share: float, smallest: int | None) -> list[Candidate]:
    """Both dictionaries for P(0) = share; those that a sample shows to be no smaller are left out."""
    weights = sum(chunk.numel() for chunk in chunks)
    # 22/64 is the least that leaves zeros the most probable of three.
    of_64 = min(max(round(share * SHARES), SHARES // 3 + 1), SHARES - 1)
    tables = [dictionary.dictionary(bits, of_64 / SHARES, chunks[0].device) for bits in dictionary.WIDTHS]
    if smallest is not None and weights > SAMPLE_ROWS * SAMPLE_COLUMNS:
        tried, most = sample(chunks), smallest * SAMPLE_MARGIN
        tables = [table for table in tables if dictionary.rate(tried, table) * weights / 8 <= most]
    return [dictionary_candidate(chunks, table, of_64) for table in tables]


def dictionary_candidate(chunks: Sequence[Tensor], table: dictionary.Dictionary, of_64: int) -> Candidate:
    """The codewords of one dictionary; to know their bytes is to have them."""
    written = [dictionary.encode(chunk, table) for chunk in chunks]
    nbytes = nbytes_of(torch.cat([lengths_R for _, lengths_R in written]))
    return Candidate(nbytes, "dictionary", table.bits, lambda: written, of_64)


def sample(chunks: Sequence[Tensor]) -> Tensor:
    """Runs of weights from all over the matrix, as rows: uint8 of shape (SAMPLE_ROWS, SAMPLE_COLUMNS) or fewer rows."""
    each = -(-SAMPLE_ROWS // len(chunks))
    parts = []
    for chunk in chunks:
        runs_of = chunk.flatten()[: chunk.numel() // SAMPLE_COLUMNS * SAMPLE_COLUMNS].view(-1, SAMPLE_COLUMNS)
        parts.append(runs_of[:: max(1, len(runs_of) // each)])
    return torch.cat(parts)
