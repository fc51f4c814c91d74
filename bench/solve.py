"""Time from H to codes for one layer, by phase, on random weights and inputs of real shapes.

    PYTHONPATH=src python bench/solve.py --shapes 4096x4096,22016x4096,4096x11008 --bits 4 --group 128

For each shape (outputs x inputs): milliseconds from H to codes, and of its parts, the factor, the scale search and the
sweep, and of a round of descent after them, each the median of --repeats with the device waited for; on a GPU also the
most memory held meanwhile, in units of H: H itself (1), the weights (told as well), their codes and all between. With
--loops also times of the torch loops that the kernels stand in for, and whether codes and certificates agree. The last
line of stdout is one JSON object.
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
        found = None  # two results at once are not what is measured
        wait()
        began = time.perf_counter()
        found = work()
        wait()
        times.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(times), 3), found


def start_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device, problem: LayerProblem) -> float | None:
    """The most memory held since `start_peak`, in units of H."""
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated() / problem.hessian_CC.nbytes, 2)


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
        row: dict[str, Any] = {"shape": shape, "weights_in_hessians": round(rows / columns, 2)}
        start_peak(device)
        row["h_to_codes_ms"], _ = timed(device, args.repeats, lambda p=problem: sweep(p, grid))
        row["h_to_codes_peak"] = peak(device, problem)
        row["factor_ms"], factor = timed(device, args.repeats, lambda p=problem: p.factor("activation"))
        price_GN = _importance(factor.root_CC[None], factor.order_C[None], args.group)[0]
        grouped_RGN = weight_RC.unflatten(-1, (-1, args.group))
        row["search_ms"], fitted = timed(device, args.repeats, lambda w=grouped_RGN, p=price_GN: scales.fit(grid, w, p))
        for name in ("kernels", "loops") if args.loops else ("kernels",):
            if name == "loops":
                fused._failed.append("asked for the loops")
            row[f"sweep_{name}_ms"], solution = timed(
                device, args.repeats, lambda p=problem, f=factor, s=fitted: sweep(p, grid, factor=f, fitted=s)
            )
            start_peak(device)
            row[f"refine_{name}_ms"], better = timed(
                device, args.repeats, lambda p=problem, s=solution: refine(p, s, 1)
            )
            row[f"certificates_{name}"] = [solution.certificate, better.certificate]
            row[name] = better.codes_RC
        fused._failed.clear()
        mine, theirs = row.pop("kernels"), row.pop("loops", None)
        if theirs is not None:
            row["codes_equal"] = float((mine == theirs).float().mean())
        row["refine_peak"] = peak(device, problem)  # with the factor, which it does not need
        del factor, solution, better, mine, theirs, fitted, grouped_RGN, problem, weight_RC, hessian
        rows_out.append(row)
        print(json.dumps(row), flush=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({"device": name, "torch": torch.__version__, "grid": str(grid), "rows": rows_out}))


if __name__ == "__main__":
    main()
