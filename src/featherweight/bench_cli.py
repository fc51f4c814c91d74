"""`featherweight bench`: what compressing, training and running cost on this machine, on random weights."""

from __future__ import annotations

from typing import Annotated

import typer

from featherweight import console

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("qat")
def bench_qat(
    shapes: Annotated[str, typer.Option(help="Whose shapes: llama-2-7b, llama-3-8b, qwen3-8b, ...")],
    bits: Annotated[int, typer.Option(help="Of a code.")] = 2,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale.")] = 64,
    sequences: Annotated[int, typer.Option(min=1, help="In a step of Block-AP.")] = 2,
    tokens: Annotated[int, typer.Option(min=2, help="In each of them.")] = 2048,
    tuned_tokens: Annotated[int, typer.Option(min=2, help="In a window of E2E-QP.")] = 4096,
    tune: Annotated[str, typer.Option(help="What Block-AP trains: weights or rounding.")] = "weights",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """What a step of Block-AP and of E2E-QP costs on a model of these shapes, and both in all."""
    from featherweight.benchmarks import qat
    from featherweight.benchmarks.shapes import named

    report = qat.measure(named(shapes), bits, group_size, sequences, tokens, tuned_tokens, tune, device)
    console.table((shapes, "Block-AP", "E2E-QP"), list(qat.rows(report)))
    console.last_line(report)
