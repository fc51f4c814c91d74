"""Whether a GPU in training waits for hidden states that lie in memory or in files.

Shapes: S sequences, T tokens, D width.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from featherweight.stream.hidden import HiddenStates, Place
from featherweight.train.sequences import Sequences
from featherweight.train.step import Run, Stepper

PLACES: dict[str, Place] = {"memory": "memory", "files": "disk"}
HELD, ROUNDS = 64, 2  # sequences off the GPU; times each is taken
WARM = 6  # steps before the clock


def fed(stepper: Stepper, run: Run, inputs_STD: Tensor, pace: Tensor, scratch: Path) -> dict[str, float]:
    """Milliseconds of fetching what a step takes, of a step of training, and of a batch of a pass that replaces the
    states, by where these lie."""
    found: dict[str, float] = {}
    batch, *shape = inputs_STD.shape
    for name, place in PLACES.items():
        held = (HELD, shape[0], shape[1])
        states = HiddenStates(held, inputs_STD.dtype, inputs_STD.device, scratch / name, place=place)
        states.states_STD.copy_(inputs_STD[:1])
        found[f"fetch_from_{name}_ms"] = steps_from(None, states.states_STD, batch, pace, inputs_STD.device)
        found[f"from_{name}_ms"] = steps_from(stepper, states.states_STD, batch, pace, inputs_STD.device)
        found[f"pass_from_{name}_ms"] = pass_over(states, batch, run)
        states.close()
    return found


def steps_from(stepper: Stepper | None, states_STD: Tensor, batch: int, pace: Tensor, device: torch.device) -> float:
    """Of a step whose sequences come from this memory, once they flow; without a stepper, of their coming alone."""
    picks = ROUNDS * torch.arange(len(states_STD)).split(batch)
    began = 0.0
    for number, pair in enumerate(Sequences(states_STD, states_STD, 0, device).batches(picks)):
        if number == WARM:
            _wait(device)
            began = time.perf_counter()
        if stepper is not None:
            stepper.step(*pair, pace, 0.0)
    _wait(device)
    return 1e3 * (time.perf_counter() - began) / (len(picks) - WARM)


@torch.no_grad()
def pass_over(states: HiddenStates, batch: int, run: Run) -> float:
    """Of a batch of a forward pass, there and back, in the second of two passes."""
    for _ in range(2):
        began = time.perf_counter()
        states.advance(batch, run)
        _wait(states.device)
    return 1e3 * (time.perf_counter() - began) / -(-len(states.states_STD) // batch)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
