"""Whether, and how, a matrix in training is rounded and stepped by one kernel each; where not, autograd does it.

Shapes: R outputs, C inputs, G groups, N inputs of one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from featherweight.train import triton_tried
from featherweight.train.trainable import OnGrid, Trainable, TrainedRounding

KINDS = {torch.float16: 16, torch.bfloat16: 17, torch.float32: 32}  # of scales, as `triton_grid` names them
LATENTS = {"steps": 0, "absolute": 1, "rounding": 2}
TILE_WEIGHTS, WIDEST = 2048, 1024  # of a program at a time, and of one group
Averages = Sequence[tuple[Tensor, Tensor]]


def usable(layer: Trainable) -> bool:
    """A grid on a GPU whose scales are of a dtype that is stored, until a kernel has failed."""
    return isinstance(layer, OnGrid) and layer.latent_RGN.is_cuda and not triton_tried.failed


def write_values(layer: Trainable, matrix_RC: Tensor, pace: Tensor) -> bool:
    """Writes `layer.values` into a matrix of any dtype and strides; False, and nothing written, where torch has to.

    `pace` is a row of `adam.paces`: whether codes are whole is its say.
    """
    if not usable(layer):
        return False
    assert isinstance(layer, OnGrid)
    tensors = [*_constants(layer), matrix_RC, pace]
    return triton_tried.tried(lambda: _launch("grid_values", layer, tensors, matrix_RC, ()))


def step(layer: Trainable, averages: Averages, gradient_RC: Tensor, pace: Tensor) -> bool:
    """One step of Adam for all parameters of the layer, from the gradient of its values (any dtype and strides).

    `averages`: mean and square of the weights, of the scales, and of the zeros where they are trained. False, and
    nothing written, where torch has to do it.
    """
    if not usable(layer):
        return False
    assert isinstance(layer, OnGrid)
    latent, code, scale, unit, zero, keep = [layer.latent_RGN, *_constants(layer)[1:]]
    of_zeros = averages[2] if layer.trains_zeros else averages[1]
    tensors = [
        *(latent, *averages[0], code, scale, *averages[1], unit, zero, *of_zeros, keep),
        *(gradient_RC, pace),
    ]
    return triton_tried.tried(lambda: _launch("grid_step", layer, tensors, gradient_RC, (layer.least,)))


def _constants(layer: OnGrid) -> list[Tensor]:
    """Latent weights, codes, scales, units, zeros, mask; one in place of another that is not read."""
    codes = layer.first_RGN if isinstance(layer, TrainedRounding) else layer.start.codes_RC
    keep = codes if layer.keep_RGN is None else layer.keep_RGN.contiguous().view(torch.uint8)
    return [layer.latent_RGN, codes, layer.scale_RG1, layer.unit_RG1, layer.zero_RG1, keep]


def _launch(name: str, layer: OnGrid, tensors: Sequence[Tensor], matrix_RC: Tensor, more: tuple[float, ...]) -> None:
    from featherweight.train import triton_grid

    kernel: Any = getattr(triton_grid, name)
    grid, (rows, in_row, width) = layer.start.grid, layer.latent_RGN.shape
    tile = min(WIDEST, max(16, 1 << (width - 1).bit_length()))
    together = max(1, TILE_WEIGHTS // tile)
    assert all(tensor.is_contiguous() for tensor in tensors if tensor is not matrix_RC)
    kernel[(-(-rows * in_row // together),)](
        *(tensor.detach() for tensor in tensors),
        *(rows * in_row, in_row, width, *matrix_RC.stride()),
        *(float(grid.bottom), float(grid.top), float(layer.lowest_zero), *more),
        LATENT=LATENTS[layer.kind],
        ASYMMETRIC=layer.trains_zeros,
        HAS_KEEP=layer.keep_RGN is not None,
        KIND=KINDS[layer.start.scales_RG.dtype],
        TILE=tile,
        GROUPS=together,
    )
