"""Block-AP: the matrices of one block trained together towards the block's original output (2407.11062).

Shapes: S sequences, T tokens, D width, R outputs, C inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.train.trainable import Trainable

LAST_RATE = 0.05  # of the first: where the cosine ends
Tick = Callable[[float], None]
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Schedule:
    """How a block is trained.

    Attributes:
        epochs: passes over the training sequences.
        batch: sequences in a step; those that do not fill one are left for another epoch.
        weight_rate, scale_rate: what Adam's rates begin at, for weights and for scales and zeros, in the units of the
            trained layers; a cosine takes both to a twentieth.
        held_out: sequences at the end that are measured and never trained on.
        each_token_alike: an error counts relative to the token's own mean square, not absolutely.
        seed: of the order of the sequences.
    """

    epochs: int
    batch: int
    weight_rate: float
    scale_rate: float
    held_out: int
    each_token_alike: bool
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What training did.

    Attributes:
        start, best: held-out losses before training and of the state that was kept: never more than `start`.
        epoch: after which epoch that was, 0 for the start.
        finite: whether the loss stayed a number; if not, the state is that of the start.
    """

    start: float
    best: float
    epoch: int
    finite: bool


@dataclass(frozen=True)
class Sequences:
    """What a block is fed and what it is to answer, S x T x D each, on the device, in memory or on disk; the last
    `held_out` sequences are the held-out ones."""

    inputs_STD: Tensor
    targets_STD: Tensor
    held_out: int
    device: torch.device

    @property
    def training(self) -> int:
        """How many sequences are trained on."""
        return self.inputs_STD.shape[0] - self.held_out

    def take(self, at_S: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these sequences on the device; `at_S` lies where the states do."""
        inputs_STD, targets_STD = (states[at_S] for states in (self.inputs_STD, self.targets_STD))
        return inputs_STD.to(self.device, non_blocking=True), targets_STD.to(self.device, non_blocking=True)


def block_ap(
    module: nn.Module, run: Run, layers: Mapping[str, Trainable], sequences: Sequences, schedule: Schedule, tick: Tick
) -> Outcome:
    """Trains `layers` (by the path of the module whose weight each is) and leaves them at their best held-out state.

    `run` puts a batch of hidden states through `module`, whose own weights are as they were in the end. Nothing waits
    for the device but the losses at the end of an epoch. `tick` hears the share of the steps that is done.
    """
    optimizer = _optimizer(layers, schedule)
    draw = torch.Generator().manual_seed(schedule.seed)
    batch = min(schedule.batch, sequences.training)
    steps = sequences.training // batch
    start = best = held_out_loss(module, run, layers, sequences, schedule)
    beginning = kept = _copy(layers)
    epoch, finite = 0, math.isfinite(start)
    for number in range(schedule.epochs if finite else 0):
        order_S = torch.randperm(sequences.training, generator=draw).to(sequences.inputs_STD.device)
        for step, at_S in enumerate(order_S[: steps * batch].split(batch)):
            done = (number * steps + step) / (schedule.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = group["first_rate"] * cosine(done)
            _step(module, run, layers, sequences.take(at_S), schedule, optimizer, done)
            tick(done)
        now = held_out_loss(module, run, layers, sequences, schedule)
        if not math.isfinite(now):
            best, epoch, kept, finite = start, 0, beginning, False
            break
        if now < best:
            best, epoch, kept = now, number + 1, _copy(layers)
    _restore(layers, kept)
    return Outcome(start, best, epoch, finite)


@torch.no_grad()
def held_out_loss(
    module: nn.Module, run: Run, layers: Mapping[str, Trainable], sequences: Sequences, schedule: Schedule
) -> float:
    """The mean loss over the held-out sequences, with codes that are whole; without layers, of the module as it is."""
    total = torch.zeros((), device=sequences.device)
    count = sequences.inputs_STD.shape[0]
    with _replaced(module, layers):
        for first in range(sequences.training, count, schedule.batch):
            at_S = torch.arange(first, min(first + schedule.batch, count), device=sequences.inputs_STD.device)
            inputs_STD, targets_STD = sequences.take(at_S)
            total += block_loss(run(inputs_STD), targets_STD, schedule.each_token_alike) * len(at_S)
    return float(total) / sequences.held_out


def block_loss(outputs_STD: Tensor, targets_STD: Tensor, each_token_alike: bool) -> Tensor:
    """Mean squared error, in float32; of `each_token_alike` relative to the mean square of the token's target.

    What follows a block divides a token by its norm: an error matters as much as it turns the token. Plain errors are
    those of the few tokens with massive activations.
    """
    targets_STD = targets_STD.float()
    error_ST = (outputs_STD.float() - targets_STD).square().mean(-1)
    if each_token_alike:
        error_ST = error_ST / targets_STD.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return error_ST.mean()


def cosine(progress: float) -> float:
    """The share of the first rate after `progress` (0 .. 1) of the steps."""
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def _step(
    module: nn.Module,
    run: Run,
    layers: Mapping[str, Trainable],
    batch: tuple[Tensor, Tensor],
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    progress: float,
) -> None:
    inputs_STD, targets_STD = batch
    for layer in layers.values():
        layer.harden(progress)
    with torch.enable_grad(), _replaced(module, layers):
        block_loss(run(inputs_STD), targets_STD, schedule.each_token_alike).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for layer in layers.values():
        layer.tidy()


def _optimizer(layers: Mapping[str, Trainable], schedule: Schedule) -> torch.optim.Optimizer:
    weights = [parameter for layer in layers.values() for parameter in layer.weights]
    steps = [parameter for layer in layers.values() for parameter in layer.steps]
    rates = ((weights, schedule.weight_rate), (steps, schedule.scale_rate))
    groups = [{"params": parameters, "first_rate": rate} for parameters, rate in rates if parameters]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


@contextmanager
def _replaced(module: nn.Module, layers: Mapping[str, Trainable]) -> Iterator[None]:
    """The module with the layers' values in place of its weights, in their dtype and layout."""
    own: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for path, layer in layers.items():
            owner = module.get_submodule(path)
            weight = owner._parameters.pop("weight")
            assert weight is not None
            own.append((owner, weight))
            values_RC = layer.values().to(weight.dtype)
            owner.__dict__["weight"] = values_RC.T if layer.transposed else values_RC
        yield
    finally:
        for owner, weight in own:
            owner.__dict__.pop("weight", None)
            owner._parameters["weight"] = weight


def _parameters(layers: Mapping[str, Trainable]) -> list[nn.Parameter]:
    return [parameter for layer in layers.values() for parameter in (*layer.weights, *layer.steps)]


def _copy(layers: Mapping[str, Trainable]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in _parameters(layers)]


def _restore(layers: Mapping[str, Trainable], kept: list[Tensor]) -> None:
    for parameter, value in zip(_parameters(layers), kept, strict=True):
        parameter.data = value
