"""Run lengths and bitmaps against readers and writers that go bit by bit, after docs/formats.md alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.codec import plain, runs


def bits_of(words: list[int]) -> str:
    """The words of a row as one string of bits, the lowest of word 0 first."""
    return "".join(format(word & 0xFFFFFFFF, "032b")[::-1] for word in words)


def read_runs(words: list[int], bits: int, values: int, columns: int) -> list[int]:
    """The documented reading of one row."""
    stream, row, gaps = bits_of(words), [0] * columns, (2**bits - 1) // values
    column = 0
    for at in range(0, len(stream) - bits + 1, bits):
        symbol = int(stream[at : at + bits][::-1], 2)
        if symbol >= values * gaps:
            column += (symbol - values * gaps + 1) * gaps
        else:
            column += symbol // values
            row[column] = symbol % values + 1
            column += 1
    return row


def fewest_symbols(row: list[int], bits: int, values: int) -> int:
    """Symbols of a row: one for each nonzero weight, and as few escapes before it as its zeros can be cut into."""
    gaps = (2**bits - 1) // values
    longest = (2**bits - values * gaps) * gaps
    symbols = zeros = 0
    for level in row:
        if level:
            symbols += 1 + math.ceil((zeros - gaps + 1) / longest if zeros >= gaps else 0)
        zeros = 0 if level else zeros + 1
    return symbols


def levels(rows: int, columns: int, values: int, zero_share: float, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    some = torch.randint(1, values + 1, (rows, columns), dtype=torch.uint8, generator=draw)
    return some * (torch.rand(rows, columns, generator=draw) >= zero_share)


matrices = st.builds(
    levels,
    rows=st.integers(1, 9),
    columns=st.integers(1, 700),
    values=st.just(3),
    zero_share=st.sampled_from([0.0, 0.3, 0.6, 0.885, 0.99, 1.0]),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=80, deadline=None)
@given(matrices, st.integers(1, 3), st.integers(2, 8))
def test_runs_read_as_documented(levels_RC: Tensor, values: int, bits: int) -> None:
    levels_RC = levels_RC.clamp(max=values)
    found = runs.find_runs(levels_RC, values)
    words_RW, lengths_R = runs.encode(found, bits)
    assert torch.equal(lengths_R, runs.row_words(found, bits))
    assert torch.equal(runs.decode(words_RW, bits, values, levels_RC.shape[1]), levels_RC)
    for row, words, count in zip(levels_RC.tolist(), words_RW.tolist(), lengths_R.tolist(), strict=True):
        assert read_runs(words[:count], bits, values, len(row)) == row
        assert count == math.ceil(fewest_symbols(row, bits, values) * bits / 32)
        assert all(word == -1 for word in words[count:])


@settings(max_examples=40, deadline=None)
@given(matrices)
def test_bitmaps_read_as_documented(levels_RC: Tensor) -> None:
    levels_RC = levels_RC.clamp(max=2)
    words_RW, lengths_R = plain.encode(levels_RC)
    assert torch.equal(plain.decode(words_RW, levels_RC.shape[1]), levels_RC)
    for row, words, count in zip(levels_RC.tolist(), words_RW.tolist(), lengths_R.tolist(), strict=True):
        flags = bits_of(words[: math.ceil(len(row) / 32)])
        signs = iter(bits_of(words[math.ceil(len(row) / 32) : count]))
        assert [1 + int(next(signs)) if flags[c] == "1" else 0 for c in range(len(row))] == row
        assert count == math.ceil(len(row) / 32) + math.ceil(sum(level > 0 for level in row) / 32)


@pytest.mark.parametrize(
    ("bits", "values", "gaps", "escapes"), [(5, 2, 15, 2), (4, 2, 7, 2), (5, 3, 10, 2), (4, 3, 5, 1)]
)
def test_every_symbol_stands_for_something(bits: int, values: int, gaps: int, escapes: int) -> None:
    alphabet = runs.Alphabet(bits, values)
    assert (alphabet.gaps, alphabet.escapes) == (gaps, escapes)
    assert values * gaps + escapes == 2**bits
    # The longest row of zeros between two weights that one escape, and one more zero, can and cannot hold.
    edge = torch.tensor([gaps - 1, gaps, gaps * (escapes + 1) - 1, gaps * (escapes + 1)])
    assert alphabet.symbols_for(edge).tolist() == [1, 2, 2, 3]
