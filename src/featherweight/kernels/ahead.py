"""Which matrix comes next: so that a launch can have its first bytes brought into the L2 cache.

While one token's attention runs, memory idles. Where a step is the same each time (a CUDA graph's), its products are
noted once, in order, and one with attention behind it is then told of the next. (Between products with little in
between it does not help: bench/results.) A hint: what is computed does not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

PIECE = 2048  # bytes: as in csrc/wna16.cu
NEAR_BYTES = 9 << 20
"""Of the next matrix: what an H100's memory gives in three microseconds, about as long as attention takes."""


@dataclass(frozen=True)
class Ahead:
    """What one launch brings near for the next: `pieces` of PIECE bytes at each of `places`, so many bytes `apart`.

    `left`: a warp asks for its share when so many of its own chunks are still to be multiplied; -1: never.
    """

    address: int | None = None
    left: int = -1
    places: int = 1
    pieces: int = 0
    apart: int = 0


NOTHING = Ahead()


def first_bytes(weights: Tensor, places: int, left: int) -> Ahead:
    """What a launch whose columns are split into `places` parts reads first; `left` is of the launch before."""
    apart = weights.nbytes // places // 16 * 16  # what is fetched begins where 16 bytes do
    pieces = min(NEAR_BYTES // places, apart) // PIECE
    return Ahead(weights.data_ptr(), left, places, pieces, apart)


@dataclass
class Order:
    """The products of a step, one after another, and where memory idles: noted in the first, told in those after it."""

    _products: list[tuple[Tensor, int]] = field(default_factory=list)
    _gaps: set[int] = field(default_factory=set)  # products behind which memory idles
    _noted: bool = False
    _at: int = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step. One that fails is noted again."""
        self._at = 0
        if not self._noted:
            self._products.clear()
            self._gaps.clear()
        before = _ORDER.set(self)
        try:
            yield
            self._noted = True
        finally:
            _ORDER.reset(before)

    def behind(self, weights: Tensor, places: int, stages: int) -> Ahead:
        """What to bring near during the next product of the step, which is by `weights`, split into `places` parts of
        the columns; a warp asks when all that it has still to multiply has been asked for, so many `stages`."""
        at, self._at = self._at, self._at + 1
        if not self._noted:
            self._products.append((weights, places))
            return NOTHING
        here = self._products[at : at + 2]
        if at not in self._gaps or len(here) < 2 or here[0][0].data_ptr() != weights.data_ptr():
            return NOTHING
        return first_bytes(*here[1], stages)

    def gap(self) -> None:
        """Behind the product of the step that was made last, memory idles."""
        if not self._noted:
            self._gaps.add(len(self._products) - 1)


_ORDER: ContextVar[Order | None] = ContextVar("order of products", default=None)


def behind(weights: Tensor, places: int, stages: int) -> Ahead:
    """`Order.behind` of the step that is being made; nothing outside of one."""
    order = _ORDER.get()
    return NOTHING if order is None else order.behind(weights, places, stages)


def gap() -> None:
    """`Order.gap` of the step that is being made."""
    order = _ORDER.get()
    if order is not None:
        order.gap()
