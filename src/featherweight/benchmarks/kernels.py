"""`featherweight bench kernels`: products with random codes at real shapes, beside dense ones and peers'.

Shapes: R outputs, C inputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.benchmarks import peers
from featherweight.benchmarks.peers import Product
from featherweight.benchmarks.shapes import named
from featherweight.benchmarks.timing import copies, excess_error, in_turn, machine, median_us, peak_tflops, read_gbps
from featherweight.core.rules import Grid, Joint, Pattern, Rule
from featherweight.core.solution import Solution
from featherweight.errors import RequestError
from featherweight.formats import by_name
from featherweight.formats.base import Format
from featherweight.kernels import KERNELS, Run, reasons

FORMAT, SPARSE_FORMAT = "compressed-tensors", "sparse"
NOT_TIMED = ("reference", "dense")
ERROR_ROWS = 4096  # of the weights that are made float64 at a time
Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """What is measured: every kernel that takes a layer of this grid and pattern, or those of `kernels`."""

    grid: Grid
    tokens: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    kernels: tuple[str, ...] = ()
    pattern: Pattern | None = None

    @property
    def rule(self) -> Rule:
        return self.grid if self.pattern is None else Joint(self.grid, self.pattern)

    @property
    def format(self) -> Format:
        return by_name(FORMAT if self.pattern is None else SPARSE_FORMAT)


def layers(shapes: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) by name, of models or as 4096x12288; RequestError for a name that is neither."""
    found: dict[str, tuple[int, int]] = {}
    for name in shapes:
        columns, cross, rows = name.partition("x")
        if cross and columns.isdigit() and rows.isdigit() and int(columns) and int(rows):
            found[name] = (int(columns), int(rows))
        else:
            found |= {f"{name} {layer}": size for layer, size in named(name).linears().items()}
    return found


def run(shapes: Sequence[str], plan: Plan, tell: Tell) -> dict[str, Any]:
    """Measures every layer; `tell` hears of each row. Returns {"machine", "read_gbps", "peak_tflops", "rows", ...}."""
    wanted = layers(shapes)
    unknown = [name for name in plan.kernels if name not in KERNELS]
    if unknown:
        raise RequestError(f"there is no kernel {unknown[0]}: choose from {', '.join(KERNELS)}.")
    torch.manual_seed(0)
    read, peak = read_gbps(plan.device), peak_tflops(plan.device)
    rows = []
    for name, (columns, outputs) in wanted.items():
        for row in _layer(columns, outputs, plan):
            row = {"layer": name, "inputs": columns, "outputs": outputs, **row}
            if "us" in row:
                row |= {"of_read": row["gbps"] / read, "of_peak": row["tflops"] / peak}
            rows.append(row)
            tell(row)
    grid = plan.grid
    return {
        "machine": machine(plan.device),
        "read_gbps": read,
        "peak_tflops": peak,
        "bits": grid.bits,
        "group_size": grid.group_size,
        "symmetric": grid.symmetric,
        "sparsity": None if plan.pattern is None else str(plan.pattern),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "rows": rows,
    }


def _layer(columns: int, outputs: int, plan: Plan) -> Iterator[dict[str, Any]]:
    """Dense, ours and the peers', for each number of tokens in turn."""
    inputs = {tokens: torch.randn(tokens, columns, device=plan.device).to(plan.dtype) for tokens in plan.tokens}
    contenders: dict[str, Sequence[Product]] = {"dense": _dense(columns, outputs, plan)}
    weights = draw(outputs, columns, plan.grid, plan.dtype, plan.device)
    if plan.pattern is not None:
        weights = pruned(weights, plan.pattern)
    nbytes = stored_bytes(columns, outputs, plan.grid, plan.dtype, plan.pattern)
    ours = _ours(weights, nbytes, plan)
    contenders |= ours
    for name, peer in peers.importable(plan.device, plan.grid.bits, plan.dtype):
        try:
            group = plan.grid.group_size or columns
            products = peer(outputs, columns, group, plan.dtype, copies(nbytes, plan.device))
            for x in inputs.values():  # what compiles, or cannot be captured, does so here
                median_us([partial(products[0], x)], plan.device)
            contenders[name] = products
        except Exception as error:  # a stranger's code: its failure is a result, not ours
            yield {"kernel": name, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
    for tokens, x in inputs.items():
        calls = {name: [partial(product, x) for product in products] for name, products in contenders.items()}
        found = in_turn(calls, plan.device)
        for name, us in found.items():
            read_bytes = 2 * columns * outputs if name == "dense" else nbytes
            row = _row(name, tokens, us, found["dense"], columns, outputs, read_bytes)
            yield row | ({"error": excess_error(ours[name][0](x), exact(x, weights))} if name in ours else {})


def _dense(columns: int, outputs: int, plan: Plan) -> list[Product]:
    """The library's product with weights of the activations' dtype."""
    count = copies(2 * columns * outputs, plan.device)
    dense = [torch.randn(outputs, columns, device=plan.device).to(plan.dtype) for _ in range(count)]
    return [partial(functional.linear, weight=weight) for weight in dense]


def _ours(weights: Solution, nbytes: float, plan: Plan) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """Each kernel over rotated copies of the weights."""
    format, (outputs, columns) = plan.format, weights.codes_RC.shape
    refusals = reasons(format, plan.rule, outputs, columns, plan.dtype, plan.device)
    taken = [name for name, why in refusals.items() if why is None]
    found: dict[str, list[Callable[[Tensor], Tensor]]] = {}
    for name in plan.kernels or [each for each in taken if each not in NOT_TIMED]:
        if name not in taken:
            raise RequestError(
                f"the kernel {name} does not take this layer: {refusals[name]}; choose {', '.join(taken)}."
            )
        tensors = format.pack(weights)
        runs = [
            KERNELS[name].prepare(format, plan.rule, tensors, plan.dtype) for _ in range(copies(nbytes, plan.device))
        ]
        found[name] = [_without_bias(run) for run in runs]
    return found


def _without_bias(run: Run) -> Callable[[Tensor], Tensor]:
    return lambda x_TC: run(x_TC, None)


def _row(
    kernel: str, tokens: int, us: float, dense_us: float, columns: int, outputs: int, nbytes: float
) -> dict[str, Any]:
    moved = nbytes + 2 * tokens * (columns + outputs)
    return {
        "kernel": kernel,
        "tokens": tokens,
        "us": us,
        "times_dense": dense_us / us,
        "gbps": moved / us / 1e3,
        "tflops": 2 * tokens * columns * outputs / us / 1e6,
    }


def draw(outputs: int, columns: int, grid: Grid, dtype: torch.dtype, device: torch.device) -> Solution:
    """Random codes, scales and zeros."""
    shape = (outputs, columns // grid.width(columns))
    codes_RC = torch.randint(grid.bottom, grid.top + 1, (outputs, columns), dtype=torch.uint8, device=device)
    scales_RG = (torch.rand(shape, device=device) * 0.01 + 0.001).to(dtype)
    zeros_RG = torch.full(shape, grid.middle, dtype=torch.uint8, device=device)
    if not grid.symmetric:
        zeros_RG = torch.randint(1, grid.top + 1, shape, dtype=torch.uint8, device=device)
    return Solution(codes_RC, scales_RG, zeros_RG, grid, torch.zeros(outputs, device=device))


def pruned(weights: Solution, pattern: Pattern) -> Solution:
    """Of each run of the pattern's the codes of a few drawn places become their group's zero."""
    runs = weights.codes_RC.unflatten(1, (-1, pattern.of))
    keep_RC = (torch.rand(runs.shape, device=runs.device).argsort(-1) < pattern.keep).flatten(1)
    zeros_RC = weights.zeros_RG.repeat_interleave(keep_RC.shape[1] // weights.zeros_RG.shape[1], 1)
    return replace(weights, codes_RC=torch.where(keep_RC, weights.codes_RC, zeros_RC), keep_RC=keep_RC, pattern=pattern)


def stored_bytes(columns: int, outputs: int, grid: Grid, dtype: torch.dtype, pattern: Pattern | None = None) -> float:
    """Of a matrix in a file: what has to be read. Of N:M patterns what is kept, and a bit a weight for where."""
    groups = columns // grid.width(columns)
    zeros = 0 if grid.symmetric else grid.stored_bits
    bits = grid.stored_bits if pattern is None else grid.stored_bits * pattern.keep / pattern.of + 1
    return outputs * (columns * bits + groups * (8 * dtype.itemsize + zeros)) / 8


def exact(x_TC: Tensor, weights: Solution) -> Tensor:
    """The product in float64."""
    count = len(weights.codes_RC)
    tiles = (weights.rows(at, min(at + ERROR_ROWS, count)) for at in range(0, count, ERROR_ROWS))
    return torch.cat([x_TC.double() @ tile.values(torch.float64).T for tile in tiles], dim=1)
