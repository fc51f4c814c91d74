"""QMoE's dictionary against Algorithm 1 with a heap, codewords against a search for the longest string, its files."""

from __future__ import annotations

import heapq
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from featherweight.codec import dictionary, read_qmoe
from featherweight.errors import RequestError

CPU = torch.device("cpu")
Strings = list[tuple[int, ...]]


@lru_cache
def best_first(count: int, zero_share: float) -> Strings:
    """Algorithm 1 of the paper: take the most probable string from a queue, put in its nine continuations."""
    share = [zero_share, (1 - zero_share) / 2, (1 - zero_share) / 2]
    of_pair = [share[pair % 3] * share[pair // 3] for pair in range(9)]
    queue: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    found: Strings = []
    while len(found) < count:
        chance, string = heapq.heappop(queue)
        if string:
            found.append(string)
        if len(string) < 14:
            for pair in range(9):
                heapq.heappush(queue, (chance * of_pair[pair], (*string, pair)))
    return found


def strings_of(table: dictionary.Dictionary) -> Strings:
    pairs = (table.pairs & 3) + 3 * (table.pairs >> 2)
    return [tuple(row[:length]) for row, length in zip(pairs.t().tolist(), table.lengths_K.tolist(), strict=True)]


@lru_cache
def numbers_of(bits: int, zero_share: float) -> dict[tuple[int, ...], int]:
    return {string: number for number, string in enumerate(best_first(1 << bits, zero_share))}


def longest_matches(row: list[int], numbers: dict[tuple[int, ...], int]) -> list[int]:
    """The codewords of a row, each the longest string that fits."""
    row = row + [0] * (len(row) % 2)
    pairs = tuple(first + 3 * second for first, second in zip(row[::2], row[1::2], strict=True))
    found, at = [], 0
    while at < len(pairs):
        length = max(n for n in range(1, 15) if pairs[at : at + n] in numbers and at + n <= len(pairs))
        found.append(numbers[pairs[at : at + length]])
        at += length
    return found


def trits(rows: int, columns: int, zero_share: float, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    some = torch.randint(1, 3, (rows, columns), dtype=torch.uint8, generator=draw)
    return some * (torch.rand(rows, columns, generator=draw) >= zero_share)


@pytest.mark.parametrize(
    ("bits", "zero_share"), [(16, 0.885), (10, 0.885), (10, 57 / 64), (10, 22 / 64), (10, 63 / 64)]
)
def test_strings_are_those_of_a_best_first_search(bits: int, zero_share: float) -> None:
    table = dictionary.dictionary(bits, zero_share, CPU)
    assert strings_of(table) == best_first(1 << bits, zero_share)


def test_original_has_the_lengths_that_were_counted() -> None:
    lengths = dictionary.dictionary(16, 0.885, CPU).lengths_K
    counted = [9, 65, 233, 577, 1161, 2049, 3305, 4993, 7177, 9921, 13289, 17345, 3843, 1569]
    assert torch.bincount(lengths, minlength=15).tolist() == [0, *counted]


@pytest.mark.parametrize("columns", [1, 2, 7, 200, 201])
@pytest.mark.parametrize(("bits", "zero_share"), [(10, 0.75), (16, 0.885)])
def test_codewords_are_the_longest_matches(bits: int, zero_share: float, columns: int) -> None:
    table = dictionary.dictionary(bits, zero_share, CPU)
    levels_RC = torch.cat((trits(5, columns, zero_share), trits(2, columns, 0.0), trits(1, columns, 1.0)))
    words_RW, lengths_R = dictionary.encode(levels_RC, table)
    for row, words, count in zip(levels_RC.tolist(), words_RW.tolist(), lengths_R.tolist(), strict=True):
        codewords = longest_matches(row, numbers_of(bits, zero_share))
        stream = sum(codeword << bits * place for place, codeword in enumerate(codewords))
        assert count == -(-len(codewords) * bits // 32)
        assert [word & 0xFFFFFFFF for word in words] == [stream >> 32 * w & 0xFFFFFFFF for w in range(len(words))]
    assert torch.equal(dictionary.decode(words_RW, table, columns), levels_RC)


@pytest.mark.parametrize("zero_share", [0.45, 0.75, 0.9])
def test_sample_says_what_the_matrix_will_take(zero_share: float) -> None:
    table = dictionary.dictionary(10, 0.75, CPU)
    words = int(dictionary.encode(trits(64, 4096, zero_share), table)[1].sum())
    assert dictionary.rate(trits(512, 256, zero_share, seed=1), table) == pytest.approx(
        words * 32 / 64 / 4096, rel=0.02
    )


def qmoe_file(values_RC: Tensor) -> dict[str, Tensor]:
    """The tensors of a ternary matrix as QMoE writes them: the row's least is level 1, the greatest, afterwards, 2."""
    least_R, greatest_R = values_RC.amin(1).bfloat16(), values_RC.amax(1).bfloat16()
    levels_RC = torch.zeros(values_RC.shape, dtype=torch.uint8)
    levels_RC[values_RC.bfloat16() == least_R[:, None]] = 1
    levels_RC[values_RC.bfloat16() == greatest_R[:, None]] = 2
    rows = [longest_matches(row, numbers_of(16, 0.885)) for row in levels_RC.tolist()]
    return {
        "w_comp": torch.from_numpy(np.concatenate(rows).astype(np.uint16).view(np.int16)),
        "row_off": torch.tensor([0, *map(len, rows)]).cumsum(0).to(torch.int32),
        "ter_minmax": torch.stack((least_R, greatest_R), dim=1).flatten(),
        "weight": torch.zeros(0, dtype=torch.bfloat16),
    }


def ternary_values(rows: int, columns: int, zero_share: float = 0.885) -> Tensor:
    sizes_R2 = torch.rand(rows, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([-1.0, 1.0])
    levels_RC = trits(rows, columns, zero_share)
    return torch.cat((torch.zeros(rows, 1), sizes_R2), dim=1).bfloat16().gather(1, levels_RC.long())


@pytest.mark.parametrize("columns", [96, 97])
def test_reads_what_qmoe_writes(columns: int) -> None:
    values_RC = ternary_values(24, columns)
    values_RC[0] = 0  # QMoE writes such a row as nothing but greatest values, which are 0
    values_RC[1] = values_RC[1].clamp(min=0)  # and the zeros of this one as least values
    values_RC[2] = values_RC[2].clamp(max=0)
    values_RC[3] = values_RC[3, values_RC[3] > 0][0]
    codes_RC, values_R2 = read_qmoe(qmoe_file(values_RC), columns, "wi")
    assert codes_RC.dtype == torch.uint8 and codes_RC.shape == values_RC.shape and values_R2.dtype == torch.bfloat16
    assert torch.equal(codes_RC == 0, values_RC == 0)
    table_R3 = torch.cat((torch.zeros_like(values_R2[:, :1]), values_R2), dim=1)
    assert torch.equal(table_R3.gather(1, codes_RC.long()), values_RC)


def test_refuses_what_cannot_be_a_qmoe_matrix() -> None:
    file = qmoe_file(ternary_values(4, 50))
    with pytest.raises(RequestError, match=r"wi's row 0 holds 50 weights, and the model says 60"):
        read_qmoe(file, 60, "wi")
    with pytest.raises(RequestError, match=r"wi\.w_comp is missing"):
        read_qmoe({key: file[key] for key in ("row_off", "ter_minmax")}, 50, "wi")
    with pytest.raises(RequestError, match=r"wi\.row_off is torch\.int64 \[5\], not a row of torch\.int32"):
        read_qmoe(file | {"row_off": file["row_off"].long()}, 50, "wi")
    with pytest.raises(RequestError, match="4 rows by row_off and 3 by ter_minmax"):
        read_qmoe(file | {"ter_minmax": file["ter_minmax"][:-2]}, 50, "wi")
    with pytest.raises(RequestError, match=rf"to {len(file['w_comp'])} and should rise from 0 to 3,"):
        read_qmoe(file | {"w_comp": file["w_comp"][:3]}, 50, "wi")
    with pytest.raises(RequestError, match="should rise"):
        read_qmoe(file | {"row_off": file["row_off"][[0, 2, 1, 3, 4]]}, 50, "wi")
    odd = qmoe_file(torch.cat((ternary_values(4, 49), torch.ones(4, 1)), dim=1))
    with pytest.raises(RequestError, match="behind its last column, 48"):
        read_qmoe(odd, 49, "wi")
