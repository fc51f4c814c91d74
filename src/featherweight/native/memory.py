"""What the C library does with memory that is freed, and what Python's collector of garbage looks through."""

from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's names for mallopt
MAPPED, TRIMMED = 1 << 26, 1 << 29  # bytes: larger blocks are given back as ever, and so is what is free beyond that
USUAL = 1 << 17  # what glibc begins with, for both


@contextmanager
def kept() -> Iterator[Callable[[], None]]:
    """Has glibc keep what is freed, for as long as this lasts; yields what is to be called between two rounds of work.

    It gives blocks of some megabytes back to the system as they are freed, and the system hands out the next ones page
    by page, cleared: on a virtual machine that takes as long as what a CPU does with such a block (docs/log.md). Kept,
    it is cut into pieces, more with every round: when a round leaves more than the first one did, all that is free goes
    back. Other C libraries go on as they do.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):  # no glibc
        yield lambda: None
        return
    first = 0

    def between() -> None:
        nonlocal first
        left = held_bytes()
        first = first or left
        if left > first:
            trim(ctypes.c_size_t(0))

    mallopt(MMAP_THRESHOLD, MAPPED)
    mallopt(TRIM_THRESHOLD, TRIMMED)
    try:
        yield between
    finally:
        mallopt(MMAP_THRESHOLD, USUAL)
        mallopt(TRIM_THRESHOLD, USUAL)
        trim(ctypes.c_size_t(0))


@contextmanager
def uncollected() -> Iterator[None]:
    """What there is already, Python's collector of garbage does not look through as long as this lasts: with a
    library's modules in memory that takes a tenth of a second each time, and a GPU waits."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def held_bytes() -> int:
    """What the process holds in memory beside mapped files; 0 where the system does not say."""
    try:
        _, resident, mapped, *_ = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0
    return (int(resident) - int(mapped)) * mmap.PAGESIZE
