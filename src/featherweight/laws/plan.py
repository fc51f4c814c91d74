"""What fits in B bytes with T tokens: the best sparsity, bits and size under the joint law, and how sure that is.

Units: bytes of stored weights, tokens, parameters. Sources: the law, arXiv 2309.08520; effective parameters of bits,
arXiv 2502.16440; that the two multiply, arXiv 2506.01863.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from featherweight.errors import RequestError
from featherweight.laws.checks import quantiles
from featherweight.laws.forms import Coefficients, effective
from featherweight.laws.forms import loss as law
from featherweight.laws.optimum import gradual_cost

BITS = (16, 8, 4, 3, 2, 1)
SPARSITIES = (0.0, 0.5, 0.75, 0.875)
SCALE_BITS = 0.125
"""One 16-bit scale for 128 stored values, in bits per stored value; 16-bit weights need none."""
ASSUMPTIONS = (
    "Every weight counted is in a transformer block; embeddings and the cache are not in the budget.",
    "The model is trained from scratch in its format (sparse by gradual pruning, bits by quantisation-aware training);"
    " compressing a finished model loses more, the more so the more tokens it saw.",
    "Sparsity and bits multiply: N_effective = N size_gain(S) eff(bits), as in 2506.01863 (to about 0.01).",
    "The intervals and best_in vary the law's coefficients over resamples of its runs; eff is held.",
    "eff(bits): 4 measured (2502.16440); 2 and 1 as recalled from it; 8 and 3 predicted from the error on a Gaussian.",
    "Stored: non-zeros at their bits and a 16-bit scale for every 128; which are zero at the mask's entropy.",
    "Tokens are the limit, not compute: every candidate sees all of them; training_flops says what that costs.",
)


@dataclass(frozen=True)
class Candidate:
    """One format filled to the budget.

    `parameters` counts zeros too, `nonzero_parameters` does not; `loss` in the law's unit with its 95 % interval over
    the draws; `best_in` the share of draws in which no other candidate has a lower loss; `training_flops` operations.
    """

    sparsity: float
    bits: int
    parameters: float
    nonzero_parameters: float
    effective_parameters: float
    loss: float
    interval: tuple[float, float]
    best_in: float
    training_flops: float


def bits_per_parameter(sparsity: float, bits: int) -> float:
    """Stored bits per parameter, zeros included: (1 - S) (bits + scale) + H(S), H the entropy of the mask in bits."""
    kept = 1 - sparsity
    mask = -kept * math.log2(kept) - sparsity * math.log2(sparsity) if sparsity else 0.0
    return kept * (bits + (SCALE_BITS if bits < 16 else 0.0)) + mask


def checked_bits(bits: Sequence[int] | None) -> tuple[int, ...]:
    """The widths to consider, all of BITS when none are named; raises RequestError for any other."""
    wrong = [str(width) for width in bits or () if width not in BITS]
    if wrong:
        raise RequestError(f"bits {', '.join(wrong)}: a plan knows {', '.join(map(str, BITS))}.")
    return tuple(dict.fromkeys(bits)) if bits else BITS


def check_budget(size_bytes: float, tokens: float, bits: Sequence[int] = BITS) -> None:
    """Raises RequestError for budgets that are no positive number, or too small.

    Too small is under a million parameters or a million tokens: no law here was fitted near that.
    """
    if not (0 < size_bytes < math.inf and 0 < tokens < math.inf):
        raise RequestError(f"{size_bytes:g} bytes and {tokens:g} tokens: both must be finite and above 0.")
    most = 8 * size_bytes / min(bits_per_parameter(s, b) for s in SPARSITIES for b in bits)
    if most < 1e6:
        raise RequestError(f"{size_bytes:g} bytes hold {most:.0f} parameters at most: a plan needs room for 1000000.")
    if tokens < 1e6:
        raise RequestError(f"{tokens:g} tokens are too few to plan for: give at least 1000000.")


def plan(
    co: Coefficients,
    draws: Sequence[Coefficients],
    size_bytes: float,
    tokens: float,
    bits: Sequence[int] = BITS,
) -> list[Candidate]:
    """Every format filled to `size_bytes` and trained on `tokens`, best predicted loss first.

    `draws` are bootstrap coefficients. Raises RequestError as `check_budget` does.
    """
    check_budget(size_bytes, tokens, bits)
    formats = [(sparsity, width) for sparsity in SPARSITIES for width in bits]
    losses = [[_loss(each, s, b, size_bytes, tokens) for s, b in formats] for each in (co, *draws)]
    over = losses[1:] or losses
    winners = [row.index(min(row)) for row in over]
    found = []
    for i, pair in enumerate(formats):
        span = quantiles([row[i] for row in over])
        share = winners.count(i) / len(winners)
        found.append(_candidate(co, pair, size_bytes, tokens, losses[0][i], span, share))
    return sorted(found, key=lambda candidate: candidate.loss)


def _nonzero(sparsity: float, bits: int, size_bytes: float) -> float:
    return (1 - sparsity) * 8 * size_bytes / bits_per_parameter(sparsity, bits)


def _loss(co: Coefficients, sparsity: float, bits: int, size_bytes: float, tokens: float) -> float:
    nonzero = _nonzero(sparsity, bits, size_bytes)
    return float(law(co, 0.0, effective(co, sparsity, bits, nonzero), tokens))


def _candidate(
    co: Coefficients,
    pair: tuple[float, int],
    size_bytes: float,
    tokens: float,
    loss: float,
    interval: tuple[float, float],
    share: float,
) -> Candidate:
    sparsity, bits = pair
    nonzero = _nonzero(sparsity, bits, size_bytes)
    flops = 6 * nonzero * tokens * gradual_cost(sparsity)
    worth = effective(co, sparsity, bits, nonzero)
    return Candidate(sparsity, bits, nonzero / (1 - sparsity), nonzero, worth, loss, interval, share, flops)
