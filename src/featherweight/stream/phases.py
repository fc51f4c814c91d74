"""Where the time goes, by phase, without making the device wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

REST = "other"  # what lies in no phase


class Phases:
    """Seconds by phase of one stretch of work after the other.

    On a GPU a mark is an event in the stream of its work, so what is counted is when the device came by, and nobody
    waits until the seconds are asked for. Phases may lie in one another: the inner one alone counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._name = REST
        self._marks: list[tuple[float | torch.cuda.Event, str]] = []
        self._mark()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """What is done meanwhile counts as `name`."""
        outer, self._name = self._name, name
        self._mark()
        try:
            yield
        finally:
            self._name = outer
            self._mark()

    def stretch(self) -> Stretch:
        """The stretch since the last one, or the beginning."""
        self._mark()
        marks, self._marks = self._marks, self._marks[-1:]
        return Stretch(marks)

    def skip(self) -> None:
        """What was done since the last mark counts as nothing: it is counted elsewhere."""
        self._marks.pop()
        self._mark()

    def _mark(self) -> None:
        moment: float | torch.cuda.Event = time.perf_counter()
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record(torch.cuda.current_stream(self.device))
        self._marks.append((moment, self._name))


class Stretch:
    """Marks, and what came after each of them up to the next."""

    def __init__(self, marks: list[tuple[float | torch.cuda.Event, str]]) -> None:
        self.marks = marks

    def wait(self) -> None:
        """Returns when the device has done the stretch."""
        end = self.marks[-1][0]
        if isinstance(end, torch.cuda.Event):
            end.synchronize()

    def seconds(self) -> dict[str, float]:
        """By phase; waits until the device has done the stretch."""
        found: dict[str, float] = {}
        for (begin, name), (end, _) in zip(self.marks, self.marks[1:], strict=False):
            if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                end.synchronize()
                took = begin.elapsed_time(end) / 1000
            else:
                assert isinstance(begin, float) and isinstance(end, float)
                took = end - begin
            found[name] = found.get(name, 0.0) + took
        return found


def added(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """The sums, phase by phase."""
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}
