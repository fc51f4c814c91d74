"""The kernels that serve every format, device and dtype: unpack, dequantise, multiply.

Shapes: R outputs, C inputs, G groups, T tokens (any leading axes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.formats.base import AnySolution, Format, Rule
from featherweight.kernels.base import Case, Kernel, Run


def dequantize(solution: AnySolution, dtype: torch.dtype) -> Tensor:
    """The weights an engine computes with: (code - zero) * scale, rounded once to `dtype`; shape R x C."""
    # float32 holds the product exactly (at most 9 + 11 significant bits, for float16 or bfloat16 scales).
    return solution.values(torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)


def linear(
    x_TC: Tensor, format: Format, rule: Rule, tensors: Mapping[str, Tensor], bias_R: Tensor | None = None
) -> Tensor:
    """y_TR = x_TC V^T + bias, V unpacked anew from its tensors and rounded to the dtype of `x_TC`."""
    return functional.linear(x_TC, dequantize(format.unpack(tensors, rule), x_TC.dtype), bias_R)


@dataclass(frozen=True)
class Reference(Kernel):
    """Dequantises in every call: slow, needs no memory between calls, and serves everything."""

    name: str = "reference"

    def refusal(self, case: Case) -> str | None:
        return None

    def prepare(self, format: Format, rule: Rule, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Run:
        kept = dict(tensors)
        return lambda x_TC, bias_R: functional.linear(x_TC, dequantize(format.unpack(kept, rule), dtype), bias_R)


@dataclass(frozen=True)
class Dense(Kernel):
    """Dequantises once and keeps the floats: as fast, and as large, as the uncompressed layer. For evaluation."""

    name: str = "dense"

    def refusal(self, case: Case) -> str | None:
        return None

    def prepare(self, format: Format, rule: Rule, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Run:
        weight_RC = dequantize(format.unpack(tensors, rule), dtype)
        return lambda x_TC, bias_R: functional.linear(x_TC, weight_RC, bias_R)
