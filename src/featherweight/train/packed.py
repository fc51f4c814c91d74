"""Values of packed codes, and sums of a gradient over their groups: one Triton kernel each, or torch.

They are operators of torch's own kind (with shapes for tracing), so that `torch.compile` takes them as they are.
Shapes: R outputs, C inputs, G groups, N inputs of one group, W words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.train import triton_tried

ROWS, TILE, TOGETHER = 4, 512, 2048  # of a program: rows and columns written; weights summed at a time


def usable(words_RW: Tensor | None) -> bool:
    """Codes that lie in a stream without gaps, on a GPU where no kernel has failed."""
    return words_RW is not None and words_RW.is_cuda and not triton_tried.failed


@torch.library.custom_op("featherweight::packed_values", mutates_args=())
def packed_values(
    words_RW: Tensor, scale_RG: Tensor, zero_RG: Tensor, bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """(code - zero) * scale in `dtype`, R x C; scales and zeros are float32, words of any strides."""
    from featherweight.train import triton_packed

    (rows, groups), value_RC = scale_RG.shape, scale_RG.new_empty((scale_RG.shape[0], columns), dtype=dtype)
    triton_packed.packed_values[(-(-rows // ROWS), -(-columns // TILE))](
        words_RW, scale_RG, zero_RG, value_RC, rows, columns, groups, columns // groups, *words_RW.stride(),
        BITS=bits, ROWS=ROWS, TILE=TILE,
    )  # fmt: skip
    return value_RC


@packed_values.register_fake
def _(words_RW: Tensor, scale_RG: Tensor, zero_RG: Tensor, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    return scale_RG.new_empty((scale_RG.shape[0], columns), dtype=dtype)


@torch.library.custom_op("featherweight::group_sums", mutates_args=())
def group_sums(gradient_RC: Tensor, words_RW: Tensor, zero_RG: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Of every group the sums of gradient * (code - zero), and of the gradient; R x G float32."""
    from featherweight.train import triton_packed

    (rows, groups), columns = zero_RG.shape, gradient_RC.shape[1]
    to_scale_RG, total_RG = torch.empty_like(zero_RG), torch.empty_like(zero_RG)
    width = columns // groups
    tile = min(1024, max(16, 1 << (width - 1).bit_length()))
    together = max(1, TOGETHER // tile)
    triton_packed.group_sums[(-(-rows * groups // together),)](
        gradient_RC.contiguous(), words_RW, zero_RG, to_scale_RG, total_RG, rows * groups, groups, columns, width,
        *words_RW.stride(), BITS=bits, TILE=tile, GROUPS=together,
    )  # fmt: skip
    return to_scale_RG, total_RG


@group_sums.register_fake
def _(gradient_RC: Tensor, words_RW: Tensor, zero_RG: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(zero_RG), torch.empty_like(zero_RG)
