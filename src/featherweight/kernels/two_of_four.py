"""Of four neighbouring codes the two that are stored, and where they stood (2:4 sparsity).

Shapes: R rows, C columns, K = C / 2 kept, G groups of a row, P = C / 4 runs of a row.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from featherweight.errors import RequestError

RUN, KEPT = 4, 2


def _places_by_flags() -> list[tuple[int, ...]]:
    """For each set of places that must be kept (bit p: place p) the first pair of places that has them; () for more."""
    pairs = list(combinations(range(RUN), KEPT))
    wanted = [{place for place in range(RUN) if flags >> place & 1} for flags in range(1 << RUN)]
    return [next((pair for pair in pairs if places <= set(pair)), ()) for places in wanted]


PLACES = _places_by_flags()


def gather(codes_RC: Tensor, zeros_RG: Tensor, keep_RC: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """kept_RK and places_RK, uint8: of each run the codes that do not stand for zero or that `keep_RC` says are kept,
    filled up to two, in their order.

    Raises RequestError where a run has more of them.
    """
    off_RC = codes_RC != zeros_RG.repeat_interleave(codes_RC.shape[1] // zeros_RG.shape[1], 1)
    stored_RPN = (off_RC if keep_RC is None else off_RC | keep_RC).unflatten(1, (-1, RUN))
    flags_RP = sum(stored_RPN[..., place].to(torch.uint8) << place for place in range(RUN))
    assert isinstance(flags_RP, Tensor)
    table = torch.tensor([pair or (RUN, RUN) for pair in PLACES], dtype=torch.uint8, device=codes_RC.device)
    places_RPN = table[flags_RP.int()]
    if bool((places_RPN == RUN).any()):
        most = int(off_RC.unflatten(1, (-1, RUN)).sum(-1, dtype=torch.uint8).max())
        raise RequestError(
            f"four neighbouring weights have {most} that are not zero, and 2:4 is 2: choose another kernel."
        )
    kept_RPN = codes_RC.unflatten(1, (-1, RUN)).gather(-1, places_RPN.long())
    return kept_RPN.flatten(1), places_RPN.flatten(1)


def scatter(kept_RK: Tensor, places_RK: Tensor, zeros_RG: Tensor) -> Tensor:
    """codes_RC, with the zero of its group wherever nothing is kept: what `gather` was given."""
    columns = kept_RK.shape[1] * RUN // KEPT
    codes_RPN = zeros_RG.repeat_interleave(columns // zeros_RG.shape[1], 1).unflatten(1, (-1, RUN))
    split = (each.unflatten(1, (-1, KEPT)) for each in (places_RK.long(), kept_RK))
    return codes_RPN.scatter(-1, *split).flatten(1)
