"""H = X^T X / T, added up over batches of a layer's inputs.

Shapes: C inputs, T tokens (all leading axes of a batch are tokens).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from featherweight.core import tiles

PANEL_COLUMNS = {"cpu": 1024, "cuda": 4096}  # fewer are multiplied faster whole
PANELS = 4
WIDE_COLUMNS, WIDE_PANELS = 8192, 8  # the same of the widest


class HessianSum:
    """The running sum of x x^T in float32.

    On a GPU, bf16 and fp16 inputs go through the tensor cores as they are: their products are exact in float32. Only
    what lies on or above the diagonal is added up, by panels; `mean` mirrors it.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum_CC = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.tokens = 0
        panels = PANELS if columns >= PANEL_COLUMNS[device.type] else 1
        if device.type == "cuda" and columns >= WIDE_COLUMNS:
            panels = WIDE_PANELS
        self.edges = [columns * n // panels for n in range(panels + 1)]
        self.tiled = False  # whether anything was added by panels of tiles, on or above the diagonal alone

    def add(self, inputs: Tensor) -> None:
        """Adds the inputs of one batch, ... x C in any float dtype."""
        x_TC = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += x_TC.shape[0]
        if tiles.sums(x_TC):
            tiles.add_(self.sum_CC, x_TC, x_TC)
            self.tiled = True
            return
        for start, stop in itertools.pairwise(self.edges):
            _accumulate(self.sum_CC[start:stop, start:], x_TC[:, start:stop], x_TC[:, start:])

    def mean(self) -> Tensor:
        """X^T X / T."""
        return self._mirrored(self.sum_CC / max(self.tokens, 1))

    def into_mean(self) -> Tensor:
        """The same in the memory of the sum, which is gone then: H is the largest thing there is beside a block."""
        mean_CC, self.sum_CC = self.sum_CC.div_(max(self.tokens, 1)), self.sum_CC[:0]
        return self._mirrored(mean_CC)

    def _mirrored(self, mean_CC: Tensor) -> Tensor:
        if self.tiled:
            return tiles.mirror_(mean_CC)
        for start, stop in itertools.pairwise(self.edges):
            mean_CC[stop:, start:stop] = mean_CC[start:stop, stop:].T
        return mean_CC


class CrossSum:
    """The running sum of d^T x: what a difference d (T x R) has in common with the inputs x (T x C)."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.sum_RC = torch.zeros(rows, columns, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, difference: Tensor, inputs: Tensor) -> None:
        """Adds one batch: ... x R differences and ... x C inputs, in one dtype."""
        x_TC = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += x_TC.shape[0]
        d_TR = difference.reshape(-1, difference.shape[-1])
        if tiles.sums(x_TC) and tiles.sums(d_TR):
            tiles.add_(self.sum_RC, d_TR, x_TC)
        else:
            _accumulate(self.sum_RC, d_TR, x_TC)

    def mean(self, rows: slice = slice(None)) -> Tensor:
        """d^T x / T, all of it or some rows."""
        return self.sum_RC[rows] / max(self.tokens, 1)


def _accumulate(sum_AB: Tensor, a_TA: Tensor, b_TB: Tensor) -> None:
    """sum += a^T b with float32 accumulation; bf16 and fp16 products are exact in it, so nothing is lost to them."""
    half = a_TA.dtype in (torch.bfloat16, torch.float16)
    if a_TA.is_cuda and half:
        sum_AB += torch.mm(a_TA.T, b_TB, out_dtype=torch.float32)
        return
    with _bf16_products(a_TA.dtype == torch.bfloat16 and not a_TA.is_cuda):
        sum_AB.addmm_(a_TA.T.float(), b_TB.float())


@contextmanager
def _bf16_products(exact: bool) -> Iterator[None]:
    """Lets a CPU multiply float32 as bf16 (twice as fast with AMX), which is exact where the values are bf16."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if exact:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
