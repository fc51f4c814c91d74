"""Kernels of this package against cuBLAS and whatever peer is importable, on one NVIDIA GPU.

usage: python bench/wna16.py [--bits 4] [--group 128] [--zeros] [--tokens 1 8 16 32] [--shapes 4096x4096 ...]

One timing rule for all: a CUDA graph of launches over copies of the weights that together exceed the L2 cache four
times (at least two), replayed; the median of the replays, divided by the launches. Random data. The error is the
relative Frobenius distance from the float64 product with the same rounded inputs, of an output rounded once: the
rounding of the output alone is taken off in squares. "read" is the share of the bandwidth that a plain sum over 2 GiB
reaches on this machine in the same run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional
from triton.testing import do_bench

from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.kernels import wna16

SHAPES = ("4096x4096", "4096x12288", "4096x22016", "11008x4096", "8192x8192", "8192x10240", "28672x8192", "8192x57344")
CACHE_BYTES = 200e6  # four times the 50 MB of an H100
Call = Callable[[Tensor], Tensor]


def median_us(calls: list[Callable[[], object]]) -> float:
    """Microseconds of one launch of a graph of `calls`."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return do_bench(graph.replay, warmup=10, rep=40, return_mode="median") * 1e3 / len(calls)


def copies(bytes: float) -> int:
    """Of a weight, so that no launch finds its own in the L2."""
    return max(2, int(CACHE_BYTES // bytes) + 1)


def read_gbps() -> float:
    x = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_(0, 255)
    return 2**31 / do_bench(lambda: x.view(torch.float32).sum(), warmup=25, rep=100, return_mode="median") / 1e6


def solution(rows: int, columns: int, group: int, zeros: bool, dtype: torch.dtype, bits: int = 4) -> Solution:
    """Random codes and scales."""
    grid = Grid(bits, group, not zeros, scale_dtype=dtype)
    codes = torch.randint(0, grid.top + 1, (rows, columns), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(rows, columns // group, device="cuda") * 0.01 + 0.001).to(dtype)
    drawn = torch.randint(0, grid.top + 1, scales.shape, dtype=torch.uint8, device="cuda")
    return Solution(codes, scales, drawn if zeros else torch.full_like(drawn, grid.middle), grid, torch.zeros(rows))


def excess_error(got: Tensor, x: Tensor, weights: Solution) -> float:
    """The relative error beyond that of rounding the exact product once."""
    exact = torch.cat(
        [
            x.double() @ weights.rows(r, min(r + 4096, got.shape[1])).values(torch.float64).T
            for r in range(0, got.shape[1], 4096)
        ],
        1,
    )
    rounded = (exact.to(got.dtype).double() - exact).norm()
    error = (got.double() - exact).norm()
    return float((error**2 - rounded**2).clamp_min(0).sqrt() / exact.norm())


def ours(weights: Solution, dtype: torch.dtype, early: bool = True) -> tuple[list[Call], float]:
    """The kernel over rotated copies, and the bytes of one."""
    blocks, layout = wna16.repack(weights)
    wna16.register()
    wna16.kernels(blocks.device, dtype, layout).early = early
    sets = [blocks, *(blocks.clone() for _ in range(copies(blocks.numel()) - 1))]
    static = (len(weights.codes_RC), layout.bits, layout.group, layout.scales, layout.zeros)
    torch.cuda.synchronize()
    return [lambda x, b=b: torch.ops.featherweight.wna16(x, b, None, *static) for b in sets], float(blocks.numel())


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


def measure(shape: str, tokens: list[int], args: argparse.Namespace, read: float) -> Iterator[dict[str, object]]:
    columns, rows = map(int, shape.split("x"))
    dtype = getattr(torch, args.dtype)
    dense = [torch.randn(rows, columns, device="cuda", dtype=dtype) for _ in range(copies(rows * columns * 2))]
    inputs = {t: torch.randn(t, columns, device="cuda", dtype=dtype) for t in tokens}
    cublas = {t: median_us([lambda w=w, x=x: functional.linear(x, w) for w in dense]) for t, x in inputs.items()}
    del dense
    weights = solution(rows, columns, args.group, args.zeros, dtype, args.bits)
    calls, bytes = ours(weights, dtype, early=not args.serial)
    others = dict(peers(rows, columns, args.bits, args.group, dtype)) if args.peers else {}
    for t, x in inputs.items():
        us = median_us([lambda c=c, x=x: c(x) for c in calls])
        gbps = (bytes + 2 * t * (rows + columns)) / us / 1e3
        row = {"shape": shape, "tokens": t, "us": us, "cublas_us": cublas[t], "times_cublas": cublas[t] / us}
        row |= {"gbps": gbps, "of_read": gbps / read, "error": excess_error(calls[0](x), x, weights)}
        row |= {f"{name}_us": median_us([lambda c=c, x=x: c(x) for c in each]) for name, each in others.items()}
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=[2, 3, 4, 8], default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--group", type=int, choices=[32, 64, 128], default=128)
    parser.add_argument("--zeros", action="store_true", help="store zero points")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="inputs x outputs")
    parser.add_argument("--serial", action="store_true", help="no launch starts before the one in front has ended")
    parser.add_argument("--peers", action="store_true", help="time other kernels that can be imported")
    args = parser.parse_args()
    torch.manual_seed(0)
    read = read_gbps()
    print(
        f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, read {read:.0f} GB/s, {args.dtype}, "
        f"{args.bits} bits, group {args.group}{', zeros' if args.zeros else ''}"
    )
    rows = []
    for shape in args.shapes:
        for row in measure(shape, args.tokens, args, read):
            rows.append(row)
            print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        torch.cuda.empty_cache()
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(0),
                "read_gbps": read,
                "dtype": args.dtype,
                "bits": args.bits,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
