"""Products with 4-bit weights on a CPU beside torch's bfloat16 ones, in turn; the last line is JSON.

    OMP_NUM_THREADS=1 taskset -c 0 python bench/cpu_products.py --rows 1,2,4,8 --seconds 4

4096 x 11008 by default, groups of 128, symmetric. Each call takes other weights: both kinds are rotated through
320 MB. Milliseconds by the clock: the least, the lower quartile and the median of as many turns as the seconds for
each number of rows allow; "times" is bf16's over ours, of each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.formats import FORMATS
from featherweight.kernels import KERNELS

FORMAT, GRID, BYTES = FORMATS["compressed-tensors"], Grid(4, 128), 320 << 20
KEPT = ("least", "quartile", "median")


def weights(inputs: int, outputs: int) -> Solution:
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    scales = torch.rand(outputs, inputs // 128).bfloat16() + 0.5
    return Solution(codes, scales, torch.full(scales.shape, 8, dtype=torch.uint8), GRID, torch.zeros(outputs))


def in_turn(functions: dict[str, Callable[[int], Tensor]], seconds: float) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function(0)
    turn, end = 0, time.perf_counter() + seconds
    while turn < 5 or time.perf_counter() < end:
        for name, function in functions.items():
            began = time.perf_counter()
            function(turn)
            took[name].append((time.perf_counter() - began) * 1e3)
        turn += 1
    return {name: [sorted(each)[at * len(each) // 4] for at in range(3)] for name, each in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,256,512,1024,2048,4096")
    parser.add_argument("--shape", default="4096x11008")
    parser.add_argument("--seconds", type=float, default=4.0)
    given = parser.parse_args()
    inputs, outputs = map(int, given.shape.split("x"))
    stored = FORMAT.pack(weights(inputs, outputs))
    ours = [
        KERNELS["cpu-int4"].prepare(FORMAT, GRID, stored, torch.bfloat16)
        for _ in range(-(-BYTES // (inputs * outputs // 2)))
    ]
    dense = [torch.randn(outputs, inputs).bfloat16() for _ in range(-(-BYTES // (inputs * outputs * 2)))]
    found = []
    for rows in map(int, given.rows.split(",")):
        x_TC = torch.randn(rows, inputs).bfloat16()
        functions: dict[str, Callable[[int], Tensor]] = {
            "bf16": lambda turn, x=x_TC: functional.linear(x, dense[turn % len(dense)]),  # type: ignore[misc]
            "ours": lambda turn, x=x_TC: ours[turn % len(ours)](x, None),  # type: ignore[misc]
        }
        with torch.inference_mode():
            took = in_turn(functions, given.seconds)
        times = [b / o for b, o in zip(took["bf16"], took["ours"], strict=True)]
        found.append({"rows": rows, **took, "times": times})
        each = (f"{name} " + " / ".join(f"{t:.2f}" for t in v) for name, v in (*took.items(), ("times", times)))
        print(f"{torch.get_num_threads()} threads, {rows} rows, {' / '.join(KEPT)}: " + "; ".join(each), flush=True)
    print(json.dumps({"threads": torch.get_num_threads(), "shape": [inputs, outputs], "rows": found}))


if __name__ == "__main__":
    main()
