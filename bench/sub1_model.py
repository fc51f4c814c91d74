"""Tokens a second of a random mixture of experts, its experts entropy-coded and ternary beside the same in bfloat16.

    PYTHONPATH=src python bench/sub1_model.py [--shapes qwen3-30b-a3b switch-like] [--blocks N] [--batch 1 8]

Attention, routers, embeddings and head are bfloat16 in both and drawn anew; experts are independent ternary weights, of
which --zero-share are zero, with one scale a row (a few matrices of each shape, copied as often as there are experts).
All blocks share one block's experts, in both models: what is read between two uses of one is more than a cache holds.
bfloat16 is the fastest of transformers' own ways to multiply experts. A step is one token of each sequence after
--context tokens, one CUDA graph on a GPU; the median of ROUNDS steps. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.benchmarks.shapes import Shapes, named
from featherweight.benchmarks.timing import machine
from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.formats import FORMATS
from featherweight.linear import CompressedLinear
from featherweight.mixture import join_experts
from featherweight.models.experts import find_experts, layout_of, take_apart
from featherweight.models.load import fill_buffers, place

OWN = {
    "switch-like": Shapes(2048, 6144, 24, 32, 32, 64, 32128, experts=64, experts_per_token=1),
    "tiny": Shapes(64, 32, 2, 2, 2, 32, 256, experts=4, experts_per_token=2),
}
RIVALS = ("grouped_mm", "batched_mm", "eager")  # ways of transformers to multiply experts
ROUNDS, WARM_UP, DISTINCT = 30, 3, 8


def matrix(rows: int, columns: int, zero_share: float, device: torch.device) -> dict[str, Tensor]:
    """Tensors of one ternary matrix, weights of a spread of about 1 / sqrt(C)."""
    chance_RC = torch.rand(rows, columns, device=device)
    codes_RC = 2 + (chance_RC > zero_share).to(torch.int8) - 2 * (chance_RC > (1 + zero_share) / 2).to(torch.int8)
    scales_R1 = (torch.rand(rows, 1, device=device) + 0.5).div_(((1 - zero_share) * columns) ** 0.5).bfloat16()
    grid, zeros_R1 = grid_of(), torch.full_like(scales_R1, 2, dtype=torch.uint8)
    solution = Solution(codes_RC.to(torch.uint8), scales_R1, zeros_R1, grid, torch.zeros(rows, device=device))
    return {name: tensor.to(device) for name, tensor in FORMATS["sub1"].pack(solution).items()}


def grid_of() -> Grid:
    return Grid(1.58, None, scale_dtype=torch.bfloat16)


def build(shapes: Shapes, blocks: int, zero_share: float | None, rival: str, device: torch.device) -> Any:
    """A random model; `zero_share` None: dense."""
    from transformers import AutoModelForCausalLM

    config = shapes.config(blocks)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    for module in model.modules():
        fill_buffers(model, module, device)
    places = [path for path, module in model.named_modules() if layout_of(module) is not None]
    for path in places[1:]:
        model.set_submodule(path, model.get_submodule(places[0]))
    if zero_share is None:
        model.set_experts_implementation(rival)
    else:
        take_apart(model)
        kernel = "sub1-cuda" if device.type == "cuda" else "auto"
        drawn: dict[tuple[int, int], list[dict[str, Tensor]]] = {}
        for _, experts in find_experts(model):
            for path, layer in list(experts.named_modules()):
                if isinstance(layer, nn.Linear):
                    size = layer.out_features, layer.in_features
                    known = drawn.setdefault(size, [matrix(*size, zero_share, device) for _ in range(DISTINCT)])
                    tensors = {name: tensor.clone() for name, tensor in known[len(path) % DISTINCT].items()}
                    args = (FORMATS["sub1"], grid_of(), tensors, None, torch.bfloat16, kernel)
                    experts.set_submodule(path, CompressedLinear.from_tensors(*args))
        join_experts(model)
        for path in places[1:]:
            model.set_submodule(path, model.get_submodule(places[0]))
    for name, parameter in [(name, each) for name, each in model.named_parameters() if each.is_meta]:
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.0
        value = torch.randn(parameter.shape, device=device, dtype=parameter.dtype).mul_(spread)
        place(model, name, value.add_(1) if parameter.dim() == 1 else value, device)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def step_us(model: Any, batch: int, context: int, device: torch.device) -> tuple[float, bool]:
    """Microseconds of one token of each of `batch` sequences, and whether that was a CUDA graph."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=context + ROUNDS + 2 * WARM_UP + 2)
    model(torch.randint(model.config.vocab_size, (batch, context), device=device), past_key_values=cache)
    token = torch.randint(model.config.vocab_size, (batch, 1), device=device)

    def step() -> None:
        token.copy_(model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1))

    if device.type != "cuda":
        return timed(step, device), False
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        print("no graph:", str(error)[:150], flush=True)
        torch.cuda.synchronize()
        return timed(step, device), False
    return timed(graph.replay, device), True


def timed(step: Callable[[], object], device: torch.device) -> float:
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(1e6 * (time.perf_counter() - start))
    return median(found)


def row(name: str, model: Any, batches: list[int], context: int, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"weights": name}
    found["expert_bytes_of_a_block"] = sum(
        tensor.nbytes for _, each in find_experts(model) for tensor in (*each.parameters(), *each.buffers())
    ) or sum(each.nbytes for each in model.parameters() if each.dim() == 3)
    for batch in batches:
        us, graph = step_us(model, batch, context, device)
        found[f"batch_{batch}"] = {"us": round(us, 1), "tokens_per_s": round(1e6 * batch / us, 1), "graph": graph}
    print(found, flush=True)
    return found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--shapes", nargs="*", default=["qwen3-30b-a3b", "switch-like"])
    ask.add_argument("--blocks", type=int, help="instead of all")
    ask.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    ask.add_argument("--context", type=int, default=16)
    ask.add_argument("--zero-share", type=float, default=0.885)
    ask.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=RIVALS)
    asked = ask.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {"machine": machine(device), "zero_share": asked.zero_share}
    for shapes_name in asked.shapes:
        shapes = OWN.get(shapes_name) or named(shapes_name)
        began, blocks = time.perf_counter(), asked.blocks or shapes.layers
        rows = [row("sub1", build(shapes, blocks, asked.zero_share, "", device), asked.batch, asked.context, device)]
        print(f"{time.perf_counter() - began:.1f} s", flush=True)
        dense = build(shapes, blocks, None, asked.rivals[0], device)
        for rival in asked.rivals:
            dense.set_experts_implementation(rival)
            rows.append(row(f"bfloat16 {rival}", dense, asked.batch, asked.context, device))
        del dense
        best = {b: min(r[f"batch_{b}"]["us"] for r in rows[1:]) / rows[0][f"batch_{b}"]["us"] for b in asked.batch}
        found[shapes_name] = {
            "blocks": blocks,
            "rows": rows,
            "times_bfloat16": {str(b): round(each, 2) for b, each in best.items()},
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
