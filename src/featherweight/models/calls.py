"""What a block is called with besides the hidden states, whatever the family: recorded, cleaned and compared.

Shapes: S sequences, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MEMORY = object()
"""In a call, the place of what a decoder's encoder returned."""


@dataclass(frozen=True)
class Call:
    """What one block was called with: everything but the hidden states, and what an encoder returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: bool

    def __call__(self, block: nn.Module, hidden: Tensor, memory: Tensor | None = None) -> Any:
        args = [memory if value is MEMORY else value for value in self.args]
        kwargs = {name: memory if value is MEMORY else value for name, value in self.kwargs.items()}
        return block(*args, hidden_states=hidden, **kwargs) if self.keyword else block(hidden, *args, **kwargs)


@dataclass(frozen=True)
class Recording:
    """The hidden states in front of the first block, and every block's call."""

    hidden_STD: Tensor
    calls: tuple[Call, ...]


def clean_call(args: tuple[Any, ...], kwargs: dict[str, Any], keyword: bool) -> Call:
    """A call without caches: they would grow with every batch."""

    def clean(value: Any) -> Any:
        return None if hasattr(value, "get_seq_length") else value

    return Call(tuple(map(clean, args)), {name: clean(value) for name, value in kwargs.items()}, keyword)


def same(one: Any, other: Any) -> bool:
    """Whether two nests of arguments are equal, tensors by value."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Call):
        return same((one.args, one.kwargs), (other.args, other.kwargs))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return True
