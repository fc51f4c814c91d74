"""QMoE's dictionary (arXiv 2310.16795, Algorithm 1): 2^b strings of pairs of ternary weights, one codeword each.

A pair is the number first + 3 second of two neighbouring levels (0 .. 2; behind the last column of an odd row a 0). The
dictionary holds the strings of 1 to 14 pairs that are most probable when levels are drawn independently, 0 with P(0)
and 1 and 2 equally often; equals are in the order of their pairs, a prefix first. Every prefix of a string is more
probable than the string and so is in it, too: taking the longest string that fits always works. A row is its codewords
in words without gaps; the filling of zeros reads as codeword 0, which is one pair of zeros.

b = 16 with P(0) = 0.885 is the original, 512 KiB as a table of a kernel; b = 10 is one of 8 KiB.

Shapes: K strings, R rows, P pairs of a row, C columns, S codewords of a row, W words of a row.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featherweight.codec.bits import WORD_BITS, pack_dense, unpack_dense
from featherweight.codec.rows import side_by_side

ORIGINAL_BITS, ORIGINAL_ZERO_SHARE = 16, 0.885
WIDTHS = (10, 16)
LONGEST = 14  # pairs of a string
LETTERS = 9  # pairs there are
NEW = 1 << 24  # the flag of a transition that leaves a string and starts the next; above 9 (2^16 + 1)


@dataclass(frozen=True)
class Dictionary:
    """What encoding and decoding look up.

    Attributes:
        bits: of a codeword.
        lengths_K: int32, pairs of each string.
        pairs: uint8 of shape (14, K): pair j of string k as first + 4 second; 0 behind the string's end.
        moves: int32 of shape (9 (K + 1),): from string k (K: none yet) by a pair p, at 9 k + p, 9 times the string that
            is k and p, or, where there is none, 9 times the string that is p alone, plus NEW.
    """

    bits: int
    lengths_K: Tensor
    pairs: Tensor
    moves: Tensor


def most_probable(count: int, zero_share: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The `count` most probable strings, best first: their probabilities, and their pairs as hexadecimal digits.

    Digit j from the left of fourteen is 1 + pair j, and 0 behind the string's end, so that the order of the numbers is
    that of the strings. Probabilities are products from left to right in double precision, as in the original: it is
    their rounding that orders strings of the same pairs, on every machine alike.
    """
    share = [zero_share, (1 - zero_share) / 2, (1 - zero_share) / 2]
    of_pair = np.array([second * first for second, first in itertools.product(share, share)])
    chances, strings = np.ones(1), np.zeros(1, dtype=np.int64)
    found: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]] = []
    for place in range(LONGEST):
        digits = np.arange(1, LETTERS + 1, dtype=np.int64) << 4 * (LONGEST - 1 - place)
        chances, strings = (chances[:, None] * of_pair).ravel(), (strings[:, None] | digits).ravel()
        everything = np.concatenate([*(chances_before for chances_before, _ in found), chances])
        # No string is more probable than its prefixes: what is not among the best so far has no descendants there.
        if len(everything) > count:
            likely = chances >= np.partition(everything, len(everything) - count)[len(everything) - count]
            chances, strings = chances[likely], strings[likely]
        found.append((chances, strings))
    all_chances, all_strings = (np.concatenate(parts) for parts in zip(*found, strict=True))
    best = np.lexsort((all_strings, -all_chances))[:count]
    return all_chances[best], all_strings[best]


def find_moves(strings: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """`Dictionary.moves` of strings as `most_probable` gives them."""
    count = len(strings)
    shifts = 4 * (LONGEST - lengths)
    last = (strings >> shifts & 15) - 1
    prefixes = strings & ~(np.int64(15) << shifts)
    order = np.argsort(strings)
    parents = np.where(lengths > 1, order[np.searchsorted(strings, prefixes, sorter=order).clip(max=count - 1)], count)
    children = np.full((count + 1, LETTERS), -1, dtype=np.int64)
    children[parents, last] = np.arange(count)
    assert (children[count] >= 0).all(), f"{count} strings do not hold every pair"
    moves: npt.NDArray[np.int32] = np.where(children >= 0, 9 * children, 9 * children[count] + NEW).astype(np.int32)
    return moves


@lru_cache(maxsize=16)
def dictionary(bits: int, zero_share: float, device: torch.device) -> Dictionary:
    """The 2^bits strings for P(0) = zero_share (1/3 .. 1, so that zeros come first); bits is 10 or 16."""
    assert bits in WIDTHS and 1 / 3 <= zero_share < 1, (bits, zero_share)
    strings = most_probable(1 << bits, zero_share)[1]
    digits = np.stack([strings >> 4 * (LONGEST - 1 - place) & 15 for place in range(LONGEST)])
    lengths = np.count_nonzero(digits, axis=0)
    pairs = np.where(digits > 0, (digits - 1) % 3 + ((digits - 1) // 3 << 2), 0)
    return Dictionary(
        bits,
        torch.from_numpy(lengths.astype(np.int32)).to(device),
        torch.from_numpy(pairs.astype(np.uint8)).to(device),
        torch.from_numpy(find_moves(strings, lengths).ravel()).to(device),
    )


def walk(levels_RC: Tensor, table: Dictionary) -> Tensor:
    """The moves that each row makes, all rows a pair at a time: int32 of shape (P, R), see `Dictionary.moves`."""
    even_RC = torch.nn.functional.pad(levels_RC, (0, levels_RC.shape[1] % 2))
    pairs_PR = (even_RC[:, 0::2] + 3 * even_RC[:, 1::2]).t().to(torch.int32, memory_format=torch.contiguous_format)
    moves_PR = torch.empty_like(pairs_PR)
    at_R = torch.full_like(pairs_PR[0], LETTERS << table.bits)
    for pairs_R, moves_R in zip(pairs_PR, moves_PR, strict=True):
        torch.index_select(table.moves, 0, pairs_R + at_R, out=moves_R)
        torch.bitwise_and(moves_R, NEW - 1, out=at_R)
    return moves_PR


def rate(levels_RC: Tensor, table: Dictionary) -> float:
    """About how many bits a weight rows like these take: the codeword that a row's end cuts short counts half."""
    moves_PR = walk(levels_RC, table)
    codewords = int((moves_PR[1:] >= NEW).sum()) + moves_PR.shape[1] / 2
    return codewords * table.bits / (2 * moves_PR.numel())


def encode(levels_RC: Tensor, table: Dictionary) -> tuple[Tensor, Tensor]:
    """Levels 0 .. 2 (uint8) into words_RW (int32, zeros behind the rows) and the words of each row (int64, (R,))."""
    moves_PR = walk(levels_RC, table)
    # A string ends in front of a move that starts another, and at the end of the row.
    ends_PR = torch.nn.functional.pad(moves_PR[1:] >= NEW, (0, 0, 0, 1), value=True)
    counts_R = ends_PR.sum(0)
    codewords = (moves_PR.t()[ends_PR.t()] & (NEW - 1)) // LETTERS
    codewords_RS = side_by_side(codewords, counts_R, fill=0, multiple=WORD_BITS)
    return pack_dense(codewords_RS, table.bits), (counts_R * table.bits + (WORD_BITS - 1)) // WORD_BITS


def decode_codewords(codewords_RS: Tensor, table: Dictionary, columns: int) -> Tensor:
    """The levels that codewords (int32, any filling behind the last column) stand for: uint8 of shape (R, columns)."""
    rows, count = codewords_RS.shape
    pairs = -(-columns // 2)
    flat = codewords_RS.reshape(-1)
    lengths_RS = table.lengths_K.index_select(0, flat).view(rows, count)
    starts_RS = (lengths_RS.cumsum(1) - lengths_RS).clamp_(max=pairs)
    width = pairs + LONGEST
    places = (starts_RS + torch.arange(rows, device=flat.device)[:, None] * width).view(-1)
    out = torch.zeros(rows * width, dtype=torch.uint8, device=flat.device)
    # All fourteen places of every string, the last first: what lies behind a string's end is overwritten by the string
    # that belongs there, because there it is an earlier place.
    for place in reversed(range(LONGEST)):
        out[place:].scatter_(0, places, table.pairs[place].index_select(0, flat))
    pairs_RP = out.view(rows, width)[:, :pairs]
    return torch.stack((pairs_RP & 3, pairs_RP >> 2), dim=-1).view(rows, -1)[:, :columns].contiguous()


def decode(words_RW: Tensor, table: Dictionary, columns: int) -> Tensor:
    """The inverse of `encode`, W any that holds the rows: uint8 of shape (R, columns)."""
    count = words_RW.shape[1] * WORD_BITS // table.bits
    used = -(-count * table.bits // WORD_BITS)
    codewords_RS = unpack_dense(words_RW[:, :used], table.bits, count).to(torch.int32)
    return decode_codewords(codewords_RS, table, columns)
