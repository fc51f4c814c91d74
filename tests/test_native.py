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
from featherweight.core import hessian
from featherweight.core.rules import Grid
from featherweight.errors import FallbackWarning
from featherweight.formats import FORMATS
from featherweight.kernels import cpu_int4, dequantize
from featherweight.linear import CompressedLinear
from featherweight.native import gram
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
        monkeypatch.setattr(gram, "amx", lambda: None)
        monkeypatch.setattr(cpu_int4, "amx", lambda: None)


@pytest.mark.parametrize(("tokens", "first", "second"), [(1, 16, 16), (33, 48, 80), (600, 144, 32), (40, 20, 32)])
def test_sums_of_products_are_exact(tokens: int, first: int, second: int, threads: int, tiles: None) -> None:
    generator = torch.Generator().manual_seed(tokens)
    a_TA, b_TB = (torch.randn(tokens, count, generator=generator).bfloat16() for count in (first, second))
    for one_TA, other_TB in ((a_TA, b_TB), (b_TB, b_TB)):
        sum_AB = torch.randn(one_TA.shape[1], second + 16, generator=generator)
        expected_AB = sum_AB.double()
        expected_AB[:, 16:] += one_TA.double().T @ other_TB.double()
        hessian._accumulate(sum_AB[:, 16:], one_TA, other_TB)  # a part of a larger sum, as panels of H are
        torch.testing.assert_close(sum_AB.double(), expected_AB, rtol=0, atol=1e-6 * float(expected_AB.abs().max()))


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


def test_threads_that_are_not_to_be_had_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.Path, "read_text", lambda path: "7f00 r-xp 0 0 0 /lib/libc.so.6\n7f01 rw-p 0 0 0\n")
    with pytest.warns(FallbackWarning, match="GOMP_parallel.*one thread"):
        assert native.openmp.__wrapped__() is None


def test_a_process_without_a_compiler_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "has_tiles", lambda: True)
    monkeypatch.setattr(native, "_permitted", lambda: True)
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.warns(FallbackWarning, match="none of cc, gcc, clang is installed.*install a C compiler"):
        assert native.amx.__wrapped__() is None


def test_a_source_that_does_not_compile_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "has_tiles", lambda: True)
    monkeypatch.setattr(native, "_permitted", lambda: True)
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
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
