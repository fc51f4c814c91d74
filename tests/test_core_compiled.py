"""The solver's loops in C against NumPy's and torch's, sums by tiles and by vectors of bfloat16 against float64; where
this machine has no compiler, or neither, one way is tried twice."""

from __future__ import annotations

import itertools
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight import native
from featherweight.core import compiled, prune, refine, scales, tiles
from featherweight.core.hessian import CrossSum, HessianSum
from featherweight.core.problem import LayerProblem
from featherweight.core.rules import Grid, Pattern
from featherweight.core.solution import Solution
from featherweight.core.sweep import sweep
from featherweight.native.memory import held_bytes, kept

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(compiled, "TASK_WORK", 1)
    monkeypatch.setattr(tiles, "THREAD_WORK", 1)
    yield
    torch.set_num_threads(before)


def problem(rows: int, columns: int, layers: int | None = None) -> LayerProblem:
    draw = torch.Generator().manual_seed(rows + columns)
    lead = () if layers is None else (layers,)
    inputs = torch.randn(*lead, 4 * columns, columns, generator=draw) * torch.rand(columns, generator=draw).exp()
    inputs[..., 1:] += 0.5 * inputs[..., :-1].clone()
    weight_RC = 0.05 * torch.randn(*lead, rows, columns, generator=draw)
    return LayerProblem(weight_RC, inputs.mT @ inputs / (4 * columns), 4 * columns)


def both(monkeypatch: pytest.MonkeyPatch, work: Any) -> tuple[Any, Any]:
    """What `work` gives by calls of libraries, and by C."""
    ours = work()
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "usable", lambda tensor: False)
        return work(), ours


def same(theirs: Solution, ours: Solution) -> None:
    assert torch.equal(ours.codes_RC, theirs.codes_RC)
    assert torch.allclose(ours.loss_R, theirs.loss_R, rtol=1e-4)


@pytest.mark.parametrize(("rows", "columns", "layers"), [(70, 160, None), (64, 96, 2), (9, 300, None)])
@pytest.mark.parametrize("masked", [False, True])
def test_sweep_and_descent_give_the_same_codes(
    rows: int, columns: int, layers: int | None, masked: bool, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, grid = problem(rows, columns, layers), Grid(4, group_size=columns // 5 if columns == 300 else 32)
    keep_RC = torch.rand(layer.weight_RC.shape, generator=torch.Generator().manual_seed(0)) < 0.6 if masked else None
    swept = both(monkeypatch, lambda: sweep(layer, grid, keep_RC=keep_RC))
    same(*swept)
    hessian_CC = layer.damped()
    price_E = torch.full((layers or 1,), float(swept[0].loss_R.mean()) / columns)
    for price in (None, price_E):
        same(*both(monkeypatch, lambda price=price: refine.descend(layer.weight_RC, hessian_CC, swept[0], price)))


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, 24, symmetric=False), Grid(2, 32, mirror=False), Grid(8, None)])
@pytest.mark.parametrize("layers", [None, 2])
def test_search_finds_the_same_scales(
    grid: Grid, layers: int | None, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_RC = problem(33, 96, layers).weight_RC
    weight_RC[..., 3, :32] = 0
    weight_RGN = weight_RC.unflatten(-1, (-1, grid.width(96, "it")))
    price_GN = torch.rand(weight_RGN[..., 0, :, :].shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(scales, "COMPILED_GROUPS", 40)
    theirs, ours = both(monkeypatch, lambda: scales.fit(grid, weight_RGN, price_GN))
    assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(theirs, ours, strict=True))


@pytest.mark.parametrize(
    "pattern", [Pattern(0.5), Pattern(0.3, block=4), Pattern(keep=2, of=4), Pattern(keep=7, of=32)]
)
def test_pruning_keeps_the_same_weights(pattern: Pattern, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = problem(70, 160)
    theirs, ours = both(monkeypatch, lambda: prune.prune(layer, pattern))
    assert torch.equal(theirs.keep_RC, ours.keep_RC) and torch.allclose(theirs.values_RC, ours.values_RC, atol=1e-6)
    assert torch.allclose(theirs.loss_R, ours.loss_R, rtol=1e-4)


def test_float64_is_left_to_calls_of_libraries() -> None:
    layer = problem(20, 64)
    exact = LayerProblem(layer.weight_RC.double(), layer.hessian_CC.double(), layer.tokens)
    assert (sweep(exact, Grid(4, 32)).codes_RC == sweep(layer, Grid(4, 32)).codes_RC).float().mean() > 0.999


@pytest.fixture(params=["found", "vectors"])
def gram(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this CPU multiplies tokens by; where that is tiles, then by vectors."""
    if request.param == "vectors":
        monkeypatch.setattr(tiles, "native_gram", native.gram_by_vectors)


@pytest.mark.parametrize(("tokens", "columns", "rows"), [(2100, 48, 80), (33, 100, 7), (64, 1, 1)])
def test_sums_over_tokens_are_those_of_float64(tokens: int, columns: int, rows: int, threads: None, gram: None) -> None:
    draw = torch.Generator().manual_seed(tokens)
    inputs, gaps = (torch.randn(2, tokens, width, generator=draw).bfloat16() for width in (columns, rows))
    hessian, cross = HessianSum(columns, CPU), CrossSum(rows, columns, CPU)
    for x, gap in itertools.chain([(inputs[:, :3], gaps[:, :3])], zip(inputs, gaps, strict=True)):  # six tokens first
        hessian.add(x)
        cross.add(gap, x)
    hessian.add(inputs.float())
    x_TC = torch.cat([inputs[:, :3].flatten(0, 1), *inputs, *inputs]).double()
    exact_CC = x_TC.T @ x_TC / len(x_TC)
    for mean_CC in (hessian.mean(), hessian.into_mean()):
        assert torch.equal(mean_CC, mean_CC.T) and close(mean_CC, exact_CC)
    x_TC = torch.cat([inputs[:, :3].flatten(0, 1), *inputs]).double()
    gap_TR = torch.cat([gaps[:, :3].flatten(0, 1), *gaps]).double()
    assert close(cross.mean(), gap_TR.T @ x_TC / len(x_TC))


def test_sums_by_vectors_over_many_tokens_do_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are rounded into sums of few tokens, not into that of all."""
    monkeypatch.setattr(tiles, "native_gram", native.gram_by_vectors)
    x_TC = torch.randn(60000, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    if tiles.sums(x_TC):
        hessian = HessianSum(40, CPU)
        hessian.add(x_TC)
        assert close(hessian.mean(), x_TC.double().T @ x_TC.double() / len(x_TC))


@pytest.mark.parametrize(("rows", "columns", "width"), [(40, 192, 64), (5, 96, 32), (16, 128, 128)])
def test_groups_of_codes_weighed_by_h(rows: int, columns: int, width: int, threads: None, gram: None) -> None:
    layer = problem(rows, columns)
    if not tiles.weighs(layer.weight_RC, width):
        return  # refine._gram has tests of its own
    codes_RGN = torch.randint(-255, 256, (rows, columns // width, width), generator=torch.Generator().manual_seed(0))
    ours = tiles.weigh(codes_RGN.float(), tiles.halved(layer.hessian_CC)).tril()
    assert close(ours, refine._gram(codes_RGN.double(), layer.hessian_CC.double()).tril(), 1e-5)


@pytest.mark.skipif(shutil.which("gcc") is None or platform.machine() != "x86_64", reason="there is no gcc for x86-64")
@pytest.mark.parametrize("flags", [native.FLAGS, native.VECTOR_FLAGS], ids=["tiles", "vectors"])
def test_sums_compile_for_tiles_and_for_vectors(flags: tuple[str, ...], tmp_path: Any) -> None:
    source = Path(native.__file__).with_name("gram.c")
    command = ["gcc", *flags, "-Wall", "-Wextra", "-Werror", str(source), "-o", str(tmp_path / "gram.so")]
    subprocess.run(command, check=True, capture_output=True)


def close(ours: Tensor, exact: Tensor, room: float = 1e-6) -> bool:
    return float((ours.double() - exact).norm()) <= room * float(exact.norm())


def test_without_a_compiler_a_process_is_told_once_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.warns(native.FallbackWarning, match="loops were not compiled.*several times as long"):
        assert native.loops.__wrapped__() is None
    monkeypatch.setattr(compiled, "loops", lambda: None)
    assert not compiled.usable(torch.ones(1)) and sweep(problem(20, 64), Grid(4, 32)).codes_RC.any()


def test_memory_that_is_freed_is_used_again() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 22)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with kept():
        faults()
        again = min(faults() for _ in range(5))
    assert again < 100 or platform.libc_ver()[0] != "glibc"
    assert faults() > 1000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries go on as they do")
def test_more_than_the_first_round_left_is_given_back() -> None:
    with kept() as between:
        between()
        before = held_bytes()
        for _ in range(2):
            parts = [torch.ones(1 << 22) for _ in range(4)]
            parts.clear()
            assert held_bytes() - before > 1 << 24  # some of the 64 MiB may lie in what was free
            between()
            assert held_bytes() - before < 1 << 24
