"""Block-AP: the matrices of one block trained together towards the block's original output (2407.11062).

Shapes: S sequences, T tokens, D width, R outputs, C inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from featherweight.core.solution import AnySolution
from featherweight.train.adam import paces
from featherweight.train.sequences import Sequences
from featherweight.train.step import ALONE, Processes, Run, Stepper
from featherweight.train.trainable import Trainable

Tick = Callable[[float], None]


@dataclass(frozen=True)
class Schedule:
    """How a block is trained.

    Attributes:
        epochs: passes over the training sequences.
        batch: sequences in a step (of all processes); those that do not fill one are left for another epoch.
        weight_rate, scale_rate: what Adam's rates begin at, for weights and for scales and zeros, in the units of the
            trained layers; a cosine takes both to a twentieth.
        each_token_alike: an error counts relative to the token's own mean square, not absolutely.
        seed: of the order of the sequences.
    """

    epochs: int
    batch: int
    weight_rate: float
    scale_rate: float
    each_token_alike: bool
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What training did.

    Attributes:
        solutions: the state that was kept, by path.
        start, best: held-out losses before training and of that state: never more than `start`.
        epoch: after which epoch that was, 0 for the start.
        finite: whether the loss stayed a number; if not, the state is that of the start.
    """

    solutions: dict[str, AnySolution]
    start: float
    best: float
    epoch: int
    finite: bool


def block_ap(
    module: nn.Module,
    run: Run,
    layers: Mapping[str, Trainable],
    sequences: Sequences,
    schedule: Schedule,
    tick: Tick,
    processes: Processes = ALONE,
) -> Outcome:
    """Trains `layers` (by the path of the module whose weight each is) and returns their best held-out state.

    `run` puts a batch of hidden states through `module`, whose own weights are as they were in the end. Nothing waits
    for the device but the losses at the end of an epoch. `tick` hears the share of the steps that is done. Of several
    processes each has its own sequences, and all return the same.
    """
    share = max(1, min(schedule.batch // processes.size, sequences.training))
    steps = _fewest(sequences.training // share, sequences.device, processes)
    loss = partial(block_loss, each_token_alike=schedule.each_token_alike)
    stepper = Stepper(module, layers, run, loss, processes)
    table = paces(schedule.epochs * steps, schedule.weight_rate, schedule.scale_rate, sequences.device)
    whole = table.new_tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    draw = torch.Generator().manual_seed(schedule.seed)

    def held_out() -> float:
        stepper.write(whole, soft=False)
        return held_out_loss(run, sequences, schedule, processes)

    with stepper.placed(len(table) * share * sequences.inputs_STD.shape[1]):
        start = best = held_out()
        kept, epoch, finite = _solutions(layers), 0, math.isfinite(start)
        for number in range(schedule.epochs if finite else 0):
            order_S = torch.randperm(sequences.training, generator=draw)[: steps * share]
            for step, pair in enumerate(sequences.batches(order_S.split(share)), number * steps):
                done = step / len(table)
                stepper.step(*pair, table[step], done)
                tick(done)
            now = held_out()
            if not math.isfinite(now):
                return Outcome({p: layer.start for p, layer in layers.items()}, start, start, 0, False)
            if now < best:
                best, epoch, kept = now, number + 1, _solutions(layers)
    return Outcome(kept, start, best, epoch, finite)


@torch.no_grad()
def held_out_loss(run: Run, sequences: Sequences, schedule: Schedule, processes: Processes = ALONE) -> float:
    """The mean loss over the held-out sequences of all processes, of the module as it is."""
    total = torch.zeros(2, device=sequences.device)
    held_S = torch.arange(sequences.training, len(sequences.inputs_STD))
    picks = held_S.split(schedule.batch) if len(held_S) else ()
    for inputs_STD, targets_STD in sequences.batches(picks):
        loss = block_loss(run(inputs_STD), targets_STD, schedule.each_token_alike)
        total += torch.stack([loss * len(inputs_STD), loss.new_tensor(len(inputs_STD))])
    processes.sum_(total)
    summed, count = total.tolist()
    return float(summed / count)


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


def _fewest(steps: int, device: torch.device, processes: Processes) -> int:
    """The fewest steps an epoch has in any process: all take as many."""
    told = torch.zeros(processes.size, device=device)
    told[processes.rank] = steps
    processes.sum_(told)
    return int(told.min())


def _solutions(layers: Mapping[str, Trainable]) -> dict[str, AnySolution]:
    """Codes, scales and zeros: an eighth of the latent weights they stand for."""
    return {path: layer.solution() for path, layer in layers.items()}
