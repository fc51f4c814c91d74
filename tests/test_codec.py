"""The bit stream against an oracle that knows nothing of words: one Python integer per row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.codec import pack_dense, unpack_dense, words_for


def oracle(row: list[int], bits: int) -> list[int]:
    """The row as one long number, cut into signed 32-bit words."""
    stream = sum(code << (i * bits) for i, code in enumerate(row))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(words_for(len(row), bits))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def packable(row: list[int], bits: int) -> torch.Tensor:
    return torch.tensor([row], dtype=torch.uint8 if bits <= 8 else torch.int32)


rows_of_codes = st.integers(1, 16).flatmap(
    lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), max_size=100))
)


@settings(max_examples=150, deadline=None)
@given(rows_of_codes)
def test_packs_like_the_oracle_and_back(case: tuple[int, list[int]]) -> None:
    bits, row = case
    words = pack_dense(packable(row, bits), bits)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert words.tolist() == [oracle(row, bits)]
    back = unpack_dense(words, bits, len(row))
    assert back.tolist() == [row] and back.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert torch.equal(pack_dense(packable(row, bits).to(torch.int32), bits), words)


@pytest.mark.parametrize("bits", range(1, 9))
def test_leading_axes_and_strides(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 37, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    turned = codes.transpose(1, 2)
    words = pack_dense(turned, bits)
    assert words.shape == (2, 5, words_for(37, bits))
    assert words[1, 3].tolist() == oracle(turned[1, 3].tolist(), bits)
    assert torch.equal(unpack_dense(words, bits, 37), turned)


def test_refuses_codes_that_would_spill_into_their_neighbours() -> None:
    with pytest.raises(AssertionError, match="3 bits"):
        pack_dense(torch.tensor([1, 8], dtype=torch.uint8), 3)
    with pytest.raises(AssertionError, match="10 bits"):
        pack_dense(torch.tensor([1, 1024], dtype=torch.int32), 10)
    with pytest.raises(AssertionError, match="10"):
        pack_dense(torch.tensor([1, 8], dtype=torch.uint8), 10)


def test_refuses_a_width_that_cannot_be_the_count() -> None:
    with pytest.raises(AssertionError):
        unpack_dense(torch.zeros(2, 3, dtype=torch.int32), 4, 32)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_all_at_once_is_one_after_the_other(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 1 << bits, (3, 5, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = pack_dense(codes, bits)
    monkeypatch.setattr("featherweight.codec.bits._at_once", lambda *_: True)
    assert torch.equal(pack_dense(codes, bits), words)
    found = unpack_dense(words, bits, 96)
    assert found.dtype == torch.uint8 and torch.equal(found, codes)
