"""What training costs: a step of Block-AP on one block, and a micro-batch of E2E-QP on a whole model, random weights.

Shapes: S sequences, T tokens, D width, R outputs, C inputs, G groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from featherweight import formats
from featherweight.benchmarks.flow import PLACES, fed
from featherweight.benchmarks.shapes import Shapes
from featherweight.benchmarks.timing import peak_tflops
from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.linear import CompressedLinear
from featherweight.stream.device import peak_memory_bytes, pick_device
from featherweight.stream.tune import MICRO_TOKENS
from featherweight.train.adam import paces
from featherweight.train.block_ap import Schedule, block_loss
from featherweight.train.e2e_qp import Schedule as TuningSchedule
from featherweight.train.e2e_qp import Trained, Tuner, divergence
from featherweight.train.keeping import Keeping
from featherweight.train.step import ALONE, Run, Stepper
from featherweight.train.trainable import NEAR, Trainable, TrainedGrid, TrainedRounding, beginning
from featherweight.train.tuned_linear import TunedLinear

PAPERS_SAMPLES, PAPERS_EPOCHS = 4096, 2
WARM, ROUNDS = 6, 30


def measure(
    shapes: Shapes,
    bits: int = 2,
    group_size: int = 64,
    sequences: int = 2,
    tokens: int = 2048,
    tuned_tokens: int = 4096,
    tune: str = "weights",
    device: str = "auto",
) -> dict[str, Any]:
    """Times, rates and memory of both, and what they come to for the whole model and the paper's amount of text."""
    where = pick_device(device)
    grid = Grid(bits, group_size, symmetric=False, search="minmax", scale_dtype=torch.bfloat16)
    peak = peak_tflops(where)
    with TemporaryDirectory() as scratch:
        block = block_step(shapes, grid, sequences, tokens, tune, where, peak, Path(scratch))
    report = {
        "machine": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "bits": bits,
        "group_size": group_size,
        "peak_tflops": peak,
        "block_ap": block,
        "e2e_qp": tuning_step(shapes, grid, tuned_tokens, where, peak),
    }
    return report


def block_step(
    shapes: Shapes, grid: Grid, sequences: int, tokens: int, tune: str, device: torch.device, peak: float, scratch: Path
) -> dict[str, Any]:
    """One step of Block-AP, its parts, and the extrapolation to PAPERS_EPOCHS x PAPERS_SAMPLES for all blocks: with
    hidden states on the GPU, and coming from memory and from files in `scratch`."""
    _forget_peak(device)
    block, run = random_block(shapes, tokens, device)
    layers = {path: _layer(module, grid, tune) for path, module in _linears(block)}
    schedule = Schedule(1, sequences, 1e-4, 1e-4, True, 0)
    stepper = Stepper(block, layers, run, partial(block_loss, each_token_alike=True), ALONE)
    table = paces(WARM + ROUNDS, 1e-4, 1e-4, device)
    inputs_STD = torch.randn(sequences, tokens, shapes.hidden, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        targets_STD = run(inputs_STD)
        forward_ms = timed(lambda: run(inputs_STD), device)
    with stepper.placed(PAPERS_EPOCHS * PAPERS_SAMPLES * tokens):
        step_ms = timed(lambda: stepper.step(inputs_STD, targets_STD, table[0], 0.0), device)
        run_ms = timed(lambda: stepper.there_and_back(inputs_STD, targets_STD), device)
        write_ms = timed(lambda: stepper.write(table[0], True), device)
        flow = fed(stepper, run, inputs_STD, table[0], scratch)
    weights = sum(layer.weights[0].numel() for layer in layers.values())
    flops = 6 * weights * sequences * tokens
    steps = shapes.layers * PAPERS_EPOCHS * PAPERS_SAMPLES // sequences
    passes = shapes.layers * 2 * PAPERS_SAMPLES // sequences
    here = (steps * step_ms + passes * forward_ms) / 6e4
    minutes_from = {
        place: (steps * flow[f"from_{place}_ms"] + passes * flow[f"pass_from_{place}_ms"]) / 6e4 for place in PLACES
    }
    return {
        "shape": [schedule.batch, tokens],
        "tune": tune,
        "step_ms": step_ms,
        "run_ms": run_ms,
        "write_ms": write_ms,
        "forward_ms": forward_ms,
        **flow,
        "tflops": flops / step_ms / 1e9,
        "share_of_peak": flops / step_ms / 1e9 / peak,
        "steps_minutes": steps * step_ms / 6e4,
        "with_passes_minutes": here,
        **{f"minutes_from_{place}": minutes for place, minutes in minutes_from.items()},
        **{f"idle_share_from_{place}": 1 - here / minutes for place, minutes in minutes_from.items()},
        "peak_gpu_bytes": peak_memory_bytes(device),
        "peak_host_bytes": peak_memory_bytes(torch.device("cpu")),
        "captured": stepper.replayed.graph is not None,
    }


def tuning_step(shapes: Shapes, grid: Grid, tokens: int, device: torch.device, peak: float) -> dict[str, Any]:
    """One micro-batch of E2E-QP there and back, on text's own loss, and PAPERS_SAMPLES of them."""
    _forget_peak(device)
    before = _allocated(device)
    model = random_packed(shapes, grid, tokens, device)
    layers = [module for module in model.modules() if isinstance(module, TunedLinear)]
    parameters: list[nn.Parameter] = [layer.scale for layer in layers]
    Keeping(model.model.layers, device, compile=True)
    micro = max(1, MICRO_TOKENS[device.type] // tokens)
    ids_ST = torch.randint(0, shapes.vocabulary, (micro, tokens))

    def logits(ids_ST: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids_ST.to(device), use_cache=False).logits
        return found

    def there_and_back() -> None:
        with torch.enable_grad():
            found_STV = logits(ids_ST)
            divergence(found_STV, None, ids_ST.to(device))[1].backward()  # type: ignore[no-untyped-call]

    trained = [Trained(parameter, 1e-5) for parameter in parameters]
    tuner = Tuner(logits, None, trained, ids_ST, ids_ST, TuningSchedule(1, micro, micro))
    held = _allocated(device) - before
    micro_ms = timed(there_and_back, device, rounds=3)
    state = tuner.state
    state_bytes = sum(t.nbytes for group in (state.parameters, state.mean, state.square) for t in group)
    gradient_bytes = sum(parameter.nbytes for parameter in parameters)
    weights = sum(layer.layer.out_features * layer.layer.in_features for layer in layers)
    flops = 6 * (weights + shapes.vocabulary * shapes.hidden) * micro * tokens
    return {
        "shape": [micro, tokens],
        "micro_batch_ms": micro_ms,
        "tflops": flops / micro_ms / 1e9,
        "share_of_peak": flops / micro_ms / 1e9 / peak,
        "minutes": PAPERS_SAMPLES / micro * micro_ms / 6e4,
        "weights_and_optimizer_bytes": held + gradient_bytes,
        "of_which_optimizer_bytes": state_bytes + gradient_bytes,
        "peak_gpu_bytes": peak_memory_bytes(device),
    }


def random_block(shapes: Shapes, tokens: int, device: torch.device) -> tuple[nn.Module, Run]:
    """A decoder block of these shapes with random weights, and what runs it on S x T x D."""
    from transformers import AutoModelForCausalLM

    config = shapes.config(1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    block = model.model.layers[0].to_empty(device=device).eval().requires_grad_(False)
    _fill(block)
    rotary = _rotary(model, device)
    places = torch.arange(tokens, device=device)[None]
    turns = rotary(torch.empty(1, tokens, 1, dtype=torch.bfloat16, device=device), places)

    def run(hidden_STD: Tensor) -> Tensor:
        found = block(hidden_STD, position_embeddings=turns, attention_mask=None, position_ids=places)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output

    return block, run


def random_packed(shapes: Shapes, grid: Grid, tokens: int, device: torch.device) -> Any:
    """A model whose blocks' matrices are packed random codes, ready to be tuned."""
    from transformers import AutoModelForCausalLM

    config = shapes.config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for path, module in _linears(model.model.layers):
        rows, columns = module.out_features, module.in_features
        layer = _random_packed_layer(rows, columns, grid, device)
        tuned = TunedLinear(layer, path, zeros=False).to(device).prepare()
        model.model.layers.set_submodule(path, tuned)
    for module in model.modules():
        if any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module.to_empty(device=device, recurse=False)
            module.requires_grad_(False)
            _fill(module)
    model.model.rotary_emb = _rotary(model, device)
    return model.eval()


def _rotary(model: Any, device: torch.device) -> nn.Module:
    with torch.device(device):
        made: nn.Module = type(model.model.rotary_emb)(config=model.config)
    return made


def _random_packed_layer(rows: int, columns: int, grid: Grid, device: torch.device) -> CompressedLinear:
    """Random bits are random codes; scales make the outputs of unit inputs units again."""
    format = formats.by_name("compressed-tensors")
    groups = columns // grid.width(columns)
    scale = 2 / (grid.top * columns**0.5)
    one = Solution(
        torch.zeros(rows, columns, dtype=torch.uint8, device=device),
        torch.full((rows, groups), scale, dtype=grid.scale_dtype, device=device),
        torch.randint(1, grid.top, (rows, groups), dtype=torch.uint8, device=device),
        grid,
        torch.zeros(rows, device=device),
    )
    tensors = format.pack(one)
    tensors["weight_packed"].random_(-(2**31), 2**31 - 1)
    return CompressedLinear.from_tensors(format, grid, tensors, None, torch.bfloat16, "reference")


def timed(work: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    """The median milliseconds of a call, after WARM of them (of fewer rounds: one)."""
    for _ in range(WARM if rounds == ROUNDS else 1):
        work()
    if device.type != "cuda":
        times = []
        for _ in range(3):
            began = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - began))
        return sorted(times)[1]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize(device)
    times = sorted(one.elapsed_time(other) for one, other in pairwise(marks))
    return times[rounds // 2]


def rows(report: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What the command shows: each figure of the two parts."""
    one, other = report["block_ap"], report["e2e_qp"]
    for name in dict.fromkeys((*one, *other)):
        yield name, one.get(name), other.get(name)


def _layer(module: nn.Linear, grid: Grid, tune: str) -> Trainable:
    """A matrix that begins on the min-max grid of random weights."""
    weight_RC = module.weight.detach().float()
    grouped_RGN = weight_RC.unflatten(-1, (-1, grid.width(weight_RC.shape[1])))
    low_RG, high_RG = grouped_RGN.amin(-1), grouped_RGN.amax(-1)
    scale_RG = ((high_RG - low_RG) / grid.top).to(grid.scale_dtype)
    zero_RG = (-low_RG / scale_RG.float()).round().clamp(0, grid.top)
    codes_RGN = grid.encode(grouped_RGN, scale_RG.float().unsqueeze(-1), zero_RG.unsqueeze(-1))
    loss_R = torch.zeros(len(weight_RC), device=weight_RC.device)
    start = Solution(codes_RGN.flatten(-2).to(torch.uint8), scale_RG, zero_RG.to(torch.uint8), grid, loss_R)
    if tune == "rounding":
        return TrainedRounding(start, weight_RC)
    return TrainedGrid(start, beginning(start, weight_RC, NEAR), 0, relative=True)


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(path, child) for path, child in module.named_modules() if isinstance(child, nn.Linear)]


@torch.no_grad()
def _fill(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        else:
            parameter.fill_(1.0)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
