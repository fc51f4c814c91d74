"""The kernel for 2:4 sparse weights of four bits: layout, launches in emulation, the operator, refusals.

Tests marked gpu run it.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from featherweight.benchmarks import kernels as kernels_bench
from featherweight.core.rules import Grid, Joint, Pattern
from featherweight.errors import FallbackWarning, RequestError
from featherweight.formats import FORMATS
from featherweight.kernels import pick, sparse24, two_of_four, w4a16_hopper, wna16
from featherweight.kernels.base import Case, Restorable
from featherweight.kernels.w4a16_hopper_plan import choose, lay_out, tiles
from featherweight.kernels.wna16_layout import Layout, blocks_of, extent, pack, unpack
from featherweight.kernels.wna16_plan import TOKENS, Choice, most_tokens
from featherweight.kernels.wna16_plan import choose as choose_streamed
from featherweight.kernels.wna16_plan import lay_out as lay_out_streamed
from featherweight.linear import CompressedLinear
from featherweight.merged import merge
from featherweight.native import nvrtc
from runs import featherweight
from sparse24_emulation import operands
from w4a16_hopper_gpu import every_tile_shares_and_repeats
from wna16_cases import A100, BFLOAT, FLOAT, H100, HALF, RTX_3090, drawn, solution, sparse_solution
from wna16_emulation import product as emulated

FORMAT, PATTERN = FORMATS["sparse"], Pattern(keep=2, of=4)
LAYOUTS = [sparse24.layout_of(*each) for each in [(128, HALF, False), (64, BFLOAT, True), (32, FLOAT, True)]]
LARGEST = LAYOUTS[-1]
GRIDS = [Grid(4, 128), Grid(4, 64, False), Grid(4, 32), Grid(4, None, False)]
PROCESSORS, BLOCK_BYTES = 132, 232448  # an H100


def dense(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    grouped = codes.unflatten(-1, (scales.shape[1], -1)).double() - zeros.unsqueeze(-1)
    return (grouped * scales.unsqueeze(-1)).flatten(-2)


# ---- layout ---------------------------------------------------------------------------------------------------------
def test_two_of_four_come_back_where_they_stood() -> None:
    zeros = torch.tensor([[8, 3]], dtype=torch.uint8)
    codes = torch.tensor([[8, 1, 8, 2, 8, 8, 8, 8, 7, 6, 3, 3, 3, 3, 3, 15]], dtype=torch.uint8)
    kept, places = two_of_four.gather(codes, zeros)
    assert kept.tolist() == [[1, 2, 8, 8, 7, 6, 3, 15]] and places.tolist() == [[1, 3, 0, 1, 0, 1, 0, 3]]
    assert torch.equal(two_of_four.scatter(kept, places, zeros), codes)
    with pytest.raises(RequestError, match="four neighbouring weights have 3 that are not zero, and 2:4 is 2"):
        two_of_four.gather(torch.tensor([[8, 1, 8, 2, 8, 8, 8, 8, 7, 6, 0, 3, 3, 3, 3, 15]], dtype=torch.uint8), zeros)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(32, 128), (50, 1408), (1, 640), (3, 32)])
def test_unpack_is_the_inverse_of_pack(layout: Layout, rows: int, columns: int) -> None:
    columns += -columns % layout.group
    given = drawn(rows, columns, layout)
    packed = pack(*given, layout)
    tiles_, blocks = extent(rows, columns)
    assert (
        packed.numel() == tiles_ * (blocks * layout.block_bytes + 32 * layout.raised) and layout.block_bytes % 16 == 0
    )
    assert all(torch.equal(got, put) for got, put in zip(unpack(packed, rows, columns, layout), given, strict=True))


def test_three_bits_a_weight_are_read_and_the_scales() -> None:
    assert LAYOUTS[0].block_bytes * 8 / (32 * 128) == 3.125


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_operands_are_code_minus_zero_where_it_was_kept(dtype: torch.dtype, layout: Layout) -> None:
    codes, scales, zeros = drawn(32, 128, layout)
    block = blocks_of(pack(codes, scales, zeros, layout), 32, 128, layout)[0, 0]
    want = codes.double() - zeros.double().repeat_interleave(layout.group, 1)
    assert torch.equal(operands(block, layout, dtype), want)


# ---- launches in emulation ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("choice", [Choice(1, 4, 2), Choice(2, 8, 2, 2)], ids=str)
def test_a_launch_computes_the_product_once(choice: Choice) -> None:
    layout = LAYOUTS[1]
    given = drawn(100, 384, layout)
    x = torch.randn(3, 384, generator=torch.Generator().manual_seed(1)).half()
    plan = lay_out_streamed(3, *extent(100, 384), layout, H100, choice)
    got = emulated(pack(*given, layout), x, 100, layout, plan)
    torch.testing.assert_close(got, x.double() @ dense(*given).T, rtol=1e-9, atol=1e-9)


SHAPES = [(4096, 4096), (4096, 11008), (10240, 8192), (8192, 28672), (57344, 8192), (32, 128), (1, 32)]


@pytest.mark.parametrize("device", [H100, A100, RTX_3090], ids=["H100", "A100", "3090"])
@pytest.mark.parametrize("layout", [LAYOUTS[0], LARGEST], ids=str)
def test_plans_fit_the_device(device: object, layout: Layout) -> None:
    for rows, columns in SHAPES:
        most = most_tokens(*extent(rows, columns), layout, device)  # type: ignore[arg-type]
        assert most > 0 or (device != H100 and columns > 8192)
        for tokens in range(1, min(most, TOKENS) + 1):
            plan = choose_streamed(tokens, *extent(rows, columns), layout, device)  # type: ignore[arg-type]
            assert plan is not None and plan.bytes <= device.block_bytes  # type: ignore[attr-defined]
            assert plan.x_stride % 128 == 16, "eight rows of x fall on different banks"


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_plans_of_many_tokens_fit_the_device(dtype: torch.dtype, layout: Layout) -> None:
    for tile, tokens, (rows, columns) in product(tiles(dtype, layout), (33, 1000, 4096), SHAPES):
        plan = lay_out(tile, tokens, rows, columns, layout, PROCESSORS, BLOCK_BYTES)
        assert plan.bytes <= BLOCK_BYTES and plan.stages >= 2 and plan.at_weights % 1024 == 0
        assert 1 <= plan.grid <= PROCESSORS and plan.shared <= plan.sharers <= PROCESSORS
        assert choose(tokens, rows, columns, dtype, layout, PROCESSORS) in (None, *tiles(dtype, layout))


# ---- the operator on a CPU ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_repacked_codes_give_the_reference(grid: Grid) -> None:
    weights = sparse_solution(grid, 50, 256)
    packed, layout = sparse24.repack(weights)
    x, bias = torch.randn(2, 3, 256).half(), torch.randn(50).half()
    sparse24.register()
    got = torch.ops.featherweight.sparse24(x, packed, bias, 50, layout.group, layout.scales, layout.zeros)
    want = functional.linear(x.double(), weights.values(torch.float64), bias.double())
    assert got.shape == (2, 3, 50) and torch.equal(got, want.half())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tensors_that_were_let_go_come_back(grid: Grid) -> None:
    """Kept codes that stand for zero, and places that were chosen for them, included."""
    drawn_ = solution(grid, 50, 256)
    weights = kernels_bench.pruned(drawn_, PATTERN)
    stored = FORMAT.pack(weights)
    layer = CompressedLinear.from_tensors(FORMAT, weights.rule, dict(stored), kernel="reference", dtype=HALF)
    run = sparse24.Sparse24().prepare(FORMAT, weights.rule, stored, HALF)
    assert isinstance(run, Restorable) and layer.release(run.solution)
    assert all(each.is_meta for each in layer.buffers())
    assert all(torch.equal(each, stored[suffix]) for suffix, each in layer.state_dict().items())


def test_the_operator_is_sound_for_torch() -> None:
    packed, layout = sparse24.repack(sparse_solution(Grid(4, 64, False), 48, 256))
    sparse24.register()
    static = (48, layout.group, layout.scales, layout.zeros)
    arguments = (torch.randn(3, 256).half(), packed, torch.randn(48).half(), *static)
    torch.library.opcheck(torch.ops.featherweight.sparse24.default, arguments)


def test_weights_that_are_not_sparse_are_refused_where_they_are_repacked() -> None:
    weights = sparse_solution(Grid(4, 64), 4, 64)
    weights.codes_RC[2, 4:8] = torch.tensor([1, 2, 8, 3], dtype=torch.uint8)
    with pytest.raises(RequestError, match="have 3 that are not zero, and 2:4 is 2"):
        sparse24.repack(weights)


# ---- refusals -------------------------------------------------------------------------------------------------------
def refusal(rule: object, columns: int = 256, dtype: torch.dtype = HALF, device: str = "cuda") -> str:
    case = Case(FORMAT, rule, 48, columns, dtype, torch.device(device))  # type: ignore[arg-type]
    return str(sparse24.Sparse24().refusal(case))


def test_refusals_name_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "of which 2 of 4 are kept, and they are not pruned" in refusal(Grid())
    assert "of which 2 of 4 are kept, and they are 1:4" in refusal(Joint(Grid(), Pattern(keep=1, of=4)))
    assert "of which 2 of 4 are kept, and they are 0.5" in refusal(Joint(Grid(), Pattern()))
    assert "weights are floats, pruned (2:4)" in refusal(PATTERN)
    assert "codes of 4 bits, and they have 3" in refusal(Joint(Grid(3), PATTERN))
    assert "NVIDIA GPUs, and the layer is on cpu" in refusal(Joint(Grid(), PATTERN), device="cpu")
    assert "activations are torch.float32" in refusal(Joint(Grid(), PATTERN), dtype=FLOAT)
    assert "multiple of 32, and they have 16" in refusal(Joint(Grid(4, 16), PATTERN))
    assert "multiple of 32, and they have 40" in refusal(Joint(Grid(4, None), PATTERN), columns=40)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0, and the GPU has 7.5" in refusal(Joint(Grid(), PATTERN))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert refusal(Joint(Grid(), PATTERN)) == refusal(Joint(Grid(4, None, False), PATTERN)) == "None"
    case = (FORMAT, Joint(Grid(), PATTERN), 48, 256, HALF, "cuda")
    assert pick(*case, wanted="sparse24").name == pick(*case).name == "sparse24"
    assert pick(FORMAT, Joint(Grid(3), PATTERN), 48, 256, HALF, "cuda").name == "wna16"


def test_compilers_that_nobody_vouches_for_are_kept_from_warpgroup_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(wna16, "kernels", lambda *layer: "stream")
    monkeypatch.setattr(w4a16_hopper, "kernels", lambda *layer: "warpgroups")
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: sparse24.COMPILERS[0])
    assert sparse24.kernels.__wrapped__(torch.device("cuda", 0), HALF, LAYOUTS[0]) == "warpgroups"
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 4))
    with pytest.warns(FallbackWarning, match=r"NVRTC 13\.5 is known to compile .* rightly, and 13\.4 is installed"):
        assert sparse24.kernels.__wrapped__(torch.device("cuda", 0), HALF, LAYOUTS[0]) == "stream"


def test_inputs_that_do_not_fit_are_refused() -> None:
    weights = sparse_solution(Grid(4, 64), 48, 256)
    run = sparse24.Sparse24().prepare(FORMAT, weights.rule, FORMAT.pack(weights), HALF)
    x = torch.randn(2, 256).half()
    assert run(x[:0], None).shape == (0, 48)
    torch.testing.assert_close(run(x, None), functional.linear(x, weights.values().half()), atol=0.1, rtol=0.01)
    with pytest.raises(RequestError, match=r"float32 with 256 columns, and the layer is torch.float16 with 256"):
        run(x.float(), None)
    with pytest.raises(RequestError, match="no backward pass"):
        run(x.requires_grad_(), None)


# ---- on the command line --------------------------------------------------------------------------------------------
def test_check_kernels_says_why_not() -> None:
    ran = featherweight("check-kernels", "--sparsity", "2:4", "--device", "cpu")
    assert ran.code == 0 and "NVIDIA GPUs, and the layer is on cpu" in ran.last["refusals"]["sparse24"]
    ran = featherweight("check-kernels", "--device", "cpu")
    assert "of which 2 of 4 are kept, and they are not pruned" in ran.last["refusals"]["sparse24"]


def test_bench_kernels_draws_weights_that_are_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_bench, "read_gbps", lambda device: 10.0)
    monkeypatch.setattr(kernels_bench, "peak_tflops", lambda device: 0.5)
    ran = featherweight(
        *("bench", "kernels", "--shapes", "128x64", "--m", "3", "--sparsity", "2:4", "--kernel", "dequantize"),
        *("--device", "cpu"),
    )
    assert ran.code == 0, ran.err
    row = ran.last["rows"][-1]
    assert ran.last["sparsity"] == "2:4" and row["kernel"] == "dequantize" and row["error"] < 5e-3
    weights = kernels_bench.pruned(kernels_bench.draw(64, 256, Grid(4, 64, False), HALF, torch.device("cpu")), PATTERN)
    held = sum(tensor.nbytes for name, tensor in FORMAT.pack(weights).items() if name != "weight_shape")
    assert kernels_bench.stored_bytes(256, 64, Grid(4, 64, False), HALF, PATTERN) == held
    ran = featherweight("bench", "kernels", "--shapes", "128x64", "--sparsity", "0.5", "--device", "cpu")
    assert ran.code == 2 and "--sparsity 0.5: products are timed with N:M sparsity alone" in ran.err


# ---- on a GPU -------------------------------------------------------------------------------------------------------
def on_gpu(grid: Grid, rows: int, columns: int, dtype: torch.dtype) -> tuple[CompressedLinear, Tensor]:
    """A layer, and its exact weights."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    weights = sparse_solution(grid, rows, columns, dtype)
    tensors = {name: tensor.cuda() for name, tensor in FORMAT.pack(weights).items()}
    bias = torch.randn(rows).cuda()
    layer = CompressedLinear.from_tensors(FORMAT, weights.rule, tensors, bias, dtype, kernel="sparse24")
    return layer, weights.values(torch.float64).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (50, 320), (33, 128), (1001, 11008)])
def test_products_on_a_gpu(dtype: torch.dtype, grid: Grid, rows: int, columns: int) -> None:
    layer, values = on_gpu(grid, rows, columns - columns % (grid.group_size or 1), dtype)
    for tokens in (1, 3, 8, 9, 17, 32, 33, 64, 65, 130, 1000):
        x = torch.randn(tokens, values.shape[1], device="cuda").to(dtype)
        want = functional.linear(x.double(), values, layer.bias.double())
        rounded = functional.linear(x.double(), values.to(dtype) - values)  # where weights are made floats
        rounding, error = (want.to(dtype) - want).norm(), (layer(x).double() - want).norm()
        allowed = 1e-3 * want.norm() + (rounded.norm() if tokens > w4a16_hopper.SPARSE_STREAMED else 0)
        assert (error**2 - rounding**2).clamp_min(0).sqrt() <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
def test_every_tile_on_a_gpu_shares_and_repeats(dtype: torch.dtype) -> None:
    """Few tiles, which CTAs share, and many; in a graph, over and over, early starts included."""
    layer, values = on_gpu(Grid(4, 64, False), 1000, 2048, dtype)
    packed, layout = sparse24.repack(layer.solution())
    kernels = sparse24.kernels(packed.device, dtype, layout)
    if not isinstance(kernels, w4a16_hopper.Kernels):
        pytest.skip("torch sees no Hopper GPU")
    every_tile_shares_and_repeats(kernels, packed, values, dtype)


@pytest.mark.gpu
def test_merged_layers_on_a_gpu_give_what_they_gave_apart() -> None:
    parent = nn.Module()
    parent.gate_proj, parent.up_proj = (on_gpu(Grid(4, 64), rows, 256, HALF)[0] for rows in (96, 50))
    x = torch.randn(5, 256, device="cuda").half()
    apart = parent.gate_proj(x), parent.up_proj(x)
    assert merge(parent) == 1
    for got, want in zip((parent.gate_proj(x), parent.up_proj(x)), apart, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_the_operator_is_sound_on_a_gpu() -> None:
    layer, _ = on_gpu(Grid(4, 128), 512, 1024, HALF)
    layer(torch.randn(1, 1024, device="cuda").half())
    packed, layout = sparse24.repack(layer.solution())
    arguments = (packed, layer.bias, 512, layout.group, layout.scales, layout.zeros)
    for x in (torch.randn(2, 3, 1024), torch.randn(64, 1025)[:, 1:], torch.randn(0, 1024)):
        torch.library.opcheck(torch.ops.featherweight.sparse24.default, (x.cuda().half(), *arguments))


@pytest.mark.gpu
def test_without_a_compiler_the_reference_takes_over_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, values = on_gpu(Grid(4, 128), 64, 256, HALF)

    def broken(*_: object) -> None:
        raise nvrtc.CompileError("no NVRTC here")

    monkeypatch.setattr(sparse24, "kernels", broken)
    x = torch.randn(2, 256, device="cuda").half()
    with pytest.warns(FallbackWarning, match="gives way to the reference kernel: no NVRTC here"):
        torch.testing.assert_close(layer(x), functional.linear(x, values.half(), layer.bias))
