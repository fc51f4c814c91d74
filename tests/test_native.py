"""C for CPUs, with tiles of bfloat16 and without: what it computes, and what happens where nothing compiles."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from featherweight import native
from featherweight.core.rules import Grid, Joint, Pattern
from featherweight.core.solution import Solution
from featherweight.errors import FallbackWarning
from featherweight.formats import FORMATS
from featherweight.kernels import cpu_native, dequantize
from featherweight.linear import CompressedLinear
from featherweight.merged import merge, prepare
from test_kernels_triton import require_close
from wna16_cases import solution

FORMAT = FORMATS["compressed-tensors"]
GRIDS = [Grid(*each) for each in product((2, 3, 4), (32, 64, None), (True, False))]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=["as the machine is", "no tiles", "no compiler"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where this CPU has no tiles one way is tried twice."""
    if request.param != "as the machine is":
        monkeypatch.setattr(cpu_native, "amx", lambda: None)
    if request.param == "no compiler":
        monkeypatch.setattr(cpu_native, "int4", lambda: None)
    return str(request.param)


def layer(grid: Grid, weights: Solution, bias: Tensor | None = None) -> CompressedLinear:
    return CompressedLinear.from_tensors(FORMAT, grid, FORMAT.pack(weights), bias, kernel="cpu-int4")


@pytest.mark.parametrize("way", ["as the machine is", "no tiles"], indirect=True)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("rows", [16, 80, 128])  # half a panel, two and a half, four
def test_few_tokens_are_as_near_as_floats_come(grid: Grid, rows: int, way: str) -> None:
    weights = solution(grid, rows, 192, torch.bfloat16)
    built = layer(grid, weights)
    for tokens in filter(cpu_native._few(cpu_native.amx()).__ge__, (1, 2, 3, 7, 8, 9, 16, 17, 32, 33, 64, 100)):
        x_TC = torch.randn(tokens, 192).bfloat16()
        require_close(built(x_TC), x_TC, weights, None)


@pytest.mark.parametrize("size", [1e30, 1.0, 1e-30, 0.0])
@pytest.mark.parametrize("way", ["as the machine is", "no tiles"], indirect=True)
def test_x_of_any_size_with_some_far_larger(size: float, way: str) -> None:
    weights = solution(Grid(4, 64, False), 48, 192, torch.bfloat16)
    x_TC = torch.randn(2, 192).mul(size)
    x_TC[:, 5::40] *= 1000
    require_close(layer(Grid(4, 64, False), weights)(x_TC.bfloat16()), x_TC.bfloat16(), weights, None)


@pytest.mark.parametrize("way", ["as the machine is", "no tiles"], indirect=True)
def test_a_row_is_one_group_of_the_largest_numbers(way: str) -> None:
    grid = Grid(4, None)
    weights = solution(grid, 32, 14336, torch.bfloat16)
    weights = replace(weights, codes_RC=torch.full_like(weights.codes_RC, 15))
    x_TC = torch.full((1, 14336), 255 / 128).bfloat16()
    for each_TC in (x_TC, -x_TC):
        require_close(layer(grid, weights)(each_TC), each_TC, weights, None)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("way", ["as the machine is", "no tiles"], indirect=True)
def test_what_is_not_finite_stays_so_and_in_its_token(bad: float, way: str) -> None:
    weights, x_TC = solution(Grid(4, 64), 48, 192, torch.bfloat16), torch.randn(2, 192).bfloat16()
    built = layer(Grid(4, 64), weights)
    want = built(x_TC)[0]
    x_TC[1, 70] = bad
    got = built(x_TC)
    assert torch.equal(got[0], want) and not got[1].isfinite().any()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_of_many_tokens_are_the_references_bit_for_bit(
    grid: Grid, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = solution(grid, 80, 192, torch.bfloat16)
    built = layer(grid, weights)
    for most in (256, 8):  # of one token each is a code times a scale, rounded once: the same without floats
        monkeypatch.setattr(cpu_native, "FEW_BY_VECTORS", most)
        got = built(torch.eye(192).bfloat16())
        assert torch.equal(got.T, dequantize(weights, torch.bfloat16))


@pytest.mark.parametrize("tokens", [1, 5, 36, 300])
def test_products_on_threads(tokens: int, threads: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for least in ("LEAST_WORK", "LEAST_FEW"):
        monkeypatch.setattr(cpu_native, least, 1)
    monkeypatch.setattr(cpu_native, "FLOATS", 1 << 13)  # a panel at a time
    monkeypatch.setattr(cpu_native, "FEW_BY_VECTORS", 40)
    grid, bias = Grid(4, 64), torch.randn(80).bfloat16()
    weights = solution(grid, 80, 192, torch.float16)
    x_STC = torch.randn(2, tokens, 192).bfloat16()
    got, exact = (
        layer(grid, weights, bias)(x_STC),
        functional.linear(x_STC.double(), weights.values(torch.float64), bias.double()),
    )
    assert got.dtype == torch.bfloat16 and (got.double() - exact).norm() < 2**-7 * exact.norm()


WITHOUT_WHOLE_NUMBERS = {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}


@pytest.mark.parametrize("known", [WITHOUT_WHOLE_NUMBERS, {"avx2", "fma"}, set()], ids=["avx512", "avx2", "plain"])
def test_cpus_with_narrower_vectors(known: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    has, grid = native._instructions() & known, Grid(4, 64, False)
    monkeypatch.setattr(native, "_instructions", lambda: has)
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    made = native.int4.__wrapped__()
    monkeypatch.setattr(cpu_native, "amx", lambda: None)
    monkeypatch.setattr(cpu_native, "int4", lambda: made)
    monkeypatch.setattr(cpu_native, "FEW_BY_VECTORS", 8)
    weights = solution(grid, 80, 192, torch.float16)
    for tokens in (1, 2, 7):
        x_TC = torch.randn(tokens, 192).bfloat16() * 100
        require_close(layer(grid, weights)(x_TC), x_TC, weights, None)
    got = layer(grid, weights)(torch.eye(192).bfloat16())
    assert torch.equal(got.T, dequantize(weights, torch.bfloat16))


def test_rows_of_x_that_lie_apart() -> None:
    weights, x_TC = solution(Grid(4, 32), 48, 96, torch.bfloat16), torch.randn(3, 192).bfloat16()
    for some_TC in (x_TC[:, 96:], x_TC[:, ::2], x_TC[:0, :96]):
        got = layer(Grid(4, 32), weights)(some_TC)
        assert got.shape == (len(some_TC), 48)
        require_close(got, some_TC, weights, None)


@pytest.mark.parametrize("grid", [Grid(4, 64), Grid(2, 32, False), Grid(3, None)], ids=str)
def test_codes_are_held_once_and_the_stored_tensors_come_back(grid: Grid) -> None:
    weights = solution(grid, 80, 192, torch.float16)
    stored, built = FORMAT.pack(weights), layer(grid, weights)
    want = built(torch.eye(192).bfloat16())
    assert all(each.is_meta for each in built.buffers())
    assert all(torch.equal(each, stored[suffix]) for suffix, each in built.state_dict().items())
    assert torch.equal(built.weight.T, want)


def test_layers_that_multiply_as_one_are_let_go_too() -> None:
    weights = solution(Grid(4, 64), 80, 192, torch.float16)
    mlp = nn.ModuleDict({name: layer(Grid(4, 64), weights) for name in ("gate_proj", "up_proj")})
    before = {name: each.clone() for name, each in mlp.state_dict().items()}
    assert merge(mlp) == 1
    prepare(mlp)
    assert all(each.is_meta for each in mlp.buffers())
    assert all(torch.equal(each, before[name]) for name, each in mlp.state_dict().items())


def test_the_mask_of_a_pruned_layer_is_kept() -> None:
    rule = Joint(Grid(4, 64), Pattern(keep=2, of=4))
    weights = replace(solution(Grid(4, 64), 16, 64, torch.bfloat16), pattern=Pattern(keep=2, of=4))
    keep = torch.tensor([True, True, False, False]).repeat(16, 16)
    weights = replace(weights, codes_RC=weights.codes_RC.where(keep, torch.tensor(8, dtype=torch.uint8)), keep_RC=keep)
    format = FORMATS["sparse"]
    built = CompressedLinear.from_tensors(format, rule, format.pack(weights), kernel="cpu-int4")
    require_close(built(torch.ones(1, 64).bfloat16()), torch.ones(1, 64), weights, None)
    assert built.solution().keep_RC is not None


def test_the_operator_keeps_torchs_rules() -> None:
    if cpu_native.library() is not None:
        cpu_native.register()
        packed = cpu_native.pack(solution(Grid(4, 32), 48, 64, torch.bfloat16))
        arguments = (torch.randn(2, 3, 64).bfloat16(), packed.codes, packed.scales, packed.zeros, packed.rows)
        operator, quick = torch.ops.featherweight.int4_cpu.default, ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, arguments, test_utils=quick)


def test_large_pages_are_asked_for() -> None:
    small, large = torch.empty(1 << 20, dtype=torch.uint8), torch.empty(1 << 26, dtype=torch.uint8)
    native.huge_pages(small)
    native.huge_pages(large)
    lines, inside = Path("/proc/self/smaps").read_text().splitlines(), False
    for line in lines:
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            inside = first <= large.data_ptr() + (1 << 25) < last
        if inside and line.startswith("VmFlags"):
            assert "hg" in line.split()


def test_threads_that_are_not_to_be_had_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native.torch, "__file__", str(tmp_path / "__init__.py"))
    with pytest.warns(FallbackWarning, match="GOMP_parallel.*one thread"):
        assert native.openmp.__wrapped__() is None


def test_threads_are_torchs_own_whatever_else_was_loaded() -> None:
    found = native.openmp()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert found.omp_get_max_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with tiles and nothing compiled for them yet."""
    monkeypatch.setattr(native, "has_tiles", lambda: True)
    monkeypatch.setattr(native, "_permitted", lambda: True)
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)


def test_a_process_without_a_compiler_is_told_once(monkeypatch: pytest.MonkeyPatch, nothing_compiled: None) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.warns(FallbackWarning, match="none of cc, gcc, clang is installed.*install a C compiler"):
        assert native.amx.__wrapped__() is None


def test_a_cpu_without_tiles_is_told_too(monkeypatch: pytest.MonkeyPatch, nothing_compiled: None) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.warns(FallbackWarning, match="4-bit codes were not compiled.*none of cc, gcc, clang is installed"):
        assert native.int4.__wrapped__() is None


def test_a_source_that_does_not_compile_is_told(monkeypatch: pytest.MonkeyPatch, nothing_compiled: None) -> None:
    monkeypatch.setattr(native, "FLAGS", ("--no-such-flag",))
    with pytest.warns(FallbackWarning, match="no-such-flag"):
        assert native.amx.__wrapped__() is None


def test_libraries_are_kept_and_made_again_when_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[Any] = []
    run = subprocess.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        compiled.append(args)
        return run(*args, **kwargs)

    monkeypatch.setattr(native.subprocess, "run", counted)
    monkeypatch.setattr(native, "FLAGS", ("-shared", "-fPIC"))
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }")
    made = native.library(source, tmp_path / "kept")
    assert native.library(source, tmp_path / "kept") == made and len(compiled) == 1
    assert ctypes.CDLL(str(made)).one() == 1
    for damaged in (b"", made.read_bytes()[:-7], bytes(len(made.read_bytes()))):
        made.unlink()  # another file: this process has the first one mapped
        made.write_bytes(damaged)
        assert native.library(source, tmp_path / "kept") == made
        assert native._sound(made.read_bytes())
    assert len(compiled) == 4 and not list((tmp_path / "kept").glob("tmp*"))
