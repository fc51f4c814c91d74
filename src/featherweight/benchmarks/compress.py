"""How long `compress` takes on a model of real shapes with random weights: the whole pipeline, nothing downloaded.

The floor it is held against is what no implementation of this recipe's method can leave out, at this machine's measured
peaks: two forward passes (the original's and the compressed model's), one Hessian for every distinct input, both in
bf16 (or, on a CPU, float32), and one factor and one sweep of every matrix in float32.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from featherweight.benchmarks.shapes import Shapes
from featherweight.benchmarks.timing import peak_tflops
from featherweight.recipe import Recipe
from featherweight.stream.compress import Memory, Result, compress
from featherweight.stream.device import peak_memory_bytes
from featherweight.stream.folder import JOURNAL
from featherweight.stream.parallel import joined
from featherweight.stream.rehearsal import waking

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Report:
    """What a run took and what it is measured against; seconds and bytes.

    Attributes:
        seconds: of the run as it was; block_s: of one block but the first, whose phases are in phase_s ("write" goes on
            beside the others on a GPU and is not in block_s); first_block_s: of the first, which compiles or loads all
            kernels; outside_s: before the first and after the last.
        whole_s: of a model with all its blocks, everything outside them as measured.
        floor_s: of one block, at the measured peaks (TFLOP/s) of so many devices; share_of_floor: floor_s / block_s.
        peak_gpu_bytes: None on a CPU.
        peer_s: llm-compressor's on the same files, None where it cannot be imported or was not asked for.
    """

    processes: int
    blocks: int
    layers: int
    samples: int
    tokens: int
    seconds: float
    block_s: float
    first_block_s: float
    outside_s: float
    phase_s: dict[str, float]
    whole_s: float
    floor_s: float
    share_of_floor: float
    peaks_tflops: dict[str, float]
    peak_gpu_bytes: int | None
    peak_host_bytes: int
    peer_s: float | None
    device: str
    torch: str


def measure(
    shapes: Shapes,
    recipe: Recipe,
    blocks: int,
    device: str = "auto",
    memory: Memory = "auto",
    scratch: Path | None = None,
    peer: bool = True,
) -> Report | None:
    """Writes a checkpoint of `blocks` random blocks into a folder under `scratch`, compresses it on random tokens, and
    removes both. With `peer`, llm-compressor does the same afterwards where it is installed, in one process alone.

    Of several processes that torchrun started, all call it and one writes; None for the others.
    """
    assert recipe.tokens is not None
    with joined() as world, tempfile.TemporaryDirectory(dir=scratch, prefix="featherweight-bench-") as own:
        folder, on = Path(world.first(own)), world.device(device)
        if on.type == "cuda":  # as the family's modules below, what is imported is there before the clock runs
            waking()
        model, out = folder / "model", folder / "out"
        if world.leads:
            write_model(shapes, blocks, model, on)
        else:  # the family's modules are imported before the clock runs, as the leader's are
            make_model(shapes, 1, torch.device("meta"))
        draw = torch.Generator().manual_seed(0)
        ids_ST = torch.randint(shapes.vocabulary, (recipe.samples, recipe.tokens), generator=draw)
        peaks = {dtype: peak_tflops(on, getattr(torch, dtype)) for dtype in ("bfloat16", "float32")}
        if on.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        world.wait()
        result = compress(model, out, recipe, device, ids_ST=ids_ST, memory=memory)
        lines = _block_lines(out)
        world.wait()
        if not world.leads:
            return None
        alone = peer and world.size == 1 and importlib.util.find_spec("llmcompressor")
        peer_s = _peer_seconds(model, recipe) if alone else None
    return _report(shapes, recipe, blocks, on, result, lines, peaks, peer_s, world.size)


def write_model(shapes: Shapes, blocks: int, folder: Path, device: torch.device) -> None:
    """A checkpoint of random weights with so many blocks, in bf16, as the family lays it out."""
    torch.manual_seed(0)
    make_model(shapes, blocks, device).save_pretrained(folder, max_shard_size="2GB")


def make_model(shapes: Shapes, blocks: int, device: torch.device) -> PreTrainedModel:
    """So many blocks with the weights that their family begins with, in bf16."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shapes.config(blocks), dtype=torch.bfloat16)
    return model


def _block_lines(out: Path) -> list[dict[str, float]]:
    """Seconds by phase of every block, from the journal."""
    lines = [json.loads(line) for line in (out / JOURNAL).read_text(encoding="utf-8").splitlines()]
    return [line["phase_seconds"] for line in lines if "phase_seconds" in line and line["block"] >= 0]


def _report(
    shapes: Shapes,
    recipe: Recipe,
    blocks: int,
    device: torch.device,
    result: Result,
    lines: list[dict[str, float]],
    peaks: dict[str, float],
    peer_s: float | None,
    processes: int,
) -> Report:
    usual = lines[1:] or lines  # the first has compiling and everything in front of it
    names = {name: None for line in usual for name in line}
    phase_s = {name: sum(line.get(name, 0.0) for line in usual) / len(usual) for name in names}
    on_gpu = device.type == "cuda"

    def without_write(line: Mapping[str, float]) -> float:
        return sum(took for name, took in line.items() if not (on_gpu and name == "write"))

    block_s, first_s = without_write(phase_s), without_write(lines[0])
    floor_s = floor_seconds(shapes, recipe, peaks["bfloat16" if on_gpu else "float32"], peaks["float32"]) / processes
    return Report(
        processes=processes,
        blocks=blocks,
        layers=shapes.layers,
        samples=recipe.samples,
        tokens=recipe.tokens or 0,
        seconds=round(result.seconds, 2),
        block_s=round(block_s, 3),
        first_block_s=round(first_s, 3),
        outside_s=round(result.seconds - sum(map(without_write, lines)), 3),
        phase_s={name: round(took, 4) for name, took in phase_s.items()},
        whole_s=round(result.seconds + (shapes.layers - blocks) * block_s, 1),
        floor_s=round(floor_s, 3),
        share_of_floor=round(floor_s / block_s, 3),
        peaks_tflops={name: round(found, 1) for name, found in peaks.items()},
        peak_gpu_bytes=result.peak_memory_bytes if on_gpu else None,
        peak_host_bytes=peak_memory_bytes(torch.device("cpu")),
        peer_s=None if peer_s is None else round(peer_s, 2),
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        torch=torch.__version__,
    )


def floor_seconds(shapes: Shapes, recipe: Recipe, product_tflops: float, solve_tflops: float) -> float:
    """Of one block (see this file's top); the peaks are of the passes and Hessians, and of the solver."""
    assert recipe.tokens is not None
    tokens, experts = recipe.samples * recipe.tokens, max(shapes.experts, 1)
    serves = {"gate_up": shapes.experts_per_token or 1, "down": shapes.experts_per_token or 1}
    copies = {"gate_up": experts, "down": experts}
    products = 2 * tokens * recipe.tokens * shapes.heads * shapes.head_dim * 2  # causal scores and values, two passes
    solving = 0.0
    for name, (columns, rows) in shapes.linears().items():
        products += 2 * 2 * tokens * serves.get(name, 1) * columns * rows
        products += 2 * tokens * serves.get(name, 1) * columns**2
        solving += copies.get(name, 1) * (2 * columns**3 / 3 + rows * columns**2)
    return (products / product_tflops + solving / solve_tflops) / 1e12


def _peer_seconds(model: Path, recipe: Recipe) -> float:
    """llm-compressor's GPTQ, W4A16 in groups of 128, on as many random tokens; reading and writing included."""
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
    from tokenizers import Tokenizer, models
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    began = time.perf_counter()
    words = Tokenizer(models.WordLevel({"a": 0, "<pad>": 1}, unk_token="a"))  # asked for, and never used
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    ids_ST = torch.randint(loaded.config.vocab_size, (recipe.samples, recipe.tokens or 0))
    windows = [{"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T)} for ids_T in ids_ST]
    chosen = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head", "re:.*mlp.gate$"])
    oneshot(
        model=loaded,
        dataset=DataLoader(windows, batch_size=1),  # type: ignore[arg-type]
        recipe=chosen,
        processor=tokenizer,
        max_seq_length=ids_ST.shape[1],
        num_calibration_samples=len(ids_ST),
        output_dir=str(model.parent / "peer"),
    )
    return time.perf_counter() - began


def rows(report: Report) -> list[tuple[str, Any]]:
    """The report as lines of a table."""
    phases: Mapping[str, float] = report.phase_s
    found: list[tuple[str, Any]] = [(f"a block: {name}", took) for name, took in phases.items()]
    gib = 2.0**30
    found += [
        ("a block", report.block_s),
        ("the first block", report.first_block_s),
        ("outside the blocks", report.outside_s),
        ("its floor at the measured peaks", report.floor_s),
        (f"as run, {report.blocks} blocks", report.seconds),
        (f"all {report.layers} blocks", report.whole_s),
        ("llm-compressor, as run", report.peer_s),
        ("peak memory, GPU (GiB)", None if report.peak_gpu_bytes is None else report.peak_gpu_bytes / gib),
        ("peak memory, host (GiB)", report.peak_host_bytes / gib),
    ]
    return found
