"""Time from H to codes for one layer, by phase, on random weights and inputs of real shapes.

    PYTHONPATH=src python bench/solve.py --shapes 4096x4096,22016x4096,4096x11008 --bits 4 --group 128

For each shape (outputs x inputs): milliseconds of the factor, the scale search, the sweep and a round of descent, each
the median of --repeats with the device waited for, and on a GPU the most memory held, H itself
and descent included, in units of H; with --loops also of the torch loops that the kernels stand in for,
and whether codes and certificates agree. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from featherweight.core import fused, scales
from featherweight.core.hessian import HessianSum
from featherweight.core.problem import LayerProblem
from featherweight.core.refine import refine
from featherweight.core.rules import Grid
from featherweight.core.sweep import _importance, sweep

PIECES = 8  # of the inputs, so that they need little room


def timed(device: torch.device, repeats: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Median milliseconds, after one run that is not counted, and what the last run returned."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    found, times = work(), []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        found = work()
        wait()
        times.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(times), 3), found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--shapes", default="4096x4096")
    ask.add_argument("--bits", type=int, default=4)
    ask.add_argument("--group", type=int, default=128)
    ask.add_argument("--asymmetric", action="store_true")
    ask.add_argument("--search", default="hessian")
    ask.add_argument("--repeats", type=int, default=3)
    ask.add_argument("--loops", action="store_true")
    ask.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = ask.parse_args()
    device = torch.device(args.device)
    grid = Grid(args.bits, args.group, not args.asymmetric, args.search, torch.bfloat16)
    rows_out = []
    for shape in args.shapes.split(","):
        rows, columns = (int(n) for n in shape.split("x"))
        generator = torch.Generator(device).manual_seed(0)
        hessian, spread_C = HessianSum(columns, device), torch.linspace(0.3, 3, columns, device=device)
        for tokens in (4 * columns // PIECES,) * PIECES:
            x_TC = torch.randn(tokens, columns, generator=generator, device=device) * spread_C
            hessian.add(x_TC.bfloat16())
            del x_TC
        weight_RC = torch.randn(rows, columns, generator=generator, device=device)
        problem = LayerProblem(weight_RC, hessian.into_mean(), hessian.tokens, 0.01, shape)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row: dict[str, Any] = {"shape": shape}
        row["factor_ms"], factor = timed(device, args.repeats, lambda p=problem: p.factor("activation"))
        price_GN = _importance(factor.upper_CC[None], factor.order_C[None], args.group)[0]
        grouped_RGN = weight_RC.unflatten(-1, (-1, args.group))
        row["search_ms"], fitted = timed(device, args.repeats, lambda w=grouped_RGN, p=price_GN: scales.fit(grid, w, p))
        for name in ("kernels", "loops") if args.loops else ("kernels",):
            if name == "loops":
                fused._failed.append("asked for the loops")
            row[f"sweep_{name}_ms"], solution = timed(
                device, args.repeats, lambda p=problem, f=factor, s=fitted: sweep(p, grid, factor=f, fitted=s)
            )
            row[f"refine_{name}_ms"], better = timed(
                device, args.repeats, lambda p=problem, s=solution: refine(p, s, 1)
            )
            row[f"certificates_{name}"] = [solution.certificate, better.certificate]
            row[name] = better.codes_RC
        fused._failed.clear()
        mine, theirs = row.pop("kernels"), row.pop("loops", None)
        if theirs is not None:
            row["codes_equal"] = float((mine == theirs).float().mean())
        if device.type == "cuda":
            row["peak_in_hessians"] = round(torch.cuda.max_memory_allocated() / problem.hessian_CC.nbytes, 2)
        rows_out.append(row)
        print(json.dumps(row), flush=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    print(
        json.dumps(
            {"device": name, "torch": torch.__version__, "grid": str(grid), "peak_bytes": peak, "rows": rows_out}
        )
    )


if __name__ == "__main__":
    main()
