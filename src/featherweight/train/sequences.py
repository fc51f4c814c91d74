"""What a block is trained on, brought to the device while the step before is still running.

Shapes: S sequences, T tokens, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

AHEAD = 4  # batches on their way from memory or disk
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sequences:
    """What a block is fed and what it is to answer, S x T x D each, on the device, in memory or on disk; the last
    `held_out` sequences are the held-out ones."""

    inputs_STD: Tensor
    targets_STD: Tensor
    held_out: int
    device: torch.device

    @property
    def training(self) -> int:
        """How many sequences are trained on."""
        return self.inputs_STD.shape[0] - self.held_out

    def take(self, at_S: Tensor) -> Pair:
        """Inputs and targets of these sequences (int64, on the CPU) on the device."""
        inputs_STD, targets_STD = (states[at_S.to(states.device)] for states in (self.inputs_STD, self.targets_STD))
        return inputs_STD.to(self.device, non_blocking=True), targets_STD.to(self.device, non_blocking=True)

    def batches(self, picks: Sequence[Tensor]) -> Iterator[Pair]:
        """`take` of every pick, in order; each pair holds until the next is asked for."""
        if self.device.type != "cuda" or (self.inputs_STD.is_cuda and self.targets_STD.is_cuda):
            yield from map(self.take, picks)
        else:
            for pair in ahead((self.inputs_STD, self.targets_STD), picks, self.device):
                yield pair[0], pair[1]


def ahead(states: tuple[Tensor, ...], picks: Sequence[Tensor], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Of every pick the sequences of all `states` on a GPU, in order; each holds until the next is asked for.

    Threads wait for memory and disk, streams of their own copy to the device. One thread moves some 5 GB/s out of a
    mapped file, and a 7B block's step takes 6.6.
    """
    if not picks:
        return
    largest = max(len(at_S) for at_S in picks)
    slots = [_Slot(states, largest, device) for _ in range(min(AHEAD, len(picks)))]
    waiting: deque[Future[tuple[Tensor, ...]]] = deque()
    with ThreadPoolExecutor(len(slots)) as pool:
        for number, at_S in enumerate(picks[: len(slots)]):
            waiting.append(pool.submit(slots[number].fetch, at_S))
        for number in range(len(picks)):
            slot = slots[number % len(slots)]
            found = waiting.popleft().result()
            torch.cuda.current_stream(device).wait_event(slot.filled)
            yield found
            slot.used.record(torch.cuda.current_stream(device))
            if (later := number + len(slots)) < len(picks):
                waiting.append(pool.submit(slot.fetch, picks[later]))


class _Slot:
    """Room for one batch on the device, and in pinned memory for what lies in memory that is not."""

    def __init__(self, states: tuple[Tensor, ...], batch: int, device: torch.device) -> None:
        self.states, self.stream = states, torch.cuda.Stream(device)
        self.there = [torch.empty(batch, *s.shape[1:], dtype=s.dtype, device=device) for s in states]
        self.pinned = [
            None if s.is_cuda or s.is_pinned() else torch.empty(batch, *s.shape[1:], dtype=s.dtype, pin_memory=True)
            for s in states
        ]
        self.filled, self.used = torch.cuda.Event(), torch.cuda.Event()
        self.used.record(torch.cuda.current_stream(device))

    def fetch(self, at_S: Tensor) -> tuple[Tensor, ...]:
        """Brings these sequences to the device, in the slot's stream; `filled` tells when they are there."""
        self.filled.synchronize()  # the pinned memory is read until then
        for states, pinned in zip(self.states, self.pinned, strict=True):
            if pinned is not None:
                _gather(states, at_S, pinned)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.used)
            for states, pinned, there in zip(self.states, self.pinned, self.there, strict=True):
                if pinned is None:
                    _gather(states, at_S, there)
                else:
                    there.copy_(pinned, non_blocking=True)
            self.filled.record(self.stream)
        return tuple(there[: len(at_S)] for there in self.there)


def _gather(states: Tensor, at_S: Tensor, to: Tensor) -> None:
    """Sequence by sequence: each lies in one piece, which is copied by all threads, or by the device itself."""
    for place, number in enumerate(at_S.tolist()):
        to[place].copy_(states[number], non_blocking=True)
