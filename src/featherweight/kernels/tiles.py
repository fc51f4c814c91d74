"""Products with integer codes by plain torch, on any device and in any dtype: a tile of rows is made floats, multiplied
and forgotten. What is left where no other kernel runs, and what many tokens take on a CPU.

Weights are those of the reference kernel bit for bit: code - zero is exact in float32, so is its product with a scale
of 16 bits, and the dtype of the activations is rounded to once. The codes of a group lie in whole bytes, 2, 4 or 8 bits
each (3 as 4, 5 to 7 as 8). On a CPU torch's embedding operators unpack them, a group as a row whose scale is 1 and
whose offset is minus its zero: with scaling and rounding 0.5 ns a weight on one core, where shifts, a conversion and a
product that broadcasts took 1.9.

The operator `featherweight::tiled_linear` is what torch.compile sees; gradients of the input pass through it.

Shapes: R outputs, C inputs, G groups, N columns of a group, B its bytes, T tokens (any leading axes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.formats import parts
from featherweight.formats.base import Format, Rule, Solution
from featherweight.kernels.base import Case, Kernel, Run, require_input

UNPACKED = {"cpu": 1 << 18, "cuda": 1 << 24}  # weights at a time: what fits a core's cache, or keeps a GPU busy
MULTIPLIED = {"cpu": 1 << 22, "cuda": 1 << 24}  # weights of one product, which every input is laid out for anew
OFFSETS = {2: torch.float16, 4: torch.float16, 8: torch.float32}  # their dtype in the operators for embeddings
BYTE_BITS = 8


@dataclass(frozen=True)
class Packed:
    """Codes in whole bytes, and on a CPU behind those of each group what the embedding operators read there: a scale of
    1 and an offset of -zero, in float16 (of 8-bit codes in float32)."""

    bytes_RGB: Tensor
    scales_RG: Tensor
    zeros_RG: Tensor
    bits: int

    @property
    def columns(self) -> int:
        own = self.bytes_RGB.shape[2] - (0 if self.bytes_RGB.is_cuda else 2 * OFFSETS[self.bits].itemsize)
        return self.bytes_RGB.shape[1] * own * BYTE_BITS // self.bits


@dataclass(frozen=True)
class Dequantize(Kernel):
    """As small in memory as 2, 4 or 8 bits a code are, whatever the activations' dtype."""

    name: str = "dequantize"

    def refusal(self, case: Case) -> str | None:
        grid, pattern = parts(case.rule)
        if grid is None:
            return f"it multiplies by codes, and the weights are floats, pruned ({pattern})"
        if case.device.type not in UNPACKED:
            return f"it runs on {' and '.join(UNPACKED)}, and the layer is on {case.device.type}"
        width, bits = grid.group_size or case.columns, stored_bits(grid.stored_bits)
        if width * bits % BYTE_BITS:
            return f"it needs groups of whole bytes, and they have {width} codes of {bits} bits"
        return None

    def prepare(self, format: Format, rule: Rule, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Run:
        solution = format.unpack(tensors, rule)
        assert isinstance(solution, Solution)
        packed = pack(solution)
        register()

        def run(x_TC: Tensor, bias_R: Tensor | None) -> Tensor:
            require_input(x_TC, packed.columns, dtype, packed.bytes_RGB.device)
            return call(x_TC, packed, bias_R)

        return run


def stored_bits(bits: int) -> int:
    """Of a code in memory: 2, 4 or 8."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def pack(solution: Solution) -> Packed:
    """A solution; the first code of a byte is in its lowest bits."""
    bits = stored_bits(solution.grid.stored_bits)
    codes = solution.codes_RC.unflatten(1, (solution.scales_RG.shape[1], -1, BYTE_BITS // bits))
    bytes_RGB = codes[..., 0].clone()
    for field in range(1, BYTE_BITS // bits):
        bytes_RGB |= codes[..., field] << field * bits
    if not bytes_RGB.is_cuda:
        offset = solution.zeros_RG.to(OFFSETS[bits]).neg_().unsqueeze(-1)
        ends = torch.cat((torch.ones_like(offset), offset), dim=-1).view(torch.uint8)
        bytes_RGB = torch.cat((bytes_RGB, ends), dim=-1)
    return Packed(bytes_RGB, solution.scales_RG.contiguous(), solution.zeros_RG.contiguous(), bits)


def call(x_TC: Tensor, packed: Packed, bias_R: Tensor | None) -> Tensor:
    """y_TR = x_TC V^T + bias."""
    y_TR: Tensor = torch.ops.featherweight.tiled_linear(
        x_TC, packed.bytes_RGB, packed.scales_RG, packed.zeros_RG, packed.bits
    )
    return y_TR if bias_R is None else y_TR + bias_R


def values(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The rows start .. stop-1 of V_RC."""
    step = _rows(packed, UNPACKED)
    value_RC = packed.scales_RG.new_empty(stop - start, packed.columns, dtype=dtype)
    for at in range(start, stop, step):
        rows = slice(at, min(at + step, stop))
        bytes_RGB, zeros_RG = packed.bytes_RGB[rows], packed.zeros_RG[rows]
        whole_RGN = _by_shifts(bytes_RGB, zeros_RG, packed.bits) if bytes_RGB.is_cuda else _on_cpu(bytes_RGB, packed)
        whole_RGN *= packed.scales_RG[rows].float().unsqueeze(-1)
        value_RC[at - start : at - start + step] = whole_RGN.flatten(1)
    return value_RC


def _on_cpu(bytes_RGB: Tensor, packed: Packed) -> Tensor:
    """code - zero in float32, a group as a row of an embedding."""
    quantized = torch.ops.quantized
    unpack: dict[int, Callable[[Tensor], Tensor]] = {
        2: quantized.embedding_bag_2bit_unpack,
        4: quantized.embedding_bag_4bit_unpack,
        8: quantized.embedding_bag_byte_unpack,
    }
    return unpack[packed.bits](bytes_RGB.flatten(0, 1)).view(*bytes_RGB.shape[:2], -1)


def _by_shifts(bytes_RGB: Tensor, zeros_RG: Tensor, bits: int) -> Tensor:
    """code - zero in float32."""
    shifts = torch.arange(0, BYTE_BITS, bits, dtype=torch.uint8, device=bytes_RGB.device)
    codes_RGN = ((bytes_RGB.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)
    return codes_RGN.float() - zeros_RG.unsqueeze(-1)


@cache
def register() -> torch.library.Library:
    """Make the operators known to torch, once; the library must stay alive."""
    library = torch.library.Library("featherweight", "FRAGMENT")
    for name, run in (("tiled_linear", _forward), ("tiled_linear_backward", _backward)):
        library.define(f"{name}(Tensor x, Tensor codes, Tensor scales, Tensor zeros, int bits) -> Tensor")
        library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake("featherweight::tiled_linear", _forward_shape, lib=library)
    torch.library.register_fake("featherweight::tiled_linear_backward", _backward_shape, lib=library)
    torch.library.register_autograd(
        "featherweight::tiled_linear", _gradients, setup_context=_keep_for_gradients, lib=library
    )
    return library


def _rows(packed: Packed, weights: Mapping[str, int]) -> int:
    """Rows that have about so many weights."""
    return max(1, weights[packed.bytes_RGB.device.type] // packed.columns)


def _tiles(packed: Packed) -> range:
    """Where the rows of a product begin; its step is how many they are."""
    return range(0, len(packed.bytes_RGB), _rows(packed, MULTIPLIED))


def _forward(x_TC: Tensor, bytes_RGB: Tensor, scales_RG: Tensor, zeros_RG: Tensor, bits: int) -> Tensor:
    packed = Packed(bytes_RGB, scales_RG, zeros_RG, bits)
    flat_TC, tiles, rows = x_TC.reshape(-1, x_TC.shape[-1]), _tiles(packed), len(bytes_RGB)
    y_TR = x_TC.new_empty(len(flat_TC), rows)
    for start in tiles:
        stop = min(start + tiles.step, rows)
        y_TR[:, start:stop] = functional.linear(flat_TC, values(packed, start, stop, x_TC.dtype))
    return y_TR.view(*x_TC.shape[:-1], rows)


def _backward(y_TR: Tensor, bytes_RGB: Tensor, scales_RG: Tensor, zeros_RG: Tensor, bits: int) -> Tensor:
    """x_TC = y_TR V, summed over the tiles in float32."""
    packed = Packed(bytes_RGB, scales_RG, zeros_RG, bits)
    flat_TR, tiles, rows = y_TR.reshape(-1, y_TR.shape[-1]), _tiles(packed), len(bytes_RGB)
    x_TC = y_TR.new_zeros(len(flat_TR), packed.columns, dtype=torch.promote_types(y_TR.dtype, torch.float32))
    for start in tiles:
        stop = min(start + tiles.step, rows)
        x_TC += flat_TR[:, start:stop] @ values(packed, start, stop, y_TR.dtype)
    return x_TC.to(y_TR.dtype).view(*y_TR.shape[:-1], packed.columns)


def _forward_shape(x_TC: Tensor, bytes_RGB: Tensor, scales_RG: Tensor, zeros_RG: Tensor, bits: int) -> Tensor:
    return x_TC.new_empty(*x_TC.shape[:-1], bytes_RGB.shape[0])


def _backward_shape(y_TR: Tensor, bytes_RGB: Tensor, scales_RG: Tensor, zeros_RG: Tensor, bits: int) -> Tensor:
    return y_TR.new_empty(*y_TR.shape[:-1], Packed(bytes_RGB, scales_RG, zeros_RG, bits).columns)


def _keep_for_gradients(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.bits = inputs[4]


def _gradients(ctx: Any, y_TR: Tensor) -> tuple[Tensor | None, ...]:
    x_TC = torch.ops.featherweight.tiled_linear_backward(y_TR, *ctx.saved_tensors, ctx.bits)
    return x_TC, None, None, None, None
