"""Norms after compression: batch norms follow the new statistics, layer norms are given back mean and spread.

Shapes: D channels of a norm's output; all leading axes are tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.errors import FallbackWarning
from featherweight.stream.feed import Enough, Feed, hooked

Statistics = tuple[Tensor, Tensor]


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep running statistics."""
    return [child for child in module.modules() if isinstance(child, _BatchNorm) and child.running_mean is not None]


def layer_norms(module: nn.Module) -> dict[str, nn.LayerNorm]:
    """The layer norms that can take in a correction: those with a weight and a bias."""
    found = {name: child for name, child in module.named_modules() if isinstance(child, nn.LayerNorm)}
    return {name: norm for name, norm in found.items() if norm.weight is not None and norm.bias is not None}


def batch_statistics(feed: Feed, norms: list[_BatchNorm]) -> list[Statistics | None]:
    """Mean and variance of every norm's inputs, each batch normalised by itself, averaged over all batches.

    None for a norm that no batch reaches. The norms keep the statistics they have.
    """
    before = [(norm, norm.momentum, [buffer.clone() for buffer in norm.buffers()]) for norm in norms]
    found: list[Statistics | None] = []
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        feed.run()
        for norm in norms:
            assert norm.running_mean is not None and norm.running_var is not None
            reached = bool(norm.num_batches_tracked)
            found.append((norm.running_mean.clone(), norm.running_var.clone()) if reached else None)
    finally:
        for norm, momentum, buffers in before:
            norm.eval()
            norm.momentum = momentum
            for buffer, value in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(value)
    return found


def reset_batch_norms(norms: list[_BatchNorm], found: list[Statistics | None]) -> None:
    """OBC's batch norm reset: the running statistics become those of the batches (`batch_statistics`)."""
    for norm, statistics in zip(norms, found, strict=True):
        if statistics is not None and norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.copy_(statistics[0])
            norm.running_var.copy_(statistics[1])


@dataclass(frozen=True)
class Call:
    """One call of a batch norm in evaluation mode: mean and variance of what it was given, and of how much."""

    mean_D: Tensor
    var_D: Tensor
    count: int

    @classmethod
    def of(cls, given: Tensor) -> Call:
        x_DT = given.float().movedim(1, 0).flatten(1)
        return cls(x_DT.mean(1), x_DT.var(1, correction=0), x_DT.shape[1])


def batch_norm_calls(feed: Feed, norms: list[_BatchNorm]) -> list[list[Call]]:
    """Every call of every norm, in the order of the batches, as the module is."""
    calls: list[list[Call]] = [[] for _ in norms]

    def hear(n: int, given: Tensor) -> None:
        calls[n].append(Call.of(given))

    with hooked({norm: partial(hear, n) for n, norm in enumerate(norms)}):
        feed.run()
    return calls


def shift_batch_norms(feed: Feed, norms: list[_BatchNorm], dense: list[list[Call]]) -> None:
    """Moves running statistics by as much as compression moved those of the same batches: mean + (now - dense),
    variance x now / dense, averaged over the batches.

    Both modules run as they are used, so chance, and how the batches differ from what the module was trained on,
    cancel. While a batch runs, each norm it passes is moved by that batch's own difference: what is upstream of a
    norm is then mended when the norm is measured. `dense` are the calls of the dense module (`batch_norm_calls`).
    """
    saved = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    calls: list[list[Call]] = [[] for _ in norms]

    def hear(n: int, given: Tensor) -> None:
        calls[n].append(Call.of(given))
        at = slice(len(calls[n]) - 1, len(calls[n]))
        _put(norms[n], saved[n], calls[n][at], dense[n][at])

    try:
        with hooked({norm: partial(hear, n) for n, norm in enumerate(norms)}):
            feed.run()
    finally:
        for norm, before in zip(norms, saved, strict=True):
            for buffer, value in zip(norm.buffers(), before, strict=True):
                buffer.copy_(value)
    for n, norm in enumerate(norms):
        _put(norm, saved[n], calls[n], dense[n])


def _put(norm: _BatchNorm, before: list[Tensor], now: list[Call], dense: list[Call]) -> None:
    """Running statistics before, moved by what tells the calls apart; they stay where there is no pair of calls."""
    pairs = list(zip(now, dense, strict=False))
    if not pairs or norm.running_mean is None or norm.running_var is None:
        return
    total = sum(ours.count for ours, _ in pairs)
    parts = [
        torch.stack([ours.mean_D - theirs.mean_D, ours.var_D, theirs.var_D]) * (ours.count / total)
        for ours, theirs in pairs
    ]
    drift_D, ours_D, theirs_D = torch.stack(parts).sum(0)
    mean, var = before[0], before[1]  # the order of the buffers of a batch norm
    norm.running_mean.copy_(mean + drift_D)
    norm.running_var.copy_(var * (ours_D + norm.eps) / (theirs_D + norm.eps))


class Moments:
    """Mean and standard deviation of every channel of one norm's outputs."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.axes = len(norm.normalized_shape)
        self.sums_2D: Tensor | None = None
        self.tokens = 0

    def add(self, output: Tensor) -> None:
        y_TD = output.double().flatten(0, -self.axes - 1) if output.dim() > self.axes else output.double().unsqueeze(0)
        part_2D = torch.stack([y_TD.sum(0), y_TD.square().sum(0)])
        self.sums_2D = part_2D if self.sums_2D is None else self.sums_2D + part_2D
        self.tokens += y_TD.shape[0]

    def values(self) -> tuple[Tensor, Tensor]:
        assert self.sums_2D is not None
        mean_D, square_D = self.sums_2D / self.tokens
        return mean_D, (square_D - mean_D.square()).clamp(min=0).sqrt()


def norm_moments(feed: Feed, norms: Mapping[str, nn.LayerNorm], stop: bool = False) -> dict[str, Moments]:
    """The moments of norms that the batches reach, in order of their first call; `stop` ends a pass at the first."""
    moments: dict[str, Moments] = {}

    def heard(name: str, norm: nn.LayerNorm) -> Callable[[Tensor], None]:
        def hear(output: Tensor) -> None:
            moments.setdefault(name, Moments(norm)).add(output)
            if stop:
                raise Enough

        return hear

    with hooked({}, {norm: heard(name, norm) for name, norm in norms.items()}):
        feed.run()
    return moments


def correct_layer_norms(
    feed: Feed, norms: Mapping[str, nn.LayerNorm], dense: Mapping[str, tuple[Tensor, Tensor]], single: set[str]
) -> None:
    """OBC's mean and variance correction: every norm's output gets the dense model's mean and spread, channel by
    channel, norm after norm in order of execution.

    y' = (y - mean) spread_dense / spread + mean_dense is absorbed: weight' = weight r, bias' = (bias - mean) r +
    mean_dense. A norm in `single` is called once a batch, so a pass can end there.
    """
    for name, (mean_dense_D, spread_dense_D) in dense.items():
        norm = norms[name]
        mean_D, spread_D = norm_moments(feed, {name: norm}, name in single)[name].values()
        ratio_D = torch.where(spread_D > 1e-9, spread_dense_D / spread_D.clamp(min=1e-9), torch.ones_like(spread_D))
        if not bool(torch.isfinite(ratio_D).all()):
            warnings.warn(f"{name}: its outputs are not finite, so it is not corrected", FallbackWarning, stacklevel=2)
            continue
        shift_D = (norm.bias.double() - mean_D) * ratio_D + mean_dense_D
        with torch.no_grad():
            norm.weight.mul_(ratio_D.to(norm.weight.dtype))
            norm.bias.copy_(shift_D)
