"""Tensors filled from a file, wherever they are: pieces of it go through memory that is used again and again.

Fresh memory is what reading takes longest for, and mapped files count as ours; this is as fast as either can be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from io import FileIO
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from featherweight.errors import RequestError

PIECE_BYTES = 16 << 20  # of each of two pieces, which are on their way to a GPU and being read in turn


def fill(path: Path, wanted: Iterable[tuple[int, Tensor]]) -> None:
    """Puts into contiguous tensors, all on one device, what a file holds from some bytes on; a GPU's current stream has
    it. RequestError where the file is shorter or cannot be read."""
    wanted = sorted(wanted, key=lambda each: each[0])
    size = min(PIECE_BYTES, max((tensor.nbytes for _, tensor in wanted), default=0))
    device = wanted[0][1].device if wanted else torch.device("cpu")
    pieces = _pieces(size, device)
    try:
        with path.open("rb", buffering=0) as file:
            for start, tensor in wanted:
                whole = tensor.view(-1).view(torch.uint8)
                file.seek(start)
                for part, piece in zip(whole.split(size) if size else (), pieces, strict=False):
                    own = piece[: len(part)]
                    _read(file, own)
                    part.copy_(own, non_blocking=True)
    except OSError as error:
        raise RequestError(f"{path} could not be read ({error}): download it again.") from error


def _read(file: FileIO, piece: Tensor) -> None:
    """The next bytes of a file."""
    left = piece.numpy().data
    while left:
        count = file.readinto(left)
        if not count:
            raise OSError(f"it ends {len(left)} bytes too early")
        left = left[count:]


def _pieces(size: int, device: torch.device) -> Iterator[Tensor]:
    """Two pieces in turn, each when the device has taken what was in it."""
    on_gpu = device.type == "cuda"
    held = [torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2 if on_gpu else 1)]
    taken = [torch.cuda.Event() if on_gpu else None for _ in held]
    for piece, event in cycle(zip(held, taken, strict=True)):
        if event is not None:
            event.synchronize()
        yield piece
        if event is not None:
            event.record(torch.cuda.current_stream(device))
