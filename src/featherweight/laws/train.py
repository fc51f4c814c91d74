"""One group of a sweep: runs of one dense size and duration, a pattern each, trained side by side on one device.

Every tensor has a leading axis of runs, so a step is a handful of batched products and a few fused kernels whatever
their number. All runs of a group see the same windows at the same learning rate; only their masks differ.

Shapes: M runs, L layers, R outputs, C inputs, B windows, T bytes of a window, X matrices, N weights of a matrix.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import RequestError
from featherweight.laws import schedule
from featherweight.laws.corpus import CHUNK, Corpus, windows
from featherweight.laws.model import PARTS, Size, initial, losses, rotary
from featherweight.laws.schedule import Pattern

BETAS, ADAM_EPSILON, CLIP = (0.9, 0.95), 1e-8, 1.0
WARMUP = 0.05


@dataclass(frozen=True)
class Setting:
    """What a group is trained with; `rate` is the learning rate at width 256, it falls as width^-1/2."""

    windows: int = 16
    window: int = 256
    rate: float = 2e-3
    decay: float = 0.1
    seed: int = 0
    evaluation_bytes: int = 1 << 20
    micro_batches: int = 1


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first WARMUP of the steps, then linearly down, to 0 at the step after the last."""
    warm = max(1, round(WARMUP * steps))
    return peak * min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def adam(
    params: dict[str, Tensor],
    grads: dict[str, Tensor],
    means: dict[str, Tensor],
    squares: dict[str, Tensor],
    masks: dict[str, Tensor],
    numbers: Tensor,
    decay: float,
) -> None:
    """One AdamW step of all runs in place; gradients of pruned weights are dropped, each run's norm clipped to CLIP.

    numbers: learning rate, 1 - beta_1^t and 1 - beta_2^t, on the device, so that a new step compiles nothing anew.
    Weights of the blocks decay, embedding and head do not.
    """
    rate, first, second = numbers.unbind()
    kept = {name: grad * masks[name] if name in masks else grad for name, grad in grads.items()}
    norm_M = torch.stack([grad.square().flatten(1).sum(1) for grad in kept.values()]).sum(0).sqrt()
    scale_M = CLIP / norm_M.clamp_min(CLIP)
    for name, weight in params.items():
        grad = kept[name] * scale_M.view(-1, *[1] * (weight.dim() - 1))
        means[name].lerp_(grad, 1 - BETAS[0])
        squares[name].lerp_(grad.square(), 1 - BETAS[1])
        step = (means[name] / first) / ((squares[name] / second).sqrt() + ADAM_EPSILON)
        weight.sub_(rate * (step + decay * weight if name in PARTS else step))


@dataclass
class Group:
    """Runs in training: float32 parameters, Adam's two moments, masks of the blocks, and how far they are.

    `step` counts finished steps; `seconds` is the time they took, compiling and earlier tries included.
    """

    size: Size
    steps: int
    patterns: tuple[Pattern, ...]
    setting: Setting
    params: dict[str, Tensor]
    means: dict[str, Tensor]
    squares: dict[str, Tensor]
    masks: dict[str, Tensor]
    step: int = 0
    seconds: float = 0.0
    chunk: tuple[int, Tensor] | None = field(default=None, repr=False)
    numbers: Tensor | None = field(default=None, repr=False)

    @classmethod
    def new(
        cls, size: Size, steps: int, patterns: tuple[Pattern, ...], setting: Setting, device: torch.device
    ) -> Group:
        params = initial(size, len(patterns), setting.seed, device)
        means, squares = ({name: torch.zeros_like(value) for name, value in params.items()} for _ in range(2))
        masks = {name: torch.ones_like(params[name], dtype=torch.bool) for name in PARTS}
        return cls(size, steps, patterns, setting, params, means, squares, masks)

    @property
    def device(self) -> torch.device:
        return self.params["head"].device

    def batch(self, corpus: Corpus) -> Tensor:
        """B x T + 1 bytes of the next step."""
        number, within = divmod(self.step, CHUNK)
        if self.chunk is None or self.chunk[0] != number:
            drawn = corpus.starts(self.setting.seed, number, self.setting.windows, self.setting.window + 1)
            self.chunk = (number, drawn)
        return windows(corpus.train_N, self.chunk[1][within], self.setting.window + 1)

    def adam_numbers(self) -> Tensor:
        """What `adam` takes at this step. All steps' are put on the device at once: a copy a step would hold it up."""
        if self.numbers is None:
            peak = self.setting.rate * math.sqrt(256 / self.size.width)
            rows = [
                (rate_at(step, self.steps, peak), 1 - BETAS[0] ** (step + 1), 1 - BETAS[1] ** (step + 1))
                for step in range(self.steps)
            ]
            self.numbers = torch.tensor(rows, device=self.device)
        return self.numbers[self.step].clone()

    def prune(self) -> None:
        """New masks, if this step calls for them; what goes is set to zero and forgets its moments."""
        if not schedule.is_update(self.step, self.steps):
            return
        share = schedule.share_at(self.step, self.steps)
        for name, parts in PARTS.items():
            for run, which in enumerate(self.patterns):
                if not which.sparsity:
                    continue
                weight = self.params[name][run]
                rows_XN = weight.view(self.size.layers * len(parts), -1)
                self.masks[name][run] = schedule.mask(rows_XN, which, share).view_as(weight)
            for held in (self.params, self.means, self.squares):
                held[name] *= self.masks[name]

    def nonzero(self) -> list[int]:
        """Weights of the blocks that are not pruned, by run."""
        counts_M = torch.stack([mask.flatten(1).sum(1) for mask in self.masks.values()]).sum(0)
        return [int(count) for count in counts_M]

    # --- to a file and back

    def save(self, path: Path, digest: str) -> None:
        """Writes everything to one safetensors file, put in place whole."""
        from safetensors.torch import save_file

        tensors = {f"{kind}.{name}": value for kind, held in self._held().items() for name, value in held.items()}
        state = {"digest": digest, "size": self.size.name, "steps": self.steps, "step": self.step,
                 "seconds": self.seconds}  # fmt: skip
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata={"state": json.dumps(state)})
        os.replace(partial, path)

    def resume(self, path: Path, digest: str) -> bool:
        """Takes up what `save` wrote, if that was this group under these settings; says whether it did."""
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                state = json.loads((file.metadata() or {})["state"])
                if (state["digest"], state["size"], state["steps"]) != (digest, self.size.name, self.steps):
                    return False
                for kind, held in self._held().items():
                    held.update({name: file.get_tensor(f"{kind}.{name}") for name in held})
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise RequestError(f"{path} is no checkpoint of a sweep that can be read: delete it.") from error
        self.step, self.seconds = state["step"], state["seconds"]
        return True

    def _held(self) -> dict[str, dict[str, Tensor]]:
        return {"params": self.params, "means": self.means, "squares": self.squares, "masks": self.masks}


class Trainer:
    """Steps and evaluates groups in one precision; compiled, if asked, once for each shape."""

    def __init__(self, corpus: Corpus, setting: Setting, device: torch.device, dtype: torch.dtype, compiled: bool):
        self.corpus, self.setting = corpus, setting
        self.tables = rotary(setting.window, device, dtype)
        self.held_BT = corpus.held_out(setting.window + 1, setting.evaluation_bytes)
        self.compiled = compiled
        self.losses: Callable[..., Tensor] = losses
        self.adam: Callable[..., None] = adam

    def compile(self) -> None:
        """Forgets what was compiled for the last size and compiles for the next, at its first step."""
        if self.compiled:
            torch.compiler.reset()
            self.losses = torch.compile(losses, dynamic=False)
            self.adam = torch.compile(adam, dynamic=False)

    def step(self, group: Group) -> Tensor:
        """One training step; returns the losses of its batch, M, without waiting for them."""
        group.prune()
        leaves = {name: value.detach().requires_grad_() for name, value in group.params.items()}
        parts = group.batch(self.corpus).chunk(self.setting.micro_batches)
        found, grads = self._gradients(leaves, parts[0])
        for part in parts[1:]:
            more, others = self._gradients(leaves, part)
            found, grads = found + more, [a.add_(b) for a, b in zip(grads, others, strict=True)]
        if len(parts) > 1:
            found, grads = found / len(parts), [grad.div_(len(parts)) for grad in grads]
        named = dict(zip(leaves, grads, strict=True))
        with torch.no_grad():
            numbers, decay = group.adam_numbers(), self.setting.decay
            self.adam(group.params, named, group.means, group.squares, group.masks, numbers, decay)
        group.step += 1
        return found

    def _gradients(self, leaves: dict[str, Tensor], bytes_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
        found_M = self.losses(leaves, bytes_BT, *self.tables)
        return found_M.detach(), list(torch.autograd.grad(found_M.sum(), list(leaves.values())))

    def evaluate(self, group: Group) -> list[float]:
        """Held-out loss of each run in nats per byte. RequestError when one is not finite."""
        total_M = torch.zeros(len(group.patterns), dtype=torch.float64, device=group.device)
        # Leaves with gradients, though none is taken: so the compiled step of training serves here, too.
        leaves = {name: value.detach().requires_grad_() for name, value in group.params.items()}
        most = self.setting.windows // self.setting.micro_batches
        for part_BT in self.held_BT.split(most):
            # The last batch, a short one, is not worth a compilation.
            whole = len(part_BT) == most
            total_M += (self.losses if whole else losses)(leaves, part_BT, *self.tables).detach() * len(part_BT)
        return finite((total_M / len(self.held_BT)).tolist(), group)


def finite(values: list[float], group: Group) -> list[float]:
    """The losses as they are; RequestError when a run has diverged."""
    wrong = [which.name for which, value in zip(group.patterns, values, strict=True) if not math.isfinite(value)]
    if wrong:
        raise RequestError(
            f"size {group.size.name}, sparsity {', '.join(wrong)}: the loss is no longer finite at step {group.step} of"
            f" {group.steps}: take a lower --rate than {group.setting.rate:g}, in a new folder."
        )
    return values


def describe(group: Group, loss_M: Any) -> str:
    """What is being trained, for the progress bar."""
    return f"{group.size.name}, step {group.step} of {group.steps}, loss {float(loss_M.mean()):.3f}"
