"""Work that is done beside the solver: shards written in the order they were made, the next block's tensors read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

WAITING = 3  # jobs that may wait for the one at work: each holds a packed block, and disks have slow moments
Made = TypeVar("Made")


class Writer:
    """Runs jobs one after the other on a thread of its own.

    An error of a job comes out of the next `put` or of the end of the `with`, and no job after it is begun. What was
    put before an error of the caller's own is still done: it is finished work. Not `beside`, each job is done when it
    is put: where one core more or less counts, nothing is gained by a thread.
    """

    def __init__(self, beside: bool) -> None:
        self._thread = ThreadPoolExecutor(1, "writer") if beside else None
        self._other = ThreadPoolExecutor(1, "writer of what is long") if beside else None
        self._jobs: deque[Future[None]] = deque()
        self._aside: list[Future[None]] = []
        self._failed = False

    def put(self, job: Callable[[], None]) -> None:
        """Hands a job over; waits while more than WAITING of those before it are not done."""
        if self._thread is None:
            job()
            return
        self._settle(WAITING)
        self._jobs.append(self._thread.submit(self._run, job))

    def put_aside(self, job: Callable[[], None]) -> None:
        """Hands over a long job that those put later need not wait for."""
        if self._other is None:
            job()
            return
        self._aside.append(self._other.submit(self._run, job))

    def wait(self) -> None:
        """Returns when all is done."""
        self._settle(0)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for thread in (self._thread, self._other):
            if thread is not None:
                thread.shutdown(wait=True)
        if kind is None:
            self._settle(0)

    def _settle(self, left: int) -> None:
        while len(self._jobs) > left:
            self._jobs.popleft().result()
        for job in [job for job in self._aside if left == 0 or job.done()]:
            self._aside.remove(job)
            job.result()

    def _run(self, job: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            job()
        except BaseException:
            self._failed = True
            raise


class Ahead(Generic[Made]):
    """Makes what will be asked for next on a thread of its own, by number; not `beside`, when it is asked for."""

    def __init__(self, make: Callable[[int], Made], count: int, beside: bool, first: int = 0) -> None:
        """Of the numbers 0 .. count - 1, `first` is asked for first, and begun at once."""
        self._make, self._count = make, count
        self._thread = ThreadPoolExecutor(1, "reader") if beside else None
        self._next: tuple[int, Future[Made]] | None = None
        self._begin(first)

    def take(self, number: int) -> Made:
        """What `make(number)` gives; the number after it is begun."""
        waiting, self._next = self._next, None
        found = waiting[1].result() if waiting is not None and waiting[0] == number else self._make(number)
        self._begin(number + 1)
        return found

    def _begin(self, number: int) -> None:
        if self._thread is not None and number < self._count:
            self._next = (number, self._thread.submit(self._make, number))

    def __enter__(self) -> Ahead[Made]:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
