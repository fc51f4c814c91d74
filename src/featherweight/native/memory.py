"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's names for mallopt
MAPPED, TRIMMED = 1 << 26, 1 << 29  # bytes: larger blocks are given back as ever, and so is what is free beyond that
USUAL = 1 << 17  # what glibc begins with, for both


@contextmanager
def kept() -> Iterator[None]:
    """Has glibc keep what is freed, for as long as this lasts.

    It gives blocks of some megabytes back to the system as they are freed, and the system hands out the next ones page
    by page, cleared: on a virtual machine that takes as long as what a CPU does with such a block (docs/log.md). Other
    C libraries go on as they do.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):  # no glibc
        yield
        return
    mallopt(MMAP_THRESHOLD, MAPPED)
    mallopt(TRIM_THRESHOLD, TRIMMED)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, USUAL)
        mallopt(TRIM_THRESHOLD, USUAL)
        trim(ctypes.c_size_t(0))
