"""The one rule all kernels are timed by, and what the machine can do at most.

On a GPU: a CUDA graph of launches over copies of the weights that together exceed the L2 cache four times (two at
least), gone through until there are sixteen launches, so that none carries the cost of starting a graph; replayed; the
median of the replays, divided by the launches. On a CPU: the same calls one after another, the
median of the rounds. Random data, since zeros draw less power. Peaks are measured on the machine, in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

Call = Callable[[], object]
ROUNDS_S = 0.04  # of replays or rounds that are measured
LEAST_ROUNDS = 5
TURNS = 3  # of contenders that are compared
REST_S, START_S = 0.25, 0.05  # of a GPU before each of their measurements: idle, and at their own work
LEAST_LAUNCHES = 16  # of a graph
CPU_CACHE_BYTES = 32e6  # that calls rotate through where nothing says how large the cache is
MOST_COPIES = 256
PEAK_WIDTHS = {"cuda": 8192, "cpu": 1024}


def median_us(calls: Sequence[Call], device: torch.device) -> float:
    """Microseconds of one of `calls`, which differ in the copy of the weights they read."""
    for call in calls:
        call()
    if device.type == "cuda":
        calls = [*calls] * -(-LEAST_LAUNCHES // len(calls))
        return _replayed(calls, device) / len(calls)
    return _rounds_us(calls) / len(calls)


def in_turn(contenders: Mapping[str, Sequence[Call]], device: torch.device) -> dict[str, float]:
    """`median_us` of each, the median of `TURNS` measurements that are taken in turn, each after a rest and a start: a
    GPU at work grows hot and slow, and whoever is measured first, or after one who draws little power, would win."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(TURNS):
        for name, calls in contenders.items():
            found[name].append(_rested_us(calls, device))
    return {name: median(each) for name, each in found.items()}


def _rested_us(calls: Sequence[Call], device: torch.device) -> float:
    """`median_us` after a rest and a start."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        time.sleep(REST_S)
        began = time.perf_counter()
        while time.perf_counter() - began < START_S:  # the clock comes back from idling
            for call in calls:
                call()
            torch.cuda.synchronize(device)
    return median_us(calls, device)


def copies(nbytes: float, device: torch.device) -> int:
    """Of a weight of so many bytes, so that no call finds its own in the cache; no more than `MOST_COPIES`."""
    return min(MOST_COPIES, max(2, int(4 * cache_bytes(device) // nbytes) + 1))


def cache_bytes(device: torch.device) -> float:
    """Of the cache in front of the memory."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).L2_cache_size)
    return CPU_CACHE_BYTES


def read_gbps(device: torch.device) -> float:
    """What a plain sum reaches: 2 GiB on a GPU, 256 MiB on a CPU."""
    nbytes = 2**31 if device.type == "cuda" else 2**28
    x = torch.empty(nbytes, dtype=torch.uint8, device=device).random_(0, 255).view(torch.float32)
    return nbytes / median_us([x.sum], device) / 1e3


def peak_tflops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """What a product of random square matrices of this dtype, `PEAK_WIDTHS` wide, reaches."""
    width = PEAK_WIDTHS[device.type]
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    return 2 * width**3 / median_us([lambda: a @ b], device) / 1e6


def machine(device: torch.device) -> str:
    """The device by name, and the torch that uses it."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"cpu, {torch.get_num_threads()} threads, torch {torch.__version__}"


def excess_error(got_TR: Tensor, exact_TR: Tensor) -> float:
    """The relative Frobenius distance from the float64 product, beyond that of rounding it to the result's dtype."""
    rounding = (exact_TR.to(got_TR.dtype).double() - exact_TR).norm()
    error = (got_TR.double() - exact_TR).norm()
    return float((error**2 - rounding**2).clamp_min(0).sqrt() / exact_TR.norm())


def _replayed(calls: Sequence[Call], device: torch.device) -> float:
    """Microseconds of a replay of a graph of the calls."""
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    first = _events_us(graph.replay, 1, device)[0]
    return median(_events_us(graph.replay, max(LEAST_ROUNDS, int(ROUNDS_S * 1e6 / first)), device))


def _events_us(replay: Call, rounds: int, device: torch.device) -> list[float]:
    """Microseconds of each of so many replays."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        replay()
        mark.record()
    torch.cuda.synchronize(device)
    return [1e3 * before.elapsed_time(after) for before, after in pairwise(marks)]


def _rounds_us(calls: Sequence[Call]) -> float:
    """Microseconds of all calls, the median of several rounds."""
    found: list[float] = []
    while len(found) < LEAST_ROUNDS or sum(found) < ROUNDS_S * 1e6:
        start = time.perf_counter()
        for call in calls:
            call()
        found.append(1e6 * (time.perf_counter() - start))
    return median(found)
