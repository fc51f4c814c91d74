"""The Hopper kernel for many tokens without a GPU: operands and launches in emulation, what it compiles to, refusals.

Tests marked gpu run it.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from cuda.pathfinder import find_nvidia_binary_utility
from torch import Tensor
from torch.nn import functional

from featherweight.core.rules import Grid
from featherweight.errors import FallbackWarning, RequestError
from featherweight.formats import FORMATS
from featherweight.kernels import pick, w4a16_hopper, wna16
from featherweight.kernels.base import Case
from featherweight.kernels.w4a16_hopper import macros
from featherweight.kernels.w4a16_hopper_plan import EXACT_TOKENS, Tile, choose, lay_out, tiles
from featherweight.kernels.wna16_layout import Layout, blocks_of, extent, pack
from featherweight.linear import CompressedLinear
from featherweight.native import nvrtc
from w4a16_hopper_emulation import block_at, helpers_of, operands, pieces, place, sent, sharers_of
from w4a16_hopper_gpu import every_tile_shares_and_repeats
from wna16_cases import solution

FORMAT = FORMATS["compressed-tensors"]
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
PROCESSORS, BLOCK_BYTES = 132, 232448  # an H100


# ---- operands and launches in emulation ------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("layout", [Layout(4, 128, HALF, False), Layout(4, 32, FLOAT, True)], ids=str)
def test_operands_are_code_minus_zero_in_the_order_of_x(dtype: torch.dtype, layout: Layout) -> None:
    draw = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (32, 128), dtype=torch.uint8, generator=draw)
    scales = torch.rand(32, 128 // layout.group, generator=draw).to(layout.scales)
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    if layout.zeros:
        zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8, generator=draw)
    block = blocks_of(pack(codes, scales, zeros, layout), 32, 128, layout)[0, 0]
    want = codes.double() - zeros.double().repeat_interleave(layout.group, 1)
    assert torch.equal(operands(block, layout, dtype), want)


@pytest.mark.parametrize("group", [128, 32])
def test_raised_weights_are_rounded_once(group: int) -> None:
    """Code times scale less the middle's, by one `fma`, is the rounded weight; of groups with scales 2^-9 of the row's
    largest and less the error is 2^-18 of the largest weight."""
    draw, layout = torch.Generator().manual_seed(4), Layout(4, group, HALF, False)
    codes = torch.randint(0, 16, (32, 128), dtype=torch.uint8, generator=draw)
    scales = (torch.rand(32, 128 // group, generator=draw) * 2.0 ** torch.arange(-14, 2, 0.5)[:, None]).to(HALF)
    scales[3] = 0
    scales[:, 1:2] *= 2.0**-10
    packed = pack(codes, scales, torch.full(scales.shape, 8, dtype=torch.uint8), layout)
    block, powers = blocks_of(packed, 32, 128, layout)[0, 0], packed[-32:]
    top = scales.double().amax(1)
    assert bool((top * 2.0 ** powers.double() <= 65504).all()) and bool(
        (top[top > 0] * 2.0 ** powers[top > 0] >= 2**15).all()
    )
    each = scales.double().repeat_interleave(group, 1)
    weights = (codes.double() - 8) * each
    got = operands(block, layout, HALF, powers)
    lift = 2.0 ** (powers.double() - 24)[:, None]
    near = each * 2.0 ** powers.double()[:, None] >= 2**7
    assert torch.equal(got[near], (weights * lift).half().double()[near])
    error = (got / lift - weights).abs()
    assert bool((error <= (weights.abs() * 2.0**-11).maximum(8 * top[:, None] * 2.0**-18)).all())


TILES = [Tile(64, 2, ctas=2), Tile(64, 4), Tile(128, 3), Tile(256, 2)]
SHAPES = [(64, 4096, 4096), (64, 12288, 1024), (1000, 10240, 1024), (33, 50, 320), (1, 1, 32)]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_column_of_every_tile_is_computed_once(tile: Tile, shape: tuple[int, int, int]) -> None:
    tokens, rows, columns = shape
    blocks = extent(rows, columns)[1]
    plan = lay_out(tile, tokens, rows, columns, Layout(4, 128, HALF, False), PROCESSORS, BLOCK_BYTES)
    owners: dict[tuple[int, int], int] = {}
    parts: dict[int, dict[int, int]] = {}
    for cta in range(plan.grid):
        slot = 0
        for index, first, end in pieces(plan, blocks, cta):
            for k in range(first, end):
                assert owners.setdefault((index, k), cta) == cta
            if (first, end) != (0, blocks) and tile.meet == 1:
                parts.setdefault(index, {})[cta] = slot
                slot += 1
                assert (cta * 2 + slot) * tile.rows * tile.tokens * 4 <= plan.partials_bytes
                assert 0 <= index - plan.whole * plan.grid < PROCESSORS * tile.ctas, "each has its counters"
        assert slot <= 2
    assert len(owners) == plan.row_tiles * plan.token_tiles * blocks
    for index, of in parts.items():
        ctas, slots = sharers_of(plan, blocks, index)
        assert dict(zip(ctas, slots, strict=True)) == of
    places = {place(plan, index) for index in range(plan.row_tiles * plan.token_tiles)}
    assert places == set(product(range(plan.row_tiles), range(plan.token_tiles)))


OWNED = [(64, 57344, 8192), (256, 10240, 8192), (256, 57344, 8192), (768, 3584, 18944), (40, 12288, 4100)]


@pytest.mark.parametrize("shape", OWNED, ids=str)
def test_owners_compute_most_of_a_tile_and_add_one_or_two_parts(shape: tuple[int, int, int]) -> None:
    tokens, rows, columns = shape
    blocks = extent(rows, columns)[1]
    plans = {
        tile: lay_out(tile, tokens, rows, columns, Layout(4, 128, HALF, False), PROCESSORS, BLOCK_BYTES)
        for tile in (Tile(64, 2, ctas=2), Tile(64, 4), Tile(128, 3))
    }
    owned = {tile: plan for tile, plan in plans.items() if plan.helped}
    assert owned
    for tile, plan in owned.items():
        by, parts = {}, {}
        for cta in range(plan.grid):
            for index, first, end in pieces(plan, blocks, cta):
                for k in range(first, end):
                    assert by.setdefault((index, k), cta) == cta
                if end == blocks and first > 0:
                    assert (first, index) == (plan.helped, plan.whole * plan.grid + cta), "an owner's own tile"
                elif end < blocks:  # `store_partial`'s slot
                    t = index - plan.whole * plan.grid
                    parts.setdefault(index, {})[cta] = t * 2 + (first > 0)
                    assert (t * 2 + 2) * tile.rows * tile.tokens * 4 <= plan.partials_bytes
        assert len(by) == plan.row_tiles * plan.token_tiles * blocks and len(parts) == plan.shared
        for index, of in parts.items():
            ctas, slots = helpers_of(plan, index)
            assert dict(zip(ctas, slots, strict=True)) == of and 1 <= len(of) <= 2


def test_where_tiles_gain_by_owners_they_have_them() -> None:
    """By the costs, as timed on an H100 (bench/results/2026-11-23-h100-w4a16-hopper.md)."""
    layout = Layout(4, 128, HALF, False)
    for (tokens, rows, columns), helped in zip(
        OWNED, (range(14, 18), range(6, 10), range(15, 31), range(13, 19)), strict=False
    ):
        tile = choose(tokens, rows, columns, HALF, layout, PROCESSORS)
        assert tile is not None
        assert lay_out(tile, tokens, rows, columns, layout, PROCESSORS, BLOCK_BYTES).helped in helped
    for tokens, rows, columns in ((64, 4096, 4096), (256, 12288, 4096), (256, 8192, 28672), (64, 28672, 4096)):
        tile = choose(tokens, rows, columns, HALF, layout, PROCESSORS)
        assert tile is not None
        assert not lay_out(tile, tokens, rows, columns, layout, PROCESSORS, BLOCK_BYTES).helped


@pytest.mark.parametrize("tile", [Tile(64, 2, meet=n) for n in (2, 3, 4)] + [Tile(128, 3, meet=3)], ids=str)
def test_sums_that_meet_in_a_cluster_are_all_there(tile: Tile) -> None:
    boxes: dict[int, set[int]] = {rank: set() for rank in range(tile.meet)}
    sums: dict[int, list[int]] = {rank: [] for rank in range(tile.meet)}
    for rank in range(tile.meet):
        for i, (to, box, own) in enumerate(sent(tile, rank)):
            if to == rank:
                assert own == len(sums[rank])
                sums[rank].append(i)
            else:
                assert box not in boxes[to] and box % -(-tile.tokens // 16 // tile.meet) == own
                boxes[to].add(box)
    assert sorted(i for summed in sums.values() for i in summed) == list(range(tile.tokens // 16))
    for rank, summed in sums.items():
        assert len(boxes[rank]) == (tile.meet - 1) * len(summed)
        assert (max(boxes[rank]) + 1) * 128 * tile.warpgroups * 32 <= tile.meeting_bytes


def test_blocks_lie_where_they_were_packed() -> None:
    layout, rows, columns = Layout(4, 128, HALF, False), 80, 5 * 128
    tiles, blocks = extent(rows, columns)
    numbered = torch.arange(tiles * blocks).repeat_interleave(layout.block_bytes)
    found = blocks_of(numbered, rows, columns, layout)[:, :, 0]
    assert [[block_at(blocks, tiles, k, t) for k in range(blocks)] for t in range(tiles)] == found.tolist()


LARGEST = Layout(4, 32, FLOAT, True)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("layout", [Layout(4, 128, HALF, False), Layout(4, 64, BFLOAT, True), LARGEST], ids=str)
def test_plans_fit_the_device(dtype: torch.dtype, layout: Layout) -> None:
    for tile, (tokens, rows, columns) in product(tiles(dtype, layout), [*SHAPES, (4096, 57344, 8192)]):
        plan = lay_out(tile, tokens, rows, columns, layout, PROCESSORS, BLOCK_BYTES)
        assert (plan.bytes + 1024) * tile.ctas <= BLOCK_BYTES + 1024
        assert plan.stages >= 2 and plan.at_weights % 1024 == 0
        assert plan.grid >= 1 and plan.shared <= plan.sharers
        assert max(plan.grid, plan.sharers) <= PROCESSORS * tile.ctas or tile.meet > 1, "none waits for one to come"
        assert plan.at_weights < plan.at_staging < plan.at_barriers < plan.bytes and plan.at_staging % 128 == 0


def test_few_tokens_have_a_tile_and_scales_of_another_dtype_have_sums() -> None:
    layout = Layout(4, 128, BFLOAT, False)
    for tokens, rows, columns in product((33, 64, 256), (4096, 57344), (4096, 28672)):
        assert choose(tokens, rows, columns, BFLOAT, layout, PROCESSORS) in tiles(BFLOAT, layout)
        assert choose(tokens, rows, columns, HALF, layout, PROCESSORS) in tiles(HALF, layout)
    assert all(tile.sums for tile in (*tiles(HALF, layout), *tiles(HALF, LARGEST), *tiles(BFLOAT, LARGEST)))


@pytest.mark.parametrize("shape", ["4096x4096", "28672x8192", "8192x57344"])
def test_bfloat16_rounds_weights_for_many_tokens_alone(shape: str) -> None:
    columns, rows = map(int, shape.split("x"))
    for tokens in (33, 64, 128, 256, 300, 1024, 4096):
        tile = choose(tokens, rows, columns, BFLOAT, Layout(4, 128, BFLOAT, False), PROCESSORS)
        assert tile is not None and (tile.sums or tokens > EXACT_TOKENS)
    assert not tile.sums, "at 4096 tokens the others take a quarter less"


FASTEST = [
    (64, "4096x4096", Tile(64, 2, meet=2)),
    (64, "4096x12288", Tile(64, 3, meet=2)),
    (64, "8192x10240", Tile(64, 3, meet=2)),
    (64, "28672x8192", Tile(64, 4)),
    (64, "8192x57344", Tile(64, 4)),
    (256, "4096x4096", Tile(128, 2, meet=2)),
    (256, "4096x12288", Tile(128, 3)),
    (256, "8192x10240", Tile(128, 3)),
    (256, "28672x8192", Tile(256, 2)),
]


@pytest.mark.parametrize(("tokens", "shape", "fastest"), FASTEST, ids=str)
def test_the_costs_choose_what_was_fastest(tokens: int, shape: str, fastest: Tile) -> None:
    """On an H100, of all tiles and ways to share them (bench/results/2026-11-23-h100-w4a16-hopper.md)."""
    columns, rows = map(int, shape.split("x"))
    assert choose(tokens, rows, columns, HALF, Layout(4, 128, HALF, False), PROCESSORS) == fastest


def test_lines_of_sixteen_rows_and_tokens_are_turned_without_loss() -> None:
    """`store_sixteens`: where the lanes put eights of rows, they are found again."""
    held = {}
    for lane in range(32):
        token = (lane >> 4) * 8 + (lane & 7)
        held[token * 32 + ((lane >> 3 & 1) ^ (token >> 2 & 1)) * 16] = (token, lane >> 3 & 1)
    for lane in range(32):
        token, half = lane >> 1, lane & 1
        assert held[token * 32 + (half ^ (token >> 2 & 1)) * 16] == (token, half)


# ---- the operator on a CPU ------------------------------------------------------------------------------------------
def test_the_operator_is_sound_for_torch() -> None:
    weights = solution(Grid(4, 64, False), 48, 256)
    packed, layout = wna16.repack(weights)
    w4a16_hopper.register()
    static = (48, layout.group, layout.scales, layout.zeros)
    x, bias = torch.randn(2, 3, 256).half(), torch.randn(48).half()
    got = torch.ops.featherweight.w4a16_hopper(x, packed, bias, *static)
    want = functional.linear(x.double(), weights.values(torch.float64), bias.double())
    assert torch.equal(got, want.half())
    torch.library.opcheck(torch.ops.featherweight.w4a16_hopper.default, (x, packed, bias, *static))


# ---- compiling ------------------------------------------------------------------------------------------------------
@cache
def compiled(dtype: torch.dtype, layout: Layout, tile: Tile) -> nvrtc.Cubin:
    return nvrtc.compile_source(nvrtc.source("kernels/w4a16_hopper"), macros(dtype, layout, tile), "sm_90a")


QUICK = [(HALF, Layout(4, 128, HALF, False), Tile(64, 4))]
LAYOUTS = [Layout(4, 128, HALF, False), Layout(4, 32, HALF, True), Layout(4, 64, BFLOAT, True), LARGEST]
EVERY = [(d, e, t) for d, e in product((HALF, BFLOAT), LAYOUTS) for t in tiles(d, e) if (d, e, t) not in QUICK]


@pytest.mark.parametrize(
    ("dtype", "layout", "tile"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in EVERY)], ids=str
)
def test_kernels_compile_without_spilling(dtype: torch.dtype, layout: Layout, tile: Tile) -> None:
    made = compiled(dtype, layout, tile)
    assert made.code[:4] == b"\x7fELF" and "warning" not in made.log.lower(), "products one by one, say"
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", made.log) == [("0",) * 3]


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of the kernel for float16 and 64 tokens, labels between them."""
    nvdisasm = find_nvidia_binary_utility("nvdisasm")
    assert nvdisasm is not None, "nvidia-cuda-nvdisasm is one of the development requirements"
    path: Path = tmp_path_factory.mktemp("sass") / "w4a16_hopper.cubin"
    path.write_bytes(compiled(*QUICK[0]).code)
    text = subprocess.run([nvdisasm, "-c", str(path)], capture_output=True, text=True, check=True).stdout
    line = re.compile(r"^\s*(?:/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.+?)\s*;|(\.L_x_\d+):)", re.M)
    return [found[1] or found[2] for found in line.finditer(text)]


def test_hopper_multiplies_by_warpgroups_and_copies_in_bulk(instructions: list[str]) -> None:
    opcodes = {each.split(" ")[0].split(".")[0] for each in instructions}
    assert {"HGMMA", "UTMALDG", "UBLKCP", "SYNCS", "USETMAXREG", "STSM", "PREEXIT", "ACQBULK"} <= opcodes
    assert not opcodes & {"LDL", "STL", "HMMA"}


def test_the_inner_loop_stays_within_its_instructions(instructions: list[str]) -> None:
    """A block a turn: eight products, and at most two instructions for each weight of a lane."""
    loops = []
    for end, each in enumerate(instructions):
        target = re.match(r"BRA `\((\.L_x_\d+)\)", each)
        if target and target[1] in instructions[:end]:
            body = instructions[instructions.index(target[1]) : end + 1]
            loops.append([op for op in body if not op.startswith(".L")])
    body = min((loop for loop in loops if sum("HGMMA" in op for op in loop) == 8), key=len)
    assert len(body) <= 4 * 64 * 128 // 128


# ---- refusals -------------------------------------------------------------------------------------------------------
def test_refusals_name_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(grid: Grid, dtype: torch.dtype = HALF, device: str = "cuda") -> str | None:
        return w4a16_hopper.W4A16Hopper().refusal(Case(FORMAT, grid, 48, 256, dtype, torch.device(device)))

    assert "NVIDIA GPUs, and the layer is on cpu" in str(refusal(Grid(), device="cpu"))
    assert "activations are torch.float32" in str(refusal(Grid(), dtype=FLOAT))
    assert "multiple of 32, and they have 16" in str(refusal(Grid(4, 16)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "compute capability 9.0, and the GPU has 8.0" in str(refusal(Grid()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "codes of 4 bits, and they have 8" in str(refusal(Grid(8)))
    assert refusal(Grid()) is None
    assert pick(FORMAT, Grid(), 48, 256, HALF, "cuda", wanted="w4a16-hopper").name == "w4a16-hopper"


def test_inputs_that_do_not_fit_are_refused() -> None:
    grid = Grid(4, 64)
    run = w4a16_hopper.W4A16Hopper().prepare(FORMAT, grid, FORMAT.pack(solution(grid, 48, 256)), HALF)
    x = torch.randn(2, 256).half()
    assert run(x[:0], None).shape == (0, 48)
    with pytest.raises(RequestError, match=r"float32 with 256 columns, and the layer is torch.float16 with 256"):
        run(x.float(), None)
    with pytest.raises(RequestError, match="with 128 columns"):
        run(x[:, :128], None)
    with pytest.raises(RequestError, match="no backward pass"):
        run(x.requires_grad_(), None)


# ---- on a GPU -------------------------------------------------------------------------------------------------------
def on_gpu(grid: Grid, rows: int, columns: int, dtype: torch.dtype) -> tuple[CompressedLinear, Tensor]:
    """A layer, and its exact weights."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("torch sees no Hopper GPU")
    weights = solution(grid, rows, columns, dtype)
    tensors = {name: tensor.cuda() for name, tensor in FORMAT.pack(weights).items()}
    bias = torch.randn(rows).cuda()
    layer = CompressedLinear.from_tensors(FORMAT, grid, tensors, bias, dtype, kernel="w4a16-hopper")
    return layer, weights.values(torch.float64).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("grid", [Grid(4, 128), Grid(4, 32, False), Grid(4, 64)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (50, 320), (33, 128), (1001, 1408)])
def test_products_on_a_gpu(dtype: torch.dtype, grid: Grid, rows: int, columns: int) -> None:
    layer, values = on_gpu(grid, rows, columns - columns % (grid.group_size or 1), dtype)
    layout = wna16.repack(layer.solution())[1]
    for tokens in (1, 33, 64, 65, 128, 200, 1000):
        x = torch.randn(tokens, values.shape[1], device="cuda").to(dtype)
        tile = choose(tokens, rows, values.shape[1], dtype, layout, PROCESSORS)
        exact = tokens <= 32 or (tile is not None and (tile.sums or dtype == HALF))
        rounded = values if exact else values.to(dtype).double()
        want = functional.linear(x.double(), values, layer.bias.double())
        rounding, error = (want.to(dtype) - want).norm(), (layer(x).double() - want).norm()
        allowed = 1e-3 * want.norm() + functional.linear(x.double(), rounded - values).norm()
        assert (error**2 - rounding**2).clamp_min(0).sqrt() <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
def test_every_tile_on_a_gpu_shares_and_repeats(dtype: torch.dtype) -> None:
    """Few tiles, which CTAs share, and many; in a graph, over and over, early starts included."""
    layer, values = on_gpu(Grid(4, 64, False), 1000, 2048, dtype)
    packed, layout = wna16.repack(layer.solution())
    kernels = w4a16_hopper.kernels(packed.device, dtype, layout)
    every_tile_shares_and_repeats(kernels, packed, values, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tile", "tokens"), [(Tile(64, 2), 40), (Tile(64, 2, ctas=2), 64), (Tile(64, 4), 50), (Tile(128, 3), 250)], ids=str
)
def test_tiles_with_owners_on_a_gpu(tile: Tile, tokens: int) -> None:
    layer, values = on_gpu(Grid(4, 128), 12288, 1024, HALF)
    packed, layout = wna16.repack(layer.solution())
    kernels = w4a16_hopper.kernels(packed.device, HALF, layout)
    x = torch.randn(tokens, 1024, device="cuda").half()
    want = functional.linear(x.double(), values).half()
    plan = kernels.plan(tile, tokens, 12288, 1024)
    whole, shared = divmod(plan.row_tiles * plan.token_tiles, kernels.processors)
    for helped in (1, 3):
        owned = replace(
            plan, grid=kernels.processors, whole=whole, shared=shared, sharers=kernels.processors, helped=helped
        )
        for _ in range(20):
            got = torch.full_like(want, torch.nan)
            kernels.launch(owned, x, packed, None, got)
            torch.testing.assert_close(got, want, rtol=0.03, atol=0.03 * float(want.abs().mean()))
    assert int(kernels.counters.abs().sum()) == 0


@pytest.mark.gpu
def test_the_operator_is_sound_on_a_gpu() -> None:
    layer, _ = on_gpu(Grid(4, 128), 512, 1024, HALF)
    packed, layout = wna16.repack(layer.solution())
    w4a16_hopper.register()
    arguments = (packed, layer.bias, 512, layout.group, layout.scales, layout.zeros)
    for x in (torch.randn(2, 100, 1024), torch.randn(64, 1025)[:, 1:], torch.randn(0, 1024)):
        torch.library.opcheck(torch.ops.featherweight.w4a16_hopper.default, (x.cuda().half(), *arguments))


@pytest.mark.gpu
def test_without_a_compiler_the_reference_takes_over_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, values = on_gpu(Grid(4, 128), 64, 256, HALF)

    def broken(*_: object) -> None:
        raise nvrtc.CompileError("no NVRTC here")

    monkeypatch.setattr(w4a16_hopper, "kernels", broken)
    x = torch.randn(100, 256, device="cuda").half()
    with pytest.warns(FallbackWarning, match="gives way to the reference kernel: no NVRTC here"):
        torch.testing.assert_close(layer(x), functional.linear(x, values.half(), layer.bias))
