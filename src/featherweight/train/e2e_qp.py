"""E2E-QP: the codes of a whole model frozen, its scales trained on text (2407.11062, section 3.3).

`tuned_linear` is a layer of it, `keeping` how its blocks go there and back; here is how they are trained.
Shapes: S sequences, T tokens, V vocabulary, N predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from featherweight.train.sharding import is_sharded, mine, whole
from featherweight.train.step import ALONE, Processes

Logits = Callable[[Tensor], Tensor]
Number = TypeVar("Number", float, Tensor)
SLICE_LOGITS = 1 << 24  # numbers of the vocabulary compared at once in float32


@dataclass(frozen=True)
class Trained:
    """A parameter in training.

    Attributes:
        rate: Adam's first rate, in the parameter's own unit.
        floor: the least value, for a scale that vanishes cannot come back; or None.
    """

    parameter: nn.Parameter
    rate: float
    floor: float | None = None


@dataclass(frozen=True)
class Schedule:
    """How a model is tuned; after a warm-up a cosine takes all rates to 0.

    Attributes:
        steps: of the optimizer, in all.
        batch: sequences in a step; `micro` of them go through the model at a time.
        checks: how often in all the held-out text is looked at; training stops when `patience` looks in a row were no
            better.
        norm: gradients are shortened to this length.
        text_share: beside a dense model, the cross-entropy's share of the loss; the rest is the divergence.
        seed: of the order of the sequences.
    """

    steps: int
    batch: int
    micro: int
    checks: int = 8
    patience: int = 3
    norm: float = 0.3
    seed: int = 0
    text_share: float = 0.0


WARM_UP = 0.03  # of the steps


def rate_at(step: int, steps: int) -> float:
    """The share of the first rate at a step: a line up, then a cosine down to 0."""
    warm = max(1, math.ceil(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def divergence(logits_STV: Tensor, dense_STV: Tensor | None, ids_ST: Tensor) -> tuple[Tensor, Tensor]:
    """Means over all predictions of KL(dense || model) (0 without `dense`) and of the cross-entropy, in nats."""
    logits_NV, targets_N = logits_STV[:, :-1].flatten(0, 1), ids_ST[:, 1:].flatten()
    dense_NV = None if dense_STV is None else dense_STV[:, :-1].flatten(0, 1)
    kl = entropy = logits_NV.new_zeros((), dtype=torch.float32)
    positions = max(1, SLICE_LOGITS // logits_NV.shape[1])
    for start in range(0, len(targets_N), positions):
        at = slice(start, start + positions)
        logp_NV = logits_NV[at].float().log_softmax(-1)
        entropy = entropy + functional.nll_loss(logp_NV, targets_N[at], reduction="sum")
        if dense_NV is not None:
            theirs_NV = dense_NV[at].float().log_softmax(-1)
            # A vocabulary's padding may be -inf in both: nothing times infinity is nothing here.
            terms_NV = (theirs_NV.exp() * (theirs_NV - logp_NV)).masked_fill(theirs_NV == -torch.inf, 0.0)
            kl = kl + terms_NV.sum()
    return kl / len(targets_N), entropy / len(targets_N)


GROUPS = ("parameters", "best", "mean", "square")  # of tensors, one for each parameter


@dataclass
class State:
    """Where tuning stands: all that is needed to go on, and the best of what was seen.

    Attributes:
        step: steps taken.
        parameters, best: values now, and at the best look; mean, square: Adam's two averages.
        looks: (step, held-out KL or None, held-out cross-entropy) of every look so far, the first before any step.
    """

    step: int
    parameters: list[Tensor]
    best: list[Tensor]
    mean: list[Tensor]
    square: list[Tensor]
    looks: list[tuple[int, float | None, float]]

    @classmethod
    def fresh(cls, parameters: Iterable[Tensor]) -> State:
        """The state before the first step, of what is held here."""
        now = [mine(parameter) for parameter in parameters]
        zeros = [torch.zeros_like(value) for value in now]
        return cls(0, now, [v.clone() for v in now], zeros, [torch.zeros_like(v) for v in now], [])


class Tuner:
    """Trains parameters of a model on text; stopped after any `advance`, it goes on from `state` to the same bits."""

    def __init__(
        self,
        model: Logits,
        dense: Logits | None,
        trained: Sequence[Trained],
        training_ST: Tensor,
        held_ST: Tensor,
        schedule: Schedule,
        state: State | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """`model` and `dense` give logits for ids; without `dense` the loss is the cross-entropy. Of several
        processes each takes some of the sequences of every step and look, and all do the same with the sum, or, where
        parameters are sharded (`sharding`), each with the part that it holds and has in its state."""
        self.processes = processes
        self.sharded = any(is_sharded(each.parameter) for each in trained)
        self.model, self.dense, self.trained = model, dense, list(trained)
        self.parameters = [each.parameter for each in trained]
        self.training_ST, self.held_ST, self.schedule = training_ST, held_ST, schedule
        if state is None:
            self.state = State.fresh(self.parameters)
            self.look()
        else:
            self.state = state
            for parameter, value in zip(self.parameters, state.parameters, strict=True):
                mine(parameter).copy_(value)
        self.state.parameters = [mine(parameter) for parameter in self.parameters]

    def whole_state(self) -> State:
        """The state as one process would have it, on the CPU."""

        def wholes(parts: list[Tensor]) -> list[Tensor]:
            return [whole(part, parameter).cpu() for part, parameter in zip(parts, self.parameters, strict=True)]

        state = self.state
        values = wholes(state.parameters), wholes(state.best)
        return State(state.step, *values, wholes(state.mean), wholes(state.square), state.looks)

    @property
    def done(self) -> bool:
        """Whether all steps are taken or the last looks were no better than the best before them."""
        losses = [self._judged(look) for look in self.state.looks]
        best = losses.index(min(losses))
        bad = not math.isfinite(losses[-1])
        return bad or self.state.step >= self.schedule.steps or len(losses) - 1 - best >= self.schedule.patience

    @property
    def best_look(self) -> tuple[int, float | None, float]:
        """Of the state that is kept."""
        return min(self.state.looks, key=self._judged)

    def _judged(self, look: tuple[int, float | None, float]) -> float:
        loss = self._loss(look[1], look[2])
        return loss if math.isfinite(loss) or len(self.state.looks) == 1 else math.inf

    def advance(self, tick: Callable[[int], None]) -> None:
        """Steps until the next look, and looks; `tick` hears the steps taken."""
        schedule, state = self.schedule, self.state
        until = min(schedule.steps, state.step + max(1, schedule.steps // schedule.checks))
        order_N = self._order()
        while state.step < until:
            first = state.step * schedule.batch
            picks = order_N[first : first + schedule.batch]
            self._step(self.training_ST[picks])
            tick(state.step)
        self.look()

    def _order(self) -> Tensor:
        """The sequence of every place in every batch: passes over the training ones, each in its own order."""
        draw = torch.Generator().manual_seed(self.schedule.seed)
        count, wanted = len(self.training_ST), self.schedule.steps * self.schedule.batch
        return torch.cat([torch.randperm(count, generator=draw) for _ in range(-(-wanted // count))])

    def _step(self, ids_ST: Tensor) -> None:
        times = self.processes.size if self.sharded else 1  # sharded, a mean over processes is what comes back
        with torch.enable_grad():
            for part_ST, share in self._parts(ids_ST):
                loss = self._loss(*self._losses(part_ST)) * (times * share)
                loss.backward()  # type: ignore[no-untyped-call]
        gradients = self._gradients()
        state, share = self.state, rate_at(self.state.step, self.schedule.steps)
        state.step += 1
        for index, (value, gradient) in enumerate(zip(state.parameters, gradients, strict=True)):
            averages = state.mean[index], state.square[index]
            _adam(value, gradient, *averages, state.step, share * self.trained[index].rate, self.trained[index].floor)

    def _parts(self, ids_ST: Tensor) -> list[tuple[Tensor, float]]:
        """This process's sequences, as many at a time as go through the model, and the share of all that they are.

        Where the model is sharded all processes run it as often as any: one that has nothing left runs a sequence that
        counts nothing.
        """
        size, micro = self.processes.size, self.schedule.micro
        own_ST = ids_ST[self.processes.rank :: size]
        found = [(part_ST, len(part_ST) / len(ids_ST)) for part_ST in own_ST.split(micro) if len(part_ST)]
        most = -(-len(ids_ST[::size]) // micro) if self.sharded else 0
        return found + [(ids_ST[:1], 0.0)] * (most - len(found))

    @torch.no_grad()
    def _gradients(self) -> list[Tensor]:
        """What is held here of the gradients over all processes, shortened; no parameter has one afterwards."""
        found = []
        for parameter in self.parameters:
            found.append(torch.zeros_like(mine(parameter)) if parameter.grad is None else mine(parameter.grad))
            parameter.grad = None
        if self.processes.size > 1 and not self.sharded:
            self._add_up(found)
        length = nn.utils.get_total_norm(found)
        if self.sharded:
            length = length.square()
            self.processes.sum_(length)
            length.sqrt_()
        torch._foreach_mul_(found, (self.schedule.norm / (length + 1e-6)).clamp(max=1.0))
        return found

    def _add_up(self, gradients: list[Tensor]) -> None:
        """Over all processes, as one tensor."""
        joined_N = torch.cat([gradient.flatten() for gradient in gradients])
        self.processes.sum_(joined_N)
        for gradient, part_N in zip(gradients, joined_N.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part_N.view_as(gradient))

    def _loss(self, kl: Number | None, entropy: Number) -> Number:
        """What is lowered."""
        text = self.schedule.text_share
        return entropy if kl is None or self.dense is None else (1 - text) * kl + text * entropy

    def _losses(self, ids_ST: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            dense_STV = None if self.dense is None else self.dense(ids_ST)
        logits_STV = self.model(ids_ST)
        return divergence(logits_STV, dense_STV, ids_ST.to(logits_STV.device))

    @torch.no_grad()
    def look(self) -> None:
        """Measures the held-out text and keeps the parameters if they are the best so far."""
        total = torch.zeros(2, device=self.parameters[0].device)
        for part_ST, share in self._parts(self.held_ST):
            total += torch.stack(self._losses(part_ST)) * share
        self.processes.sum_(total)
        kl, entropy = total.tolist()
        self.state.looks.append((self.state.step, None if self.dense is None else kl, entropy))
        if self.best_look == self.state.looks[-1]:
            self.state.best = [mine(parameter).clone() for parameter in self.parameters]

    @torch.no_grad()
    def finish(self) -> None:
        """Gives the model the best parameters seen."""
        for parameter, value in zip(self.parameters, self.state.best, strict=True):
            mine(parameter).copy_(value)


@torch.no_grad()
def _adam(
    parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: int, rate: float, floor: float | None
) -> None:
    """One step of Adam (betas 0.9 and 0.999) in place; the averages are the caller's, to be stored and read back."""
    mean.lerp_(gradient, 0.1)
    square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    scale = (square / (1 - 0.999**step)).sqrt_().add_(1e-8)
    parameter.addcdiv_(mean, scale, value=-rate / (1 - 0.9**step))
    if floor is not None:
        parameter.clamp_(min=floor)
