"""Encoded matrices: lossless whatever the shape, the smallest there is, read by rows, and never a wrong weight."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from featherweight.codec import Encoded, Kind, check, decode, decode_rows, encode, entropy_bits, matrix, zero_share
from featherweight.codec.encoded import KINDS
from featherweight.errors import RequestError

TERNARY, TWO_BITS = (0, 1, 2), (0, 1, 2, 3)


def draw_codes(rows: int, columns: int, share: float, levels: tuple[int, ...] = TERNARY, seed: int = 0) -> Tensor:
    """levels[0] with the probability `share`, each of the others equally often."""
    draw = torch.Generator().manual_seed(seed)
    others = torch.tensor(levels[1:] or levels, dtype=torch.uint8)
    some = others[torch.randint(len(others), (rows, columns), generator=draw)]
    return torch.where(torch.rand(rows, columns, generator=draw) < share, levels[0], some)


def can_hold(kind: Kind, codes: Tensor) -> bool:
    return kind in ("plain", "runs") or len(codes.unique()) <= 3


anything = st.builds(
    draw_codes,
    rows=st.sampled_from([1, 2, 31, 32, 33, 70]),
    columns=st.integers(1, 260),
    share=st.sampled_from([0.0, 0.2, 0.5, 0.75, 0.885, 0.97, 1.0]),
    levels=st.sampled_from([TERNARY, TWO_BITS, (2, 1, 3), (3, 0), (1,), (3, 2, 1, 0)]),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=50, deadline=None)
@given(anything, st.data())
def test_every_code_is_lossless_and_the_smallest_is_taken(codes: Tensor, data: st.DataObject) -> None:
    alone = [encode(codes, (kind,)) for kind in KINDS if can_hold(kind, codes)]
    chosen = encode(codes, KINDS)
    assert chosen.nbytes == min(encoded.nbytes for encoded in alone)
    assert encode(codes).nbytes == min(each.nbytes for each in alone if each.header.kind != "dictionary")
    start = data.draw(st.integers(0, len(codes) - 1))
    stop = data.draw(st.integers(start + 1, len(codes)))
    for encoded in [chosen, *alone]:
        back = Encoded.from_tensors(encoded.tensors(), "up_proj")
        assert torch.equal(decode(back, "up_proj"), codes)
        assert torch.equal(decode_rows(back, start, stop, "up_proj"), codes[start:stop])


@pytest.mark.parametrize("kind", KINDS)
def test_large_matrices_go_through_in_pieces(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = draw_codes(300, 500, 0.7)
    whole = encode(codes, (kind,))
    monkeypatch.setattr(matrix, "CPU_CHUNK", 64 * 500)
    pieces = encode(codes, (kind,))
    assert all(torch.equal(pieces.tensors()[key], value) for key, value in whole.tensors().items())
    assert torch.equal(decode(pieces, "w"), codes)


def test_no_dictionary_is_looked_up_where_a_sample_speaks_against_it() -> None:
    dense, sparse = draw_codes(400, 512, 0.36), draw_codes(400, 512, 0.885)
    assert encode(dense, KINDS).header.kind == "dictionary" and encode(sparse, KINDS).header.kind == "runs"
    for codes in (dense, sparse):
        assert encode(codes, KINDS).nbytes == min(encode(codes, (kind,)).nbytes for kind in KINDS)
    assert encode(dense).header.kind == "bitmap", "no kernel reads a dictionary, so it has to be asked for"


@pytest.mark.parametrize("share", [0.5, 0.885])
def test_several_threads_write_and_read_the_same(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = draw_codes(300, 500, share)
    alone = encode(codes)
    monkeypatch.setattr(matrix, "CPU_CHUNK", 64 * 500)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = encode(codes)
        assert torch.equal(decode(together, "w"), codes) and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(together.tensors()[key], value) for key, value in alone.tensors().items())


@pytest.mark.parametrize(("zeros", "goal"), [(0.885, 1.09), (0.857, 1.09), (0.80, 1.09)])
def test_reaches_the_rates_asked_for_with_all_that_a_row_needs(zeros: float, goal: float) -> None:
    rows, columns = 2080, 6144
    encoded = encode(draw_codes(rows, columns, zeros), ("runs",))
    entropy = zeros * math.log2(1 / zeros) + (1 - zeros) * math.log2(2 / (1 - zeros))
    two_bfloat16_a_row = 32 / columns  # the least and greatest weight, which QMoE's figures contain
    assert entropy < encoded.bits_per_weight + two_bfloat16_a_row <= goal * entropy


def test_rows_of_more_than_255_words_have_longer_lengths() -> None:
    codes = draw_codes(33, 8300, 0.1)
    wide = encode(codes, ("bitmap",)).tensors()
    assert wide["row_words"].dtype == torch.uint16
    assert torch.equal(decode(Encoded.from_tensors(wide, "w"), "w"), codes)
    with pytest.raises(
        RequestError, match=r"w's tensor 'row_words' is torch.int16 of shape \[33\], where torch.uint16"
    ):
        Encoded.from_tensors(wide | {"row_words": wide["row_words"].view(torch.int16)}, "w")


def test_bitmaps_take_over_where_half_of_the_weights_are_zero() -> None:
    encoded = encode(draw_codes(512, 2048, 0.5))
    assert encoded.header.kind == "bitmap" and encoded.bits_per_weight < 1.02 * 1.5


def test_a_matrix_of_noise_takes_two_bits_and_a_header() -> None:
    encoded = encode(draw_codes(512, 2048, 0.25, TWO_BITS))
    assert encoded.header.kind == "plain"
    assert encoded.nbytes == 512 * 2048 // 4 + 16 + 4 * 512 // 32


def test_entropy_and_zero_share_of_known_matrices() -> None:
    codes = torch.tensor([[0, 0, 0, 0], [1, 1, 2, 2]], dtype=torch.uint8)
    assert entropy_bits(codes) == 1.5 and zero_share(codes) == 0.5 and zero_share(codes, zero=2) == 0.25
    assert entropy_bits(torch.full((3, 3), 2, dtype=torch.uint8)) == 0
    with pytest.raises(AssertionError, match="up to 4"):
        encode(torch.tensor([[0, 4]], dtype=torch.uint8))
    with pytest.raises(AssertionError, match="none of bitmap holds 4 levels"):
        encode(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), ("bitmap",))


def test_a_file_holds_it(tmp_path: Path) -> None:
    codes = draw_codes(50, 77, 0.885)
    encoded = encode(codes)
    tensors = {f"gate_proj.weight_{part}": tensor for part, tensor in encoded.tensors().items()}
    save_file(tensors, tmp_path / "m.safetensors")
    read = {
        key.removeprefix("gate_proj.weight_"): value for key, value in load_file(tmp_path / "m.safetensors").items()
    }
    assert torch.equal(decode(Encoded.from_tensors(read, "gate_proj"), "gate_proj"), codes)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_can_be_read_alone_from_where_its_offset_says(kind: Kind) -> None:
    codes = draw_codes(70, 300, 0.885)
    encoded = encode(codes, (kind,))
    offsets = encoded.row_offsets
    assert offsets.dtype == torch.int64 and offsets.shape == (71,) and int(offsets[-1]) == len(encoded.stream_N)
    for row in range(70):
        words = encoded.stream_N[offsets[row] : offsets[row + 1]]
        assert torch.equal(matrix.decode_words(encoded.header, words[None])[0], codes[row])


def damaged(tensors: dict[str, Tensor], part: str, byte: int, by: int) -> dict[str, Tensor]:
    raw = bytearray(tensors[part].numpy().tobytes())
    raw[byte] ^= by
    return tensors | {part: torch.frombuffer(raw, dtype=tensors[part].dtype)}


@pytest.mark.parametrize("kind", KINDS)
def test_any_byte_that_changed_is_noticed(kind: Kind) -> None:
    codes = draw_codes(70, 60, 0.8)
    tensors = encode(codes, (kind,)).tensors()
    for part, tensor in tensors.items():
        for byte in range(tensor.nbytes):
            with pytest.raises(RequestError, match="up_proj"):
                decode(Encoded.from_tensors(damaged(tensors, part, byte, 1 << byte % 8), "up_proj"), "up_proj")


def test_damage_names_the_tile_and_both_checksums_and_leaves_the_others_readable() -> None:
    codes = draw_codes(100, 200, 0.885)
    tensors = encode(codes).tensors()
    assert tensors["row_words"].dtype == torch.uint8
    words = tensors["row_words"].to(torch.int64)[:32].sum()
    bad = Encoded.from_tensors(damaged(tensors, "stream", 4 * int(words), 4), "layers.3.up_proj")
    with pytest.raises(RequestError) as caught:
        decode(bad, "layers.3.up_proj")
    stored = int(tensors["checksums"][1]) & 0xFFFFFFFF
    assert str(caught.value).startswith("layers.3.up_proj is damaged in tile 1 (rows 32 to 63): its checksum is ")
    assert f"the file has {stored:08x}" in str(caught.value)
    with pytest.raises(RequestError, match="tile 1"):
        check(bad, "layers.3.up_proj")
    assert torch.equal(decode_rows(bad, 0, 32, "up"), codes[:32])
    assert torch.equal(decode_rows(bad, 64, 100, "up"), codes[64:])
    with pytest.raises(RequestError, match="tile 1"):
        decode_rows(bad, 63, 65, "up")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut_off_left_over_or_swapped_is_noticed(kind: Kind) -> None:
    codes = draw_codes(70, 60, 0.8)
    tensors = encode(codes, (kind,)).tensors()
    for cut in (1, 5, len(tensors["stream"])):
        short = Encoded.from_tensors(tensors | {"stream": tensors["stream"][:-cut]}, "up")
        with pytest.raises(RequestError, match=r"up is damaged in tile \d .*checksum"):
            decode(short, "up")
    longer = torch.cat((tensors["stream"], tensors["stream"][:1]))
    with pytest.raises(RequestError, match=rf"up has {len(longer)} words, and its rows take {len(longer) - 1}"):
        decode(Encoded.from_tensors(tensors | {"stream": longer}, "up"), "up")
    for part in set(tensors) - {"stream"}:
        with pytest.raises(RequestError, match="up"):
            Encoded.from_tensors(tensors | {part: tensors[part][:-1]}, "up")
        with pytest.raises(RequestError, match="up"):
            Encoded.from_tensors({key: value for key, value in tensors.items() if key != part}, "up")
    other = encode(draw_codes(70, 60, 0.8, seed=1), (kind,)).tensors()
    with pytest.raises(RequestError, match="tile 0"):
        decode(Encoded.from_tensors(tensors | {"checksums": other["checksums"]}, "up"), "up")
    if "row_words" in tensors:
        moved = tensors["row_words"].clone()
        moved[3], moved[4] = moved[3] + 1, moved[4] - 1
        with pytest.raises(RequestError, match="tile 0"):
            decode(Encoded.from_tensors(tensors | {"row_words": moved}, "up"), "up")
    twice = encode(codes[:32].repeat(2, 1), (kind,)).tensors()
    with pytest.raises(RequestError, match="tile 0"):
        decode(Encoded.from_tensors(twice | {"checksums": twice["checksums"].flip(0)}, "up"), "up")


def test_unknown_versions_and_codes_are_refused() -> None:
    tensors = encode(draw_codes(4, 40, 0.8)).tensors()
    header = tensors["header"].clone()
    header[0] = 2
    with pytest.raises(
        RequestError, match="up is encoded by version 2 of the codec and this featherweight reads version 1"
    ):
        Encoded.from_tensors(tensors | {"header": header}, "up")
    # What a later version might bring is refused before anything is made of it.
    for byte, value in ((1, 4), (2, 9), (3, 0), (3, 5), (4, 0), (5, 30), (6, 1), (8, 0), (12, 0), (15, 1)):
        header = tensors["header"].clone()
        if byte in (8, 12):
            header[byte : byte + 4] = 0
        else:
            header[byte] = value
        with pytest.raises(RequestError, match="up's codec header, 01"):
            Encoded.from_tensors(tensors | {"header": header}, "up")
