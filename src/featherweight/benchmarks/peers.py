"""Other packages' 4-bit products, where they are installed: speed only, over random bits.

Each takes (rows, columns, group size, dtype, how many copies) and returns one call of x a copy. None is a dependency:
a peer that is missing is left out, one that fails is reported with its own words.

Shapes: R outputs, C inputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

Product = Callable[[Tensor], object]
Peer = Callable[[int, int, int, torch.dtype, int], list[Product]]


def tinygemm(rows: int, columns: int, group: int, dtype: torch.dtype, count: int) -> list[Product]:
    """torch's own."""
    inner_tiles = 8
    scales = torch.rand(columns // group, rows, 2, device="cuda", dtype=dtype)

    def one() -> Product:
        drawn = torch.randint(0, 255, (rows, columns // 2), device="cuda", dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(drawn, inner_tiles)
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)

    return [one() for _ in range(count)]


def humming(rows: int, columns: int, group: int, dtype: torch.dtype, count: int) -> list[Product]:
    """humming-kernels."""
    from humming.layer import HummingLayer

    def one() -> Product:
        config = {"dtype": "int4", "group_size": group}
        layer = HummingLayer(shape_n=rows, shape_k=columns, weight_config=config, torch_dtype=dtype).cuda()
        layer.load_from_unquantized(torch.randn(rows, columns, device="cuda", dtype=dtype))
        layer.transform()
        product: Product = layer
        return product

    return [one() for _ in range(count)]


def gemlite(rows: int, columns: int, group: int, dtype: torch.dtype, count: int) -> list[Product]:
    """gemlite."""
    from gemlite.core import DType, GemLiteLinear

    kind = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}[dtype]

    def one() -> Product:
        layer = GemLiteLinear(
            4, group_size=group, in_features=columns, out_features=rows, input_dtype=kind, output_dtype=kind
        )
        codes = torch.randint(0, 15, (rows, columns), device="cuda", dtype=torch.uint8)
        scales = torch.rand(rows, columns // group, device="cuda", dtype=dtype)
        layer.pack(codes, scales, torch.full_like(scales, 8), None)
        product: Product = layer
        return product

    return [one() for _ in range(count)]


def marlin(rows: int, columns: int, group: int, dtype: torch.dtype, count: int) -> list[Product]:
    """vLLM's Marlin."""
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    kind, scales = scalar_types.uint4b8, torch.rand(columns // group, rows, device="cuda", dtype=dtype)
    workspace = torch.zeros(
        4 * torch.cuda.get_device_properties("cuda").multi_processor_count, device="cuda", dtype=torch.int32
    )

    def one() -> Product:
        words = torch.randint(-(2**31), 2**31 - 1, (columns // 16, rows * 2), device="cuda", dtype=torch.int32)
        nothing = (None,) * 5
        return lambda x: ops.marlin_gemm(
            *(x, None, words, None, scales, *nothing, workspace, kind, len(x), rows, columns, True, False, True, False)
        )

    return [one() for _ in range(count)]


def machete(rows: int, columns: int, group: int, dtype: torch.dtype, count: int) -> list[Product]:
    """vLLM's Machete, on Hopper."""
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    kind, scales = scalar_types.uint4b8, torch.rand(columns // group, rows, device="cuda", dtype=dtype)

    def one() -> Product:
        words = torch.randint(-(2**31), 2**31 - 1, (columns // 8, rows), device="cuda", dtype=torch.int32)
        packed = ops.machete_prepack_B(words.t().contiguous().t(), dtype, kind, dtype)
        return lambda x: ops.machete_mm(
            a=x, b_q=packed, b_type=kind, b_group_scales=scales, b_group_zeros=None, b_group_size=group
        )

    return [one() for _ in range(count)]


PACKAGES: dict[str, tuple[str, Peer]] = {
    "tinygemm": ("torch", tinygemm),
    "humming": ("humming", humming),
    "gemlite": ("gemlite", gemlite),
    "marlin": ("vllm", marlin),
    "machete": ("vllm", machete),
}


def importable(device: torch.device, bits: float, dtype: torch.dtype) -> Iterator[tuple[str, Peer]]:
    """The peers this machine has for 4-bit weights on a GPU, by name."""
    if device.type != "cuda" or bits != 4:
        return
    for name, (package, peer) in PACKAGES.items():
        if find_spec(package) is not None and (name != "tinygemm" or dtype == torch.bfloat16):
            yield name, peer
