"""`featherweight bench generate`: tokens a second of a random model of real shapes, compressed and not.

Both run in the same code. The weights are drawn on the device, block by block: nothing is downloaded, and a dense copy
of a compressed matrix never exists. Tokens follow one another without the host looking at them, as an engine has them.

Shapes: R outputs, C inputs, G groups.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from featherweight.benchmarks import timing
from featherweight.benchmarks.shapes import named
from featherweight.codec import words_for
from featherweight.core.rules import Grid
from featherweight.errors import RequestError
from featherweight.evaluate.decode import Decoder, How
from featherweight.evaluate.size import read_bytes
from featherweight.formats import by_name
from featherweight.linear import CompressedLinear
from featherweight.merged import merge, prepare
from featherweight.models.load import fill_buffers, meta_tensors, place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "compressed-tensors"
HEAD = "lm_head"
ROUND = 16  # tokens that are timed together


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        shapes: of a model by name (`shapes.NAMED`), with `blocks` of its blocks (None: all).
        grid: of the compressed matrices of the blocks; head_bits those of the head, 16 leaves it.
        kernel: that multiplies by them.
        context: tokens before the first that is timed; tokens that are.
        how: a token's step is made (`Decoder`).
    """

    shapes: str
    grid: Grid
    device: torch.device
    kernel: str = "auto"
    blocks: int | None = None
    head_bits: int = 16
    context: int = 1024
    tokens: int = 64
    how: How = "fused"


def run(plan: Plan) -> dict[str, Any]:
    """Both models, one after the other: {"machine", "rows": [dense, compressed], "speedup", ...}."""
    if plan.tokens < ROUND or plan.context < 1:
        raise RequestError(
            f"{plan.tokens} tokens after {plan.context} were asked for, and {ROUND} or more after 1 or more are timed."
        )
    peak_gbps = timing.read_gbps(plan.device)
    rows = [_measured(plan, compressed) for compressed in (False, True)]
    rows = [{**row, "share_of_read": row["read_gbps"] / peak_gbps} for row in rows]
    return {
        "machine": timing.machine(plan.device),
        "peak_read_gbps": peak_gbps,
        "shapes": plan.shapes,
        "blocks": plan.blocks or named(plan.shapes).layers,
        "context": plan.context,
        "step": plan.how,
        "rows": rows,
        "speedup": rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"],
    }


def build(plan: Plan, compressed: bool) -> PreTrainedModel:
    """A random model, in eval mode."""
    from transformers import AutoModelForCausalLM

    shapes = named(plan.shapes)
    if shapes.experts:
        raise RequestError(f"{plan.shapes} has {shapes.experts} experts, and models of 0 are timed: choose another.")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(shapes.config(plan.blocks), dtype=torch.bfloat16)
    torch.manual_seed(0)
    for module in model.modules():
        fill_buffers(model, module, plan.device)
    if compressed:
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and (path != HEAD or plan.head_bits < 16):
                model.set_submodule(path, _random_layer(module, plan, path))
    for name, parameter in list(meta_tensors(model)):
        drawn = torch.randn(parameter.shape, device=plan.device, dtype=parameter.dtype)
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.0
        place(model, name, drawn * spread + (parameter.dim() == 1), plan.device)
    if compressed:  # when nothing is on meta any more but what kernels have let go
        merge(model)
        prepare(model)
    result: PreTrainedModel = model.eval().requires_grad_(False)
    return result


def _random_layer(module: nn.Linear, plan: Plan, path: str) -> CompressedLinear:
    """A compressed layer whose weights have a spread of about 1 / sqrt(C)."""
    rows, columns, device = module.out_features, module.in_features, plan.device
    grid = plan.grid if path != HEAD else Grid(plan.head_bits, plan.grid.group_size, plan.grid.symmetric)
    bits, groups = grid.stored_bits, columns // grid.width(columns, path)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device)

    scale = 3.5 / (1 << bits) / columns**0.5  # codes are even: their spread is 2^bits / sqrt(12)
    tensors = {
        "weight_packed": words(rows, words_for(columns, bits)),
        "weight_scale": torch.full((rows, groups), scale, dtype=torch.bfloat16, device=device),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not grid.symmetric:
        tensors["weight_zero_point"] = words(words_for(rows, bits), groups)
    return CompressedLinear.from_tensors(by_name(FORMAT), grid, tensors, kernel=plan.kernel)


def _measured(plan: Plan, compressed: bool) -> dict[str, Any]:
    """One model's row."""
    began = time.perf_counter()
    model = build(plan, compressed)
    kernels = sorted({module.kernel.name for module in model.modules() if isinstance(module, CompressedLinear)})
    ids_T = torch.randint(model.config.vocab_size, (plan.context,), device=plan.device)
    decoder = Decoder(model, plan.context + plan.tokens + ROUND, plan.how)
    decoder.begin(ids_T)
    _decode_s(decoder, ROUND, plan.device)
    ready = time.perf_counter() - began
    rounds = [_decode_s(decoder, ROUND, plan.device) / ROUND for _ in range(plan.tokens // ROUND)]
    per_token, nbytes = median(rounds), read_bytes(model)
    return {
        "weights": f"{plan.grid.bits} bits" if compressed else "bfloat16",
        "kernels": kernels,
        "tokens_per_s": 1 / per_token,
        "ms_per_token": 1e3 * per_token,
        "read_bytes": nbytes,
        "read_gbps": nbytes / per_token / 1e9,
        "fused": decoder.step is not None,
        "graph": decoder.graph is not None,
        "memory_gib": torch.cuda.memory_allocated(plan.device) / 2**30 if plan.device.type == "cuda" else None,
        "until_ready_s": ready,
    }


def _decode_s(decoder: Decoder, count: int, device: torch.device) -> float:
    """Seconds of so many tokens more, each the likeliest after the one before."""
    start = time.perf_counter()
    for _ in range(count):
        decoder.next()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
