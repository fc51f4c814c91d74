"""`featherweight compress`: an option for every field of a recipe, and what is asked for by more than one name."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from featherweight import console, recipes
from featherweight.errors import RequestError
from featherweight.recipe import FLOAT_BITS, Recipe


def compress(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, a hub name, feather-tiny or feather-tiny-moe.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; repeat the command to resume.")],
    recipe: Annotated[str, typer.Option(help=f"{', '.join(recipes.RECIPES)}, or module:function.")] = "default",
    bits: Annotated[float | None, typer.Option(help="1.58, 2, 3, 4, 5, 6, 7 or 8.")] = None,
    group_size: Annotated[str | None, typer.Option(help="Inputs sharing a scale, or 'row'.")] = None,
    asymmetric: Annotated[bool | None, typer.Option("--asymmetric/--symmetric", help="Store zero points.")] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(help="Zeros: a share (0.5), or kept weights (2:4); without --bits, floats stay."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="Of all shards, as 60MB: each matrix gets bits of its own.")] = None,
    average_bits: Annotated[float | None, typer.Option(help="Bits a weight on disk, each matrix its own.")] = None,
    non_uniform: Annotated[
        bool | None, typer.Option("--non-uniform", help="With --sparsity: each matrix its own share.")
    ] = None,
    embedding_bits: Annotated[float | None, typer.Option(help="Of embedding and head; 16 leaves them.")] = None,
    method: Annotated[str | None, typer.Option(help="gptq, obq, rtn or block-ap.")] = None,
    start: Annotated[str | None, typer.Option(help="What block-ap begins with: gptq, obq or rtn.")] = None,
    tune: Annotated[str | None, typer.Option(help="What block-ap trains: weights or rounding.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Of block-ap, over the samples that are not held out.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples in a step of block-ap.")] = None,
    weight_rate: Annotated[float | None, typer.Option(help="Block-ap's first rate for weights.")] = None,
    scale_rate: Annotated[float | None, typer.Option(help="Block-ap's first rate for scales and zeros.")] = None,
    held_out: Annotated[float | None, typer.Option(help="The share of the text and samples held out.")] = None,
    mask: Annotated[str | None, typer.Option(help="Zeros chosen by admm, sparsegpt, wanda or obs.")] = None,
    resolve: Annotated[int | None, typer.Option(help="Conjugate-gradient steps on the weights kept.")] = None,
    swaps: Annotated[int | None, typer.Option(help="Rounds of swapping kept for pruned weights.")] = None,
    format: Annotated[
        str | None, typer.Option(help="auto, compressed-tensors, gptq, gptq_v2, sparse, sub1 or dense.")
    ] = None,
    calibration: Annotated[list[str] | None, typer.Option(help="Text file or hub data set; repeatable.")] = None,
    chat_template: Annotated[
        bool | None, typer.Option("--chat-template", help="Wrap calibration documents as chats.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens in each.")] = None,
    search: Annotated[str | None, typer.Option(help="Scales by hessian, mse or minmax.")] = None,
    order: Annotated[str | None, typer.Option(help="Columns by activation, pivot or natural order.")] = None,
    scales_from: Annotated[str | None, typer.Option(help="original or updated weights.")] = None,
    damping: Annotated[float | None, typer.Option(help="Added to H's diagonal, relative to its mean.")] = None,
    refine: Annotated[int | None, typer.Option(help="Rounds of descent after the sweep.")] = None,
    target: Annotated[str | None, typer.Option(help="Match outputs on drifted or original inputs.")] = None,
    pull: Annotated[float | None, typer.Option(help="With target original: the share of the drift to undo.")] = None,
    sink_share: Annotated[
        float | None, typer.Option(help="The first tokens' least share of what attention reads.")
    ] = None,
    guide: Annotated[
        float | None, typer.Option(help="Weigh tokens by their gradients to this power (0: all alike).")
    ] = None,
    true_sequential: Annotated[
        bool | None, typer.Option("--true-sequential", help="Re-collect inputs inside a block.")
    ] = None,
    diverged: Annotated[
        str | None, typer.Option(help="A block trained to a loss that is not finite: restore (it) or error.")
    ] = None,
    starved: Annotated[
        str | None,
        typer.Option(help="Experts with fewer tokens than inputs: shared (others' count too), round or error."),
    ] = None,
    route_all: Annotated[
        bool | None, typer.Option("--route-all", help="Calibrate every expert on every token.")
    ] = None,
    drop_special: Annotated[
        bool | None, typer.Option("--drop-special", help="Calibrate experts without special tokens.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the calibration windows.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    memory: Annotated[
        Literal["auto", "low"], typer.Option(help="low: slower, with less of it on a GPU, experts in the files.")
    ] = "auto",
) -> None:
    """Compress MODEL into the folder OUT."""
    asked = {name: value for name, value in locals().items() if name in Recipe.__dataclass_fields__}
    asked |= {"bits": _bits(bits, sparsity), "embedding_bits": _whole(embedding_bits)}
    asked["size_bytes"] = None if size is None else int(console.quantity("size", size, console.BYTES))
    asked["symmetric"] = None if asymmetric is None else not asymmetric
    asked["calibration"] = tuple(calibration) if calibration else None
    asked["group_size"] = None  # where None means rows, and not "as the recipe has it"
    _run(model, out, _with_group_size(recipes.by_name(recipe).but(**asked), group_size), device, memory)


def _run(model: str, out: Path, recipe: Recipe, device: str, memory: Literal["auto", "low"]) -> None:
    from featherweight import api
    from featherweight.stream.parallel import joined

    with joined() as world:
        if not world.leads:  # process 0 tells
            api.compress(model, out, recipe, device, memory=memory)
            return
        console.say(f"recipe {recipe.digest()}: {json.dumps(recipe.as_dict())}")
        try:
            with console.progress() as tell:
                result = api.compress(model, out, recipe, device, tell, memory)
        except KeyboardInterrupt:
            console.say(f"stopped; finished blocks are kept in {out}: repeat the command to go on.")
            raise typer.Exit(1) from None
        console.table(("phase", "seconds"), list(result.phase_seconds.items()))
        console.last_line(asdict(result))


def _bits(bits: float | None, sparsity: str | None) -> float | None:
    """As asked for; with sparsity alone, weights stay floats."""
    return _whole(bits) if bits is not None or sparsity is None else FLOAT_BITS


def _whole(bits: float | None) -> float | None:
    """A whole number as one: it goes into the recipe's hash."""
    return int(bits) if bits is not None and bits.is_integer() else bits


def _with_group_size(recipe: Recipe, group_size: str | None) -> Recipe:
    if group_size is None:
        return recipe
    if group_size == "row":
        return replace(recipe, group_size=None)
    if not (group_size.isascii() and group_size.isdigit()):
        raise RequestError(f"group size must be a number or 'row', not {group_size!r}.")
    return replace(recipe, group_size=int(group_size))
