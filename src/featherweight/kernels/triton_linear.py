"""Codes of 2 to 8 bits by 16-bit activations on any GPU that Triton compiles for: NVIDIA from Ampere on, and AMD.

Few tokens share the columns among splits, whose sums a second launch adds up; more go tile by tile; and from
`DENSE_ABOVE` tokens on weights are made floats for the length of the call, one layer at a time.

The operator `featherweight::triton_linear` is what torch.compile and CUDA graphs see. Triton itself is imported at the
first product: on a machine without a GPU only its interpreter can run one.

Shapes: R outputs, C inputs, G groups, T tokens (any leading axes); words as `triton_products` has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.formats import parts
from featherweight.formats.base import Format, Rule, Solution
from featherweight.kernels.base import Case, Kernel, Run, require_input, require_no_backward

DTYPES = (torch.float16, torch.bfloat16)
OLDEST = (8, 0)
PLANE = 16  # columns whose codes are the same field of PLANE words
ROWS = 64  # of a tile; rows are padded to whole ones
DENSE_ABOVE = 64
"""Tokens above which weights are made floats first: two tiles of tokens take longer than that and the library's product
(4096 x 12288 on an H100: 50 us a tile, 40 to make floats, 40 to multiply)."""
CTAS_PER_PROCESSOR = 4
WARPS, STAGES = 4, 3
WORD_BITS = 32


@dataclass(frozen=True)
class Packed:
    """A matrix in the order of `triton_products`: words_KR, scales_GR and zeros_GR, and what the operator is told."""

    words_KR: Tensor
    scales_GR: Tensor
    zeros_GR: Tensor | None
    rows: int
    width: int
    bits: int


@dataclass(frozen=True)
class TritonLinear(Kernel):
    """Weights stay packed in the GPU's memory, repacked once; 3, 5 and 6 bits take 3.2, 5.3 and 6.4, and 7 take 8."""

    name: str = "triton"

    def refusal(self, case: Case) -> str | None:
        grid, pattern = parts(case.rule)
        if grid is None:
            return f"it multiplies by codes, and the weights are floats, pruned ({pattern})"
        if case.device.type != "cuda":
            return f"it runs on GPUs, and the layer is on {case.device.type}"
        if case.dtype not in DTYPES:
            return f"it takes {' or '.join(map(str, DTYPES))}, and the activations are {case.dtype}"
        if grid.group_size is not None and grid.group_size % PLANE and grid.group_size < case.columns:
            return f"it needs groups of a multiple of {PLANE}, and they have {grid.group_size}"
        return _device_refusal(case.device)

    def prepare(self, format: Format, rule: Rule, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Run:
        solution = format.unpack(tensors, rule)
        assert isinstance(solution, Solution)
        columns, packed = solution.codes_RC.shape[1], pack(solution)
        register()

        def run(x_TC: Tensor, bias_R: Tensor | None) -> Tensor:
            require_no_backward(self.name, x_TC)
            require_input(x_TC, columns, dtype, packed.words_KR.device)
            return call(x_TC, packed, bias_R)

        if packed.words_KR.is_cuda:  # compiled now, not in the first call, which may be captured into a graph
            run(torch.zeros(1, columns, dtype=dtype, device=packed.words_KR.device), None)
        return run


def pack(solution: Solution) -> Packed:
    """The words of a solution; rows are padded to whole tiles and columns to whole blocks, by codes that meet no x."""
    codes_RC, bits = solution.codes_RC, solution.grid.stored_bits
    (rows, columns), fields = codes_RC.shape, WORD_BITS // bits
    more_rows = -rows % ROWS
    codes_RC = functional.pad(codes_RC, (0, -columns % _block(bits), 0, more_rows))
    fields_RBFK = codes_RC.unflatten(1, (-1, fields, PLANE))
    words_RBK = torch.zeros_like(fields_RBFK[:, :, 0], dtype=torch.int32)
    for field in range(fields):
        words_RBK |= fields_RBFK[:, :, field].to(torch.int32) << field * bits
    scales_GR, zeros_GR = (
        functional.pad(each.T, (0, more_rows)).contiguous() for each in (solution.scales_RG, solution.zeros_RG)
    )
    width = columns // len(scales_GR)
    return Packed(
        words_RBK.flatten(1).T.contiguous(),
        scales_GR,
        None if solution.grid.symmetric else zeros_GR,
        rows,
        width,
        bits,
    )


def call(x_TC: Tensor, packed: Packed, bias_R: Tensor | None) -> Tensor:
    """The operator on these weights."""
    y_TR: Tensor = torch.ops.featherweight.triton_linear(
        x_TC, packed.words_KR, packed.scales_GR, packed.zeros_GR, bias_R, packed.rows, packed.width, packed.bits
    )
    return y_TR


@cache
def register() -> torch.library.Library:
    """Make the operator known to torch, once; the library must stay alive."""
    library = torch.library.Library("featherweight", "FRAGMENT")
    library.define(
        "triton_linear(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor? bias, int rows, int width, "
        "int bits) -> Tensor"
    )
    library.impl("triton_linear", _product, "CUDA")
    library.impl("triton_linear", _product, "CPU")  # by Triton's interpreter, where that is switched on
    torch.library.register_fake("featherweight::triton_linear", _shape, lib=library)
    return library


def _product(
    x_TC: Tensor,
    words_KR: Tensor,
    scales_GR: Tensor,
    zeros_GR: Tensor | None,
    bias_R: Tensor | None,
    rows: int,
    width: int,
    bits: int,
) -> Tensor:
    flat_TC = x_TC.reshape(-1, x_TC.shape[-1]).contiguous()
    packed = Packed(words_KR, scales_GR, zeros_GR, rows, width, bits)
    with torch.cuda.device_of(x_TC):
        if len(flat_TC) == 0:
            y_TR = flat_TC.new_empty(0, rows)
        elif len(flat_TC) > DENSE_ABOVE:
            y_TR = functional.linear(flat_TC, dequantize(packed, flat_TC), bias_R)
        else:
            y_TR = _tiles(flat_TC, packed, bias_R)
    return y_TR.view(*x_TC.shape[:-1], rows)


def _shape(
    x_TC: Tensor,
    words_KR: Tensor,
    scales_GR: Tensor,
    zeros_GR: Tensor | None,
    bias_R: Tensor | None,
    rows: int,
    width: int,
    bits: int,
) -> Tensor:
    return x_TC.new_empty(*x_TC.shape[:-1], rows)


def _tiles(x_TC: Tensor, packed: Packed, bias_R: Tensor | None) -> Tensor:
    """One launch, or two where the columns are split."""
    from featherweight.kernels import triton_products

    tokens, (words, padded) = len(x_TC), packed.words_KR.shape
    blocks, groups = words // PLANE, len(packed.scales_GR)
    x_TC = functional.pad(x_TC, (0, blocks * _block(packed.bits) - x_TC.shape[1])).contiguous()
    tile = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    grid = (padded // ROWS, -(-tokens // tile))
    chunk = -(-blocks // splits(grid[0] * grid[1], blocks, x_TC.device))
    count = -(-blocks // chunk)
    y_TR = x_TC.new_empty(tokens, packed.rows)
    out = y_TR if count == 1 else x_TC.new_empty(count, tokens, packed.rows, dtype=torch.float32)
    zeros, bias = _or_any(packed.zeros_GR, y_TR), _or_any(bias_R, y_TR)
    triton_products.product[(*grid, count)](
        *(x_TC, packed.words_KR, packed.scales_GR, zeros, bias, out),
        *(tokens, packed.rows, padded, blocks, groups, packed.width, chunk),
        BITS=packed.bits,
        PLANE=PLANE,
        SPAN=_span(packed),
        HAS_ZEROS=packed.zeros_GR is not None,
        HAS_BIAS=bias_R is not None,
        PARTIAL=count > 1,
        TOKENS=tile,
        ROWS=ROWS,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    if count > 1:
        size, step = y_TR.numel(), 512
        triton_products.combine[(-(-size // step),)](
            out, bias, y_TR, size, packed.rows, count, HAS_BIAS=bias_R is not None, TILE=step
        )
    return y_TR


def dequantize(packed: Packed, like: Tensor) -> Tensor:
    """The weights V_RC as floats of the dtype of `like` (T x C)."""
    from featherweight.kernels import triton_products

    (words, padded), columns = packed.words_KR.shape, like.shape[1]
    weight_RC = like.new_empty(packed.rows, columns)
    triton_products.floats[(padded // ROWS, words // PLANE)](
        *(packed.words_KR, packed.scales_GR, _or_any(packed.zeros_GR, weight_RC), weight_RC),
        *(packed.rows, padded, columns, len(packed.scales_GR), packed.width),
        BITS=packed.bits,
        PLANE=PLANE,
        HAS_ZEROS=packed.zeros_GR is not None,
        ROWS=ROWS,
    )
    return weight_RC


def splits(tiles: int, blocks: int, device: torch.device) -> int:
    """Into how many parts the columns go, so that every multiprocessor has work."""
    wanted = CTAS_PER_PROCESSOR * _processors(device)
    return max(1, min(blocks, wanted // tiles, 16))


def _block(bits: int) -> int:
    """Columns of a block."""
    return PLANE * (WORD_BITS // bits)


def _span(packed: Packed) -> int:
    """Columns of a block that share a scale, wherever the block begins."""
    block = _block(packed.bits)
    return block if len(packed.scales_GR) == 1 else gcd(packed.width, block)


def _or_any(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer has to be given even where the kernel reads nothing through it."""
    return other if tensor is None else tensor


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _device_refusal(device: torch.device) -> str | None:
    """Why this machine cannot run Triton's kernels."""
    if not torch.cuda.is_available():
        return "it needs a GPU, and torch sees 0"
    if find_spec("triton") is None:
        return "it needs triton, which is not installed"
    found: Any = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and found < OLDEST:
        return f"it needs compute capability {OLDEST[0]}.{OLDEST[1]}, and the GPU has {found[0]}.{found[1]}"
    return None
