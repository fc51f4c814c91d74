"""The kernel of last resort: weights made floats a tile at a time, in plain torch."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from featherweight.core.rules import Grid, Pattern
from featherweight.core.solution import Solution
from featherweight.formats import FORMATS
from featherweight.kernels import dequantize, tiles
from featherweight.kernels.base import Case
from featherweight.linear import CompressedLinear
from test_kernels_triton import solution

FORMAT = FORMATS["compressed-tensors"]
GRIDS = [Grid(*each) for each in product((2, 3, 4, 5, 8), (32, None), (True, False))]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_are_the_references_bit_for_bit(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.UNPACKED, "cpu", 7 * 96)  # tiles that do not divide the rows
    for scales in (torch.float16, torch.bfloat16):
        weights = solution(grid, 50, 96, scales)
        packed = tiles.pack(weights)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            assert torch.equal(tiles.values(packed, 3, 50, dtype), dequantize(weights, dtype)[3:])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gpus_unpack_by_shifts_what_cpus_unpack_by_embedding(bits: int) -> None:
    weights = solution(Grid(bits, 32, False), 10, 96)
    packed = tiles.pack(weights)
    codes_RGB = packed.bytes_RGB[..., : 32 * bits // 8]
    assert torch.equal(tiles._by_shifts(codes_RGB, packed.zeros_RG, bits), tiles._on_cpu(packed.bytes_RGB, packed))


def layer(weights: Solution, dtype: torch.dtype, bias: torch.Tensor | None = None) -> CompressedLinear:
    return CompressedLinear.from_tensors(FORMAT, weights.grid, FORMAT.pack(weights), bias, dtype, "dequantize")


def test_products_and_gradients_over_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.MULTIPLIED, "cpu", 7 * 96)
    weights, bias = solution(Grid(4, 32, False), 50, 96), torch.randn(50)
    built, x = layer(weights, torch.float32, bias), torch.randn(2, 3, 96, requires_grad=True)
    y = built(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weights.values(), bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, weights.values().sum(0).expand(2, 3, 96))
    assert built(x[:0]).shape == (0, 3, 50)


def test_the_operators_are_sound_for_torch() -> None:
    tiles.register()
    packed = tiles.pack(solution(Grid(4, 32), 50, 96))
    arguments = (packed.bytes_RGB, packed.scales_RG, packed.zeros_RG, packed.bits)
    x, y = torch.randn(3, 96, requires_grad=True), torch.randn(3, 50)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.featherweight.tiled_linear.default, (x, *arguments), test_utils=checks)
    torch.library.opcheck(torch.ops.featherweight.tiled_linear_backward.default, (y, *arguments), test_utils=checks)


def test_refusals() -> None:
    def refusal(rule: object, columns: int, device: str = "cpu") -> str | None:
        case = Case(FORMAT, rule, 48, columns, torch.float32, torch.device(device))  # type: ignore[arg-type]
        return tiles.Dequantize().refusal(case)

    assert refusal(Grid(4, 32), 96) is None and refusal(Grid(4, 32), 96, "cuda") is None
    assert "whole bytes, and they have 3 codes of 2 bits" in str(refusal(Grid(2, 3), 96))
    assert "cpu and cuda, and the layer is on meta" in str(refusal(Grid(4, 32), 96, "meta"))
    assert "weights are floats, pruned" in str(refusal(Pattern(), 96))
