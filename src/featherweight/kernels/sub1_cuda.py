"""sub1 on NVIDIA GPUs (Ampere and later): entropy-coded ternary matrices multiplied from the bytes of the file.

Few tokens go through `csrc/sub1.cu`; many through a dense product, with rows made floats some at a time. `mixture` has
all experts of a layer multiplied in one launch.

Shapes: R outputs, C inputs, G groups, T tokens (any leading axes).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.codec.encoded import TILE_ROWS
from featherweight.errors import FallbackWarning, RequestError
from featherweight.formats import Sub1, parts
from featherweight.formats.base import Format, Rule
from featherweight.kernels.base import Case, Kernel, Run
from featherweight.kernels.sub1 import Sub1Tiles
from featherweight.kernels.sub1_bank import Bank, entry_of, fused
from featherweight.kernels.sub1_launch import MOST_TOKENS, PIECE, STRIDES, module_of, register
from featherweight.native import nvrtc

DTYPES = (torch.float16, torch.bfloat16)
OLDEST = (8, 0)
FEW_TOKENS = 4 * MOST_TOKENS  # up to so many are multiplied without making weights floats: four passes over the codes
DENSE_BYTES = 64 << 20  # of floats made at a time


@dataclass(frozen=True)
class Sub1Cuda(Kernel):
    """Multiplies from the bytes of the file; with many tokens through floats made for the length of the call."""

    name: str = "sub1-cuda"

    def refusal(self, case: Case) -> str | None:
        if not isinstance(case.format, Sub1):
            return f"it decodes sub1, and the weights are {case.format.name}"
        if case.device.type != "cuda" or torch.version.hip:
            return f"it runs on NVIDIA GPUs, and the layer is on {case.device.type}"
        if case.dtype not in DTYPES:
            return f"it takes {' or '.join(map(str, DTYPES))}, and the activations are {case.dtype}"
        grid, _ = parts(case.rule)
        assert grid is not None
        if grid.width(case.columns) % PIECE:
            return f"it needs groups of a multiple of {PIECE}, and they have {grid.width(case.columns)}"
        return nvrtc.device_refusal(case.device, OLDEST)

    def broken(self, case: Case) -> str | None:
        try:
            module_of(torch.device("cuda", case.device.index or 0), case.dtype, STRIDES[-1], 1)
        except nvrtc.CompileError as error:
            return str(error)
        return None

    def prepare(self, format: Format, rule: Rule, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Run:
        grid, _ = parts(rule)
        assert isinstance(format, Sub1) and grid is not None
        rows, columns = format.shape(tensors, rule)
        entry = entry_of(format, tensors)
        bank = Bank.of([[entry]])
        zeros_RG = None if grid.symmetric else format.zeros(tensors, grid)
        few = FEW_TOKENS if fused(entry) and grid.symmetric else 0
        device = bank.table.device
        try:
            module_of(device, dtype, bank.stride, bank.codes)
        except nvrtc.CompileError as error:
            warnings.warn(f"sub1-cuda gives way to sub1-tiles: {error}", FallbackWarning, stacklevel=2)
            return Sub1Tiles().prepare(format, rule, tensors, dtype)
        nobody_N = torch.zeros(FEW_TOKENS, dtype=torch.int64, device=device)

        def run(x_TC: Tensor, bias_R: Tensor | None) -> Tensor:
            flat_TC = x_TC.reshape(-1, columns)
            if x_TC.dtype != dtype:
                raise RequestError(f"the input is {x_TC.dtype}, and the layer is {dtype}: cast it, or the layer.")
            if len(flat_TC) <= few and not (torch.is_grad_enabled() and x_TC.requires_grad):
                y_TR = bank.products(flat_TC, nobody_N[: len(flat_TC)], 1)[:, 0]
            else:
                y_TR = many(flat_TC, bank, entry.scales_RG.shape[1], zeros_RG, dtype)
            y_TR = y_TR.view(*x_TC.shape[:-1], rows)
            return y_TR if bias_R is None else y_TR + bias_R

        return run


def many(x_TC: Tensor, bank: Bank, groups: int, zeros_RG: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x V^T of the first matrix, whose rows become floats some at a time."""
    register()
    step = max(1, DENSE_BYTES // (2 * bank.columns) // TILE_ROWS) * TILE_ROWS
    pieces = [(at, min(at + step, bank.rows)) for at in range(0, bank.rows, step)]
    weights = (
        torch.ops.featherweight.sub1_dense(bank.table, zeros_RG, dtype, bank.rows, bank.columns, groups, *piece)
        for piece in pieces
    )
    found = [functional.linear(x_TC, weight_RC) for weight_RC in weights]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)
