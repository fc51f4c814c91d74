"""Experts that stay in the files and are fetched when tokens are sent to them; those used last are kept.

A mixture that is larger than the device, and larger than memory, runs so: what is held is everything but the experts,
and of these as many bytes as were asked for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

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


def nbytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
