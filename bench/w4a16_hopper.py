"""The Hopper kernel for many tokens against cuBLAS, every tile of it, on one GPU.

usage: python bench/w4a16_hopper.py [--tokens 64 128 256 1024 4096] [--dtype float16] [--group 128] [--zeros] [--sparse]
           [--shapes 4096x4096 ...]

The timing rule and the error are those of `featherweight bench kernels`. For each tile the microseconds of its own plan
and, where tiles are shared, of the other ways to share them ("sharers"); "chosen" is what the kernel would take. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.benchmarks.kernels import draw, exact, pruned
from featherweight.benchmarks.timing import copies, excess_error, median_us, peak_tflops, read_gbps
from featherweight.core.rules import Grid, Pattern
from featherweight.kernels import sparse24, w4a16_hopper, wna16
from featherweight.kernels.w4a16_hopper_plan import Plan, choose

SHAPES = ("4096x4096", "4096x12288", "4096x22016", "11008x4096", "8192x8192", "8192x10240", "28672x8192", "8192x57344")
MOST_FLOP = 1.1e12  # of a product that is worth the wait
GPU = torch.device("cuda", 0)


def plans(kernels: w4a16_hopper.Kernels, tokens: int, rows: int, columns: int) -> Iterator[Plan]:
    """The plan of every tile, with as many sharers as there are multiprocessors, and with one CTA of two on each."""
    for tile in kernels.modules:
        plan = kernels.plan(tile, tokens, rows, columns)
        yield plan
        if tile.meet > 1:
            continue
        everybody = min(kernels.processors * tile.ctas, plan.shared * (columns // 256))
        if plan.shared and everybody not in (plan.sharers, plan.shared) and everybody > plan.shared:
            yield replace(plan, sharers=everybody, grid=kernels.processors * tile.ctas if plan.whole else everybody)
        if tile.ctas == 2 and not plan.whole:  # one CTA a multiprocessor, so that all of the next launch's fit beside
            most = min(kernels.processors, plan.shared * (columns // 256))
            for sharers in range(plan.shared, most + 1, plan.shared):
                yield replace(plan, sharers=sharers, grid=sharers)


def measure(shape: str, tokens: list[int], args: argparse.Namespace) -> Iterator[dict[str, object]]:
    columns, rows = map(int, shape.split("x"))
    dtype = getattr(torch, args.dtype)
    inputs = {
        t: torch.randn(t, columns, device="cuda", dtype=dtype) for t in tokens if t * rows * columns <= MOST_FLOP / 2
    }
    dense = [torch.randn(rows, columns, device="cuda", dtype=dtype) for _ in range(copies(rows * columns * 2, GPU))]
    cublas = {t: median_us([lambda w=w, x=x: functional.linear(x, w) for w in dense], GPU) for t, x in inputs.items()}
    del dense
    weights = draw(rows, columns, Grid(4, args.group, not args.zeros, scale_dtype=dtype), dtype, GPU)
    if args.sparse:
        weights = pruned(weights, Pattern(keep=2, of=4))
    blocks, layout = (sparse24 if args.sparse else wna16).repack(weights)
    sets = [blocks, *(blocks.clone() for _ in range(copies(blocks.numel(), GPU) - 1))]
    kernels = w4a16_hopper.kernels(GPU, dtype, layout)
    streamed = wna16.kernels(GPU, dtype, layout)
    for t, x in inputs.items():
        y_TR = x.new_empty(t, rows)
        chosen = choose(t, rows, columns, dtype, layout, kernels.processors)
        row: dict[str, object] = {"shape": shape, "tokens": t, "cublas_us": cublas[t], "chosen": str(chosen)}
        row["floats_us"] = median_us(
            [lambda s=s, x=x: functional.linear(x, streamed.dequantize(s, x, rows)) for s in sets[:4]], GPU
        )
        for plan in plans(kernels, t, rows, columns):
            us = median_us([lambda s=s, p=plan, x=x, y=y_TR: kernels.launch(p, x, s, None, y) for s in sets], GPU)
            more = " two CTAs" * (plan.tile.ctas == 2) + f" {plan.tile.meet} meet" * (plan.tile.meet > 1)
            row[f"{plan.tile.tokens}x{plan.tile.rows}{more} {plan.whole}+{plan.shared}/{plan.sharers} us"] = us
        if chosen is not None:
            got: Tensor = x.new_full((t, rows), torch.nan)
            kernels.launch(kernels.plan(chosen, t, rows, columns), x, blocks, None, got)
            row["error"] = excess_error(got, exact(x, weights))
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256, 1024, 4096])
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--group", type=int, choices=[32, 64, 128], default=128)
    parser.add_argument("--zeros", action="store_true", help="store zero points")
    parser.add_argument("--sparse", action="store_true", help="2:4 sparse weights")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="inputs x outputs")
    args = parser.parse_args()
    torch.manual_seed(0)
    head = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "dtype": args.dtype}
    head |= {"read_gbps": read_gbps(GPU), "peak_tflops": peak_tflops(GPU)}
    print(head)
    rows = []
    for shape in args.shapes:
        for row in measure(shape, args.tokens, args):
            rows.append(row)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        torch.cuda.empty_cache()
    print(json.dumps(head | {"rows": rows}))


if __name__ == "__main__":
    main()
