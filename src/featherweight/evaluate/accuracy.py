"""Zero-shot accuracy: which choice a model finds likeliest, and whether it guesses a passage's last word.

Shapes: B sequences in a pass, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from featherweight.data.tasks import Item
from featherweight.errors import RequestError
from featherweight.evaluate.perplexity import evaluating, positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PASS_LOGITS = 1 << 27  # of one pass: 256 MiB in bf16, 2,730 tokens of a vocabulary of 49,152


@dataclass(frozen=True)
class ZeroShot:
    """What `zero_shot` found.

    Attributes:
        items: how many were asked.
        accuracy: share of items whose likeliest choice is the right one; where there is one choice, whose every token
            is the model's own first.
        accuracy_per_character: the same by likelihood per character of the choice; None for single choices.
        error: standard error of `accuracy`.
        seconds: wall time.
    """

    items: int
    accuracy: float
    accuracy_per_character: float | None
    error: float
    seconds: float


@dataclass(frozen=True)
class _Asked:
    """One choice behind its context: ids, and where the choice begins among them."""

    ids: list[int]
    begin: int


def zero_shot(
    model: PreTrainedModel,
    encode: Callable[[str], list[int]],
    items: Sequence[Item],
    bos: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ZeroShot:
    """Log-likelihoods of every choice given its context, summed in fp32 over the choice's tokens.

    Contexts longer than the model's positions lose their beginning. Sequences of like length share a pass.

    Args:
        model: a causal language model of transformers; moved nowhere.
        encode: token ids of a text, without special tokens.
        items: as `data.tasks.read_task` gives them.
        bos: the id in front of every context, or None.
        progress: called with (sequences done, sequences in all) after every pass.

    Raises RequestError for no items, or a choice longer than the model's positions.
    """
    if not items:
        raise RequestError("no items were given: a task needs at least 1.")
    started = time.perf_counter()
    longest = positions_of(model)
    asked = [_ask(encode, item.context, choice, bos, longest) for item in items for choice in item.choices]
    order = sorted(range(len(asked)), key=lambda at: -len(asked[at].ids))
    found: list[tuple[float, bool]] = [(0.0, False)] * len(asked)
    done, vocabulary = 0, model.get_input_embeddings().weight.shape[0]
    with torch.no_grad(), evaluating(model):
        while done < len(order):
            length = len(asked[order[done]].ids)
            these = order[done : done + max(1, PASS_LOGITS // (length * vocabulary))]
            for at, result in zip(these, _likelihoods(model, [asked[at] for at in these]), strict=True):
                found[at] = result
            done += len(these)
            if progress is not None:
                progress(done, len(order))
    return _marked(items, found, time.perf_counter() - started)


def _ask(encode: Callable[[str], list[int]], context: str, choice: str, bos: int | None, longest: int | None) -> _Asked:
    """Ids of the whole; the choice begins where they first differ from those of the context alone."""
    alone, whole = encode(context), encode(context + choice)
    begin = next((at for at, pair in enumerate(zip(alone, whole, strict=False)) if pair[0] != pair[1]), len(alone))
    begin = min(begin, len(whole) - 1)
    front = [] if bos is None else [bos]
    if not front and begin == 0:
        raise RequestError(f"the context {context!r} has no token before {choice!r}: give the model something to read.")
    drop = 0 if longest is None else max(0, len(front) + len(whole) - longest)
    if drop >= max(begin, 1) and drop:
        raise RequestError(f"the choice {choice!r} has more tokens than the model's {longest} positions: shorten it.")
    return _Asked(front + whole[drop:], len(front) + begin - drop)


def _likelihoods(model: PreTrainedModel, asked: list[_Asked]) -> list[tuple[float, bool]]:
    """(log-likelihood, every token the likeliest) of each choice, in one pass padded on the right."""
    device = model.get_input_embeddings().weight.device
    ids_BT = torch.zeros(len(asked), len(asked[0].ids), dtype=torch.int64)
    for row, one in enumerate(asked):
        ids_BT[row, : len(one.ids)] = torch.tensor(one.ids)
    ids_BT = ids_BT.to(device)
    # No mask: what stands behind a sequence is never seen from within it.
    logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    results = []
    for row, one in enumerate(asked):
        targets_T = ids_BT[row, one.begin : len(one.ids)]
        logp_TV = logits_BTV[row, one.begin - 1 : len(one.ids) - 1].float().log_softmax(-1)
        likelihood = logp_TV.gather(1, targets_T[:, None]).sum()
        results.append(torch.stack([likelihood, (logp_TV.argmax(-1) == targets_T).all()]))
    return [(likelihood, bool(greedy)) for likelihood, greedy in torch.stack(results).tolist()]


def _marked(items: Sequence[Item], found: list[tuple[float, bool]], seconds: float) -> ZeroShot:
    right = right_per_character = at = 0
    for item in items:
        scores, at = found[at : at + len(item.choices)], at + len(item.choices)
        if len(scores) == 1:
            right += scores[0][1]
            continue
        places = range(len(scores))
        right += max(places, key=lambda k: scores[k][0]) == item.gold
        lengths = [len(choice.strip()) for choice in item.choices]
        right_per_character += max(places, key=lambda k: scores[k][0] / max(1, lengths[k])) == item.gold
    count, choices = len(items), any(len(item.choices) > 1 for item in items)
    accuracy = right / count
    error = (accuracy * (1 - accuracy) / max(1, count - 1)) ** 0.5
    return ZeroShot(count, accuracy, right_per_character / count if choices else None, error, seconds)
