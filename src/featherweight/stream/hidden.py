"""The hidden states of every calibration sequence between two blocks, kept where they fit.

Shapes: S sequences, T tokens, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from featherweight.errors import RequestError
from featherweight.stream.back import Back
from featherweight.train.sequences import ahead

SHARE = 0.4  # of the free memory that hidden states may take before they move one place further out
MOST_MEMORY_BYTES = 6 << 30  # of one stream, however much memory is free: mapped from disk, the system keeps what fits


Place = Literal["device", "memory", "disk"]


class HiddenStates:
    """An S x T x D tensor on the device, in memory or in a memory-mapped scratch file; read and written by batches."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        scratch: Path,
        sharers: int = 1,
        low: bool = False,
        place: Place | None = None,
    ) -> None:
        """Takes the nearest place with room, or `place`; `scratch` is the file to map if it is the disk.

        `sharers` processes are each about to keep as much in the memory of this machine. `low` on memory, a GPU is not
        such a place.
        """
        size_bytes = dtype.itemsize * shape[0] * shape[1] * shape[2]
        self.device, self.scratch, self.beside, self.sharers, self.low = device, None, scratch, sharers, low
        self.place = place or room(size_bytes, device, sharers, low)
        if self.place == "device":
            self.states_STD = torch.empty(shape, dtype=dtype, device=device)
        elif self.place == "memory":
            self.states_STD = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        else:
            self.scratch = scratch
            try:
                self.states_STD = mapped(scratch, shape, dtype)
            except (OSError, RuntimeError) as error:
                scratch.unlink(missing_ok=True)
                raise RequestError(
                    f"{scratch.name} could not be written: the disk is full ({size_bytes:,} bytes of hidden states are "
                    "needed beside the output); make room and repeat the command, finished blocks are kept."
                ) from error

    def another(self, name: str, width: int, tokens: int) -> HiddenStates:
        """Room for as many sequences of other tokens and width, with a scratch file of its own should it need one."""
        sequences = self.states_STD.shape[0]
        scratch = self.beside.with_name(f"{name}.{self.beside.name}")
        shape, dtype = (sequences, tokens, width), self.states_STD.dtype
        return HiddenStates(shape, dtype, self.device, scratch, self.sharers, self.low)

    def batches(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of `size` sequences with their states on the device."""
        for start in range(0, self.states_STD.shape[0], size):
            at = slice(start, min(start + size, self.states_STD.shape[0]))
            yield at, self.states_STD[at].to(self.device, non_blocking=True)

    def fill(self, size: int, make: Callable[[slice], Tensor]) -> None:
        """Writes make(slice) for every batch of `size` sequences."""
        for start in range(0, self.states_STD.shape[0], size):
            at = slice(start, min(start + size, self.states_STD.shape[0]))
            self.states_STD[at] = make(at).to(self.states_STD.dtype)

    def advance(self, size: int, make: Callable[[Tensor], Tensor]) -> None:
        """Replaces the states by make(states), `size` sequences at a time; what comes and goes does so beside it."""
        if self.device.type != "cuda" or self.states_STD.is_cuda:
            for at, states_STD in self.batches(size):
                self.states_STD[at] = make(states_STD)
            return
        starts = range(0, self.states_STD.shape[0], size)
        picks = torch.arange(self.states_STD.shape[0]).split(size)
        with Back(self.states_STD, self.device) as back:
            for start, (states_STD,) in zip(starts, ahead((self.states_STD,), picks, self.device), strict=True):
                back.put(slice(start, start + len(states_STD)), make(states_STD))

    def close(self) -> None:
        """Removes the scratch file, if there is one."""
        self.states_STD = torch.empty(0)
        if self.scratch is not None:
            self.scratch.unlink(missing_ok=True)


def room(size_bytes: int, device: torch.device, sharers: int = 1, low: bool = False) -> Place:
    """The nearest place with room for so many bytes, by `HiddenStates`' arguments."""
    if device.type == "cuda" and not low and size_bytes < SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "memory" if sharers * size_bytes < min(SHARE * free_memory_bytes(), MOST_MEMORY_BYTES) else "disk"


def mapped(path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """A new file of this name as a tensor: what is written to it the system brings to disk, and forgets as it must."""
    elements = shape[0] * shape[1] * shape[2]
    _reserve(path, elements * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=elements, dtype=dtype).view(shape)


def _reserve(path: Path, size_bytes: int) -> None:
    """Room on disk before it is mapped: on a full disk, writing to a map kills the process (SIGBUS)."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size_bytes)


def free_memory_bytes() -> int:
    """Memory this process may still take, by the operating system's word."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 8 << 30  # where the system does not say (macOS, Windows): a laptop's worth
