"""What the blocks of a model in training keep of their way there for the way back.

Shapes: S sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from featherweight.train.compiled import Compiled

RESERVE = 0.3  # of the device's memory: logits and gradients, when the blocks have what they keep


class Keeping:
    """Blocks that keep what they computed for the way back while there is room, and run again where there is not.

    In eval mode, without dropout, so it makes no difference to the numbers. A block on a CPU always runs again; with
    `compile`, those on a GPU are compiled for the first shape they are trained with.
    """

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device, compile: bool) -> None:
        self.device, self.grown_bytes = device, 0
        self.shape: torch.Size | None = None
        for block in blocks:
            fast = Compiled(block.forward) if compile and device.type == "cuda" else block.forward
            block.forward = partial(self._forward, block.forward, fast)  # type: ignore[method-assign]

    def _forward(self, plain: Callable[..., Any], fast: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        hidden_STD = args[0] if args else kwargs["hidden_states"]
        self.shape = self.shape or hidden_STD.shape
        inner = fast if hidden_STD.shape == self.shape else plain
        if not self._room():
            from torch.utils.checkpoint import checkpoint

            return checkpoint(inner, *args, use_reentrant=False, **kwargs)
        before = torch.cuda.memory_allocated(self.device)
        found = inner(*args, **kwargs)
        self.grown_bytes = max(self.grown_bytes, torch.cuda.memory_allocated(self.device) - before)
        return found

    def _room(self) -> bool:
        """Whether another block's activations leave RESERVE of the memory free."""
        if self.device.type != "cuda":
            return False
        free, total = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + cached - self.grown_bytes > RESERVE * total
