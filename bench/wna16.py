"""Kernels of this package against cuBLAS and whatever peer is importable, on one NVIDIA GPU.

usage: python bench/wna16.py [--bits 4] [--group 128] [--zeros] [--tokens 1 8 16 32] [--shapes 4096x4096 ...]

The timing rule is `featherweight.benchmarks.timing`'s for all. The error is the relative Frobenius distance from the
float64 product with the same rounded inputs, of an output rounded once: the rounding of the output alone is taken off
in squares. "read" is the share of the bandwidth that a plain sum over 2 GiB reaches on this machine in the same run.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.benchmarks.decode import measure
from featherweight.benchmarks.timing import copies, median_us, read_gbps
from featherweight.core.rules import Grid

SHAPES = ("4096x4096", "4096x12288", "4096x22016", "11008x4096", "8192x8192", "8192x10240", "28672x8192", "8192x57344")
Call = Callable[[Tensor], Tensor]


def peers(rows: int, columns: int, bits: int, group: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Call]]]:
    """Every other kernel for this width that this machine has; speed only, over random bits."""
    count = copies(rows * columns * bits / 8)
    if dtype == torch.bfloat16 and bits == 4:
        draw = lambda: torch.randint(0, 255, (rows, columns // 2), device="cuda", dtype=torch.uint8)  # noqa: E731
        packed = [torch.ops.aten._convert_weight_to_int4pack(draw(), 8) for _ in range(count)]
        scales = torch.rand(columns // group, rows, 2, device="cuda", dtype=dtype)
        yield "tinygemm", [lambda x, b=b: torch.ops.aten._weight_int4pack_mm(x, b, group, scales) for b in packed]
    try:
        from humming.layer import HummingLayer
    except ImportError:
        return
    layers = []
    for _ in range(count):
        config = {"dtype": f"int{bits}", "group_size": group}
        layer = HummingLayer(shape_n=rows, shape_k=columns, weight_config=config, torch_dtype=dtype).cuda()
        layer.load_from_unquantized(torch.randn(rows, columns, device="cuda", dtype=dtype))
        layer.transform()
        layers.append(layer)
    yield "humming", list(layers)


def lines(shape: str, args: argparse.Namespace, read: float) -> Iterator[dict[str, object]]:
    """What was measured of one shape, a number of tokens at a time."""
    columns, rows = map(int, shape.split("x"))
    dtype = getattr(torch, args.dtype)
    dense = [torch.randn(rows, columns, device="cuda", dtype=dtype) for _ in range(copies(rows * columns * 2))]
    inputs = {t: torch.randn(t, columns, device="cuda", dtype=dtype) for t in args.tokens}
    cublas = {t: median_us([lambda w=w, x=x: functional.linear(x, w) for w in dense]) for t, x in inputs.items()}
    del dense
    others = dict(peers(rows, columns, args.bits, args.group, dtype)) if args.peers else {}
    grid = Grid(args.bits, args.group, not args.zeros, scale_dtype=dtype)
    for cell in measure(grid, rows, columns, args.tokens, dtype, early=not args.serial):
        x, dense_us = inputs[cell.tokens], cublas[cell.tokens]
        row = {"shape": shape, **asdict(cell), "of_read": cell.gbps / read}
        row |= {"cublas_us": dense_us, "times_cublas": dense_us / cell.us}
        yield row | {f"{name}_us": median_us([lambda c=c, x=x: c(x) for c in each]) for name, each in others.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=[2, 3, 4, 8], default=4)
    parser.add_argument("--group", type=int, choices=[32, 64, 128], default=128)
    parser.add_argument("--zeros", action="store_true", help="store zero points")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="inputs x outputs")
    parser.add_argument("--serial", action="store_true", help="no launch starts before the one in front has ended")
    parser.add_argument("--peers", action="store_true", help="time other kernels that can be imported")
    args = parser.parse_args()
    torch.manual_seed(0)
    read, name = read_gbps(), torch.cuda.get_device_name(0)
    zeros = "zeros" if args.zeros else "symmetric"
    print(f"{name}, torch {torch.__version__}, read {read:.0f} GB/s, {args.dtype}, W{args.bits} g{args.group} {zeros}")
    rows = []
    for shape in args.shapes:
        for row in lines(shape, args, read):
            rows.append(row)
            print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        torch.cuda.empty_cache()
    settings = {name: getattr(args, name) for name in ("bits", "group", "zeros", "dtype")}
    print(json.dumps({"device": name, "read_gbps": read, **settings, "rows": rows}))


if __name__ == "__main__":
    main()
