"""What processes send each other, as bytes: a text and the small tensors that go along with it, and large ones."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Kinds = list[tuple[str, Sequence[int], str]]  # the dtypes, shapes and devices of tensors
SMALL_BYTES = {"cpu": 1 << 16, "cuda": 1 << 26}  # what is copied to be sent with others: a message takes longer
RIDING_BYTES = 1 << 18  # of a tensor on the CPU that goes along with a text
LENGTH_BYTES = 8  # of a message's text, and of what goes along with it
FIRST_BYTES = {"cpu": 1 << 14, "cuda": 1 << 17}  # of what all send before they know how much each has to say


def kinds_of(tensors: Sequence[Tensor]) -> Kinds:
    """What has to be known to receive tensors."""
    return [(str(t.dtype).removeprefix("torch."), t.shape, t.device.type) for t in tensors]


def rides(kind: tuple[str, Sequence[int], str]) -> bool:
    """Whether a tensor goes along with a text: one on the CPU that is not large."""
    dtype, shape, on = kind
    return on == "cpu" and math.prod(shape) * getattr(torch, dtype).itemsize <= RIDING_BYTES


def framed(said: Any, riding: Sequence[Tensor], first_bytes: int) -> tuple[Tensor, Tensor]:
    """A JSON value and tensors as a first message of one size for all, which begins with how many bytes there are in
    all and of the value, and what does not fit in."""
    text, held = json.dumps(said).encode(), bytes_of(riding)
    size = max(2 * LENGTH_BYTES + len(text) + len(held), first_bytes)
    lengths = size.to_bytes(LENGTH_BYTES, "little") + len(text).to_bytes(LENGTH_BYTES, "little")
    whole = torch.frombuffer(bytearray((lengths + text).ljust(size)), dtype=torch.uint8)
    whole[len(lengths) + len(text) :][: len(held)] = held
    return whole[:first_bytes], whole[first_bytes:]


def length_of(first: Tensor) -> int:
    """How many bytes a message has in all, of which this is the first part."""
    return int.from_bytes(first[:LENGTH_BYTES].numpy().tobytes(), "little")


def unframed(first: Tensor, more: Tensor) -> tuple[Any, Tensor]:
    """What `framed` was given, the tensors as bytes; behind both there may be bytes that are nobody's."""
    begin = 2 * LENGTH_BYTES
    end = begin + int.from_bytes(first[LENGTH_BYTES:begin].numpy().tobytes(), "little")
    whole = torch.cat([first, more])
    return json.loads(whole[begin:end].numpy().tobytes()), whole[end:]


def bytes_of(tensors: Sequence[Tensor]) -> Tensor:
    """Contiguous tensors one behind the other (not every backend has bools); one alone is not copied."""
    parts = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def copy_apart(bytes_N: Tensor, tensors: Sequence[Tensor]) -> None:
    """Fills tensors with bytes that `bytes_of` has put one behind the other; more may follow."""
    at = 0
    for tensor in tensors:
        tensor.view(-1).view(torch.uint8).copy_(bytes_N[at : at + tensor.nbytes])
        at += tensor.nbytes


def bundles(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors that are sent together: the small ones of a device, of which a block of experts has a thousand."""
    small: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.nbytes <= SMALL_BYTES[tensor.device.type]:
            small.setdefault(tensor.device.type, []).append(tensor)
    large = ([tensor] for tensor in tensors if tensor.nbytes > SMALL_BYTES[tensor.device.type])
    return [*small.values(), *large]
