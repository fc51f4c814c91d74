"""The one timing rule for kernels.

A CUDA graph of launches over copies of the weights that together exceed the L2 cache four times (at least two),
replayed with the L2 written over in between; the median of the replays, divided by the launches. Random data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

CACHE_BYTES = 200e6
"""Four times the L2 of an H100."""


def median_us(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of one launch of a graph of `calls`."""
    from triton.testing import do_bench

    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    median: float = do_bench(graph.replay, warmup=10, rep=40, return_mode="median")
    return median * 1e3 / len(calls)


def copies(bytes: float) -> int:
    """Of a weight, so that no launch finds its own in the L2."""
    return max(2, int(CACHE_BYTES // bytes) + 1)


def read_gbps() -> float:
    """What a plain sum over 2 GiB reads."""
    from triton.testing import do_bench

    x = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_(0, 255)
    median: float = do_bench(lambda: x.view(torch.float32).sum(), warmup=25, rep=100, return_mode="median")
    return 2**31 / median / 1e6
