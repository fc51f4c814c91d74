"""Small integers in 32-bit words, and booleans in bytes: little-endian bit streams without gaps.

Element i of a row occupies the bits i*bits .. i*bits + bits - 1 of the row, bit 0 being the lowest of word 0, so a
code may straddle two words. The fewest codes that fill whole words (8 codes of 4 bits one word, 32 codes of 3 bits
three) make the work below a fixed schedule of as many shifts. The widths that divide 32 never straddle and this is then
the usual packing; compressed-tensors (since 0.18) and GPTQ use the same stream for the others too.

Shapes: ... any leading axes, N codes of a row, W words of a row, B blocks of codes that fill whole words.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD_BITS = 32
BYTE_BITS = 8
AT_ONCE = 1 << 26  # codes that a GPU packs by one operation on all: fewer launches, but four bytes for each code
# What may be packed: (dtype, bits).
DTYPES = {(torch.uint8, bits) for bits in range(1, 9)} | {(torch.int32, bits) for bits in range(1, 17)}


def words_for(count: int, bits: int) -> int:
    """Words that hold `count` codes of `bits` bits: the ceiling of count * bits / 32."""
    return -(-count * bits // WORD_BITS)


def pack_dense(codes_N: Tensor, bits: int) -> Tensor:
    """Pack codes below 2**bits along the last axis: uint8 of 1 .. 8 bits, or int32 of 1 .. 16 bits.

    Returns int32 of shape (..., W), W = words_for(N, bits), contiguous; the last word of a row is filled up with zeros.
    """
    assert (codes_N.dtype, bits) in DTYPES, (codes_N.dtype, bits)
    # A code too wide would spill into its neighbour: one pass over the codes is a small price for never doing that.
    assert codes_N.numel() == 0 or int(codes_N.max()) < 1 << bits, f"a code does not fit in {bits} bits"
    count, (codes, words) = codes_N.shape[-1], _block(bits)
    if words == 1 and count % codes == 0 and _at_once(codes_N, codes_N.numel()):
        shifts = bits * torch.arange(codes, dtype=torch.int32, device=codes_N.device)
        packed: Tensor = (codes_N.unflatten(-1, (-1, codes)).to(torch.int32) << shifts).sum(-1, dtype=torch.int32)
        return packed
    blocks = -(-count // codes)
    padded = torch.nn.functional.pad(codes_N, (0, blocks * codes - count))
    codes_Bc = padded.reshape(*padded.shape[:-1], blocks, codes)
    words_Bw = torch.zeros(*codes_Bc.shape[:-1], words, dtype=torch.int32, device=codes_N.device)
    for i in range(codes):
        word, shift = divmod(i * bits, WORD_BITS)
        code = codes_Bc[..., i].to(torch.int32)
        words_Bw[..., word] |= code << shift
        if shift + bits > WORD_BITS:
            words_Bw[..., word + 1] |= code >> (WORD_BITS - shift)
    return words_Bw.flatten(-2)[..., : words_for(count, bits)].contiguous()


def unpack_dense(words_W: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_dense`: the first `count` codes of each row, of shape (..., count).

    `words_W` is int32 with exactly words_for(count, bits) words along the last axis. Codes of 8 bits or fewer come as
    uint8, those of 9 to 16 as int32.
    """
    assert 1 <= bits <= 16 and words_W.dtype == torch.int32, (bits, words_W.dtype)
    assert words_W.shape[-1] == words_for(count, bits), (words_W.shape, bits, count)
    codes, words = _block(bits)
    if words == 1 and count % codes == 0 and _at_once(words_W, codes * words_W.numel()):
        shifts = bits * torch.arange(codes, dtype=torch.int32, device=words_W.device)
        apart = (words_W.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
        return apart.flatten(-2).to(torch.uint8 if bits <= BYTE_BITS else torch.int32)
    blocks = -(-count // codes)
    padded = torch.nn.functional.pad(words_W, (0, blocks * words - words_W.shape[-1]))
    words_Bw = padded.reshape(*padded.shape[:-1], blocks, words)
    dtype = torch.uint8 if bits <= BYTE_BITS else torch.int32
    codes_Bc = torch.empty(*words_Bw.shape[:-1], codes, dtype=dtype, device=words_W.device)
    mask = (1 << bits) - 1
    for i in range(codes):
        word, shift = divmod(i * bits, WORD_BITS)
        code = words_Bw[..., word] >> shift
        if shift + bits > WORD_BITS:
            # The shift above copies the sign into the high bits; they make room for the part in the next word.
            low = WORD_BITS - shift
            code = (code & ((1 << low) - 1)) | (words_Bw[..., word + 1] << low)
        codes_Bc[..., i] = code & mask
    return codes_Bc.flatten(-2)[..., :count].contiguous()


def _at_once(tensor: Tensor, codes: int) -> bool:
    """Whether launches cost more here than memory."""
    return tensor.is_cuda and codes <= AT_ONCE


def _block(bits: int) -> tuple[int, int]:
    """The fewest codes of so many bits that fill whole words, and how many words."""
    shared = math.gcd(bits, WORD_BITS)
    return WORD_BITS // shared, bits // shared


def pack_flags(flags_N: Tensor) -> Tensor:
    """Pack booleans along the last axis, eight a byte: flag i is bit i % 8 (0 the lowest) of byte i // 8.

    Returns uint8 of shape (..., ceil(N / 8)); the last byte of a row is filled up with zeros.
    """
    assert flags_N.dtype == torch.bool, flags_N.dtype
    padded = torch.nn.functional.pad(flags_N.to(torch.uint8), (0, -flags_N.shape[-1] % BYTE_BITS))
    shifts = torch.arange(BYTE_BITS, dtype=torch.uint8, device=flags_N.device)
    packed: Tensor = (padded.unflatten(-1, (-1, BYTE_BITS)) << shifts).sum(-1, dtype=torch.uint8)
    return packed


def unpack_flags(bytes_N: Tensor) -> Tensor:
    """The inverse of `pack_flags`: every bit, filling included, as bool of shape (..., 8 * bytes)."""
    assert bytes_N.dtype == torch.uint8, bytes_N.dtype
    shifts = torch.arange(BYTE_BITS, dtype=torch.uint8, device=bytes_N.device)
    return ((bytes_N.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)
