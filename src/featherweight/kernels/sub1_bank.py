"""Entropy-coded ternary matrices as `csrc/sub1.cu` finds them, and its launches.

What is kept beside a matrix's own tensors is where its rows start, 32 bits a row. The operators
`featherweight::sub1_products` and `featherweight::sub1_dense` are what torch.compile and CUDA graphs see. They are
given a table of addresses, whose owner (`Bank`) keeps what lies there alive.

Shapes: R outputs, C inputs, G groups, T tokens (any leading axes), E experts, M matrices of an expert, N pairs of a
token and an expert.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from featherweight.codec import Encoded, check, decode, encode
from featherweight.codec.encoded import KINDS, TILE_ROWS
from featherweight.formats import Sub1
from featherweight.formats.base import THE_MATRIX
from featherweight.kernels import nvrtc
from featherweight.kernels.launch import Module

MOST_TOKENS = 8  # of one expert, in one pass over its codes
USUAL_PAIRS, MOST_PAIRS, MOST_EXPERTS = 512, 1024, 1024  # that the kernel sorts by itself
PIECE = 16  # columns and columns of a group: a multiple of it
WIDTHS = range(3, 9)  # bits of a symbol that the kernel reads
STRIDES = (64, 32, 16)
MOST_WARPS, FEWEST_WARPS = 16, 4  # of a CTA; with fewer, weights made floats are faster
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
    at_stage = _up(8 * _up(pairs, 4) + 8 * (experts + 1), 16)
    room = limit - at_stage - columns * stride - ALIGNED
    warps = max(0, min(MOST_WARPS, room // stage_bytes))
    stages = 2 if warps and room >= 2 * warps * stage_bytes else 1
    at_x = _up(at_stage + warps * stages * stage_bytes, ALIGNED)
    return Layout(at_stage, at_x, at_x + columns * stride, stage_bytes, stages, warps)


@dataclass(frozen=True)
class Bank:
    """Matrices of one shape on a GPU, M of each expert, as the kernel finds them.

    Attributes:
        table: int64 of shape (E, M, 4): addresses of words, row starts and scales, then kind and bits.
        codes: bit b: runs of b bits occur; bit 0: bitmaps.
        stride: bytes from a column of x to the next in shared memory.
        stage_bytes: of the largest tile.
        held: what the table points to.
    """

    table: Tensor
    rows: int
    columns: int
    codes: int
    stride: int
    stage_bytes: int
    held: tuple[Tensor, ...]

    @classmethod
    def of(cls, matrices: Sequence[Sequence[Entry]]) -> Bank:
        """E times M entries, all of one shape on one device."""
        first = matrices[0][0]
        flat = [entry for row in matrices for entry in row]
        assert all((entry.rows, entry.columns) == (first.rows, first.columns) for entry in flat)
        table = torch.tensor([[entry.row() for entry in row] for row in matrices], dtype=torch.int64)
        codes = 0
        for entry in flat:
            codes |= 1 << (entry.encoded.header.bits if entry.encoded.header.kind == "runs" else 0)
        held = tuple(tensor for entry in flat for tensor in entry.tensors())
        most = max(entry.stage_bytes for entry in flat)
        device = first.starts_R.device
        stride = stride_of(len(matrices), first.columns, most, block_bytes(device))
        return cls(table.to(device), first.rows, first.columns, codes, stride, most, held)

    def products(self, x_TC: Tensor, expert_N: Tensor, choices: int) -> Tensor:
        """V x for every pair: N x M x R. Pair n is of token n // choices and expert expert_N[n] (int64); those of no
        expert (below 0, E or more) are left unwritten."""
        register()
        y: Tensor = torch.ops.featherweight.sub1_products(
            x_TC.contiguous(), expert_N, self.table, choices, self.rows, self.codes, self.stride, self.stage_bytes
        )
        return y


@dataclass(frozen=True)
class Entry:
    """One matrix on a GPU.

    Attributes:
        starts_R: int32, the word each row starts with, R + 1.
        scales_RG: float16 or bfloat16.
    """

    encoded: Encoded
    starts_R: Tensor
    scales_RG: Tensor

    @classmethod
    def of(cls, encoded: Encoded, scales_RG: Tensor) -> Entry:
        return cls(encoded, encoded.row_offsets.to(torch.int32), scales_RG.contiguous())

    @property
    def rows(self) -> int:
        return self.encoded.header.rows

    @property
    def columns(self) -> int:
        return self.encoded.header.columns

    @property
    def stage_bytes(self) -> int:
        """Bytes that hold the words of any tile, from a multiple of 16 bytes on."""
        edges = torch.cat((self.starts_R[:-1:TILE_ROWS], self.starts_R[-1:]))
        return 4 * _up(int(edges.diff().max()) + 3, 4)

    @property
    def device(self) -> torch.device:
        return self.starts_R.device

    def tensors(self) -> tuple[Tensor, ...]:
        return self.encoded.stream_N, self.starts_R, self.scales_RG

    def row(self) -> list[int]:
        """Its row of a table: the struct Matrix of csrc/sub1.cu."""
        header = self.encoded.header
        order = sum(level << 2 * place for place, level in enumerate(header.levels))
        kind = KINDS.index(header.kind) | order << 8 | header.values << 16
        kind |= (self.scales_RG.dtype == torch.bfloat16) << 30 | (header.levels[1:2] == (3,)) << 31
        return [*(tensor.data_ptr() for tensor in self.tensors()), kind | header.bits << 32]


def entry_of(format: Sub1, tensors: Mapping[str, Tensor], name: str = THE_MATRIX) -> Entry:
    """A matrix as the fused kernel reads it; what it cannot read is encoded again as a bitmap, and has the same codes.

    Raises RequestError where a checksum does not hold.
    """
    encoded = format.encoded(tensors, name)
    check(encoded, name)
    header = encoded.header
    ternary = header.levels[0] == 0 and set(header.levels) <= {0, 1, 3}
    runs = header.kind == "runs" and header.bits in WIDTHS and len(header.levels) == 3
    if ternary and not runs and header.kind != "bitmap":
        encoded = moved(encode(decode(encoded, name), ("bitmap",)), tensors["weight_scale"].device)
    return Entry.of(encoded, tensors["weight_scale"])


def moved(encoded: Encoded, device: torch.device) -> Encoded:
    """The same on another device."""
    lengths = None if encoded.row_words_R is None else encoded.row_words_R.to(device)
    return Encoded(encoded.header, encoded.stream_N.to(device), lengths, encoded.checksums_K.to(device))


def fused(entry: Entry) -> bool:
    """Whether the kernel multiplies by this matrix as it is."""
    header = entry.encoded.header
    layout = lay_out(
        MOST_PAIRS, MOST_EXPERTS, header.columns, STRIDES[-1], entry.stage_bytes, block_bytes(entry.device)
    )
    whole = header.kind == "bitmap" or (header.kind == "runs" and header.bits in WIDTHS and header.values == 2)
    return (
        whole
        and header.levels[0] == 0
        and set(header.levels) <= {0, 1, 3}
        and entry.scales_RG.shape[1] == 1
        and layout.warps >= FEWEST_WARPS
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# ---- the operators ---------------------------------------------------------------------------------------------------
@cache
def module_of(device: torch.device, dtype: torch.dtype, stride: int, codes: int) -> Module:
    """csrc/sub1.cu compiled (or from the cache) and loaded. Raises CompileError."""
    properties = torch.cuda.get_device_properties(device)
    macros = (f"BF16={int(dtype == torch.bfloat16)}", f"STRIDE={stride}", f"CODES={codes}")
    module = Module(device, nvrtc.cubin("sub1", macros, nvrtc.arch(properties.major, properties.minor)))
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
