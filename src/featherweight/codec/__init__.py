"""Bits and words: pure functions on tensors, with no idea of what the numbers mean. Imports no room but errors."""

from featherweight.codec.bits import pack_dense, pack_flags, unpack_dense, unpack_flags, words_for
from featherweight.codec.encoded import Encoded, Kind, check
from featherweight.codec.entropy import entropy_bits, zero_share
from featherweight.codec.matrix import decode, decode_rows, encode
from featherweight.codec.qmoe import read_qmoe

__all__ = [
    "Encoded",
    "Kind",
    "check",
    "decode",
    "decode_rows",
    "encode",
    "entropy_bits",
    "pack_dense",
    "pack_flags",
    "read_qmoe",
    "unpack_dense",
    "unpack_flags",
    "words_for",
    "zero_share",
]
