"""Milliseconds a product takes with sub1's weights on one CPU thread, beside the dense matrix in bfloat16.

    PYTHONPATH=src OMP_NUM_THREADS=1 python bench/sub1.py

Independent ternary weights with one scale a row, bfloat16 activations; the best of --repeats by the processor time of
the thread. "reference" decodes the whole matrix in every call, as any format can; "cpu-int4" is torch's operator over
the same weights in four bits each. A table goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.formats import Sub1
from featherweight.kernels import dequantize
from featherweight.linear import CompressedLinear

SHAPES = ("2048x768", "768x2048", "2080x6144")
ZERO_SHARES = (0.5, 0.8, 0.885, 0.95)
TOKENS = (1, 8, 64, 512)
KERNELS = ("sub1-tiles", "reference", "cpu-int4")
GRID = Grid(bits=1.58, group_size=None, scale_dtype=torch.bfloat16)


def draw(rows: int, columns: int, zero_share: float) -> Solution:
    """Codes 1 .. 3, of which 2 (the weight 0) has the probability `zero_share` and the others are equally often."""
    chance = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))
    codes_RC = 2 + (chance > zero_share).to(torch.int8) - 2 * (chance > (1 + zero_share) / 2).to(torch.int8)
    scales_RG, zeros_RG = torch.full((rows, 1), 0.02).bfloat16(), torch.full((rows, 1), 2, dtype=torch.uint8)
    return Solution(codes_RC.to(torch.uint8), scales_RG, zeros_RG, GRID, torch.zeros(rows))


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """The least time that `work` took, after one run to warm up."""
    work()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return round(1e3 * min(found), 2)


def measure(rows: int, columns: int, zero_share: float, repeats: int) -> list[dict[str, float | str]]:
    format, solution = Sub1(), draw(rows, columns, zero_share)
    tensors, weight_RC = format.pack(solution), dequantize(solution, torch.bfloat16)
    bits = 8 * sum(tensor.nbytes for tensor in tensors.values()) / weight_RC.numel()
    layers = {name: CompressedLinear.from_tensors(format, GRID, tensors, kernel=name).prepare() for name in KERNELS}
    found = []
    for tokens in TOKENS:
        x_TC = torch.randn(tokens, columns).bfloat16()
        row: dict[str, float | str] = {"shape": f"{rows}x{columns}", "zero_share": zero_share, "bits": round(bits, 4)}
        row |= {"tokens": tokens, "dense": milliseconds(lambda x=x_TC: functional.linear(x, weight_RC), repeats)}
        row |= {name: milliseconds(lambda x=x_TC, run=layer: run(x), repeats) for name, layer in layers.items()}
        print("  ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape in arguments.shapes:
        for zero_share in ZERO_SHARES:
            rows += measure(*map(int, shape.split("x")), zero_share, arguments.repeats)
    print(json.dumps({"torch": torch.__version__, "threads": 1, "rows": rows}))


if __name__ == "__main__":
    main()
