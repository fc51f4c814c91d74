"""What was asked for, as the output folder remembers it, and what can be refused once the text is read.

Shapes: S sequences, T tokens.
"""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from featherweight import data
from featherweight.errors import RequestError
from featherweight.models.tree import ModelTree
from featherweight.recipe import FLOAT_BITS, Recipe
from featherweight.stream.parallel import World


def check_ids(tree: ModelTree, ids_ST: Tensor | None) -> None:
    """Token ids the embedding does not have mean that the tokenizer is another model's: RequestError."""
    known = tree.model.get_input_embeddings().weight.shape[0]
    if ids_ST is not None and int(ids_ST.max()) >= known:
        raise RequestError(
            f"the tokenizer gives token {int(ids_ST.max())} and the model knows 0 to {known - 1}: "
            "use the model's own tokenizer."
        )


def refuse_parts(tree: ModelTree, recipe: Recipe) -> None:
    """RequestError for what goes through decoders alone, where the model has an encoder too."""
    if len(tree.lists) == 1:
        return
    asked = {
        "training (--method block-ap, ...)": recipe.trains,
        "a budget (--size, --average-bits)": recipe.budget is not None,
        "weights of tokens (guide)": bool(recipe.guide),
        "rounded embeddings": recipe.embedding_bits < FLOAT_BITS,
    }
    if wrong := [what for what, is_asked in asked.items() if is_asked]:
        raise RequestError(
            f"{tree.checkpoint.path} has an encoder and a decoder, which are rounded or solved layer by layer: "
            f"leave out {wrong[0]}."
        )


def manifest(
    tree: ModelTree, recipe: Recipe, ids_ST: Tensor | None, device: torch.device, dtype: torch.dtype, world: World
) -> dict[str, Any]:
    """What the output's bytes follow from; `OutputFolder.begin` compares it on resuming."""
    import transformers

    return {
        "recipe": recipe.as_dict(),
        "recipe_digest": recipe.digest(),
        "model": {"fingerprint": tree.checkpoint.fingerprint(), "blocks": len(tree.blocks)},
        "data": {"ids_sha256": None if ids_ST is None else data.digest(ids_ST)},
        "made_with": {
            "featherweight": version("featherweight"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            **({"processes": world.size} if world.size > 1 else {}),
        },
    }
