"""The W4A16 kernel without a GPU: its layout, its arithmetic and launches in emulation, what it compiles to, refusals.

Tests marked gpu run it.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from cuda.pathfinder import find_nvidia_binary_utility
from torch import Tensor
from torch.nn import functional

from featherweight.core.rules import Grid, Pattern
from featherweight.core.solution import Solution
from featherweight.errors import FallbackWarning, RequestError
from featherweight.formats import FORMATS
from featherweight.kernels import nvrtc, pick, reasons, w4a16, w4a16_layout
from featherweight.kernels.base import Case
from featherweight.kernels.w4a16_layout import Layout, extent, pack, unpack
from featherweight.kernels.w4a16_plan import TOKENS, Device, Split, choose, lay_out, most_tokens, shares
from featherweight.linear import CompressedLinear
from w4a16_emulation import fragments
from w4a16_emulation import product as emulated

FORMAT = FORMATS["compressed-tensors"]
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
LAYOUTS = [Layout(*each) for each in product((32, 64, 128), (HALF, BFLOAT, FLOAT), (False, True))]
H100 = Device(132, 232448, 233472, ((1, 132), (2, 66), (4, 30), (8, 15)))
A100 = Device(108, 166912, 167936, ((1, 108),))
RTX_3090 = Device(82, 101376, 102400, ((1, 82),))


def drawn(rows: int, columns: int, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, scales and zeros for `pack`."""
    draw = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=draw)
    scales = (torch.rand(rows, columns // layout.group, generator=draw) + 0.1).to(layout.scales)
    zeros = torch.randint(0, 17, scales.shape, dtype=torch.uint8, generator=draw)
    return codes, scales, zeros if layout.zeros else torch.full_like(zeros, 8)


def solution(grid: Grid, rows: int, columns: int, dtype: torch.dtype = HALF) -> Solution:
    draw = torch.Generator().manual_seed(5)
    codes = torch.randint(grid.bottom, grid.top + 1, (rows, columns), dtype=torch.uint8, generator=draw)
    scales = (torch.rand(rows, columns // grid.width(columns), generator=draw) * 0.1 + 0.01).to(dtype)
    zeros = torch.full(scales.shape, grid.middle, dtype=torch.uint8)
    if not grid.symmetric:
        zeros = torch.randint(1, grid.top + 1, scales.shape, dtype=torch.uint8, generator=draw)
    return Solution(codes, scales, zeros, grid, torch.zeros(rows))


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
    assert packed.numel() == tiles * blocks * layout.block_bytes and layout.block_bytes % 16 == 0
    assert all(torch.equal(got, put) for got, put in zip(unpack(packed, rows, columns, layout), given, strict=True))


def test_columns_that_fill_no_block_are_padded_with_scale_zero() -> None:
    layout = Layout(32, HALF, True)
    codes, scales, zeros = unpack(pack(*drawn(3, 32, layout), layout), 32, 128, layout)
    assert (scales[3:] == 0).all() and (scales[:, 1:] == 0).all() and (codes[3:] == 0).all() and (zeros[3:] == 0).all()


def test_a_word_is_what_its_lane_multiplies() -> None:
    layout = Layout(128, HALF, False)
    codes, scales, zeros = drawn(32, 128, layout)
    words = pack(codes, scales, zeros, layout)[: w4a16_layout.CODE_BYTES].view(torch.int32).view(2, 2, 8, 4, 2, 2)
    for dtype, step in ((HALF, 2.0**-24), (BFLOAT, 2.0**-133)):
        registers = fragments(words, dtype) / step
        for half, u, g, t, i, j in [(0, 0, 0, 0, 0, 0), (1, 0, 3, 2, 1, 0), (0, 1, 7, 3, 1, 1), (1, 1, 5, 1, 0, 1)]:
            row, column = 16 * half + g, 64 * u + 32 * i + 8 * t + 4 * j
            for r in range(4):  # of mma.m16n8k16: rows g and g + 8 in turn, two columns each
                want = codes[row + 8 * (r % 2), column + r // 2 * 2 :][:2].double() * 16 ** (r % 2)
                assert registers[half, u, g, t, i, j, r].tolist() == want.tolist()


# ---- launches in emulation ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[9], LAYOUTS[17]], ids=str)
@pytest.mark.parametrize("split", [Split(8, 1, 8), Split(8, 2, 4), Split(16, 4, 1), Split(8, 8, 1)], ids=str)
def test_a_launch_computes_the_product_once(dtype: torch.dtype, layout: Layout, split: Split) -> None:
    few = Device(132, 232448, 233472, ((1, 3), (2, 2), (4, 1), (8, 1)))  # so few clusters that they pass more than once
    given = drawn(330, 640, layout)
    x = torch.randn(3, 640, generator=torch.Generator().manual_seed(1)).to(dtype)
    plan = lay_out(3, *extent(330, 640), layout, few, split, stages=2, chunk=1 if split.warps == 16 else 2)
    got = emulated(pack(*given, layout), x, 330, layout, plan)
    torch.testing.assert_close(got, exact(*given, x), rtol=1e-9, atol=1e-9)


SHAPES = [(4096, 4096), (12288, 4096), (4096, 11008), (10240, 8192), (8192, 28672), (57344, 8192), (32, 128), (1, 32)]


@pytest.mark.parametrize("device", [H100, A100, RTX_3090], ids=["H100", "A100", "3090"])
@pytest.mark.parametrize("layout", [Layout(128, HALF, False), Layout(32, FLOAT, True)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_plans_fit_the_device(device: Device, layout: Layout, rows: int, columns: int) -> None:
    extents = extent(rows, columns)
    most = most_tokens(*extents, layout, device)
    assert 0 <= most <= TOKENS
    assert most > 0 or (device != H100 and columns > 8192), "so many columns go through a dense product there"
    for tokens in range(1, most + 1):
        plan = choose(tokens, *extents, layout, device)
        assert plan is not None and plan.bytes <= device.block_bytes and plan.stages >= 2
        assert plan.clusters <= dict(device.clusters)[plan.split.size]
        regions = [0, plan.at_barriers, plan.at_x, plan.at_sums, plan.at_partials, plan.bytes]
        assert regions == sorted(regions) and plan.at_x % 16 == 0 and plan.x_stride % 16 == 0


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
    (1.58, 32, True),
    (4, None, True),
]


@pytest.mark.parametrize(("bits", "size", "symmetric"), CASES)
def test_repacked_codes_of_any_width_give_the_reference(bits: float, size: int | None, symmetric: bool) -> None:
    weights = solution(Grid(bits, size, symmetric), 50, 256)
    packed, layout = w4a16.repack(weights)
    x, bias = torch.randn(2, 3, 256).half(), torch.randn(50).half()
    w4a16.register()
    got = torch.ops.featherweight.w4a16(x, packed, bias, 50, layout.group, layout.scales, layout.zeros)
    want = functional.linear(x.double(), weights.values(torch.float64), bias.double())
    assert got.shape == (2, 3, 50) and torch.equal(got, want.half())


def test_the_operator_is_sound_for_torch() -> None:
    packed, layout = w4a16.repack(solution(Grid(), 48, 256))
    w4a16.register()
    static = (48, layout.group, layout.scales, layout.zeros)
    for bias in (None, torch.randn(48).half()):
        torch.library.opcheck(
            torch.ops.featherweight.w4a16.default, (torch.randn(3, 256).half(), packed, bias, *static)
        )

    def twice(x: Tensor) -> Tensor:
        return torch.ops.featherweight.w4a16(x, packed, None, *static) * 2

    x = torch.randn(5, 256).half()
    assert torch.equal(torch.compile(twice, fullgraph=True, backend="aot_eager")(x), twice(x))


# ---- compiling ------------------------------------------------------------------------------------------------------
@cache
def compiled(arch: str, dtype: torch.dtype, layout: Layout) -> tuple[bytes, dict[str, int], str]:
    """The code, registers of each kernel, and the log."""
    made = nvrtc.compile_source(nvrtc.source("w4a16"), w4a16.macros(dtype, layout), arch)
    found = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", made.log, re.S)
    return made.code, {name: int(count) for name, count in found}, made.log


HOPPER_HALF = ("sm_90a", HALF, Layout(128, HALF, False))
OTHERS = [
    (arch, dtype, layout)
    for arch in ("sm_80", "sm_90a")
    for dtype, layout in [(HALF, Layout(128, HALF, False)), (BFLOAT, Layout(64, BFLOAT, True))]
    if (arch, dtype) not in (("sm_90a", HALF), ("sm_80", BFLOAT))
]


@pytest.mark.parametrize(
    ("arch", "dtype", "layout"),
    [
        HOPPER_HALF,
        ("sm_80", BFLOAT, Layout(64, BFLOAT, True)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS),
        *(pytest.param(arch, BFLOAT, Layout(32, FLOAT, True), marks=pytest.mark.slow) for arch in ("sm_80", "sm_90a")),
    ],
    ids=str,
)
def test_kernels_compile_without_spilling(arch: str, dtype: torch.dtype, layout: Layout) -> None:
    code, registers, log = compiled(arch, dtype, layout)
    assert code[:4] == b"\x7fELF" and "warning" not in log
    assert set(registers) == {"w4a16_8", "w4a16_16", "w4a16_24", "w4a16_32", "w4a16_dequantize"}
    assert set(re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log)) == {("0",) * 3}
    assert registers["w4a16_8"] <= 128 and registers["w4a16_16"] <= 128, "two CTAs have to fit on a multiprocessor"


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The instructions of each kernel for sm_90a, labels between them."""
    nvdisasm = find_nvidia_binary_utility("nvdisasm")
    assert nvdisasm is not None, "nvidia-cuda-nvdisasm is one of the development requirements"
    path = tmp_path_factory.mktemp("sass") / "w4a16.cubin"
    path.write_bytes(compiled(*HOPPER_HALF)[0])
    text = subprocess.run([nvdisasm, "-c", str(path)], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"\.section\s+\.text\.(\w+)", text)
    line = re.compile(r"^\s*(?:/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.+?)\s*;|(\.L_x_\d+):)", re.M)
    kernels = zip(sections[1::2], sections[2::2], strict=True)
    return {name: [found[1] or found[2] for found in line.finditer(body)] for name, body in kernels}


def loop_with(products: int, instructions: list[str]) -> list[str]:
    """The opcodes of the shortest loop with so many products of tensor cores."""
    loops = []
    for end, each in enumerate(instructions):
        target = re.match(r"BRA `\((\.L_x_\d+)\)", each)
        if target and target[1] in instructions[:end]:
            body = instructions[instructions.index(target[1]) : end + 1]
            loops.append([i.split(" ")[0] for i in body if not i.startswith(".L")])
    return min((body for body in loops if sum(op.startswith("HMMA.16816") for op in body) == products), key=len)


@pytest.mark.parametrize(("width", "ceiling"), [(8, 1.15), (16, 1.4), (24, 1.65), (32, 1.9)])
def test_the_inner_loop_stays_within_its_instructions(hopper: dict[str, list[str]], width: int, ceiling: float) -> None:
    """A block a turn: a product for each 16 x 16 codes and 8 tokens, and few instructions for each weight of a lane."""
    body = loop_with(2 * width, hopper[f"w4a16_{width}"])
    assert len(body) <= ceiling * w4a16_layout.ROWS * w4a16_layout.COLUMNS / 32
    assert not any(op.startswith(("LDL", "STL", "LDG", "BAR")) for op in body)


def test_hopper_fetches_in_bulk_and_starts_early(hopper: dict[str, list[str]]) -> None:
    opcodes = {each.split(" ")[0].split(".")[0] for each in hopper["w4a16_8"]}
    assert {"UBLKCP", "SYNCS", "PREEXIT", "ACQBULK", "UCGABAR_ARV"} <= opcodes


def test_a_source_that_does_not_compile_says_so() -> None:
    with pytest.raises(nvrtc.CompileError, match=r"(?s)refused a kernel for sm_90a.*expected"):
        nvrtc.compile_source("__global__ void broken( {", (), "sm_90a")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A source that compiles at once; what it returns fills with one entry a compilation."""
    compilations: list[str] = []
    whole = nvrtc.compile_source

    def counted(text: str, macros: tuple[str, ...], arch: str) -> nvrtc.Cubin:
        compilations.append(arch)
        return whole(text, macros, arch)

    monkeypatch.setattr(nvrtc, "source", lambda name: f'extern "C" __global__ void {name}(int* p) {{ *p = VALUE; }}')
    monkeypatch.setattr(nvrtc, "compile_source", counted)
    return compilations


def test_machine_code_is_kept_per_source_macros_and_architecture(small: list[str], tmp_path: Path) -> None:
    first = nvrtc.cubin("one", ("VALUE=1",), "sm_80", tmp_path)
    assert nvrtc.cubin("one", ("VALUE=1",), "sm_80", tmp_path) == first and len(small) == 1
    assert nvrtc.cubin("one", ("VALUE=2",), "sm_80", tmp_path) != first
    nvrtc.cubin("two", ("VALUE=1",), "sm_80", tmp_path)
    nvrtc.cubin("one", ("VALUE=1",), "sm_90a", tmp_path)
    assert len(small) == 4 and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("break_it", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"?" + b[41:], None])
def test_broken_machine_code_is_made_again(
    small: list[str], tmp_path: Path, break_it: Callable[[bytes], bytes] | None
) -> None:
    first = nvrtc.cubin("one", ("VALUE=1",), "sm_80", tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.unlink() if break_it is None else path.write_bytes(break_it(whole))
    assert nvrtc.cubin("one", ("VALUE=1",), "sm_80", tmp_path) == first and len(small) == 2
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_said_and_survived(small: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(FallbackWarning, match="cannot be kept"):
        assert nvrtc.cubin("one", ("VALUE=1",), "sm_80", tmp_path / "file" / "cubin")[:4] == b"\x7fELF"


def _compile_in_a_process(folder: str) -> str:
    text = "\n".join(f'extern "C" __global__ void f{i}(int* p) {{ *p = {i}; }}' for i in range(100))
    nvrtc.source = lambda name: text  # in a process of its own
    return hashlib.sha256(nvrtc.cubin("many", (), "sm_80", Path(folder))).hexdigest()


def test_processes_that_compile_at_once_agree(tmp_path: Path) -> None:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        digests = set(pool.map(_compile_in_a_process, [str(tmp_path)] * 2))
    assert len(digests) == 1 and len(list(tmp_path.iterdir())) == 1


# ---- refusals -------------------------------------------------------------------------------------------------------
def refusal(rule: object, rows: int = 48, columns: int = 256, dtype: torch.dtype = HALF, device: str = "cuda") -> str:
    case = Case(FORMAT, rule, rows, columns, dtype, torch.device(device))  # type: ignore[arg-type]
    return str(w4a16.W4A16().refusal(case))


@pytest.mark.parametrize(
    ("why", "message"),
    [
        (refusal(Grid(), device="cpu"), "NVIDIA GPUs, and the layer is on cpu"),
        (refusal(Grid(), dtype=FLOAT), "float16 or torch.bfloat16, and the activations are torch.float32"),
        (refusal(Grid(8)), "4 bits, and the codes have 8"),
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
    assert pick(FORMAT, Grid(), 48, 256, HALF, "cuda", wanted="w4a16").name == "w4a16"
    assert pick(FORMAT, Grid(), 48, 256, HALF, "cuda").name == "triton"  # it has to be asked for
    assert pick(FORMAT, Grid(8), 48, 256, HALF, "cuda").name == "triton"
    assert reasons(FORMAT, Grid(), 48, 256, HALF, "cuda")["w4a16"] is None


def test_inputs_that_do_not_fit_are_refused() -> None:
    grid = Grid(4, 64)
    run = w4a16.W4A16().prepare(FORMAT, grid, FORMAT.pack(solution(grid, 48, 256)), HALF)
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


# ---- on a GPU -------------------------------------------------------------------------------------------------------
def on_gpu(
    grid: Grid, rows: int, columns: int, dtype: torch.dtype, size: float = 1.0
) -> tuple[CompressedLinear, Tensor]:
    """A layer whose scales are multiplied by `size`, and its exact weights."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    weights = solution(grid, rows, columns, dtype)
    weights = replace(weights, scales_RG=weights.scales_RG * size)
    tensors = {name: tensor.cuda() for name, tensor in FORMAT.pack(weights).items()}
    layer = CompressedLinear.from_tensors(FORMAT, grid, tensors, torch.randn(rows).cuda(), dtype)
    assert layer.kernel.name == "w4a16"
    return layer, weights.values(torch.float64).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize(
    "grid", [Grid(4, 128), Grid(4, 64, False), Grid(4, 32, False), Grid(4, None), Grid(3, 64)], ids=str
)
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (50, 320), (33, 128), (1000, 11008), (8192, 28672)])
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
    packed, layout = w4a16.repack(layer.solution())
    arguments = (packed, layer.bias, 4096, layout.group, layout.scales, layout.zeros)
    for x in (torch.randn(2, 3, 4096), torch.randn(8, 4097)[:, 1:], torch.randn(0, 4096)):
        torch.library.opcheck(torch.ops.featherweight.w4a16.default, (x.cuda().half(), *arguments))


@pytest.mark.gpu
def test_without_a_compiler_the_reference_takes_over_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, values = on_gpu(Grid(4, 128), 64, 256, HALF)

    def broken(*_: object) -> None:
        raise nvrtc.CompileError("no NVRTC here")

    monkeypatch.setattr(w4a16, "kernels", broken)
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

    kernel = w4a16.kernels(x.device, HALF, Layout(128, HALF, False))
    for call in (chain, direct):
        kernel.early = False
        want = call(x)
        kernel.early = True
        assert want.isfinite().all()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call(x)
        for _ in range(100):
            got.zero_()
            graph.replay()
            assert torch.equal(got, want)
