"""The kernels for packed weights without a GPU: layout, arithmetic, launches in emulation, the operator, refusals."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from featherweight.core.rules import Grid, Pattern
from featherweight.errors import RequestError
from featherweight.formats import FORMATS
from featherweight.kernels import pick, reasons, wna16
from featherweight.kernels.base import Case
from featherweight.kernels.wna16_layout import Layout, extent, pack, unpack
from featherweight.kernels.wna16_plan import TOKENS, Choice, Device, choose, lay_out, most_tokens, shares
from featherweight.native import nvrtc
from wna16_cases import A100, BFLOAT, FLOAT, H100, HALF, RTX_3090, drawn, solution
from wna16_emulation import fragments, odd_step
from wna16_emulation import product as emulated

FORMAT = FORMATS["compressed-tensors"]
LAYOUTS = [
    Layout(bits, *each) for bits in (2, 3, 4, 8) for each in [(32, FLOAT, True), (64, BFLOAT, True), (128, HALF, False)]
]


def exact(codes: Tensor, scales: Tensor, zeros: Tensor, x: Tensor) -> Tensor:
    grouped = codes.unflatten(-1, (scales.shape[1], -1)).double() - zeros.unsqueeze(-1)
    return x.double() @ (grouped * scales.unsqueeze(-1)).flatten(-2).T


# ---- layout ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(32, 128), (50, 1408), (1, 640)])
def test_unpack_is_the_inverse_of_pack(layout: Layout, rows: int, columns: int) -> None:
    given = drawn(rows, columns, layout)
    packed = pack(*given, layout)
    tiles, blocks = extent(rows, columns)
    assert packed.numel() == tiles * (blocks * layout.block_bytes + 32 * layout.raised) and layout.block_bytes % 16 == 0
    assert all(torch.equal(got, put) for got, put in zip(unpack(packed, rows, columns, layout), given, strict=True))


def test_columns_that_fill_no_block_are_padded_with_scale_zero() -> None:
    layout = Layout(3, 32, HALF, True)
    codes, scales, zeros = unpack(pack(*drawn(3, 32, layout), layout), 32, 128, layout)
    assert (scales[3:] == 0).all() and (scales[:, 1:] == 0).all() and (codes[3:] == 0).all() and (zeros[3:] == 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_word_is_what_its_lane_multiplies(bits: int) -> None:
    layout = Layout(bits, 128, HALF, False)
    codes, scales, zeros = drawn(32, 128, layout)
    block = pack(codes, scales, zeros, layout)
    for dtype, step in ((HALF, 2.0**-24), (BFLOAT, 2.0**-133)):
        registers = fragments(block, layout, dtype) / step
        for half, u, i, j, g, t in [(0, 0, 0, 0, 0, 0), (1, 0, 1, 0, 3, 2), (0, 1, 1, 1, 7, 3), (1, 1, 0, 1, 5, 1)]:
            row, column = 16 * half + g, 64 * u + 32 * i + 16 * j + 2 * t
            for r in range(4):  # of mma.m16n8k16: rows g and g + 8 in turn, two columns each
                pair = codes[row + 8 * (r % 2), column + r // 2 * 8 :][:2]
                want = pair.double() * odd_step(layout) ** (r % 2)
                assert registers[half, u, i, j, g, t, r].tolist() == want.tolist()


# ---- launches in emulation ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_blocks_are_multiplied_exactly(dtype: torch.dtype, layout: Layout) -> None:
    given = drawn(64, 256, layout)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    plan = lay_out(3, 2, 2, layout, H100, Choice(1, 4, 2))
    got = emulated(pack(*given, layout), x, 64, layout, plan)
    torch.testing.assert_close(got, exact(*given, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("choice", [Choice(1, 8, 2), Choice(2, 8, 2, 2), Choice(4, 3, 2, 2), Choice(8, 11, 2)], ids=str)
def test_a_launch_computes_the_product_once(bits: int, choice: Choice) -> None:
    few = Device(132, 232448, 233472, ((1, 3), (2, 2), (4, 1), (8, 1)))  # so few clusters that they pass more than once
    layout = Layout(bits, 64, HALF, True)
    given = drawn(330, 640, layout)
    x = torch.randn(3, 640, generator=torch.Generator().manual_seed(1)).half()
    plan = lay_out(3, *extent(330, 640), layout, few, choice)
    got = emulated(pack(*given, layout), x, 330, layout, plan)
    torch.testing.assert_close(got, exact(*given, x), rtol=1e-9, atol=1e-9)


def test_divisions_by_inverses_are_exact() -> None:
    """As `quotient` of gpu.cuh has it, for every divisor of a plan and the largest products that it is given."""
    for divisor in (*range(1, 129), 1000, 4097):
        most = (2**31 - 1) // divisor
        numbers = torch.cat([torch.arange(0, 4 * divisor + 1), torch.arange(most - 4 * divisor, most)]).clamp_min(0)
        assert torch.equal(numbers * (2**31 // divisor + 1) >> 31, numbers // divisor)


def test_launches_are_described_as_the_source_reads_them() -> None:
    struct = re.search(r"struct Params \{(.*?)\};", nvrtc.source("kernels/wna16"), re.S)
    assert struct is not None
    lines = re.sub(r"//.*", "", struct[1])
    assert re.findall(r"(\w+)(?=[,;])", lines) == [name for name, _ in wna16.Params._fields_]


SHAPES = [(4096, 4096), (12288, 4096), (4096, 11008), (10240, 8192), (8192, 28672), (57344, 8192), (32, 128), (1, 32)]


@pytest.mark.parametrize("device", [H100, A100, RTX_3090], ids=["H100", "A100", "3090"])
@pytest.mark.parametrize("layout", [Layout(4, 128, HALF, False), Layout(8, 32, FLOAT, True)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_plans_fit_the_device(device: Device, layout: Layout, rows: int, columns: int) -> None:
    extents = extent(rows, columns)
    most = most_tokens(*extents, layout, device)
    assert 0 <= most <= TOKENS
    assert most > 0 or (device != H100 and columns > 8192), "so many columns go through a dense product there"
    for tokens in range(1, most + 1):
        plan = choose(tokens, *extents, layout, device)
        assert plan is not None and plan.bytes <= device.block_bytes and plan.stages >= 2
        assert plan.warps <= (16 if plan.width <= 16 else 8) and plan.owned * 16 * plan.size >= plan.row_warps * 32
        regions = [0, plan.at_barriers, plan.at_x, plan.at_sums, plan.at_partials, plan.bytes]
        assert regions == sorted(regions) and plan.at_x % 16 == 0 and plan.x_stride % 16 == 0


@pytest.mark.parametrize("layout", [Layout(4, 128, HALF, False), Layout(2, 64, HALF, True)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_next_launch_is_held_back_only_where_it_fits_beside(layout: Layout, rows: int, columns: int) -> None:
    for tokens in range(1, TOKENS + 1):
        plan = choose(tokens, *extent(rows, columns), layout, H100)
        if plan is not None and plan.hold is not None:
            assert 2 * (plan.bytes + 1024) <= H100.processor_bytes and 2 * plan.warps <= 32


def test_plans_are_those_that_were_fastest() -> None:
    """bench/results/2026-11-2{3,4}-h100-wna16.md: clusters, warps, rings, and when the next launch may begin."""

    def shape(bits: int, tokens: int, rows: int, columns: int) -> tuple[int | None, ...]:
        layout = Layout(4, 128, HALF, False) if bits == 4 else Layout(2, 64, HALF, True)
        p = choose(tokens, *extent(rows, columns), layout, H100)
        assert p is not None
        return (p.size, p.clusters, p.row_warps, p.warp_splits, p.stages, p.chunk, p.hold)

    assert shape(4, 16, 4096, 4096) == (8, 15, 9, 1, 2, 1, 3)
    assert shape(4, 16, 12288, 4096) == (8, 15, 13, 1, 2, 1, None)
    assert shape(2, 1, 10240, 8192) == (2, 66, 5, 2, 2, 4, 2)
    assert shape(2, 2, 10240, 8192) == (2, 66, 5, 3, 2, 2, None), "two CTAs of the other do not fit"
    assert shape(2, 1, 57344, 8192) == (2, 132, 14, 1, 2, 2, 2)
    assert shape(2, 1, 8192, 28672) == (2, 66, 4, 4, 2, 2, None), "several times the bytes: not measured otherwise"


def test_tokens_beyond_a_launch_are_shared_evenly() -> None:
    assert (
        shares(33, 32) == [16, 17] and shares(64, 24) == [21, 21, 22] and shares(32, 32) == [32] and shares(0, 32) == []
    )


# ---- the operator on a CPU ------------------------------------------------------------------------------------------
CASES = [
    (4, 128, True),
    (4, 64, False),
    (4, 32, False),
    (3, 64, True),
    (2, 64, False),
    (3, 128, False),
    (5, 64, True),
    (6, 64, False),
    (8, 128, True),
    (1.58, 32, True),
    (4, None, True),
]


@pytest.mark.parametrize(("bits", "size", "symmetric"), CASES)
def test_repacked_codes_of_any_width_give_the_reference(bits: float, size: int | None, symmetric: bool) -> None:
    weights = solution(Grid(bits, size, symmetric), 50, 256)
    packed, layout = wna16.repack(weights)
    x, bias = torch.randn(2, 3, 256).half(), torch.randn(50).half()
    wna16.register()
    got = torch.ops.featherweight.wna16(x, packed, bias, 50, layout.bits, layout.group, layout.scales, layout.zeros)
    want = functional.linear(x.double(), weights.values(torch.float64), bias.double())
    assert got.shape == (2, 3, 50) and torch.equal(got, want.half())


def test_the_operator_is_sound_for_torch() -> None:
    packed, layout = wna16.repack(solution(Grid(), 48, 256))
    wna16.register()
    static = (48, layout.bits, layout.group, layout.scales, layout.zeros)
    for bias in (None, torch.randn(48).half()):
        torch.library.opcheck(
            torch.ops.featherweight.wna16.default, (torch.randn(3, 256).half(), packed, bias, *static)
        )

    def twice(x: Tensor) -> Tensor:
        return torch.ops.featherweight.wna16(x, packed, None, *static) * 2

    x = torch.randn(5, 256).half()
    assert torch.equal(torch.compile(twice, fullgraph=True, backend="aot_eager")(x), twice(x))


# ---- refusals -------------------------------------------------------------------------------------------------------
def refusal(rule: object, rows: int = 48, columns: int = 256, dtype: torch.dtype = HALF, device: str = "cuda") -> str:
    case = Case(FORMAT, rule, rows, columns, dtype, torch.device(device))  # type: ignore[arg-type]
    return str(wna16.WNA16().refusal(case))


@pytest.mark.parametrize(
    ("why", "message"),
    [
        (refusal(Grid(), device="cpu"), "NVIDIA GPUs, and the layer is on cpu"),
        (refusal(Grid(), dtype=FLOAT), "float16 or torch.bfloat16, and the activations are torch.float32"),
        (refusal(Grid(4, 16)), "multiple of 32, and they have 16"),
        (refusal(Grid(4, None), columns=40), "multiple of 32, and they have 40"),
        (refusal(Pattern()), "weights are floats, pruned"),
    ],
)
def test_refusals_name_both_numbers(why: str, message: str) -> None:
    assert message in why


def test_without_a_gpu_or_with_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees 0" in refusal(Grid())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0, and the GPU has 7.5" in refusal(Grid())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert refusal(Grid()) == "None"
    assert pick(FORMAT, Grid(), 48, 256, HALF, "cuda", wanted="wna16").name == "wna16"
    assert pick(FORMAT, Grid(), 48, 256, HALF, "cuda").name == "w4a16-hopper"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert pick(FORMAT, Grid(), 48, 256, HALF, "cuda").name == "wna16"
    assert pick(FORMAT, Grid(8), 48, 256, HALF, "cuda").name == "wna16"
    assert pick(FORMAT, Grid(8), 48, 256, FLOAT, "cuda").name != "wna16"
    assert reasons(FORMAT, Grid(), 48, 256, HALF, "cuda")["wna16"] is None


def test_inputs_that_do_not_fit_are_refused() -> None:
    grid = Grid(4, 64)
    run = wna16.WNA16().prepare(FORMAT, grid, FORMAT.pack(solution(grid, 48, 256)), HALF)
    x = torch.randn(2, 256).half()
    assert run(x[:0], None).shape == (0, 48)
    torch.testing.assert_close(
        run(x, None), functional.linear(x, solution(grid, 48, 256).values().half()), atol=0.1, rtol=0.01
    )
    with pytest.raises(RequestError, match=r"float32 with 256 columns, and the layer is torch.float16 with 256"):
        run(x.float(), None)
    with pytest.raises(RequestError, match="with 128 columns"):
        run(x[:, :128], None)
    with pytest.raises(RequestError, match="no backward pass"):
        run(x.requires_grad_(), None)
