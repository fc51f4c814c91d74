"""A compressed layer in training: its codes as they are, its scales (and zeros) parameters (2407.11062, section 3.3).

Weights stay packed. Every call unpacks one matrix, multiplies, and lets go of it; so does the way back. Only where they
are pruned, and unpacking takes longer than multiplying, are codes kept as bytes.
Shapes: T tokens, R outputs, C inputs, G groups, N inputs of one group, W words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from featherweight.core.solution import Solution
from featherweight.errors import RequestError
from featherweight.linear import CompressedLinear
from featherweight.train import packed, triton_tried
from featherweight.train.fake_quant import stored, whole

Codes = Callable[[], Tensor]


class _Multiply(Function):
    """y = x ((codes - zero) scale)^T; keeps x, scales and zeros, and unpacks the codes again on the way back."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, scale_RG: Tensor, zero_RG: Tensor, codes: Codes) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x_TC, scale_RG, zero_RG)
        ctx.codes = codes
        return functional.linear(x_TC, _weight(_steps(codes(), zero_RG), scale_RG, x_TC.dtype))

    @staticmethod
    def backward(ctx: Any, gradient_TR: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:  # type: ignore[override]
        x_TC, scale_RG, zero_RG = ctx.saved_tensors
        steps_RGN = _steps(ctx.codes(), zero_RG)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = gradient_TR @ _weight(steps_RGN, scale_RG, gradient_TR.dtype)
        to_weight_RC = gradient_TR.flatten(0, -2).T @ x_TC.flatten(0, -2).to(gradient_TR.dtype)
        to_weight_RGN = to_weight_RC.float().unflatten(-1, steps_RGN.shape[-2:])
        to_scale = (to_weight_RGN * steps_RGN).sum(-1)
        to_zero = -to_weight_RGN.sum(-1) * scale_RG if ctx.needs_input_grad[2] else None
        return to_x, to_scale, to_zero, None


class _MultiplyPacked(Function):
    """The same over packed words, which two kernels read; it keeps x, scales and zeros."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_TC: Tensor, scale_RG: Tensor, zero_RG: Tensor, words_RW: Tensor, bits: int
    ) -> Tensor:
        ctx.save_for_backward(x_TC, scale_RG, zero_RG, words_RW)
        ctx.bits = bits
        value_RC = packed.packed_values(words_RW, scale_RG, zero_RG, bits, x_TC.shape[-1], x_TC.dtype)
        return functional.linear(x_TC, value_RC)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, gradient_TR: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        x_TC, scale_RG, zero_RG, words_RW = ctx.saved_tensors
        to_x = None
        if ctx.needs_input_grad[0]:
            columns = x_TC.shape[-1]
            value_RC = packed.packed_values(words_RW, scale_RG, zero_RG, ctx.bits, columns, gradient_TR.dtype)
            to_x = gradient_TR @ value_RC
        to_weight_RC = gradient_TR.flatten(0, -2).T @ x_TC.flatten(0, -2).to(gradient_TR.dtype)
        to_scale, total_RG = packed.group_sums(to_weight_RC, words_RW, zero_RG, ctx.bits)
        to_zero = -total_RG * scale_RG if ctx.needs_input_grad[2] else None
        return to_x, to_scale, to_zero, None, None


def _steps(codes_RC: Tensor, zero_RG: Tensor) -> Tensor:
    """codes - zero, float32, R x G x N."""
    return codes_RC.unflatten(-1, (zero_RG.shape[-1], -1)).float() - zero_RG.unsqueeze(-1)


def _weight(steps_RGN: Tensor, scale_RG: Tensor, dtype: torch.dtype) -> Tensor:
    """The values, rounded once, as `kernels.dequantize` has them."""
    return (steps_RGN * scale_RG.unsqueeze(-1)).flatten(-2).to(dtype)


class TunedLinear(nn.Module):
    """A compressed layer whose scales (and zeros) are parameters, in float32, over the same packed codes.

    Scales are held relative to those they began with, so that one rate serves all; the forward pass rounds them to the
    dtype they are stored in, and zeros to whole numbers the format holds. Raises RequestError for a layer without
    scales, and for zeros where they cannot be stored.
    """

    unit_RG: Tensor
    codes_RC: Tensor | None

    def __init__(self, layer: CompressedLinear, name: str, zeros: bool) -> None:
        super().__init__()
        solution = layer.solution()
        if not isinstance(solution, Solution):
            raise RequestError(f"{name} is pruned and not rounded: it has no scales to tune; give a folder with bits.")
        if zeros and solution.grid.symmetric:
            raise RequestError(
                f"{name} is symmetric, and its {layer.format.name} file holds no zeros: drop --zeros, or compress "
                "with --asymmetric."
            )
        if zeros and solution.keep_RC is not None:
            raise RequestError(f"{name} is pruned, and its zeros mark what was: drop --zeros.")
        self.layer, self.lowest, self.top = layer, layer.format.lowest_zero(solution.grid), solution.grid.top
        self.stored_dtype = solution.scales_RG.dtype
        self.register_buffer("unit_RG", solution.scales_RG.float(), persistent=False)
        self.scale = nn.Parameter(torch.ones_like(solution.scales_RG, dtype=torch.float32))
        self.zero = nn.Parameter(solution.zeros_RG.float(), requires_grad=zeros)
        self.bits = solution.grid.stored_bits
        kept = solution.codes_RC if layer.code_words() is None else None
        self.register_buffer("codes_RC", kept, persistent=False)

    def codes(self) -> Tensor:
        """Of the layer, uint8, R x C."""
        if self.codes_RC is not None:
            return self.codes_RC
        solution = self.layer.solution()
        assert isinstance(solution, Solution)
        return solution.codes_RC

    def forward(self, x_TC: Tensor) -> Tensor:
        """y_TR for x_TC."""
        words_RW = self.layer.code_words()
        if packed.usable(words_RW):
            y_TR: Tensor = _MultiplyPacked.apply(x_TC, self.scales(), self.zeros(), words_RW, self.bits)
        else:
            y_TR = _Multiply.apply(x_TC, self.scales(), self.zeros(), self.codes)
        return y_TR if self.layer.bias is None else y_TR + self.layer.bias

    def prepare(self) -> TunedLinear:
        """Tries the kernels where the layer now is, so that a failure is known before training; returns the layer."""
        words_RW = self.layer.code_words()
        if words_RW is not None and packed.usable(words_RW):
            zero_RG, columns = self.zero.detach(), self.layer.in_features

            def both() -> None:
                value_RC = packed.packed_values(words_RW, zero_RG, zero_RG, self.bits, columns, torch.bfloat16)
                packed.group_sums(value_RC, words_RW, zero_RG, self.bits)

            triton_tried.tried(both)
        return self

    def scales(self) -> Tensor:
        """The scales as they will be stored, float32 with gradients, R x G."""
        return stored(self.scale * self.unit_RG, self.stored_dtype)

    def zeros(self) -> Tensor:
        """The zeros as they will be stored, float32 with gradients where they are trained, R x G."""
        return whole(self.zero, self.lowest, self.top) if self.zero.requires_grad else self.zero

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The layer's tensors as its format packs them now, by suffix; codes are those that were there."""
        solution = self.layer.solution()
        assert isinstance(solution, Solution)
        scales_RG, zeros_RG = self.scales().to(self.stored_dtype), self.zeros().to(torch.uint8)
        return self.layer.format.pack(replace(solution, scales_RG=scales_RG, zeros_RG=zeros_RG), dtype=self.layer.dtype)


class Rounded(nn.Module):
    """A parametrization: float32 in training, rounded as it is stored, in the dtype the model computes in."""

    def __init__(self, kept: torch.dtype, computed: torch.dtype) -> None:
        super().__init__()
        self.kept, self.computed = kept, computed

    def forward(self, value: Tensor) -> Tensor:
        return stored(value, self.kept).to(self.computed) if value.dtype == torch.float32 else value
