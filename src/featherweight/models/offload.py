"""Experts that stay in the files and are fetched when tokens are sent to them; those used last are kept.

A mixture that is larger than the device, and larger than memory, runs so: what is held is everything but the experts,
and of these as many bytes as were asked for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Fetch = Callable[[], nn.Module]


@dataclass
class Shelf:
    """The experts of a model that are held at the moment, the one used last at the end.

    Attributes:
        limit_bytes: of all of them; the one that is being used is held whatever its size.
        held_bytes: what they take now.
        fetched: how many times one was fetched.
    """

    limit_bytes: int
    held_bytes: int = 0
    fetched: int = 0
    _held: OrderedDict[str, tuple[nn.Module, int]] = field(default_factory=OrderedDict)

    def get(self, name: str, fetch: Fetch) -> nn.Module:
        """The expert of this name, fetched if it is not held; those not used for longest make room."""
        if name not in self._held:
            expert = fetch()
            self.fetched += 1
            nbytes = nbytes_of(expert)
            while self._held and self.held_bytes + nbytes > self.limit_bytes:
                self.held_bytes -= self._held.popitem(last=False)[1][1]
            self._held[name] = expert, nbytes
            self.held_bytes += nbytes
        self._held.move_to_end(name)
        return self._held[name][0]


class Remote(nn.Module):
    """An expert in the files; it has no parameters until it is called, nor afterwards."""

    def __init__(self, name: str, shelf: Shelf, fetch: Fetch) -> None:
        super().__init__()
        self.name, self.shelf, self.fetch = name, shelf, fetch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.shelf.get(self.name, self.fetch)(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.name}, in the files"


class Apart(nn.Module):
    """An expert of a block that is being compressed: in the files, but while it is solved or called.

    Attributes:
        original: makes it of the original's files.
        compressed: makes it of what it has become; None before it is solved.
        undone: whether to answer as the original all the same.
    """

    def __init__(self, name: str, shelf: Shelf, original: Fetch) -> None:
        super().__init__()
        self.name, self.shelf, self.original = name, shelf, original
        self.compressed: Fetch | None = None
        self.undone = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.undone or self.compressed is None:
            return self.shelf.get(f"{self.name} as it was", self.original)(*args, **kwargs)
        return self.shelf.get(self.name, self.compressed)(*args, **kwargs)


@contextmanager
def taken_out(experts: nn.Module, numbers: Iterable[int]) -> Iterator[None]:
    """Some of a mixture's experts in memory, in the places of those that are apart; others are as they are."""
    apart = {str(n): module for n in numbers if isinstance(module := experts.get_submodule(str(n)), Apart)}
    for number, module in apart.items():
        experts.set_submodule(number, (module.compressed or module.original)())
    try:
        yield
    finally:
        for number, module in apart.items():
            experts.set_submodule(number, module)


def with_weights(original: Fetch, values: Mapping[str, Callable[[], Tensor]]) -> nn.Module:
    """An expert with other weights, by the paths of its matrices."""
    expert = original()
    for leaf, make in values.items():
        weight = expert.get_parameter(f"{leaf}.weight")
        weight.data = make().to(weight)
    return expert


def apart_in(module: nn.Module) -> dict[str, Apart]:
    """Experts that are apart, by their path."""
    return {path: child for path, child in module.named_modules() if isinstance(child, Apart)}


def nbytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
