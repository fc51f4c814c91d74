"""The headers of safetensors files: 8 bytes of length, JSON, then the tensors one after the other without gaps."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featherweight.errors import RequestError

# The format's names of dtypes that torch has.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard: where it lies, from which byte of the file on, and what it is, by the file's own name
    of its dtype."""

    shard: str
    start: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_entries(folder: Path, shard: str) -> dict[str, Entry]:
    """The tensors of one shard by name, from its header alone, checked against the size of the file.

    Raises RequestError for a header or file that is truncated or corrupt, with both numbers.
    """
    path = folder / shard
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= size - 8:
            raise RequestError(
                f"{path} is truncated or not safetensors: its header needs {length + 8} bytes, the file has {size}; "
                "download it again."
            )
        raw = file.read(length)
    try:
        fields = {name: value for name, value in json.loads(raw).items() if name != "__metadata__"}
        entries = {name: _entry(shard, 8 + length, value) for name, value in fields.items()}
        ends = _check_tiling(sorted(tuple(value["data_offsets"]) for value in fields.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path} has a corrupt header of {length} bytes ({error}): download it again.") from error
    if 8 + length + ends != size:
        raise RequestError(
            f"{path} is {'truncated' if size < 8 + length + ends else 'corrupt'}: its header says "
            f"{8 + length + ends} bytes, the file has {size}; download it again."
        )
    return entries


def _entry(shard: str, begin: int, fields: dict[str, Any]) -> Entry:
    shape = tuple(int(size) for size in fields["shape"])
    start, stop = (int(offset) for offset in fields["data_offsets"])
    dtype = str(fields["dtype"])
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != stop - start:
        raise ValueError(f"{stop - start} bytes for {dtype} of shape {list(shape)}")
    return Entry(shard, begin + start, dtype, shape, stop - start)


def _check_tiling(spans: list[tuple[int, ...]]) -> int:
    """Tensors lie one after the other from byte 0, without gaps; returns where the last one ends."""
    end = 0
    for start, stop in spans:
        if start != end or stop < start:
            raise ValueError(f"a tensor at bytes {start} to {stop} where the last one ended at {end}")
        end = stop
    return end
