"""What a pass over hidden states makes of them, brought back to memory or disk while the next batch is computed.

Shapes: S sequences, T tokens, D width.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType

import torch
from torch import Tensor

ROOM = 3  # batches on their way back


class Back:
    """Writes batches from a GPU into S x T x D states that lie elsewhere; all are there when its block is left."""

    def __init__(self, states_STD: Tensor, device: torch.device) -> None:
        self.states_STD, self.device = states_STD, device
        self.pool = ThreadPoolExecutor(ROOM)
        self.rooms: SimpleQueue[_Room] = SimpleQueue()
        for _ in range(ROOM):
            self.rooms.put(_Room(device))
        self.jobs: list[Future[None]] = []

    def __enter__(self) -> Back:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pool.shutdown()
        for job in self.jobs:
            job.result()

    def put(self, at: slice, value_STD: Tensor) -> None:
        """Has a batch written; waits where ROOM of them are on their way."""
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self.device))
        self.jobs.append(self.pool.submit(self._write, self.rooms.get(), at, value_STD, computed))

    def _write(self, room: _Room, at: slice, value_STD: Tensor, computed: torch.cuda.Event) -> None:
        try:
            to_STD = self.states_STD[at]
            held_STD = to_STD if to_STD.is_pinned() else room.held(value_STD)
            with torch.cuda.stream(room.stream):
                room.stream.wait_event(computed)
                held_STD.copy_(value_STD, non_blocking=True)
            room.stream.synchronize()
            if held_STD is not to_STD:
                for place, sequence_TD in enumerate(held_STD):
                    to_STD[place].copy_(sequence_TD)
        finally:
            self.rooms.put(room)


class _Room:
    """A stream, and pinned memory for a batch where it is needed."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pinned_STD: Tensor | None = None

    def held(self, like_STD: Tensor) -> Tensor:
        if self.pinned_STD is None or len(self.pinned_STD) < len(like_STD):
            self.pinned_STD = torch.empty(like_STD.shape, dtype=like_STD.dtype, pin_memory=True)
        return self.pinned_STD[: len(like_STD)]
