"""All experts of a layer in two launches, where a kernel takes them so: up and gate together, then down.

Where it does not (other formats, a CPU, many tokens) experts run one after the other as they are (`models.experts`).

Shapes: T tokens, D width, I inner width, K experts a token goes to, E experts, N = T K pairs of both, M matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from featherweight.formats import Sub1
from featherweight.kernels.sub1_bank import Bank, Entry, entry_of, fused
from featherweight.kernels.sub1_launch import MOST_EXPERTS, MOST_PAIRS, MOST_TOKENS
from featherweight.linear import CompressedLinear
from featherweight.models.experts import Expert, Experts, Routed, find_experts

PASSES = 4  # over an expert's codes; with more tokens for each expert, weights made floats are faster


def join_experts(model: nn.Module) -> None:
    """Lets every mixture of a model run together where it can; to be called when the experts are in their places."""
    for _, experts in find_experts(model):
        if all(isinstance(experts.expert(index), Expert) for index in range(len(experts))):
            experts.together = Together(experts)


class Together:
    """The experts of one layer as a kernel has them: made at the first call, and again for another device or dtype."""

    def __init__(self, experts: Experts) -> None:
        self.experts = experts
        self.banks: tuple[Bank, Bank] | None = None
        self.made_for: tuple[torch.device, torch.dtype] | None = None
        self.up_bias_EMI: Tensor | None = None
        self.down_bias_ED: Tensor | None = None

    def __call__(self, routed: Routed) -> Tensor | None:
        """What the layer answers, T x D; None where its experts have to run one after the other."""
        x_TD, expert_TK = routed.inputs_TD, routed.expert_TK
        if not self._fits(routed) or (banks := self._banks(x_TD.device, x_TD.dtype)) is None:
            return None
        up, down = banks
        expert_N, choices = expert_TK.flatten(), expert_TK.shape[1]
        up_NMI = up.products(x_TD, expert_N, choices)
        if self.up_bias_EMI is not None:
            up_NMI = up_NMI + self.up_bias_EMI[expert_N]
        first = self.experts.expert(0)
        assert isinstance(first, Expert)
        joined = up_NMI.transpose(1, 2) if first.layout.interleaved else up_NMI
        down_ND = down.products(first.activate(joined.flatten(1)), expert_N, 1)[:, 0]
        if self.down_bias_ED is not None:
            down_ND = down_ND + self.down_bias_ED[expert_N]
        down_TKD = down_ND.view(*expert_TK.shape, -1)
        if routed.share_TK is not None:
            down_TKD = down_TKD * routed.share_TK.unsqueeze(-1)
        return down_TKD.sum(1).to(x_TD.dtype)

    def _fits(self, routed: Routed) -> bool:
        """Whether the kernel does so many tokens, and faster than experts one by one."""
        x_TD, pairs, count = routed.inputs_TD, routed.expert_TK.numel(), len(self.experts)
        few = len(x_TD) <= PASSES * MOST_TOKENS or pairs <= PASSES * MOST_TOKENS * count
        fits = 0 < pairs <= MOST_PAIRS and count <= MOST_EXPERTS and not self.experts.layout.by_rows
        return x_TD.is_cuda and few and fits and not (torch.is_grad_enabled() and x_TD.requires_grad)

    def _banks(self, device: torch.device, dtype: torch.dtype) -> tuple[Bank, Bank] | None:
        if self.made_for != (device, dtype):
            self.made_for = device, dtype
            self.banks = self._made(device, dtype)
        return self.banks

    def _made(self, device: torch.device, dtype: torch.dtype) -> tuple[Bank, Bank] | None:
        experts = [self.experts.expert(index) for index in range(len(self.experts))]
        leaves = ("gate_proj", "up_proj") if self.experts.layout.gated else ("up_proj",)
        ups = [[expert.get_submodule(leaf) for leaf in leaves] for expert in experts]
        downs = [[expert.get_submodule("down_proj")] for expert in experts]
        if not all(takes(layer, device, dtype) for row in (*ups, *downs) for layer in row):
            return None
        if self.experts.layout.bias:
            self.up_bias_EMI = torch.stack([torch.stack([bias_of(layer) for layer in row]) for row in ups])
            self.down_bias_ED = torch.stack([bias_of(layer) for (layer,) in downs])
        up, down = bank_of(ups), bank_of(downs)
        return None if up is None or down is None else (up, down)


def takes(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a layer is one that the kernel could multiply by, where the tokens are."""
    return (
        isinstance(layer, CompressedLinear)
        and isinstance(layer.format, Sub1)
        and layer.kernel.name == "sub1-cuda"
        and (layer.device, layer.dtype) == (device, dtype)
    )


def bank_of(layers: Sequence[Sequence[nn.Module]]) -> Bank | None:
    """The matrices of E x M layers; None where one is of a kind that only floats can be made of."""
    entries = [[_entry(layer) for layer in row] for row in layers]
    return Bank.of(entries) if all(fused(entry) for row in entries for entry in row) else None


def bias_of(layer: nn.Module) -> Tensor:
    assert isinstance(layer, CompressedLinear) and layer.bias is not None
    return layer.bias


def _entry(layer: nn.Module) -> Entry:
    assert isinstance(layer, CompressedLinear) and isinstance(layer.format, Sub1)
    return entry_of(layer.format, dict(layer.named_buffers()))
