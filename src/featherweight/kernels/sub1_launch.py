"""Launches of `csrc/sub1.cu`: what shared memory holds, and the operators.

`featherweight::sub1_products` and `featherweight::sub1_dense` are what torch.compile and CUDA graphs see. They are
given a table of addresses, whose owner (`sub1_bank.Bank`) keeps what lies there alive.

Shapes: R outputs, C inputs, G groups, T tokens, E experts, M matrices of an expert, N pairs of a token and an expert.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from featherweight.codec.encoded import TILE_ROWS
from featherweight.native import nvrtc
from featherweight.native.launch import Module

MOST_TOKENS = 8  # of one expert, in one pass over its codes
USUAL_PAIRS, MOST_PAIRS, MOST_EXPERTS = 512, 1024, 1024  # that the kernel sorts by itself
PIECE = 16  # columns and columns of a group: a multiple of it
WIDTHS = range(3, 9)  # bits of a symbol that the kernel reads
STRIDES = (64, 32, 16)
MOST_WARPS = 16  # of a CTA
DENSE_WARPS, PITCH = 4, 33
ALIGNED = 128  # x: to all banks


class Params(ctypes.Structure):
    """The struct Params of csrc/sub1.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("matrices", "x", "experts_of", "y")),
        *((name, ctypes.c_int) for name in ("pairs", "choices", "experts", "parts", "rows", "columns")),
        *((name, ctypes.c_int) for name in ("at_stage", "at_x", "stage_bytes", "stages")),
    )


class DenseParams(ctypes.Structure):
    """The struct Dense of csrc/sub1_dense.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("matrices", "zeros", "y")),
        *((name, ctypes.c_int) for name in ("count", "rows", "columns", "groups", "first_row", "last_row")),
    )


@dataclass(frozen=True)
class Layout:
    """Shared memory of a launch, in bytes, and its warps.

    Attributes:
        at_stage, at_x: where the words of tiles and x begin; in front of them is the routing.
        bytes: of all.
        stages: tiles a warp holds: 2 where the next one is fetched meanwhile.
    """

    at_stage: int
    at_x: int
    bytes: int
    stage_bytes: int
    stages: int
    warps: int


def stride_of(experts: int, columns: int, stage_bytes: int, limit: int) -> int:
    """The widest stride with room for all warps beside the usual routing; else the narrowest.

    Wide strides hold more copies of x, which is fewer lanes at one bank; more warps are worth more (docs/log.md).
    """
    for stride in STRIDES:
        if lay_out(USUAL_PAIRS, experts, columns, stride, stage_bytes, limit).warps == MOST_WARPS:
            return stride
    return STRIDES[-1]


def lay_out(pairs: int, experts: int, columns: int, stride: int, stage_bytes: int, limit: int) -> Layout:
    """Room for as many warps as there can be, then for a second tile of each; 0 warps: no room."""
    at_stage = up(8 * up(pairs, 4) + 8 * (experts + 1), 16)
    room = limit - at_stage - columns * stride - ALIGNED
    warps = max(0, min(MOST_WARPS, room // stage_bytes))
    stages = 2 if warps and room >= 2 * warps * stage_bytes else 1
    at_x = up(at_stage + warps * stages * stage_bytes, ALIGNED)
    return Layout(at_stage, at_x, at_x + columns * stride, stage_bytes, stages, warps)


def up(number: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
    return -(-number // multiple) * multiple


@cache
def module_of(device: torch.device, dtype: torch.dtype, stride: int, codes: int) -> Module:
    """csrc/sub1.cu compiled (or from the cache) and loaded. Raises CompileError."""
    properties = torch.cuda.get_device_properties(device)
    macros = (f"BF16={int(dtype == torch.bfloat16)}", f"STRIDE={stride}", f"CODES={codes}")
    module = Module(device, nvrtc.cubin("kernels/sub1", macros, nvrtc.arch(properties.major, properties.minor)))
    module.function("sub1_products", block_bytes(device))
    module.function("sub1_dense", block_bytes(device))
    return module


def block_bytes(device: torch.device) -> int:
    """Shared memory that a CTA can have."""
    found: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return found


@cache
def register() -> torch.library.Library:
    """Make the operators known to torch, once; the library must stay alive."""
    library = torch.library.Library("featherweight", "FRAGMENT")
    library.define(
        "sub1_products(Tensor x, Tensor experts_of, Tensor table, int choices, int rows, int codes, int stride,"
        " int stage_bytes) -> Tensor"
    )
    library.define(
        "sub1_dense(Tensor table, Tensor? zeros, ScalarType dtype, int rows, int columns, int groups, int first,"
        " int last) -> Tensor"
    )
    library.impl("sub1_products", _products, "CUDA")
    library.impl("sub1_dense", _dense, "CUDA")
    torch.library.register_fake("featherweight::sub1_products", _products_shape, lib=library)
    torch.library.register_fake("featherweight::sub1_dense", _dense_shape, lib=library)
    return library


def _products(
    x_TC: Tensor, expert_N: Tensor, table: Tensor, choices: int, rows: int, codes: int, stride: int, stage_bytes: int
) -> Tensor:
    experts, matrices = table.shape[:2]
    y_NMR = x_TC.new_empty(len(expert_N), matrices, rows)
    if not len(expert_N):
        return y_NMR
    properties = torch.cuda.get_device_properties(x_TC.device)
    columns = x_TC.shape[1]
    layout = lay_out(len(expert_N), experts, columns, stride, stage_bytes, block_bytes(x_TC.device))
    assert layout.warps and len(expert_N) <= MOST_PAIRS and experts <= MOST_EXPERTS, (layout, expert_N.shape)
    params = Params(
        *(each.data_ptr() for each in (table, x_TC, expert_N, y_NMR)),
        *(len(expert_N), choices, experts, matrices, rows, columns),
        *(layout.at_stage, layout.at_x, layout.stage_bytes, layout.stages),
    )
    with torch.cuda.device(x_TC.device):
        module = module_of(x_TC.device, x_TC.dtype, stride, codes)
        processors = properties.multi_processor_count
        early = properties.major >= 9
        module.launch("sub1_products", processors, layout.warps * 32, layout.bytes, params, cluster=0, early=early)
    return y_NMR


def _dense(
    table: Tensor, zeros_RG: Tensor | None, dtype: torch.dtype, rows: int, columns: int, groups: int, *piece: int
) -> Tensor:
    first, last = piece
    y_RC = torch.empty(last - first, columns, dtype=dtype, device=table.device)
    zeros = None if zeros_RG is None else zeros_RG.data_ptr()
    params = DenseParams(table.data_ptr(), zeros, y_RC.data_ptr(), 1, rows, columns, groups, first, last)
    each = columns // PIECE * PITCH * 4  # bytes of shared memory a warp takes
    with torch.cuda.device(table.device):
        warps = min(DENSE_WARPS, block_bytes(table.device) // each)
        assert warps, f"{columns} columns are too many"
        module = module_of(table.device, dtype, STRIDES[-1], 1)
        blocks = -(-(last - first) // (TILE_ROWS * warps))
        module.launch("sub1_dense", blocks, warps * 32, warps * each, params, cluster=0, early=False)
    return y_RC


def _products_shape(
    x_TC: Tensor, expert_N: Tensor, table: Tensor, choices: int, rows: int, codes: int, stride: int, stage_bytes: int
) -> Tensor:
    return x_TC.new_empty(expert_N.shape[0], table.shape[1], rows)


def _dense_shape(
    table: Tensor, zeros_RG: Tensor | None, dtype: torch.dtype, rows: int, columns: int, groups: int, *piece: int
) -> Tensor:
    return table.new_empty(piece[1] - piece[0], columns, dtype=dtype)
