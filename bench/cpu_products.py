"""Products with 4-bit weights on a CPU beside torch's bfloat16 ones, in turn; the last line is JSON.

    taskset -c 0 python bench/cpu_products.py --threads 1 --rows 1,2,4,8 --seconds 4

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
from featherweight.kernels import cpu_native
from featherweight.native import huge_pages

BYTES, GROUP = 320 << 20, 128
KEPT = ("least", "quartile", "median")


def weights(inputs: int, outputs: int) -> cpu_native.Packed:
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    scales = torch.rand(outputs, inputs // GROUP).bfloat16() + 0.5
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    return cpu_native.pack(Solution(codes, scales, zeros, Grid(4, GROUP), torch.zeros(outputs)))


def again(packed: cpu_native.Packed) -> cpu_native.Packed:
    """The same elsewhere in memory, in pages as `pack` asks for them."""
    codes = torch.empty_like(packed.codes)
    huge_pages(codes)
    return cpu_native.Packed(codes.copy_(packed.codes), packed.scales.clone(), packed.zeros.clone(), packed.rows)


def in_turn(functions: dict[str, Callable[[int], Tensor]], seconds: float) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function(0)
    turn, end = 0, time.perf_counter() + seconds
    while turn < 3 or time.perf_counter() < end:
        for name, function in functions.items():
            began = time.perf_counter()
            function(turn)
            took[name].append((time.perf_counter() - began) * 1e3)
        turn += 1
    return {name: [sorted(each)[at * len(each) // 4] for at in range(3)] for name, each in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,256,512,1024,2048,4096")
    parser.add_argument("--shape", default="4096x11008")
    parser.add_argument("--seconds", type=float, default=4.0)
    given = parser.parse_args()
    inputs, outputs = map(int, given.shape.split("x"))
    torch.set_num_threads(given.threads)
    first, plain = weights(inputs, outputs), torch.randn(outputs, inputs).bfloat16()
    ours = [again(first) for _ in range(-(-BYTES // first.codes.nbytes))]
    dense = [plain.clone() for _ in range(-(-BYTES // plain.nbytes))]
    found = []
    for rows in map(int, given.rows.split(",")):
        x_TC = torch.randn(rows, inputs).bfloat16()
        functions: dict[str, Callable[[int], Tensor]] = {
            "bf16": lambda turn, x=x_TC: functional.linear(x, dense[turn % len(dense)]),  # type: ignore[misc]
            "ours": lambda turn, x=x_TC: cpu_native.call(x, ours[turn % len(ours)]),  # type: ignore[misc]
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
