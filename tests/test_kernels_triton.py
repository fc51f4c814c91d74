"""The Triton products without a GPU: their order of codes, their numbers in Triton's interpreter, what they compile to,
refusals. Tests marked gpu run them.

The interpreter multiplies bfloat16 as if it were integers, so bfloat16 is tested on GPUs alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from featherweight.core.rules import Grid, Pattern
from featherweight.core.solution import Solution
from featherweight.errors import RequestError
from featherweight.formats import FORMATS
from featherweight.kernels import dequantize, triton_linear
from featherweight.kernels.base import Case
from featherweight.kernels.triton_linear import PLANE, Packed, TritonLinear, call, pack, register, splits
from featherweight.linear import CompressedLinear
from wna16_cases import solution

FORMAT = FORMATS["compressed-tensors"]
HALF, BFLOAT = torch.float16, torch.bfloat16
# bits, group size, symmetric, columns: every way a scale can lie in a block, and columns that fill none
GRIDS = [
    (4, 128, True, 256),
    (4, 32, False, 160),
    (4, 48, False, 96),
    (4, None, True, 40),
    (3, 64, False, 320),
    (2, 64, False, 320),
    (8, None, False, 100),
    (8, 64, True, 128),
    (5, 128, False, 256),
]


def require_close(got: Tensor, x: Tensor, weights: Solution, bias: Tensor | None) -> None:
    """To the exact product, as near as 1e-3 beyond the rounding of the result."""
    values = weights.values(torch.float64).to(x.device)
    want = functional.linear(x.double(), values, None if bias is None else bias.double())
    rounding, error = (want.to(got.dtype) - want).norm(), (got.double() - want).norm()
    assert bool(got.isfinite().all()) and (error**2 - rounding**2).clamp_min(0).sqrt() <= 1e-3 * want.norm()


def words_of(packed: Packed, row: int, block: int) -> list[int]:
    """The words of one row in a block, as unsigned numbers."""
    return [int(word) & 0xFFFFFFFF for word in packed.words_KR[block * PLANE : (block + 1) * PLANE, row]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fields_of_a_word_are_a_plane_apart(bits: int) -> None:
    weights = solution(Grid(bits, None), 5, 700)
    packed, fields = pack(weights), 32 // bits
    assert packed.words_KR.shape == (-(-700 // (fields * PLANE)) * PLANE, triton_linear.ROWS)
    for row, block in ((0, 0), (4, 1)):
        for number, word in enumerate(words_of(packed, row, block)):
            columns = [block * fields * PLANE + field * PLANE + number for field in range(fields)]
            codes = [int(weights.codes_RC[row, column]) if column < 700 else 0 for column in columns]
            assert word == sum(code << field * bits for field, code in enumerate(codes))


@pytest.mark.parametrize(("bits", "size", "symmetric", "columns"), GRIDS)
def test_interpreted_products(bits: float, size: int | None, symmetric: bool, columns: int) -> None:
    register()
    weights = solution(Grid(bits, size, symmetric), 50, columns)
    x, bias = torch.randn(2, 9, columns).half(), torch.randn(50).half()
    require_close(call(x, pack(weights), bias), x, weights, bias)


@pytest.mark.parametrize("count", [1, 3])
def test_interpreted_splits_and_tails(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns in one part or in three (the last of them smaller), tokens and rows that fill no tile."""
    register()
    monkeypatch.setattr(triton_linear, "splits", lambda *_: count)
    weights = solution(Grid(4, 32, False), 70, 128 * 4 + 32)
    x = torch.randn(35, 544).half()
    require_close(call(x, pack(weights), None), x, weights, None)


def test_many_tokens_multiply_the_rounded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.setattr(triton_linear, "DENSE_ABOVE", 4)
    weights = solution(Grid(3, 64, False), 50, 192)
    x, bias = torch.randn(5, 192).half(), torch.randn(50).half()
    packed = pack(weights)
    assert torch.equal(triton_linear.dequantize(packed, x), dequantize(weights, HALF))
    torch.testing.assert_close(call(x, packed, bias), functional.linear(x, dequantize(weights, HALF), bias))


def test_no_tokens_and_inputs_that_are_not_contiguous() -> None:
    register()
    weights = solution(Grid(4, 64), 50, 128)
    packed, wide = pack(weights), torch.randn(3, 129).half()
    assert call(wide[:0, 1:], packed, None).shape == (0, 50)
    require_close(call(wide[:, 1:], packed, None), wide[:, 1:], weights, None)


def test_the_operator_is_sound_for_torch() -> None:
    register()
    packed = pack(solution(Grid(4, 64, False), 50, 128))
    x, bias = torch.randn(3, 128).half(), torch.randn(50).half()
    arguments = (packed.words_KR, packed.scales_GR, packed.zeros_GR, bias, packed.rows, packed.width, packed.bits)
    checks = ("test_schema", "test_faketensor")  # there is nothing to differentiate
    torch.library.opcheck(torch.ops.featherweight.triton_linear.default, (x, *arguments), test_utils=checks)
    compiled = torch.compile(lambda x: call(x, packed, bias) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), call(x, packed, bias) * 2)


def test_splits_give_every_multiprocessor_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_linear, "_processors", lambda device: 132)
    cuda = torch.device("cuda")
    assert splits(64, 32, cuda) == 8 and splits(64, 4, cuda) == 4 and splits(1000, 32, cuda) == 1
    assert splits(1, 1000, cuda) == 16


# ---- compiling ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "variants", [["16-4-128-1", "64-4-32-0"], ["16-3-32-1"], ["16-2-64-1"], ["64-8-64-0"]], ids=str
)
def test_the_kernels_compile_without_a_gpu(arch: int, variants: list[str], tmp_path: Path) -> None:
    """By Triton itself, in a process of its own: here it is interpreting."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = str(Path(__file__).parent / "compile_products.py")
    ran = subprocess.run(
        [sys.executable, program, str(arch), *variants], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    made = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [each["kernel"] for each in made] == ["product", "floats", "combine"] * len(variants)
    for each in made:
        assert each["shared"] <= 99 << 10, "what every GPU from sm_86 on lets a program take"
        assert (each["ptx"] > 0) == (each["kernel"] == "product"), "tensor cores multiply, and nothing else does"


# ---- refusals -------------------------------------------------------------------------------------------------------
def refusal(rule: object, dtype: torch.dtype = HALF, device: str = "cuda", columns: int = 256) -> str:
    case = Case(FORMAT, rule, 48, columns, dtype, torch.device(device))  # type: ignore[arg-type]
    return str(TritonLinear().refusal(case))


def test_refusals_name_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "runs on GPUs, and the layer is on cpu" in refusal(Grid(), device="cpu")
    assert "torch.bfloat16, and the activations are torch.float32" in refusal(Grid(), torch.float32)
    assert "a multiple of 16, and they have 40" in refusal(Grid(4, 40), columns=80)
    assert "weights are floats, pruned" in refusal(Pattern())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees 0" in refusal(Grid())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0, and the GPU has 7.5" in refusal(Grid())
    monkeypatch.setattr(triton_linear, "find_spec", lambda name: None)
    assert "not installed" in refusal(Grid())


def test_it_has_no_backward() -> None:
    grid = Grid(4, 64)
    run = TritonLinear().prepare(FORMAT, grid, FORMAT.pack(solution(grid, 48, 256)), HALF)
    x = torch.randn(2, 256).half()
    with pytest.raises(RequestError, match="no backward pass"):
        run(x.requires_grad_(), None)


# ---- on a GPU -------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize(("bits", "size", "symmetric", "columns"), GRIDS)
def test_products_on_a_gpu(bits: float, size: int | None, symmetric: bool, columns: int, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    grid = Grid(bits, size, symmetric)
    weights = solution(grid, 1000, columns * 4 if size else columns, dtype)
    tensors = {name: tensor.cuda() for name, tensor in FORMAT.pack(weights).items()}
    for kernel in ("triton", "dequantize"):
        layer = CompressedLinear.from_tensors(FORMAT, grid, tensors, torch.randn(1000).cuda(), dtype, kernel)
        for tokens in (0, 1, 3, 16, 17, 33, 100, 300):
            x = torch.randn(tokens, weights.codes_RC.shape[1], device="cuda").to(dtype)
            if tokens > triton_linear.DENSE_ABOVE or kernel == "dequantize":
                want = functional.linear(x, weights.values(torch.float64).to(dtype).cuda(), layer.bias)
                size = float(want.abs().sum()) / max(1, want.numel())
                torch.testing.assert_close(layer(x), want, rtol=2e-2, atol=2e-2 * size)
            elif tokens:
                require_close(layer(x), x, weights, layer.bias)
