"""What a kernel is: y_TR = x_TC V^T for the tensors of one format, and what it takes.

Shapes: R outputs, C inputs, T tokens (any leading axes).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.errors import RequestError
from featherweight.formats.base import Format, Rule, Solution

Run = Callable[[Tensor, Tensor | None], Tensor]
"""(x_TC, bias_R or None) -> y_TR, with the weights in whatever shape the kernel likes them held inside."""


@dataclass(frozen=True)
class Restorable:
    """A `Run` whose own order of the weights can be turned back, so that nobody else has to hold them.

    Attributes:
        run: multiplies.
        solution: what it was made of: equal codes, scales, zeros and grid.
    """

    run: Run
    solution: Callable[[], Solution]

    def __call__(self, x_TC: Tensor, bias_R: Tensor | None) -> Tensor:
        return self.run(x_TC, bias_R)


def require_no_backward(name: str, x_TC: Tensor) -> None:
    """Raise RequestError where gradients would be wanted of a kernel that has none."""
    if torch.is_grad_enabled() and x_TC.requires_grad:
        raise RequestError(f"the {name} kernel has no backward pass: choose reference or dense.")


def require_input(x_TC: Tensor, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise RequestError unless x fits a layer that was prepared for this width, dtype and device."""
    if x_TC.shape[-1] != columns or x_TC.dtype != dtype:
        found = f"{x_TC.dtype} with {x_TC.shape[-1]} columns"
        raise RequestError(f"the input is {found}, and the layer is {dtype} with {columns}: cast it, or the layer.")
    if x_TC.device != device:
        raise RequestError(f"the input is on {x_TC.device}, and the layer on {device}: move one to the other.")


@dataclass(frozen=True)
class Case:
    """What a layer is, as far as choosing its kernel goes."""

    format: Format
    rule: Rule
    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Kernel(ABC):
    """One way to multiply by compressed weights."""

    name: str

    @abstractmethod
    def refusal(self, case: Case) -> str | None:
        """Why this kernel does not take this layer, in a few words with both numbers; None when it does."""

    def broken(self, case: Case) -> str | None:
        """Why a layer that this kernel takes could not run on this machine all the same, found by trying; else None."""
        return None

    @abstractmethod
    def prepare(self, format: Format, rule: Rule, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Run:
        """Rearrange the weights once, on the device where `tensors` lie, and return the function that multiplies.

        `dtype` is that of the activations, and of what comes out.
        """
