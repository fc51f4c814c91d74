"""Kernels against the dequantised product, and the layer's behaviour as a module."""

from __future__ import annotations

import copy
import io
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from featherweight import merged
from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.errors import RequestError
from featherweight.formats import FORMATS
from featherweight.kernels import KERNELS, Kernel, Restorable, dequantize, pick, reasons
from featherweight.kernels.cpu_native import FEW_BY_VECTORS
from featherweight.kernels.w4a16_hopper import W4A16Hopper
from featherweight.kernels.wna16 import WNA16
from featherweight.linear import CompressedLinear
from featherweight.merged import merge, prepare

FORMAT = FORMATS["compressed-tensors"]


def solved(grid: Grid, rows: int = 48, columns: int = 256, dtype: torch.dtype = torch.bfloat16) -> Solution:
    """A random matrix rounded to nearest on `grid`, zeros a little off the middle when they may be."""
    draw = torch.Generator().manual_seed(7)
    groups = columns // grid.width(columns)
    weight = torch.randn(rows, groups, columns // groups, generator=draw)
    zeros = torch.full((rows, groups), grid.middle, dtype=torch.uint8)
    if not grid.symmetric:
        zeros = torch.randint(1, grid.top + 1, (rows, groups), dtype=torch.uint8, generator=draw)
    scales = (weight.abs().amax(-1) / grid.top * 2).to(dtype)
    codes = grid.encode(weight, scales.float()[..., None], zeros[..., None]).to(torch.uint8).flatten(-2)
    return Solution(codes, scales, zeros, replace(grid, scale_dtype=dtype), torch.zeros(rows))


def layer(
    grid: Grid, kernel: str = "auto", dtype: torch.dtype = torch.bfloat16, bias: Tensor | None = None
) -> CompressedLinear:
    return CompressedLinear.from_tensors(FORMAT, grid, FORMAT.pack(solved(grid)), bias, dtype, kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_are_rounded_once_from_the_exact_product(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    solution = solved(Grid(bits=bits, group_size=32, symmetric=symmetric), dtype=dtype)
    assert torch.equal(dequantize(solution, dtype), solution.values(torch.float64).to(dtype))


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "gptq_v2", "sparse"])
@pytest.mark.parametrize("kernel", ["reference", "dense"])
@pytest.mark.parametrize("shape", [(256,), (5, 256), (2, 3, 256), (0, 256)])
def test_reference_and_dense_are_the_dequantised_layer(name: str, kernel: str, shape: tuple[int, ...]) -> None:
    format, grid = FORMATS[name], Grid(bits=4, group_size=64, symmetric=False)
    solution = solved(grid, dtype=format.scale_dtype(torch.bfloat16))
    x, bias = torch.randn(shape).bfloat16(), torch.randn(48).bfloat16()
    built = CompressedLinear.from_tensors(format, grid, format.pack(solution), bias, torch.bfloat16, kernel)
    assert torch.equal(built(x), functional.linear(x, solution.values().bfloat16(), bias))


INT4 = itertools.product([1.58, 2, 3, 4], [32, 64, None], [True, False])


@pytest.mark.parametrize(("bits", "size", "symmetric"), [c for c in INT4 if c[0] != 1.58 or c[2]])
@pytest.mark.parametrize("tokens", [1, 17])
def test_cpu_int4_agrees_with_the_reference(bits: float, size: int | None, symmetric: bool, tokens: int) -> None:
    grid = Grid(bits=bits, group_size=size, symmetric=symmetric)
    x, bias = torch.randn(2, tokens, 256).bfloat16(), torch.randn(48).bfloat16()
    got, exact = layer(grid, "cpu-int4", bias=bias)(x), layer(grid, "reference", torch.float32, bias)(x.float())
    assert got.dtype == torch.bfloat16 and got.shape == (2, tokens, 48)
    assert (got.float() - exact).norm() < 2**-7 * exact.norm()


def test_cpu_int4_says_that_it_has_no_backward() -> None:
    with pytest.raises(RequestError, match="no backward pass"):
        layer(Grid(group_size=64), "cpu-int4")(torch.randn(2, 256, dtype=torch.bfloat16, requires_grad=True))


@pytest.mark.parametrize("kernel", ["reference", "dense"])
def test_gradients_reach_the_input(kernel: str) -> None:
    built = layer(Grid(group_size=64), kernel, torch.float32)
    with torch.inference_mode():
        built(torch.randn(1, 256))
    x = torch.randn(3, 256, requires_grad=True)
    built(x).sum().backward()
    torch.testing.assert_close(x.grad, built.weight.sum(0).expand(3, 256))


def test_pick_prefers_the_fast_kernel_and_tells_why_not() -> None:
    case = (FORMAT, Grid(group_size=64), 48, 256)
    assert pick(*case, torch.bfloat16, "cpu").name == "cpu-int4"
    assert pick(*case, torch.float32, "cpu").name == "dequantize"
    assert pick(FORMAT, Grid(bits=2, group_size=2), 48, 256, torch.float32, "cpu").name == "reference"
    why = reasons(*case, torch.bfloat16, "cuda")
    assert set(why) == set(KERNELS) and why["reference"] is None and "cuda" in str(why["cpu-int4"])


@pytest.mark.parametrize(
    ("grid", "rows", "message"),
    [
        (Grid(bits=8, group_size=64), 48, "4 bits, and the codes have 8"),
        (Grid(bits=4, group_size=64), 40, "multiples of 16, and there are 40"),
        (Grid(bits=4, group_size=16), 48, "multiple of 32, and they have 16"),
    ],
)
def test_a_kernel_that_does_not_fit_is_refused_with_numbers(grid: Grid, rows: int, message: str) -> None:
    with pytest.raises(
        RequestError, match=f"cpu-int4 does not take this layer: .*{message}.*choose dequantize or reference"
    ):
        pick(FORMAT, grid, rows, 256, torch.bfloat16, "cpu", wanted="cpu-int4")
    assert pick(FORMAT, grid, rows, 256, torch.bfloat16, "cpu").name == "dequantize"


def test_requests_that_make_no_layer() -> None:
    with pytest.raises(RequestError, match="no kernel marlin: choose auto, sub1-cuda, sub1-tiles, cpu-int4"):
        layer(Grid(group_size=64), "marlin")
    with pytest.raises(RequestError, match=r"bias has shape \(3,\)"):
        layer(Grid(group_size=64), bias=torch.zeros(3))


def test_buffers_bear_the_names_on_disk_and_load() -> None:
    grid = Grid(group_size=64, symmetric=False)
    built, other = layer(grid, bias=torch.ones(48)), layer(grid, bias=torch.zeros(48))
    assert set(built.state_dict()) == {*FORMAT.suffixes(grid), "bias"}
    other.weight_scale *= 2
    other.prepare()
    other.load_state_dict(built.state_dict())
    x = torch.randn(3, 256).bfloat16()
    assert torch.equal(other(x), built(x))
    assert torch.equal(built.solution().codes_RC, solved(grid).codes_RC)
    assert "in_features=256, out_features=48, bias=True, format=compressed-tensors, bits=4" in repr(built)


def test_casts_change_the_arithmetic_and_never_the_file() -> None:
    gptq, grid = FORMATS["gptq"], Grid(group_size=64)
    solution = solved(grid, dtype=torch.float16)
    built = CompressedLinear.from_tensors(gptq, grid, gptq.pack(solution), torch.ones(48), torch.bfloat16)
    model = nn.Sequential(built).float()
    assert built.scales.dtype == torch.float16 and built.bias is not None and built.bias.dtype == torch.float32
    assert built.dtype == torch.float32 and built.kernel.name == "dequantize"
    x = torch.randn(3, 256)
    torch.testing.assert_close(model(x), functional.linear(x, solution.values(), built.bias))
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(built.solution().scales_RG, solution.scales_RG)


def test_moves_and_copies_drop_what_was_prepared() -> None:
    built = layer(Grid(group_size=64)).prepare()
    assert built.to("meta").weight_packed.device.type == "meta"
    assert built._run is None and built.kernel.name == "reference"
    built = layer(Grid(group_size=64)).prepare()
    x, saved = torch.randn(3, 256).bfloat16(), io.BytesIO()
    assert torch.equal(copy.deepcopy(built)(x), built(x))
    torch.save(built, saved)  # the layer can be pickled, as torch.distributed does; nothing of ours loads one
    assert built._run is not None


# ---- layers that share an input -------------------------------------------------------------------------------------
class Attention(nn.Module):
    """Three layers of one input, as families write them."""

    def __init__(self, grids: list[Grid], bias: bool = False, kernel: str = "auto") -> None:
        super().__init__()
        for name, grid in zip(("q_proj", "k_proj", "v_proj"), grids, strict=True):
            setattr(self, name, layer(grid, kernel, bias=torch.randn(48).bfloat16() if bias else None))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.q_proj(x), self.k_proj(x) * 2, self.v_proj(x) - 1), dim=-1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_merged_layers_give_what_they_gave_apart(name: str, bias: bool) -> None:
    grid, format = Grid(group_size=64, symmetric=False), FORMATS[name]
    apart = Attention([grid] * 3, bias)
    for part in ("q_proj", "k_proj", "v_proj"):
        packed = format.pack(solved(grid, dtype=torch.float16))
        setattr(apart, part, CompressedLinear.from_tensors(format, grid, packed, getattr(apart, part).bias))
    together = copy.deepcopy(apart)
    names = list(together.state_dict())
    assert merge(together) == 1 and merge(nn.Sequential(together)) == 1
    prepare(together)
    for tokens in (1, 40):
        x = torch.randn(2, tokens, 256).bfloat16()
        assert torch.equal(together(x), apart(x))
        assert torch.equal(together.k_proj(x), apart.k_proj(x)), "alone, and out of order"
        assert torch.equal(together.v_proj(x.clone()), apart.v_proj(x))
    assert list(together.state_dict()) == names and together.q_proj._run is None
    assert together.q_proj._merged is not None and together.q_proj._merged._last is None, "nothing is kept"


def test_merged_layers_load_move_and_copy_like_others() -> None:
    first, second = Attention([Grid(group_size=64)] * 3, bias=True), Attention([Grid(group_size=64)] * 3, bias=True)
    second.q_proj.weight_scale *= 2
    merge(first)
    x = torch.randn(3, 256).bfloat16()
    first(x)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))
    assert torch.equal(copy.deepcopy(first)(x), second(x)) and copy.deepcopy(first).q_proj._merged is None
    torch.testing.assert_close(first.float()(x.float()), second.float()(x.float()))
    assert first.q_proj._merged is None, "the kernel for float32 gains nothing from merging"


def test_layers_that_differ_stay_apart() -> None:
    assert merge(Attention([Grid(group_size=64), Grid(group_size=64), Grid(group_size=32)])) == 0
    assert merge(Attention([Grid(group_size=64)] * 3, kernel="reference")) == 0
    mixed = Attention([Grid(group_size=64)] * 3)
    mixed.k_proj.bias = nn.Parameter(torch.zeros(48).bfloat16())
    assert merge(mixed) == 0
    mixed.k_proj = nn.Linear(256, 48)
    assert merge(mixed) == 0


@pytest.mark.parametrize("kernel", ["auto", "cpu-int4", "dequantize"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_compiled_in_one_graph(kernel: str, tokens: int) -> None:
    model = Attention([Grid(group_size=64)] * 3, bias=True, kernel=kernel)
    x = torch.randn(tokens, 256).bfloat16()
    want = model(x)
    assert merge(model) == (kernel != "dequantize")
    prepare(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), want) and torch.equal(compiled(x + 0), want)


@pytest.mark.parametrize("kernel", ["cpu-int4", "dequantize"])
def test_many_tokens_on_a_cpu_multiply_the_rounded_weights(kernel: str) -> None:
    """More of them than any CPU's vectors multiply by codes. Weights that were not rounded would be as far from these
    products again as the rounding of the outputs."""
    solution, x = solved(Grid(group_size=64, symmetric=False)), torch.randn(2, FEW_BY_VECTORS // 2 + 32, 256).bfloat16()
    built = layer(Grid(group_size=64, symmetric=False), kernel)
    want = x.double() @ dequantize(solution, torch.bfloat16).double().T
    assert (built(x).double() - want).norm() <= 1.01 * (want.bfloat16().double() - want).norm()


# ---- stored tensors are let go where the kernel can give them back ---------------------------------------------------
@pytest.mark.parametrize("name", ["compressed-tensors", "gptq_v2"])
@pytest.mark.parametrize(
    ("kernel", "grid"),
    [(WNA16(), Grid(4, 128)), (W4A16Hopper(), Grid(4, 32, symmetric=False)), (WNA16(), Grid(8, None))],
    ids=str,
)
def test_tensors_that_were_let_go_are_still_there(name: str, kernel: Kernel, grid: Grid) -> None:
    format, tensors = FORMATS[name], FORMATS[name].pack(solved(grid, dtype=torch.float16))
    layer = CompressedLinear.from_tensors(format, grid, dict(tensors), dtype=torch.float32, kernel="reference")
    x, nbytes = torch.randn(2, 256), sum(each.nbytes for each in tensors.values())
    want = layer(x)
    run = kernel.prepare(format, grid, tensors, torch.float16)
    assert isinstance(run, Restorable) and layer.release(run.solution)
    assert all(each.is_meta for each in layer.buffers()) and sum(each.nbytes for each in layer.buffers()) == nbytes
    assert layer.device == torch.device("cpu") and torch.equal(layer(x), want)
    saved = layer.state_dict()
    assert saved.keys() == tensors.keys() and all(torch.equal(saved[suffix], tensors[suffix]) for suffix in tensors)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), want) and not any(each.is_meta for each in copied.buffers())
    layer.load_state_dict(saved)
    assert all(torch.equal(layer.get_buffer(suffix), each) for suffix, each in tensors.items()), "held again"
    layer.release(run.solution)
    layer.to(torch.float64)
    assert all(torch.equal(layer.get_buffer(suffix), each) for suffix, each in tensors.items()), "and after a cast"


def test_tensors_that_would_not_come_back_are_kept() -> None:
    format, grid = FORMATS["compressed-tensors"], Grid(4, 64)
    one, other = (format.pack(solved(grid)) for _ in range(2))
    other["weight_scale"] = other["weight_scale"] * 2
    layer = CompressedLinear.from_tensors(format, grid, dict(one), dtype=torch.float32)
    run = WNA16().prepare(format, grid, other, torch.float16)
    assert isinstance(run, Restorable) and not layer.release(run.solution)
    assert all(torch.equal(layer.get_buffer(suffix), each) for suffix, each in one.items())


def test_merged_layers_are_let_go_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = Attention([Grid(group_size=64)] * 3)
    before, x = copy.deepcopy(attention), torch.randn(3, 256).bfloat16()
    monkeypatch.setattr(CompressedLinear, "kernel", WNA16())
    monkeypatch.setattr(merged, "pick", lambda *_, **__: WNA16())
    assert merge(attention) == 1
    attention.q_proj.prepare()
    for name, want in before.state_dict().items():
        assert attention.get_buffer(name).is_meta and torch.equal(attention.state_dict()[name], want)
    torch.testing.assert_close(attention.k_proj(x), before.k_proj(x), rtol=2e-2, atol=2e-2)
