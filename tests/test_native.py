"""C for CPUs with tiles of bfloat16: what it computes where there are any, and what happens where there are none."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from featherweight import native
from featherweight.core.rules import Grid
from featherweight.errors import FallbackWarning
from featherweight.formats import FORMATS
from featherweight.kernels import cpu_int4, dequantize
from featherweight.linear import CompressedLinear
from test_kernels_triton import solution

FORMAT = FORMATS["compressed-tensors"]
GRIDS = [Grid(*each) for each in product((2, 3, 4), (32, 64, None), (True, False))]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=["as the machine is", "no tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this CPU has tiles both ways are tried, else one way twice."""
    if request.param == "no tiles":
        monkeypatch.setattr(cpu_int4, "amx", lambda: None)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_of_many_tokens_are_the_references_bit_for_bit(grid: Grid, tiles: None) -> None:
    weights = solution(grid, 80, 192, torch.bfloat16)  # two and a half panels
    built = CompressedLinear.from_tensors(FORMAT, grid, FORMAT.pack(weights), kernel="cpu-int4")
    assert torch.equal(built(torch.eye(192).bfloat16()).T, dequantize(weights, torch.bfloat16))


@pytest.mark.parametrize("tokens", [5, 31, 33, 300])
def test_products_of_many_tokens(tokens: int, threads: int, tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featherweight.kernels.cpu_amx.LEAST_WORK", 1)
    grid, bias = Grid(4, 64), torch.randn(80).bfloat16()
    weights = solution(grid, 80, 192, torch.float16)
    built = CompressedLinear.from_tensors(FORMAT, grid, FORMAT.pack(weights), bias, kernel="cpu-int4")
    x_STC = torch.randn(2, tokens, 192).bfloat16()
    got, exact = built(x_STC), functional.linear(x_STC.double(), weights.values(torch.float64), bias.double())
    assert got.dtype == torch.bfloat16 and (got.double() - exact).norm() < 2**-7 * exact.norm()


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
        made.write_bytes(damaged)
        assert native.library(source, tmp_path / "kept") == made
        assert native._sound(made.read_bytes())
    assert len(compiled) == 4 and not list((tmp_path / "kept").glob("tmp*"))
