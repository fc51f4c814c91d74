"""The command line. Progress and tables go to stderr; the last line of stdout is one JSON object."""

from __future__ import annotations

import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from featherweight import bench_cli, compress_cli, console, laws_cli
from featherweight.errors import FallbackWarning, FeatherweightError, RequestError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command()(compress_cli.compress)
app.add_typer(laws_cli.app, name="laws")
app.add_typer(bench_cli.app, name="bench")

Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a hub name, feather-tiny or feather-tiny-moe.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Texts = Annotated[
    list[str] | None, typer.Option(help="Text file (.txt, .jsonl, .parquet) or hub data set; repeatable.")
]


@app.command()
def tune(
    out: Annotated[Path, typer.Argument(help="A folder that compress wrote; repeat the command to resume.")],
    text: Annotated[list[str], typer.Option(help="Text file or hub data set to train on; repeatable.")],
    to: Annotated[Path | None, typer.Option(help="The folder to write; OUT itself without.")] = None,
    against: Annotated[str | None, typer.Option(help="The dense model to come near; else the text itself.")] = None,
    samples: Annotated[int, typer.Option(help="Windows of text, held-out ones among them.")] = 256,
    tokens: Annotated[int | None, typer.Option(help="Tokens in each (2048, or the model's positions).")] = None,
    held_out: Annotated[float, typer.Option(help="The share of the text that chooses what is kept.")] = 0.125,
    epochs: Annotated[int, typer.Option(help="Passes over the windows.")] = 1,
    batch: Annotated[int, typer.Option(help="Windows in a step.")] = 8,
    rate: Annotated[float, typer.Option(help="The first rate, relative to each scale.")] = 1e-3,
    zeros: Annotated[bool, typer.Option("--zeros", help="Train zero points too.")] = False,
    norms: Annotated[bool, typer.Option("--norms", help="Train norms too.")] = False,
    weights: Annotated[bool, typer.Option("--weights", help="Train weights too, as floats; masks stay.")] = False,
    weight_rate: Annotated[float, typer.Option(help="Their first rate, in steps of the grid.")] = 0.03,
    text_share: Annotated[float, typer.Option(help="Of the loss, beside --against: the text's own part.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the windows and their order.")] = 0,
    shard: Annotated[
        bool | None, typer.Option(help="Of several processes each holds a part of the models (if too large for one).")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train the scales of OUT on text, its codes as they are."""
    from featherweight import api
    from featherweight.stream.parallel import joined
    from featherweight.stream.tune import Tuning

    training = samples, tokens, held_out, epochs, batch, rate, zeros, norms, seed, weights, weight_rate, text_share
    settings = Tuning(*training)
    with joined() as world:
        if not world.leads:  # process 0 tells
            api.tune(out, text, to, against, settings, device, shard=shard)
            return
        try:
            with console.progress() as tell:
                report = api.tune(out, text, to, against, settings, device, tell, shard)
        except KeyboardInterrupt:
            console.say("stopped; repeat the command to go on.")
            raise typer.Exit(1) from None
        console.last_line(report)


@app.command("eval")
def evaluate(
    model: Model,
    text: Texts = None,
    context: Annotated[int | None, typer.Option(help="Tokens in a window (2048, or the model's positions).")] = None,
    against: Annotated[str | None, typer.Option(help="The dense model, for KL and top-1 agreement.")] = None,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Zero-shot questions (.jsonl); repeatable.")] = None,
    items: Annotated[int | None, typer.Option(help="Only the first so many questions of each.")] = None,
    device: Device = "auto",
) -> None:
    """Perplexity of MODEL, bits per weight, its distance from a dense model, and zero-shot accuracy."""
    from featherweight import api

    with console.progress() as tell:
        report = api.evaluate(
            model, text or ["builtin:evaluation"], context, against, windows, device, tell, task or (), items
        )
    for name, found in report["tasks"].items():
        console.say(f"{name}: {found['accuracy']:.3f} +- {found['error']:.3f} of {found['items']} items")
    bos = report.pop("bos")
    console.say(
        "no BOS in front of windows (the tokenizer adds none)"
        if bos is None
        else f"BOS (id {bos}) in front of every window"
    )
    console.last_line(report)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Device = "auto",
) -> None:
    """Print MODEL's continuation of PROMPT, and how fast it was written."""
    from featherweight import api
    from featherweight.evaluate import write
    from featherweight.models.load import load_tokenizer

    written = write(api.load(model, device), load_tokenizer(model), prompt, max_new_tokens, temperature, seed)
    typer.echo(prompt + written.text)
    if written.tokens_per_s is not None:
        console.say(f"{written.tokens_per_s:.1f} tokens/s, {written.read_gbps:.1f} GB/s of weights read")
    rates = {"tokens_per_s": written.tokens_per_s, "read_gbps": written.read_gbps}
    console.last_line({"model": model, "prompt": prompt, **asdict(written), **rates})


@app.command()
def inspect(model: Model) -> None:
    """List MODEL's compressed matrices from its files alone."""
    from featherweight import api

    found = api.inspect(model)
    columns = ["name", "shape", "bits", "group_size", "symmetric", "sparsity", "bytes", "loss"]
    if all(row["sparsity"] is None for row in found["matrices"]):
        columns.remove("sparsity")
    console.table(columns, [[row[column] for column in columns] for row in found["matrices"]], " x ")
    console.last_line(found)


@app.command()
def demo(device: Device = "auto") -> None:
    """The embedded model at 4, 3 and 2 bits, rounded and compensated, in about a minute."""
    from featherweight import demo as demonstration

    with console.progress() as tell:
        found = demonstration.run(device, tell)
    rows = [["dense", "16", "16.00", f"{found['dense_perplexity']:.2f}", "0", ""]]
    for row in found["rows"]:
        numbers = [
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['kl_nats']:.4f}",
            f"{row['seconds']:.1f}",
        ]
        rows.append([row["method"], str(row["bits"]), *numbers])
    console.table(("method", "bits", "bits per weight", "perplexity", "KL (nats)", "seconds"), rows)
    console.last_line(found)


@app.command("check-kernels")
def check_kernels(
    dtype: Annotated[str, typer.Option(help="Of the activations: bfloat16, float16 or float32.")] = "bfloat16",
    sparsity: Annotated[str | None, typer.Option(help="Of the weights, such as 2:4.")] = None,
    device: Device = "auto",
) -> None:
    """What multiplies by 4-bit weights (groups of 128) on this machine, and why not the others."""
    import torch

    from featherweight import kernels
    from featherweight.core.rules import Grid, Joint, Pattern, Rule
    from featherweight.formats import by_name

    if dtype not in ("bfloat16", "float16", "float32"):
        raise RequestError(f"activations are bfloat16, float16 or float32, not {dtype}.")
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    rule: Rule = Grid(4, 128) if sparsity is None else Joint(Grid(4, 128), Pattern.of_text(sparsity))
    format = by_name("compressed-tensors" if sparsity is None else "sparse")
    layer = (format, rule, 4096, 4096, getattr(torch, dtype), where)
    found = kernels.machine(*layer)
    console.table(("kernel", "runs", "why not"), [[name, "no" if why else "yes", why] for name, why in found.items()])
    console.last_line({"device": where, "dtype": dtype, "auto": kernels.pick(*layer).name, "refusals": found})


def main() -> None:
    """Runs the command; our own errors become one sentence on stderr and exit code 2 (bad request) or 1 (failed)."""
    warnings.simplefilter("always", FallbackWarning)
    warnings.showwarning = lambda message, *_rest, **_named: console.say(f"warning: {message}")
    try:
        app()
    except RequestError as error:
        console.say(f"error: {error}")
        sys.exit(2)
    except FeatherweightError as error:
        console.say(f"failed: {error}")
        sys.exit(1)
