"""Products of csrc/w4a16_hopper.cu on a GPU, dense and sparse alike."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.kernels import w4a16_hopper


def every_tile_shares_and_repeats(
    kernels: w4a16_hopper.Kernels, packed: Tensor, values: Tensor, dtype: torch.dtype
) -> None:
    """Products of every tile on a GPU: few of them, which CTAs share, and many; in a graph, over and over, early starts
    included. `values` are the weights in float64."""
    rows, columns = values.shape
    for tile, tokens in product(kernels.modules, (40, 3000)):
        x = torch.randn(tokens, columns, device="cuda").to(dtype)
        want = functional.linear(x.double(), values).to(dtype)
        got = torch.full_like(want, torch.nan)
        plan = kernels.plan(tile, tokens, rows, columns)
        graph = torch.cuda.CUDAGraph()
        kernels.launch(plan, x, packed, None, got)
        with torch.cuda.graph(graph):
            for _ in range(5):
                kernels.launch(plan, x, packed, None, got)
        for _ in range(5):
            got.fill_(torch.nan)
            graph.replay()
            torch.testing.assert_close(got, want, rtol=0.03, atol=0.03 * float(want.abs().mean()))
    assert int(kernels.counters.abs().sum()) == 0
