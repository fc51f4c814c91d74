"""SparseGPT: one pass over the columns, each pruned weight made up for by the columns still free (2301.00774).

Shapes: R outputs, C inputs, N columns of a slab, M columns of an N:M group. Weights are held transposed, C x R.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Pattern
from featherweight.core.serial import one_thread
from featherweight.core.solution import SparseSolution
from featherweight.core.sweep import SLAB

Saliency = Literal["obs", "wanda"]
Scope = Literal["slab", "row"]


def prune(
    problem: LayerProblem,
    pattern: Pattern,
    saliency: Saliency = "obs",
    scope: Scope = "slab",
    slab: int = SLAB,
    keep_RC: Tensor | None = None,
) -> SparseSolution:
    """Prunes a layer to a pattern in one sweep, in the natural order of the columns.

    Masks are chosen on the weights as they stand by then: unstructured when a slab begins, N:M when a group begins.

    Args:
        saliency: what a weight is worth: "obs" w^2/U_jj^2, its price once the rest makes up for it; "wanda" |w| times
            the size of its input (2306.11695).
        scope: with unstructured sparsity, the weights that compete: all of a slab, or each row's in a slab.
        slab: columns swept together (whole N:M groups or blocks), and the window of an unstructured mask.
        keep_RC: a mask to use instead of choosing one (True is kept).

    Raises RequestError where the pattern does not fit the columns.
    """
    columns = problem.weight_RC.shape[-1]
    pattern.check(columns, problem.name)
    factor = problem.factor("natural")
    weight_CR = problem.weight_RC.T.clone(memory_format=torch.contiguous_format)  # written to: never the caller's own
    upper_CC = factor.upper_CC
    price_C = _price(problem, upper_CC, saliency)
    kept_CR = torch.ones_like(weight_CR, dtype=torch.bool) if keep_RC is None else keep_RC.T.contiguous()
    loss_R = torch.zeros_like(weight_CR[0])
    step = max(slab // pattern.of, 1) * pattern.of if pattern.of else max(slab // pattern.block, 1) * pattern.block
    for start in range(0, columns, step):
        at = slice(start, min(start + step, columns))
        if keep_RC is None and not pattern.of:
            kept_CR[at] = _unstructured(weight_CR[at].square() * price_C[at, None], pattern, scope)
        choosing = pattern if keep_RC is None and pattern.of else None
        with one_thread(weight_CR.device):
            error_NR = _sweep_slab(weight_CR[at], kept_CR[at], upper_CC[at, at], price_C[at], choosing)
        weight_CR[at.stop :].addmm_(upper_CC[at, at.stop :].T, error_NR, alpha=-1)
        loss_R += error_NR.square().sum(0)
    return SparseSolution(weight_CR.T.contiguous(), kept_CR.T.contiguous(), pattern, loss_R, factor.damping)


def _price(problem: LayerProblem, upper_CC: Tensor, saliency: Saliency) -> Tensor:
    """What a unit of each squared weight is worth."""
    if saliency == "wanda":
        return problem.hessian_CC.diagonal().clone()
    return upper_CC.diagonal().square().reciprocal()


def _unstructured(worth_NR: Tensor, pattern: Pattern, scope: Scope) -> Tensor:
    """The mask of a slab with exactly its share of zeros, in whole blocks of columns."""
    worth_NR = worth_NR.unflatten(0, (-1, pattern.block)).sum(1)
    kept_NR = torch.ones_like(worth_NR, dtype=torch.bool)
    if scope == "row":
        zeros = round(pattern.sparsity * worth_NR.shape[0])
        kept_NR.scatter_(0, worth_NR.topk(zeros, 0, largest=False).indices, False)
    else:
        zeros = round(pattern.sparsity * worth_NR.numel())
        kept_NR.view(-1)[worth_NR.flatten().topk(zeros, largest=False).indices] = False
    return kept_NR.repeat_interleave(pattern.block, 0)


def _sweep_slab(
    weight_NR: Tensor, kept_NR: Tensor, upper_NN: Tensor, price_N: Tensor, choosing: Pattern | None
) -> Tensor:
    """Prunes a slab in place, choosing N:M masks on the way; returns its scaled errors E, with W - V = E U."""
    error_NR = torch.zeros_like(weight_NR)
    pivot_N = upper_NN.diagonal().reciprocal()
    width = choosing.of if choosing else 1
    for start in range(0, weight_NR.shape[0], width):
        group = slice(start, start + width)
        now_MR = torch.addmm(weight_NR[group], upper_NN[:start, group].T, error_NR[:start], alpha=-1)
        if choosing:
            worth_MR = now_MR.square() * price_N[group, None]
            gone_MR = worth_MR.topk(choosing.of - choosing.keep, 0, largest=False).indices
            kept_NR[group] = torch.ones_like(now_MR, dtype=torch.bool).scatter_(0, gone_MR, False)
        for inside in range(width):
            j = start + inside
            if inside:
                now_MR[inside].addmv_(error_NR[start:j].T, upper_NN[start:j, j], alpha=-1)
            torch.mul(now_MR[inside], kept_NR[j], out=weight_NR[j])
            torch.sub(now_MR[inside], weight_NR[j], out=error_NR[j]).mul_(pivot_N[j])
    return error_NR
