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
    """The default in ternary, one scale a row, entropy-coded: at these widths a scale for each group costs more bits
    than it is worth (docs/formats.md)."""
    return Recipe(bits=1.58, group_size=None, format="sub1", refine=3)


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


RECIPES = {
    "default": default,
    "best": best,
    "fast": fast,
    "rtn": rtn,
    "sub1": sub1,
    "papers.rtn": papers_rtn,
    "papers.gptq": papers_gptq,
    "papers.gptq-mse": papers_gptq_mse,
    "papers.sparsegpt": papers_sparsegpt,
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
