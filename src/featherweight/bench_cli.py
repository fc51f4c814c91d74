"""`featherweight bench`: what compressing, training and running cost on this machine, on random weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from featherweight import console
from featherweight.errors import RequestError

app = typer.Typer(no_args_is_help=True, help=__doc__)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="With zero points.")]
ON_GPU = (("llama-2-7b", "llama-2-70b", "llama-3-8b", "qwen3-8b"), "1,8,16,32,64,256,1024,4096")
ON_CPU = (("2048x2048",), "1,8,64")


@app.command()
def compress(
    shapes: Annotated[str, typer.Option(help="Whose shapes: llama-2-7b, llama-3-70b, qwen3-30b-a3b, ...")],
    blocks: Annotated[
        int, typer.Option(min=1, help="Blocks that are really compressed; the rest is extrapolated.")
    ] = 3,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    recipe: Annotated[str, typer.Option(help="A recipe by name.")] = "default",
    device: Device = "auto",
    memory: Annotated[
        Literal["auto", "low"], typer.Option(help='"auto", or "low": what can be kept elsewhere is not on the GPU.')
    ] = "auto",
    scratch: Annotated[Path | None, typer.Option(help="Where the checkpoint is put meanwhile.")] = None,
    peer: Annotated[bool, typer.Option(help="Run llm-compressor too, where it is installed.")] = True,
) -> None:
    """How long `compress` takes on a model of these shapes: by phase, in all, and against the machine's peaks."""
    from featherweight import recipes
    from featherweight.benchmarks import compress as bench
    from featherweight.benchmarks.shapes import named

    chosen = recipes.by_name(recipe).but(samples=samples, tokens=tokens)
    report = bench.measure(named(shapes), chosen, blocks, device, memory, scratch, peer)
    if report is not None:  # of several processes one tells
        console.table(("seconds", shapes), bench.rows(report))
        console.last_line(asdict(report))


@app.command()
def kernels(
    shapes: Annotated[
        list[str] | None, typer.Option(help="A model (llama-3-8b), or inputs x outputs (4096x12288); repeatable.")
    ] = None,
    bits: Annotated[int, typer.Option(help="Of the weights, 2 to 8.")] = 4,
    group_size: Annotated[str, typer.Option(help="Inputs sharing a scale, or 'row'.")] = "128",
    asymmetric: Asymmetric = False,
    sparsity: Annotated[str | None, typer.Option(help="Of each run of M weights N are kept: 2:4, or another.")] = None,
    m: Annotated[str | None, typer.Option(help="Rows of activations, as 1,16,256.")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Only these of our kernels; repeatable.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the activations: bfloat16 or float16.")] = "bfloat16",
    device: Device = "auto",
) -> None:
    """Microseconds of one product: ours, the library's dense one, and every peer that is installed."""
    import torch

    from featherweight.benchmarks import kernels as bench

    where = _device(device)
    usual_shapes, usual_m = ON_GPU if where.type == "cuda" else ON_CPU
    if dtype not in ("bfloat16", "float16"):
        raise RequestError(f"activations are bfloat16 or float16, not {dtype}.")
    plan = bench.Plan(
        *(_grid(bits, group_size, asymmetric), _numbers(m or usual_m), getattr(torch, dtype), where),
        *(tuple(kernel or ()), _pattern(sparsity)),
    )
    found = bench.run(shapes or usual_shapes, plan, _say_row)
    columns = ["layer", "kernel", "tokens", "us", "times_dense", "gbps", "of_read", "of_peak", "error"]
    rows = [row for row in found["rows"] if "us" in row]
    console.table(columns, [[row.get(column) for column in columns] for row in rows])
    console.last_line(found)


@app.command()
def generate(
    shapes: Annotated[str, typer.Option(help="Of a model: llama-3-8b, qwen3-8b, ...")] = "llama-3-8b",
    bits: Annotated[int, typer.Option(help="Of the weights, 2 to 8.")] = 4,
    group_size: Annotated[str, typer.Option(help="Inputs sharing a scale, or 'row'.")] = "128",
    asymmetric: Asymmetric = False,
    head_bits: Annotated[int, typer.Option(help="Of the head; 16 leaves it.")] = 16,
    kernel: Annotated[str, typer.Option(help="auto, or the kernel that multiplies.")] = "auto",
    context: Annotated[int, typer.Option(help="Tokens before the first that is timed.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens that are timed.")] = 64,
    blocks: Annotated[int | None, typer.Option(help="Only so many of the model's blocks.")] = None,
    step: Annotated[
        Literal["fused", "modules", "compiled"],
        typer.Option(help="Of a token: fused, by transformers' own modules, or those compiled."),
    ] = "fused",
    device: Device = "auto",
) -> None:
    """Tokens a second of a random model at batch 1, compressed and in bfloat16."""
    from featherweight.benchmarks import generate as bench

    plan = bench.Plan(
        *(shapes, _grid(bits, group_size, asymmetric), _device(device), kernel, blocks, head_bits),
        *(context, tokens, step),
    )
    found = bench.run(plan)
    columns = ["weights", "tokens_per_s", "ms_per_token", "read_gbps", "share_of_read", "memory_gib", "until_ready_s"]
    console.table(columns, [[row[column] for column in columns] for row in found["rows"]])
    console.last_line(found)


@app.command()
def qat(
    shapes: Annotated[str, typer.Option(help="Whose shapes: llama-2-7b, llama-3-8b, qwen3-8b, ...")],
    bits: Annotated[int, typer.Option(help="Of a code.")] = 2,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale.")] = 64,
    sequences: Annotated[int, typer.Option(min=1, help="In a step of Block-AP.")] = 2,
    tokens: Annotated[int, typer.Option(min=2, help="In each of them.")] = 2048,
    tuned_tokens: Annotated[int, typer.Option(min=2, help="In a window of E2E-QP.")] = 4096,
    tune: Annotated[str, typer.Option(help="What Block-AP trains: weights or rounding.")] = "weights",
    device: Device = "auto",
) -> None:
    """What a step of Block-AP and of E2E-QP costs on a model of these shapes, and both in all."""
    from featherweight.benchmarks import qat as bench
    from featherweight.benchmarks.shapes import named

    report = bench.measure(named(shapes), bits, group_size, sequences, tokens, tuned_tokens, tune, device)
    console.table((shapes, "Block-AP", "E2E-QP"), list(bench.rows(report)))
    console.last_line(report)


def _say_row(row: dict[str, Any]) -> None:
    """A row as it is measured: the table comes when all are."""
    what = row.get("failed") or f"{row['tokens']} tokens: {row['us']:.1f} us, {row['times_dense']:.2f} times dense"
    console.say(f"{row['layer']}, {row['kernel']}, {what}")


def _pattern(sparsity: str | None) -> Any:
    from featherweight.core.rules import Pattern

    found = None if sparsity is None else Pattern.of_text(sparsity)
    if found is not None and not found.of:
        raise RequestError(f"--sparsity {sparsity}: products are timed with N:M sparsity alone, such as 2:4.")
    return found


def _grid(bits: int, group_size: str, asymmetric: bool) -> Any:
    from featherweight.core.rules import Grid

    if group_size != "row" and not (group_size.isascii() and group_size.isdigit()):
        raise RequestError(f"group size must be a number or 'row', not {group_size!r}.")
    return Grid(bits, None if group_size == "row" else int(group_size), not asymmetric)


def _numbers(text: str) -> tuple[int, ...]:
    """1,16,256 as numbers; RequestError for anything else."""
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise RequestError(f"--m {text!r}: give whole numbers of 1 or more, as 1,16,256.")
    return tuple(int(part) for part in parts)


def _device(name: str) -> Any:
    from featherweight.stream.device import pick_device

    return pick_device(name)
