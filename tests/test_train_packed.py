"""The kernels over packed codes against unpacking them, interpreted on a CPU.

Shapes: R outputs, C inputs, G groups, T tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid
from featherweight.core.solve import Choices, solve
from featherweight.formats import by_name
from featherweight.linear import CompressedLinear
from featherweight.train import packed, triton_tried
from featherweight.train.tuned_linear import TunedLinear

pytest.importorskip("triton", reason="Triton has no build for this platform")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # in tests on a CPU Triton interprets (conftest)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def layer_of(name: str, bits: int, symmetric: bool, size: int | None = 32, rows: int = 32) -> CompressedLinear:
    format = by_name(name)
    grid = Grid(bits, size, symmetric, "minmax", scale_dtype=format.scale_dtype(torch.float32))
    columns = 96
    problem = LayerProblem(drawn(rows, columns, seed=1), torch.eye(columns, device=DEVICE), 1, 0.01)
    solution = solve(problem, grid, Choices(method="rtn", lowest_zero=format.lowest_zero(grid)))
    return CompressedLinear.from_tensors(
        format, grid, format.pack(solution), drawn(rows, seed=2), torch.float32, "reference"
    )


CASES: list[Any] = [("compressed-tensors", 2, False), ("compressed-tensors", 3, True), ("gptq_v2", 2, False)]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (*(("compressed-tensors", bits, bits % 2 == 1) for bits in (4, 5, 8)), ("gptq", 3, False))
]


@pytest.mark.parametrize(("name", "bits", "symmetric"), CASES)
def test_a_tuned_layer_is_the_same_by_the_kernels(
    name: str, bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_tried, "failed", [])
    size = None if bits == 5 else 32
    found: list[list[Any]] = []
    for kernels in (True, False):
        monkeypatch.setattr(packed, "usable", lambda words_RW, kernels=kernels: kernels and words_RW is not None)
        tuned = TunedLinear(layer_of(name, bits, symmetric, size), "layer", zeros=not symmetric).prepare()
        x_TC = drawn(2, 3, 96, seed=3).requires_grad_()
        with torch.no_grad():
            tuned.scale *= 1 + 0.1 * drawn(*tuned.scale.shape, seed=5)
        y_TR = tuned(x_TC)
        y_TR.backward(drawn(2, 3, 32, seed=4))
        found.append([y_TR, x_TC.grad, tuned.scale.grad, tuned.zero.grad])
    assert not triton_tried.failed
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_words_lie_as_the_format_says() -> None:
    layer = layer_of("gptq_v2", 2, False)
    words_RW = layer.code_words()
    assert words_RW is not None and words_RW.data_ptr() == layer.get_buffer("qweight").data_ptr()
    ones_RG = torch.ones(32, 3, device=DEVICE)
    codes_RC = packed.packed_values(words_RW, ones_RG, 0 * ones_RG, 2, 96, torch.float32)
    solution = layer.solution()
    assert torch.equal(codes_RC, solution.codes_RC.float())  # type: ignore[union-attr]
