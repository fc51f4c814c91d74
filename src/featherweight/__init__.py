"""featherweight: any Hugging Face language model in 4, 3 or 2 bits, loadable anywhere.

featherweight.compress(model, out, Recipe(bits=4))    a checkpoint folder in, a smaller one out
featherweight.tune(out, [text])                       its scales trained on text as a whole
featherweight.load(out)                               the compressed model as a transformers model
featherweight.solve(problem, rule)                    one layer, from its weights and its inputs' Hessian
featherweight.compress_module(module, batches, rule)  any nn.Module, with batches of your own

With it imported, transformers' own `from_pretrained` loads sparse and sub1 folders too (`transformers_hook` says how),
and others onto our kernels where it is given `config=featherweight.config(out)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featherweight.transformers_hook import install as _install

__version__ = "0.1.0"
__all__ = [
    "Choices",
    "Grid",
    "Joint",
    "LayerProblem",
    "Pattern",
    "Recipe",
    "Solution",
    "SparseSolution",
    "Tuning",
    "compress",
    "compress_module",
    "config",
    "load",
    "solve",
    "tune",
]

if TYPE_CHECKING:
    from featherweight.api import compress, compress_module, load, tune
    from featherweight.core.problem import LayerProblem
    from featherweight.core.rules import Grid, Joint, Pattern
    from featherweight.core.solution import Solution, SparseSolution
    from featherweight.core.solve import Choices, solve
    from featherweight.huggingface import config
    from featherweight.recipe import Recipe
    from featherweight.stream.tune import Tuning

_HOMES = {
    "featherweight.api": ("compress", "compress_module", "load", "tune"),
    "featherweight.core.problem": ("LayerProblem",),
    "featherweight.core.rules": ("Grid", "Joint", "Pattern"),
    "featherweight.core.solution": ("Solution", "SparseSolution"),
    "featherweight.core.solve": ("Choices", "solve"),
    "featherweight.huggingface": ("config",),
    "featherweight.recipe": ("Recipe",),
    "featherweight.stream.tune": ("Tuning",),
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for: `import featherweight` alone loads neither torch nor transformers."""
    import importlib

    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'featherweight' has no attribute {name!r}")


_install()
