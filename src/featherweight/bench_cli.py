"""`featherweight bench`: what compressing, training and running cost on this machine, on random weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from featherweight import console

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("compress")
def bench_compress(
    shapes: Annotated[str, typer.Option(help="Whose shapes: llama-2-7b, llama-3-70b, qwen3-30b-a3b, ...")],
    blocks: Annotated[
        int, typer.Option(min=1, help="Blocks that are really compressed; the rest is extrapolated.")
    ] = 3,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    recipe: Annotated[str, typer.Option(help="A recipe by name.")] = "default",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    memory: Annotated[
        Literal["auto", "low"], typer.Option(help='"auto", or "low": what can be kept elsewhere is not on the GPU.')
    ] = "auto",
    scratch: Annotated[Path | None, typer.Option(help="Where the checkpoint is put meanwhile.")] = None,
    peer: Annotated[bool, typer.Option(help="Run llm-compressor too, where it is installed.")] = True,
) -> None:
    """How long `compress` takes on a model of these shapes: by phase, in all, and against the machine's peaks."""
    from featherweight import recipes
    from featherweight.benchmarks import compress
    from featherweight.benchmarks.shapes import named

    chosen = recipes.by_name(recipe).but(samples=samples, tokens=tokens)
    report = compress.measure(named(shapes), chosen, blocks, device, memory, scratch, peer)
    console.table(("seconds", shapes), compress.rows(report))
    console.last_line(asdict(report))
