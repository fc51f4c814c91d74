"""The recipes we ship, by name: functions that return a Recipe. `--recipe NAME` or `--recipe your.module:function`."""

from __future__ import annotations

import importlib
from dataclasses import replace

from featherweight.errors import RequestError
from featherweight.recipe import Recipe


def default() -> Recipe:
    """GPTQ towards the original model's outputs and residual stream, with scales searched by their price, ten times the
    usual damping, attention's sinks weighed up and a round of descent: what `compress` does unless told otherwise."""
    return Recipe()


def best() -> Recipe:
    """The default with tokens weighed by their gradients and three rounds of descent: the least KL we know of, where
    the model fits on the device as a whole and twice the time is there."""
    return Recipe(guide=0.5, refine=3)


def fast() -> Recipe:
    """The default without the descent after the sweep and the second stream, on fewer, shorter samples."""
    return Recipe(refine=0, target="drifted", samples=32, tokens=512)


def rtn() -> Recipe:
    """Round to nearest on the least-squares grid; needs no text."""
    return Recipe(method="rtn")


def sub1() -> Recipe:
    """Ternary, one scale a row, entropy-coded: the sweep, then each block trained towards the original's output, which
    halves the loss; at these widths a scale for each group costs more bits than it is worth (docs/log.md)."""
    ternary = Recipe(bits=1.58, group_size=None, format="sub1", damping=1.0, pull=0.0, refine=3)
    return ternary.but(method="block-ap", tune="weights")


def papers_rtn() -> Recipe:
    """Round to nearest on the min-max grid, as the GPTQ paper's baseline."""
    return Recipe(method="rtn", search="minmax", mirror=False)


def papers_gptq() -> Recipe:
    """GPTQ as published: min-max grid, activation order with static groups, 1 % damping, nothing after the sweep."""
    return Recipe(search="minmax", mirror=False, refine=0, damping=0.01, target="drifted", sink_share=0.0)


def papers_gptq_mse() -> Recipe:
    """GPTQ as published, with the squared-error grid search of the authors' code."""
    return papers_gptq().but(search="mse")


def papers_sparsegpt() -> Recipe:
    """SparseGPT as published: half of each 128-column slab, 1 % damping, no second solve; with bits, min-max by row."""
    plain = replace(papers_gptq(), group_size=None, symmetric=False, order="natural")
    return plain.but(sparsity="0.5", bits=16, mask="sparsegpt", resolve=0)


def _papers_efficientqat(bits: int, group_size: int) -> Recipe:
    """Block-AP as published, 4096 samples less what is held out: from rounding on the min-max grid, weights, scales and
    zeros by straight-through, mean squared error, two epochs of batches of 2. (Its norms stay as they are here.)"""
    start = Recipe(bits=bits, group_size=group_size, symmetric=False, search="minmax", mirror=False)
    return start.but(
        method="block-ap",
        start="rtn",
        units="absolute",
        epochs=2,
        batch=2,
        weight_rate=2e-5 if bits == 2 else 1e-5,
        scale_rate=1e-4,
        samples=4096 + 64,
        held_out=64 / (4096 + 64),
    )


def papers_efficientqat_w2g64() -> Recipe:
    """EfficientQAT's Block-AP at 2 bits, groups of 64."""
    return _papers_efficientqat(2, 64)


def papers_efficientqat_w3g128() -> Recipe:
    """EfficientQAT's Block-AP at 3 bits, groups of 128."""
    return _papers_efficientqat(3, 128)


def papers_efficientqat_w4g128() -> Recipe:
    """EfficientQAT's Block-AP at 4 bits, groups of 128."""
    return _papers_efficientqat(4, 128)


def best_2bit() -> Recipe:
    """2 bits, groups of 64: the default's codes, each moved by one at most where that brings its block nearer to the
    original's output, and its scales with them. `featherweight tune` afterwards takes it further."""
    return Recipe(method="block-ap", tune="rounding", bits=2, group_size=64, symmetric=False, epochs=2)


def best_3bit() -> Recipe:
    """`best_2bit` at 3 bits, trained for longer."""
    return best_2bit().but(bits=3, epochs=4)


def best_2of4_4bit() -> Recipe:
    """Two of four weights, at 4 bits, groups of 64: the default's masks and codes, and what the masks kept trained
    block by block. `featherweight tune --weights` afterwards trains it towards the original as a whole, which takes
    away more; with `--text-share 0.3` perplexity falls further (docs/log.md)."""
    return Recipe(sparsity="2:4", bits=4, group_size=64, method="block-ap", tune="weights")


RECIPES = {
    "default": default,
    "best": best,
    "fast": fast,
    "rtn": rtn,
    "best_2bit": best_2bit,
    "best_3bit": best_3bit,
    "best_2of4_4bit": best_2of4_4bit,
    "sub1": sub1,
    "papers.rtn": papers_rtn,
    "papers.gptq": papers_gptq,
    "papers.gptq-mse": papers_gptq_mse,
    "papers.sparsegpt": papers_sparsegpt,
    "papers.efficientqat_w2g64": papers_efficientqat_w2g64,
    "papers.efficientqat_w3g128": papers_efficientqat_w3g128,
    "papers.efficientqat_w4g128": papers_efficientqat_w4g128,
}


def by_name(name: str) -> Recipe:
    """The recipe of a shipped name, or of `module:function`; RequestError naming the known ones otherwise."""
    if name in RECIPES:
        return RECIPES[name]()
    module, colon, function = name.partition(":")
    if not colon:
        raise RequestError(f"no recipe is called {name!r}: take {', '.join(RECIPES)}, or give module:function.")
    try:
        recipe = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise RequestError(
            f"recipe {name!r} cannot be imported ({error}): give module:function of a Recipe."
        ) from error
    if not isinstance(recipe, Recipe):
        raise RequestError(f"recipe {name!r} returned {type(recipe).__name__}, not a featherweight Recipe.")
    return recipe
