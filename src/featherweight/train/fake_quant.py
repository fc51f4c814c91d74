"""Rounding that gradients pass through: the straight-through rules of EfficientQAT (2407.11062), plain torch.

Shapes: R outputs, C inputs, G groups, N inputs of one group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, None, None]


class _FakeQuantize(Function):
    """Keeps its three inputs and nothing of the size of the weights besides; codes are found again going back."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, weight_RGN: Tensor, scale_RG1: Tensor, zero_RG1: Tensor, bottom: int, top: int
    ) -> Tensor:
        ctx.save_for_backward(weight_RGN, scale_RG1, zero_RG1)
        ctx.bounds = bottom, top
        codes_RGN = (weight_RGN / scale_RG1).round_().add_(zero_RG1).clamp_(bottom, top)
        return codes_RGN.sub_(zero_RG1).mul_(scale_RG1)

    @staticmethod
    def backward(ctx: Any, gradient_RGN: Tensor) -> Gradients:  # type: ignore[override]
        weight_RGN, scale_RG1, zero_RG1 = ctx.saved_tensors
        ratio_RGN = weight_RGN / scale_RG1
        level_RGN = ratio_RGN.round() + zero_RG1
        codes_RGN = level_RGN.clamp(*ctx.bounds)
        within_RGN = gradient_RGN * (codes_RGN == level_RGN)
        to_scale = (gradient_RGN * (codes_RGN - zero_RG1)).sub_(within_RGN * ratio_RGN).sum(-1, keepdim=True)
        to_zero = None
        if ctx.needs_input_grad[2]:
            to_zero = (within_RGN - gradient_RGN).sum(-1, keepdim=True) * scale_RG1
        return within_RGN, to_scale, to_zero, None, None


def fake_quantize(weight_RGN: Tensor, scale_RG1: Tensor, zero_RG1: Tensor, bottom: int, top: int) -> Tensor:
    """The value of each weight's nearest code, (clamp(round(w / s) + z, bottom, top) - z) s; shape R x G x N.

    Gradients: of the weight 1 where its code is not clamped and 0 where it is; of the scale round(w / s) - w / s and
    code - z; of the zero 0 and -s. Scales may be negative; zeros are whole numbers (`whole`).
    """
    found: Tensor = _FakeQuantize.apply(weight_RGN, scale_RG1, zero_RG1, bottom, top)
    return found


class _PassThrough(Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def valued(source: Tensor, value: Tensor) -> Tensor:
    """`value`, whose gradient goes to `source` as it is."""
    found: Tensor = _PassThrough.apply(source, value)
    return found


def whole(zero_RG: Tensor, bottom: int, top: int) -> Tensor:
    """Zeros rounded and clamped to what a file can hold; gradients pass everywhere, beyond the bounds too."""
    return valued(zero_RG, zero_RG.round().clamp(bottom, top))


def stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers rounded to the dtype a file holds them in (and back); gradients pass as if they were not."""
    return value if dtype == value.dtype else valued(value, value.to(dtype).to(value.dtype))


def softly(offset: Tensor, hardness: float) -> Tensor:
    """A staircase through the whole numbers, from straight (hardness 0) to rounding (infinity); exact gradients.

    Between two whole numbers it is tanh(hardness x) / tanh(hardness / 2) / 2, x = -1/2 .. 1/2 from the middle.
    """
    if hardness == 0:
        return offset
    step = offset.detach().floor() + 0.5
    return step + torch.tanh(hardness * (offset - step)) / (2 * torch.tanh(torch.tensor(hardness / 2)).item())
