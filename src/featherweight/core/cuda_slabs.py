"""Launches of `csrc/slabs.cu`: the column loops of the solvers on NVIDIA GPUs, several times as fast as Triton's.

Imported by `fused` alone, and only where there is a GPU. Shapes: E layers, C columns, R rows.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from featherweight.native import nvrtc
from featherweight.native.launch import Module

OLDEST = (8, 0)
TILE, CHUNK, STAGES = 32, 8, 4  # of slabs.cu
WARPS, FEW_WARPS = 8, 4  # of a CTA; the latter where memory is short (GPUs for games have 99 KB)
SIZES = ("rows", "all_columns", "groups", "start", "columns", "bottom", "top")
ALIGNED = 16  # bytes that are copied at once, where they begin at a multiple
_LOCKS: dict[tuple[int, int], Lock] = defaultdict(Lock)


class Params(ctypes.Structure):
    """The struct Params of csrc/slabs.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("given", "matrix", "scale", "zero", "group", "keep", "value", "price")),
        *((name, ctypes.c_void_p) for name in ("delta", "found", "codes", "total")),
        *((name, ctypes.c_int) for name in (*SIZES, "blocks", "aligned")),
    )


@dataclass(frozen=True)
class Plan:
    """How a slab is shared out: rows and warps of a CTA, its shared memory, and the CTAs of a layer."""

    rows: int
    warps: int
    bytes: int
    blocks: int


@cache
def plan(layers: int, rows: int, columns: int, processors: int, limit: int) -> Plan | None:
    """Few rows a CTA where all multiprocessors have some even so; None where a slab's errors do not fit into one."""
    few = layers * -(-rows // 16) <= processors
    for each, warps in (*((n, WARPS) for n in ((16, 32) if few else (32, 16))), (16, FEW_WARPS)):
        found = Plan(each, warps, shared_bytes(each, warps, columns), -(-rows // each))
        if found.bytes <= limit:
            return found
    return None


def shared_bytes(rows: int, warps: int, columns: int) -> int:
    """What a CTA holds, as slabs.cu lays it out: two tiles, their rows of the matrix, rings or sums, and the errors."""
    tiles = -(-columns // TILE)
    two = 2 * TILE * (rows * 7 + TILE + 4)
    ring = warps * max(STAGES * CHUNK * TILE, TILE * (rows + 4))
    return 4 * (two + TILE * TILE + ring + tiles * TILE * (rows + 1))


@cache
def limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a CTA can have. Raises CompileError where the GPU is too old."""
    refusal = nvrtc.device_refusal(device, OLDEST)
    if refusal or torch.version.hip:
        raise nvrtc.CompileError(f"slabs.cu cannot run: {refusal or 'it is for NVIDIA GPUs'}.")
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


def module_of(device: torch.device, rows: int, warps: int) -> Module:
    """csrc/slabs.cu compiled (or from the cache) and loaded; threads that want the same wait for the first of them.
    Raises CompileError."""
    with _LOCKS[rows, warps]:
        return _module_of(device, rows, warps)


@cache
def _module_of(device: torch.device, rows: int, warps: int) -> Module:
    properties = torch.cuda.get_device_properties(device)
    macros = (f"ROWS={rows}", f"WARPS={warps}")
    module = Module(device, nvrtc.cubin("core/slabs", macros, nvrtc.arch(properties.major, properties.minor)))
    for name in ("sweep_slab", "descend_slab", "descend_slab_priced"):
        module.function(name, limits(device)[1])
    return module


def params(tensors: dict[str, Tensor | None], sizes: Sequence[int], chosen: Plan) -> Params:
    """What a kernel is told; the tensors have to stay alive."""
    matrix = tensors["matrix"]
    assert matrix is not None and all(tensor is None or tensor.is_contiguous() for tensor in tensors.values())
    found = Params(blocks=chosen.blocks, **dict(zip(SIZES, sizes, strict=True)))
    found.aligned = matrix.data_ptr() % ALIGNED == 0 and all(
        4 * n % ALIGNED == 0 for n in (found.all_columns, found.start)
    )
    for name, tensor in tensors.items():
        setattr(found, name, None if tensor is None else tensor.data_ptr())
    return found


def launch(name: str, tensors: dict[str, Tensor | None], sizes: Sequence[int], chosen: Plan) -> None:
    """Runs a kernel over all rows and layers. Raises CompileError.

    `tensors` are Params' pointers by their names, None where there is none; `sizes` its numbers as SIZES names them.
    """
    given = tensors["given"]
    assert given is not None
    told = params(tensors, sizes, chosen)
    with torch.cuda.device(given.device):
        module = module_of(given.device, chosen.rows, chosen.warps)
        blocks, threads = chosen.blocks * len(given), chosen.warps * 32
        module.launch(name, blocks, threads, chosen.bytes, told, cluster=0, early=False)
