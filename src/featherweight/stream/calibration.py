"""The calibration windows of a recipe, and how many of them go through a block at a time.

Shapes: S sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from featherweight import data
from featherweight.errors import RequestError
from featherweight.models.load import load_tokenizer
from featherweight.models.tree import ModelTree
from featherweight.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tell = Callable[[float, float, str], None]  # done, total (in blocks), what is going on
TOKENS = 2048  # in a window, unless the recipe says or the model takes fewer
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # in one forward pass; to be tuned


def window_length(recipe: Recipe, tree: ModelTree) -> int:
    """The recipe's tokens in a window; left open, 2048 or what the model takes. RequestError if it takes fewer."""
    longest = getattr(tree.model.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    tokens = recipe.tokens or min(TOKENS, longest)
    if tokens > longest:
        raise RequestError(f"--tokens {tokens} is longer than the model's {longest} positions: use --tokens {longest}.")
    return tokens


def calibration_ids(path: Path, recipe: Recipe) -> Tensor | None:
    """The recipe's windows of token ids (int64, S x T), held-out ones last, or None where it needs none."""
    if recipe.method == "rtn":
        return None
    tokenizer = load_tokenizer(path)
    assert recipe.tokens is not None
    encode, bos = data.encoder(tokenizer), data.bos_of(tokenizer)
    if not recipe.trains:
        text = data.calibration_text(tokenizer, recipe.calibration, recipe.chat_template)
        return data.calibration_windows(encode, text, recipe.samples, recipe.tokens, recipe.seed, bos)
    texts = _apart(tokenizer, recipe)
    counts = recipe.samples - recipe.held_out_samples, recipe.held_out_samples
    return torch.cat(
        [
            data.calibration_windows(encode, text, count, recipe.tokens, recipe.seed, bos)
            for text, count in zip(texts, counts, strict=True)
        ]
    )


def _apart(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[str, str]:
    """The text to train on and the text to hold out: the end of every source, so that no window is part of both."""
    heads, tails = [], []
    for source in recipe.calibration:
        text = data.calibration_text(tokenizer, (source,), recipe.chat_template)
        cut = round((1 - recipe.held_out) * len(text))
        heads.append(text[:cut])
        tails.append(text[cut:])
    return "\n\n".join(heads), "\n\n".join(tails)
