"""Bits and words: pure functions on tensors, with no idea of what the numbers mean. Imports no other room."""

from featherweight.codec.bits import pack_dense, pack_flags, unpack_dense, unpack_flags, words_for

__all__ = ["pack_dense", "pack_flags", "unpack_dense", "unpack_flags", "words_for"]
