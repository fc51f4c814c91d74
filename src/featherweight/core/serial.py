"""How many threads work on a CPU: one for loops of small operations, or one for each part of a larger task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Part = TypeVar("Part")
Made = TypeVar("Made")


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


def each(work: Callable[[Part], Made], parts: Sequence[Part], device: torch.device) -> list[Made]:
    """`work` of every part in order; on a CPU as many at a time as torch has threads, each on one of its own.

    For parts whose operations take some ten microseconds: of smaller ones the threads wait for the interpreter's lock.
    """
    threads = torch.get_num_threads()
    with one_thread(device):
        if device.type != "cpu" or threads == 1 or len(parts) == 1:
            return [work(part) for part in parts]
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, parts))
