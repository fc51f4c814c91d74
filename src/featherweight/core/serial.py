"""One thread for loops of small operations on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Keeps torch's CPU operations on this thread for a while.

    The column loops make thousands of calls of some microseconds; waking a second thread for each costs more than it
    does, and when that thread's core is busy with something else, thirty times more (measured, docs/log.md).
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
