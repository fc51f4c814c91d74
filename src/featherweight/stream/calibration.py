"""The calibration windows of a recipe, and how many of them go through a block at a time.

Shapes: S sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
RUN, MOST_SHARED = 16, 0.1  # tokens in a row that are the same text, and the share of them held out and trained on
TOKENS = 2048  # in a window, unless the recipe says or the model takes fewer
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # in one forward pass; to be tuned
LOW_TOKENS = 8192  # the same where memory is short


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
    if not recipe.trains:
        encode, bos = data.encoder(tokenizer), data.bos_of(tokenizer)
        text = data.calibration_text(tokenizer, recipe.calibration, recipe.chat_template)
        return data.calibration_windows(encode, text, recipe.samples, recipe.tokens, recipe.seed, bos)
    counts = recipe.samples - recipe.held_out_samples, recipe.held_out_samples
    return torch.cat(
        windows_apart(
            tokenizer, recipe.calibration, counts, recipe.held_out, recipe.tokens, recipe.seed, recipe.chat_template
        )
    )


def windows_apart(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    counts: tuple[int, int],
    held_out: float,
    tokens: int,
    seed: int,
    chat_template: bool,
) -> tuple[Tensor, Tensor]:
    """Windows to train on and windows to hold out (int64, S x T), so many of each, that share no text.

    The end of every source, by the share `held_out`, is where the latter come from. RequestError where it is too short.
    """
    heads, tails = [], []
    for source in sources:
        text = data.calibration_text(tokenizer, (source,), chat_template)
        cut = round((1 - held_out) * len(text))
        heads.append(text[:cut])
        tails.append(text[cut:])
    encode, bos = data.encoder(tokenizer), data.bos_of(tokenizer)
    head_ST = data.calibration_windows(encode, "\n\n".join(heads), counts[0], tokens, seed, bos)
    try:
        tail_ST = data.calibration_windows(encode, "\n\n".join(tails), counts[1], tokens, seed, bos)
    except RequestError as error:
        raise RequestError(f"of the text held out ({held_out:.3g} of each source), {error}") from error
    _require_apart(head_ST, tail_ST)
    return head_ST, tail_ST


def _require_apart(training_ST: Tensor, held_ST: Tensor) -> None:
    """RequestError where much of the held-out text is in the training windows too, since a file holds it twice or two
    files hold it: what it chose would be what fits best by heart."""
    if held_ST.shape[1] < RUN:
        return
    factors_N = torch.randint(1, 2**62, (RUN,), generator=torch.Generator().manual_seed(0))

    def hashed(ids_ST: Tensor) -> Tensor:
        """One number for each run of tokens."""
        return torch.cat([(ids_T.unfold(0, RUN, 1) * factors_N).sum(-1) for ids_T in ids_ST])

    share = float(torch.isin(hashed(held_ST), hashed(training_ST)).float().mean())
    if share > MOST_SHARED:
        raise RequestError(
            f"{share:.0%} of the text held out is in the text trained on too, and at most {MOST_SHARED:.0%} may be: "
            "leave out files, or parts of them, that repeat others."
        )
