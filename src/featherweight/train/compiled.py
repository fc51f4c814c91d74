"""torch.compile where it works and pays: it takes some 15 s for a first block, and others of its kind share it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from featherweight.errors import FallbackWarning

Forward = Callable[..., Any]


class Compiled:
    """A block's forward as torch.compile has it, for calls of one shape with gradients; as it is for others, and, with
    one FallbackWarning, where it cannot be compiled."""

    def __init__(self, forward: Forward) -> None:
        self.forward, self.fast = forward, torch.compile(forward, dynamic=False)
        self.works: bool | None = None  # not known before the first call

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*arguments, **named)
        if self.works is None:
            try:
                found = self.fast(*arguments, **named)
            except Exception as error:  # tracing and compilers raise kinds of their own
                self.works = False
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                warnings.warn(
                    f"this block cannot be compiled ({reason}): it runs as it is, slower.",
                    FallbackWarning,
                    stacklevel=2,
                )
            else:
                self.works = True
                return found
        return self.fast(*arguments, **named) if self.works else self.forward(*arguments, **named)
