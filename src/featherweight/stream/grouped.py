"""All experts of a mixture at once on a GPU: pairs of token and expert sorted by expert, one grouped product a matrix.

Experts one after the other are a dozen small launches each, and what they give is added up in bfloat16, rounded after
each; here a token's experts are added up in float32 and rounded once.

Shapes: T tokens, D width, I inner width, K experts a token goes to, E experts, N = T K pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.core.triton_tried import tried
from featherweight.models.experts import Experts, Routed

WIDTHS = 8  # of a grouped product's axes: their rows have to begin at multiples of 16 bytes
_failed: list[str] = []  # why, once it has


class Grouped:
    """The experts of one layer together, with whatever weights they have at the time."""

    def __init__(self, experts: Experts, gated: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.experts, self.gated = experts, gated

    def __call__(self, routed: Routed) -> Tensor | None:
        """What the layer answers, T x D; None where its experts have to run one after the other."""
        if not self._fits(routed):
            return None
        choices, count = routed.expert_TK.shape[1], len(self.experts)
        flat_N = routed.expert_TK.flatten()
        order_N = flat_N.argsort(stable=True)
        ends_E = flat_N.clamp(max=count).bincount(minlength=count + 1)[:count].cumsum(0).to(torch.int32)
        x_ND = routed.inputs_TD[order_N // choices]
        found: list[Tensor] = []

        def run() -> None:
            inner_NI = self.gated(self._product(x_ND, "gate_proj", ends_E), self._product(x_ND, "up_proj", ends_E))
            found.append(joined(self._product(inner_NI, "down_proj", ends_E), order_N, routed, count))

        return found[0] if tried(run, _failed, "experts run one after the other, several times slower") else None

    def _product(self, x_NC: Tensor, leaf: str, ends_E: Tensor) -> Tensor:
        """Every pair's inputs times its expert's matrix, N x R."""
        weight_ERC = torch.stack([self.experts.get_parameter(f"{e}.{leaf}.weight") for e in range(len(self.experts))])
        return F.grouped_mm(x_NC, weight_ERC.mT, offs=ends_E)

    def _fits(self, routed: Routed) -> bool:
        layout, x_TD = self.experts.layout, routed.inputs_TD
        known = layout.gated and not (layout.bias or layout.by_rows) and routed.scale_TK is None
        down = self.experts.get_parameter("0.down_proj.weight")
        wide = all(not size % WIDTHS for size in down.shape)
        plain = x_TD.dtype == down.dtype == torch.bfloat16 and not torch.is_grad_enabled()
        return known and wide and plain and x_TD.is_cuda and bool(x_TD.numel()) and not _failed


def joined(down_ND: Tensor, order_N: Tensor, routed: Routed, count: int) -> Tensor:
    """The sum of each token's pairs, times their shares, T x D; `order_N` says which pairs lie where."""
    from featherweight.stream import triton_pieces

    place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
    tokens, choices = routed.expert_TK.shape
    found_TD = down_ND.new_empty(tokens, down_ND.shape[1])
    share_TK = torch.ones_like(routed.expert_TK, dtype=down_ND.dtype) if routed.share_TK is None else routed.share_TK
    tile = 1 << (down_ND.shape[1] - 1).bit_length()
    triton_pieces.join[(tokens,)](
        down_ND, place_N, routed.expert_TK.contiguous(), share_TK.contiguous(), found_TD,
        down_ND.shape[1], count, CHOICES=choices, TILE=tile,
    )  # fmt: skip
    return found_TD
