"""The kernels for packed weights on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from featherweight.benchmarks.kernels import Plan, run
from featherweight.core.rules import Grid
from featherweight.errors import FallbackWarning
from featherweight.formats import FORMATS
from featherweight.kernels import wna16
from featherweight.kernels.wna16_layout import Layout
from featherweight.linear import CompressedLinear
from featherweight.native import nvrtc
from wna16_cases import BFLOAT, HALF, solution

FORMAT = FORMATS["compressed-tensors"]


def on_gpu(
    grid: Grid, rows: int, columns: int, dtype: torch.dtype, size: float = 1.0
) -> tuple[CompressedLinear, Tensor]:
    """A layer whose scales are multiplied by `size`, and its exact weights."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    weights = solution(grid, rows, columns, dtype)
    weights = replace(weights, scales_RG=weights.scales_RG * size)
    tensors = {name: tensor.cuda() for name, tensor in FORMAT.pack(weights).items()}
    layer = CompressedLinear.from_tensors(FORMAT, grid, tensors, torch.randn(rows).cuda(), dtype, kernel="wna16")
    return layer, weights.values(torch.float64).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize(
    "grid",
    [Grid(), Grid(4, 64, False), Grid(4, None), Grid(3, 64), Grid(3, 128, False), Grid(2, 64, False), Grid(8)],
    ids=str,
)
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (50, 320), (33, 128), (1000, 11008)])
def test_products_on_a_gpu(dtype: torch.dtype, grid: Grid, rows: int, columns: int) -> None:
    layer, values = on_gpu(grid, rows, columns - columns % (grid.group_size or 1), dtype)
    for tokens in (1, 3, 8, 9, 17, 32, 33, 64):
        x = torch.randn(tokens, values.shape[1], device="cuda").to(dtype)
        want = functional.linear(x.double(), values, layer.bias.double())
        rounding, error = (want.to(dtype) - want).norm(), (layer(x).double() - want).norm()
        assert (error**2 - rounding**2).clamp_min(0).sqrt() <= 1e-3 * want.norm()


@pytest.mark.gpu
def test_many_tokens_on_a_gpu_multiply_the_rounded_weights() -> None:
    layer, values = on_gpu(Grid(4, 64, False), 1000, 11008, BFLOAT)
    x = torch.randn(300, 11008, device="cuda").bfloat16()
    torch.testing.assert_close(layer(x), functional.linear(x, values.bfloat16(), layer.bias))


@pytest.mark.gpu
def test_the_operator_is_sound_on_a_gpu() -> None:
    layer, _ = on_gpu(Grid(4, 128), 4096, 4096, HALF)
    layer(torch.randn(1, 4096, device="cuda").half())
    packed, layout = wna16.repack(layer.solution())
    arguments = (packed, layer.bias, 4096, layout.bits, layout.group, layout.scales, layout.zeros)
    for x in (torch.randn(2, 3, 4096), torch.randn(8, 4097)[:, 1:], torch.randn(0, 4096)):
        torch.library.opcheck(torch.ops.featherweight.wna16.default, (x.cuda().half(), *arguments))


@pytest.mark.gpu
def test_without_a_compiler_the_reference_takes_over_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, values = on_gpu(Grid(4, 128), 64, 256, HALF)

    def broken(*_: object) -> None:
        raise nvrtc.CompileError("no NVRTC here")

    monkeypatch.setattr(wna16, "kernels", broken)
    x = torch.randn(2, 256, device="cuda").half()
    with pytest.warns(FallbackWarning, match="gives way to the reference kernel: no NVRTC here"):
        torch.testing.assert_close(layer(x), functional.linear(x, values.half(), layer.bias))


@pytest.mark.gpu
def test_chained_launches_in_a_graph_wait_for_each_other() -> None:
    # Codes are not zero on average: what a layer makes of its input's mean must not grow from layer to layer.
    layers = [on_gpu(Grid(4, 128), 4096, 4096, HALF, size=1 / 64)[0] for _ in range(6)]
    x = torch.randn(16, 4096, device="cuda").half()

    def chain(x: Tensor) -> Tensor:
        for layer in layers:
            x = functional.normalize(layer(x), dim=-1)
        return x

    def direct(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    kernel = wna16.kernels(x.device, HALF, Layout(4, 128, HALF, False))
    for call in (chain, direct):
        kernel.early = False
        want = call(x)
        kernel.early = True
        assert want.isfinite().all()
        assert torch.equal(call(x), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call(x)
        for _ in range(100):
            got.zero_()
            graph.replay()
            assert torch.equal(got, want)


@pytest.mark.gpu
def test_products_are_timed_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    plan = Plan(Grid(2, 64, False), (1, 9), HALF, torch.device("cuda", 0), ("wna16",))
    rows = [row for row in run(["1024x512"], plan, lambda row: None)["rows"] if row["kernel"] == "wna16"]
    assert [row["tokens"] for row in rows] == [1, 9]
    assert all(row["us"] > 0 and row["error"] <= 1e-3 for row in rows)
