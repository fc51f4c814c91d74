"""featherweight: any Hugging Face language model in 4, 3 or 2 bits, loadable anywhere.

featherweight.compress(model, out, Recipe(bits=4))    a checkpoint folder in, a smaller one out
featherweight.load(out)                               the compressed model as a transformers model
featherweight.solve(problem, grid)                    one layer, from its weights and its inputs' Hessian
featherweight.compress_module(module, batches, rule)  any nn.Module, with batches of your own
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Grid", "LayerProblem", "Recipe", "Solution", "compress", "compress_module", "load", "solve"]

if TYPE_CHECKING:
    from featherweight.api import compress, compress_module, load, solve
    from featherweight.core.problem import LayerProblem
    from featherweight.core.rules import Grid
    from featherweight.core.solution import Solution
    from featherweight.recipe import Recipe

_HOMES = {
    "compress": "featherweight.api",
    "compress_module": "featherweight.api",
    "load": "featherweight.api",
    "solve": "featherweight.api",
    "LayerProblem": "featherweight.core.problem",
    "Grid": "featherweight.core.rules",
    "Solution": "featherweight.core.solution",
    "Recipe": "featherweight.recipe",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for: `import featherweight` alone loads neither torch nor transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module 'featherweight' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
