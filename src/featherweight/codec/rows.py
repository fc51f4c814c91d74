"""Rows of unequal length: side by side with filling between them while they are worked on, end to end in a file.

Shapes: R rows, W words (of the longest row, where rows are side by side), N elements of all rows end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Part = TypeVar("Part")
Made = TypeVar("Made")


def each(work: Callable[[Part], Made], parts: Iterable[Part], device: torch.device) -> list[Made]:
    """`work` of every part in order; on a CPU as many at a time as torch has threads."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return [work(part) for part in parts]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)


def offsets_of(lengths_R: Tensor) -> Tensor:
    """Where each row starts when all lie end to end, and where the last one ends: int64 of shape (R + 1,)."""
    offsets: Tensor = torch.nn.functional.pad(lengths_R.cumsum(0, dtype=torch.int64), (1, 0))
    return offsets


def nonzero_counts(levels_RC: Tensor) -> Tensor:
    """How many of each row of a uint8 matrix are not zero: int64 of shape (R,)."""
    counts_R = levels_RC.bool().view(torch.uint8).sum(1, dtype=torch.int32)  # int64 takes twice as long
    return counts_R.to(torch.int64)


def nonzero_places(levels_RC: Tensor) -> Tensor:
    """Where the flat matrix (uint8, contiguous) is not zero: int64, rising."""
    if levels_RC.is_cuda:
        return levels_RC.flatten().nonzero().flatten()
    return torch.from_numpy(np.flatnonzero(levels_RC.numpy().view(np.bool_)))  # four times as fast as torch's


def end_to_end(rows_RW: Tensor, lengths_R: Tensor) -> Tensor:
    """The first `lengths_R` elements of each row, row after row, in one dimension."""
    return rows_RW[torch.arange(rows_RW.shape[1], device=rows_RW.device) < lengths_R[:, None]]


def side_by_side(stream_N: Tensor, lengths_R: Tensor, fill: int, multiple: int = 1) -> Tensor:
    """The inverse of `end_to_end`: (R, W), W the longest row rounded up to a multiple, with `fill` behind the rows."""
    width = -(-int(lengths_R.max()) // multiple) * multiple
    places_W = torch.arange(width, device=stream_N.device)
    rows_RW = torch.full((len(lengths_R), width), fill, dtype=stream_N.dtype, device=stream_N.device)
    rows_RW[places_W < lengths_R[:, None]] = stream_N
    return rows_RW
