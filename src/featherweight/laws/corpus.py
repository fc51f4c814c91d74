"""Text as bytes: what a sweep trains on, what it holds out, and which windows a step sees.

Shapes: N bytes, B windows, T bytes of a window (the byte predicted last included).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from featherweight.errors import RequestError

BLOCK_BYTES, EVERY = 65_536, 50
"""Blocks 0, 50, 100, ... of this size are held out; a short last block counts as one."""
CHUNK = 256
"""Steps whose windows are drawn at once."""


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes, uint8 on one device, and the hash of the whole text."""

    train_N: Tensor
    held_N: Tensor
    sha256: str

    def starts(self, seed: int, chunk: int, windows: int, length: int) -> Tensor:
        """Where the windows of steps CHUNK chunk to CHUNK (chunk + 1) start: CHUNK x windows.

        A function of seed, chunk and text alone, so an interrupted run goes on with the very bytes it would have seen.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + chunk)
        drawn = torch.randint(len(self.train_N) - length + 1, (CHUNK, windows), generator=generator)
        return drawn.to(self.train_N.device)

    def held_out(self, length: int, most_bytes: int) -> Tensor:
        """B x T: windows in a row that each predict length - 1 bytes, evenly thinned to `most_bytes` predictions."""
        predicted = length - 1
        whole = (len(self.held_N) - 1) // predicted
        count = max(1, min(whole, most_bytes // predicted))
        first = torch.arange(count, device=self.held_N.device) * whole // count * predicted
        return windows(self.held_N, first, length)


def windows(text_N: Tensor, starts_B: Tensor, length: int) -> Tensor:
    """B x T bytes from these places on."""
    return text_N[starts_B[:, None] + torch.arange(length, device=text_N.device)]


def read(paths: Sequence[str | Path], window: int, device: torch.device) -> Corpus:
    """The files one after the other, cut into training and held-out blocks.

    Raises RequestError for no file, one that cannot be read, or a text without a window on either side.
    """
    if not paths:
        raise RequestError("no text to train on: give at least one file with --text.")
    raw = b"".join(_bytes(Path(path)) for path in paths)
    needed = BLOCK_BYTES + window + 1
    if len(raw) < needed:
        raise RequestError(f"the text has {len(raw)} bytes and a sweep needs at least {needed}: give more with --text.")
    blocks = list(torch.frombuffer(bytearray(raw), dtype=torch.uint8).split(BLOCK_BYTES))
    held = torch.cat(blocks[::EVERY]).to(device)
    train = torch.cat([block for i, block in enumerate(blocks) if i % EVERY]).to(device)
    return Corpus(train, held, hashlib.sha256(raw).hexdigest())


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"text {path} cannot be read ({error.strerror or error}): check the name.") from error
