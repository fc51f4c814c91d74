"""Perplexity of a language model over windows of ids, and how far it is from a reference.

Shapes: S sequences, T tokens of a window, N predictions (T - 1), V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from featherweight.errors import FeatherweightError, RequestError
from featherweight.models.windows import model_inputs, predicted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits upcast at once: 2^24 fp32 numbers are 64 MiB, that is 341 positions of 49,152 tokens and 64 of 262,144.
SLICE_LOGITS = 1 << 24


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        perplexity: exp of the mean negative log-likelihood (nats) over all predictions.
        tokens: how many predictions were counted.
        context: ids in a window.
        kl_nats: mean of KL(reference || model) over the predicted positions, in nats; None without a reference.
        top1_agreement: share of positions where both put the same token first, 0 .. 1; None without a reference.
        seconds: wall time.
    """

    perplexity: float
    tokens: int
    context: int
    kl_nats: float | None
    top1_agreement: float | None
    seconds: float


def evaluate(
    model: PreTrainedModel,
    ids_ST: Tensor,
    reference: PreTrainedModel | None = None,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity over equal windows, each on its own: exp of the mean over all S x (T - 1) predictions, as in GPTQ.

    Logits are taken as the models give them (bf16 from bf16 models), upcast to fp32 slice by slice; sums are float64.
    Position 0 is never predicted, so windows that begin with a BOS need no special care.

    Args:
        model: a causal language model of transformers; moved nowhere, and left in the mode (train or eval) it was in.
        ids_ST: int64, S x T; on any device.
        reference: the dense model to compare with, of the same vocabulary; may live on another device.
        batch: windows in one forward pass.
        progress: called with (windows done, windows in all) after every pass.

    Raises:
        RequestError: ids outside the vocabulary, windows longer than the model can take, another vocabulary in the
            reference, no prediction at all, batch < 1.
        FeatherweightError: the model or the reference gives NaN.
    """
    _check(model, "model", ids_ST, batch)
    if reference is not None:
        _check(reference, "reference", ids_ST, batch)
    started = time.perf_counter()
    sums = torch.zeros(3, dtype=torch.float64)
    windows, context = ids_ST.shape
    with torch.no_grad(), evaluating(model), evaluating(reference):
        for first in range(0, windows, batch):
            ids_of_pass = ids_ST[first : first + batch]
            sums += _pass_sums(model, reference, ids_of_pass)
            if sums.isnan().any():
                raise FeatherweightError(
                    f"the logits of window {first} of {windows} hold NaN: the weights are broken there"
                )
            if progress is not None:
                progress(first + len(ids_of_pass), windows)
    predictions = windows * (context // 2 if model.config.is_encoder_decoder else context - 1)
    nll, kl, agreement = (sums / predictions).unbind()
    compared = reference is not None
    return Evaluation(
        perplexity=nll.exp().item(),
        tokens=predictions,
        context=context,
        kl_nats=kl.item() if compared else None,
        top1_agreement=agreement.item() if compared else None,
        seconds=time.perf_counter() - started,
    )


def _check(model: PreTrainedModel, role: str, ids_ST: Tensor, batch: int) -> None:
    """Refuse what would crash or mean nothing, before any work."""
    if batch < 1:
        raise RequestError(f"a batch of {batch} windows was asked for and at least 1 is needed: raise the batch")
    if ids_ST.ndim != 2 or ids_ST.shape[0] < 1 or ids_ST.shape[1] < 2:
        raise RequestError(f"ids of shape {tuple(ids_ST.shape)} hold no prediction: give at least 1 window of 2 tokens")
    longest = positions_of(model)
    if longest and ids_ST.shape[1] > longest:
        raise RequestError(
            f"windows have {ids_ST.shape[1]} tokens and the {role} takes at most {longest}: lower --context"
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    low, high = ids_ST.min().item(), ids_ST.max().item()
    if low < 0 or high >= vocabulary:
        raise RequestError(
            f"ids run from {low:.0f} to {high:.0f} and the {role} knows 0 to {vocabulary - 1}: "
            f"use the {role}'s own tokenizer"
        )


def positions_of(model: PreTrainedModel) -> int | None:
    """The most tokens the model takes, None where its configuration names no limit."""
    longest: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest


@contextmanager
def evaluating(model: PreTrainedModel | None) -> Iterator[None]:
    """Dropout off for the time being."""
    was_training = model is not None and model.training
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        if model is not None:
            model.train(was_training)


def _logits(model: PreTrainedModel, ids_ST: Tensor) -> Tensor:
    device = model.get_input_embeddings().weight.device
    logits_STV: Tensor = model(**model_inputs(model, ids_ST.to(device)), use_cache=False).logits
    return logits_STV


def _pass_sums(model: PreTrainedModel, reference: PreTrainedModel | None, ids_ST: Tensor) -> Tensor:
    """Sums of (NLL, KL, agreement) over one pass: float64, on the CPU."""
    logits_STV = _logits(model, ids_ST)
    dense_STV = None if reference is None else _logits(reference, ids_ST)
    if dense_STV is not None and dense_STV.shape != logits_STV.shape:
        theirs, ours = dense_STV.shape[-1], logits_STV.shape[-1]
        raise RequestError(
            f"the reference has {theirs} logits and the model {ours}: compare with a model of the same vocabulary"
        )
    sums = torch.zeros(3, dtype=torch.float64, device=logits_STV.device)
    logits_SNV, targets_SN = predicted(model, logits_STV, ids_ST.to(logits_STV.device))
    dense_SNV = None if dense_STV is None else predicted(model, dense_STV, ids_ST)[0]
    for at in range(len(ids_ST)):
        sums += _window_sums(logits_SNV[at], targets_SN[at], None if dense_SNV is None else dense_SNV[at])
    return sums.cpu()


def _window_sums(logits_NV: Tensor, targets_N: Tensor, dense_NV: Tensor | None) -> Tensor:
    """Sums of (NLL, KL, agreement) over one window, a slice of positions at a time: the whole in fp32 may not fit."""
    positions = max(1, SLICE_LOGITS // logits_NV.shape[1])
    sums = torch.zeros(3, dtype=torch.float64, device=logits_NV.device)
    for start in range(0, len(targets_N), positions):
        rows = slice(start, start + positions)
        logp_NV = logits_NV[rows].float().log_softmax(-1)
        sums[0] -= logp_NV.gather(1, targets_N[rows, None]).double().sum()
        if dense_NV is not None:
            part_NV = dense_NV[rows].to(logits_NV.device)
            sums[1] += _kl_sum(part_NV.float().log_softmax(-1), logp_NV)
            sums[2] += (part_NV.argmax(-1) == logits_NV[rows].argmax(-1)).sum()
    return sums


def _kl_sum(dense_logp_NV: Tensor, logp_NV: Tensor) -> Tensor:
    """Sum over positions of KL(dense || model) in nats, float64."""
    terms_NV = dense_logp_NV.exp() * (dense_logp_NV - logp_NV)
    # Models that mask the padding of their vocabulary give -inf there: nothing times infinity is nothing here.
    terms_NV.masked_fill_(dense_logp_NV == -torch.inf, 0.0)
    return terms_NV.sum(-1).double().sum()
