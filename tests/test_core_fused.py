"""The Triton column loops against the torch ones, interpreted where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import featherweight.core
from featherweight.core import fused, grams, scales
from featherweight.core import refine as refine_room
from featherweight.core import sweep as sweep_room
from featherweight.core.problem import LayerProblem
from featherweight.core.refine import descend, refine
from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.core.sweep import sweep
from featherweight.core.triangle import inverse_lower
from featherweight.errors import FallbackWarning

pytest.importorskip("triton", reason="Triton has no build for this platform")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # in tests on a CPU Triton interprets (conftest)
INVERT = fused.invert_diagonal


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors of this device go to the kernels; returns a word for each launch."""
    ran: list[str] = []
    tried = fused.launched

    def counted(launch: Callable[[], None]) -> bool:
        done = tried(launch)
        ran.extend(["kernel"] if done else [])
        return done

    monkeypatch.setattr(fused, "usable", lambda tensor: not fused._failed)
    monkeypatch.setattr(fused, "launched", counted)
    monkeypatch.setattr(fused, "_failed", [])
    monkeypatch.setattr(fused, "invert_diagonal", lambda *matrices: False)  # interpreted it takes seconds
    return ran


def problem(rows: int, columns: int, layers: int | None = None, seed: int = 0) -> LayerProblem:
    generator = torch.Generator().manual_seed(seed)
    lead = () if layers is None else (layers,)
    x_TC = torch.randn(*lead, 4 * columns, columns, generator=generator) * torch.linspace(0.2, 2, columns)
    weight_RC = torch.randn(*lead, rows, columns, generator=generator).to(DEVICE)
    return LayerProblem(weight_RC, (x_TC.mT @ x_TC / x_TC.shape[-2]).to(DEVICE), x_TC.shape[-2], 0.01, "layer")


def same(one: Solution, other: Solution) -> None:
    """Equal but for ties: sums are taken in another order, so a weight in the middle may go the other way."""
    apart = (one.codes_RC.int() - other.codes_RC.int()).abs()
    assert int(apart.max()) <= 1 and float(apart.float().mean()) < 0.01
    assert torch.allclose(one.loss_R, other.loss_R, rtol=1e-3)


GRIDS = [Grid(4, 32), Grid(3, 32, symmetric=False), Grid(2, None, symmetric=False), Grid(1.58, 32), Grid(8, 16)]


@pytest.mark.parametrize("grid", [*GRIDS[:3], *(pytest.param(g, marks=pytest.mark.slow) for g in GRIDS[3:])], ids=str)
def test_the_kernels_are_the_loops(grid: Grid, launched: list[str]) -> None:
    given = problem(18, 32)  # rows are no multiple of a program's
    fast = refine(given, sweep(given, grid), 1)
    assert len(launched) == 7  # scales, sweep between two turns, gram, descent, gram
    fused._failed.append("on purpose")
    same(fast, refine(given, sweep(given, grid), 1))
    assert len(launched) == 7


def test_slabs_and_layers(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of a tile and a piece of one."""
    for room in (sweep_room, refine_room):
        monkeypatch.setattr(room, "WIDE_SLAB", 40)
    given, grid = problem(3, 72, layers=2), Grid(3, 8, symmetric=False)
    fast = refine(given, sweep(given, grid), 1)
    assert len(launched) == 7  # scales, two turns, two slabs of sweep and descent each
    fused._failed.append("on purpose")
    same(fast, refine(given, sweep(given, grid), 1))
    assert len(launched) == 7


def test_few_rows_of_many_columns_take_wider_slabs(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the memory of a multiprocessor is large."""
    for name, value in (("WIDE_SLAB", 20), ("FEW_ROWS", 6), ("MANY_COLUMNS", 72)):
        monkeypatch.setattr(sweep_room, name, value)
    given, grid = problem(3, 72, layers=2), Grid(3, 8, symmetric=False)
    counts = []
    for large in (False, True):
        monkeypatch.setattr(fused, "roomy", lambda device, large=large: large)
        fast = sweep(given, grid)
        counts.append(len(launched) - sum(counts))
    assert counts == [7, 5]  # scales, two turns, four slabs or two
    fused._failed.append("on purpose")
    same(fast, sweep(given, grid))


@pytest.mark.parametrize("order", ["natural", "pivot"])
def test_masks_and_orders(order: Any, launched: list[str]) -> None:
    given = problem(5, 32)
    keep_RC = torch.rand(5, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.5
    fast = refine(given, replace(sweep(given, Grid(4, 16), order, keep_RC=keep_RC), keep_RC=keep_RC), 1)
    fused._failed.append("on purpose")
    slow = refine(given, replace(sweep(given, Grid(4, 16), order, keep_RC=keep_RC), keep_RC=keep_RC), 1)
    same(fast, slow)
    assert launched and not bool(fast.values()[~keep_RC].any())


def test_a_price_on_what_is_not_zero(launched: list[str]) -> None:
    given, grid = problem(5, 40, layers=2), Grid(3, 20, symmetric=False)
    swept, damped_ECC = sweep(given, grid), given.damped()
    price_E = torch.tensor([0.5, 0.0], device=DEVICE) * swept.loss_R.mean(-1) / 4
    launched.clear()
    fast = descend(given.weight_RC, damped_ECC, swept, price_E)
    assert launched == ["kernel"]
    fused._failed.append("on purpose")
    same(fast, descend(given.weight_RC, damped_ECC, swept, price_E))
    free = descend(given.weight_RC, damped_ECC, swept)
    assert int(fast.layer(0).nonzero().sum()) < int(free.layer(0).nonzero().sum())
    assert torch.equal(fast.layer(1).codes_RC, free.layer(1).codes_RC)


def test_updated_scales(launched: list[str]) -> None:
    given = problem(5, 32)
    fast = sweep(given, Grid(4, 16), "natural", "updated")
    fused._failed.append("on purpose")
    same(fast, sweep(given, Grid(4, 16), "natural", "updated"))
    assert launched


def test_a_failure_is_told_once_and_the_loops_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given, grid = problem(16, 160), Grid(4, 32)
    plain = sweep(given, grid)
    monkeypatch.setattr(fused, "_failed", [])
    monkeypatch.setattr(fused, "usable", lambda tensor: not fused._failed)
    for name in ("triton_slabs", "triton_scales", "triton_passes"):
        monkeypatch.setitem(sys.modules, f"featherweight.core.{name}", None)
        monkeypatch.delattr(featherweight.core, name, raising=False)
    with pytest.warns(FallbackWarning, match="Triton cannot run here") as told:
        same(sweep(given, grid), plain)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(sweep(given, grid), plain)


def test_nothing_of_triton_is_imported_on_a_cpu() -> None:
    code = (
        "import sys, torch; from featherweight.core.sweep import sweep; from featherweight.core.problem import "
        "LayerProblem; from featherweight.core.rules import Grid; "
        "sweep(LayerProblem(torch.randn(4, 32), torch.eye(32), 1, 0.01), Grid(4, 32)); "
        "assert 'featherweight.core.triton_slabs' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scales_in_float32_are_laid_out_for_the_kernels(launched: list[str]) -> None:
    given, grid = problem(18, 32), Grid(4, 16, scale_dtype=torch.float32)
    fast = sweep(given, grid)
    assert len(launched) == 4  # scales, sweep between two turns
    fused._failed.append("on purpose")
    same(fast, sweep(given, grid))


@pytest.mark.parametrize("lead", [(), (2,)], ids=["layer", "layers"])
def test_grams_of_codes(lead: tuple[int, ...], launched: list[str]) -> None:
    """Rows that are no multiple of a program's; the upper triangle is nobody's."""
    generator = torch.Generator().manual_seed(0)
    shift_RGN = torch.randint(-255, 256, (*lead, 70, 3, 16), generator=generator).float().to(DEVICE)
    x_TC = torch.randn(*lead, 100, 48, generator=generator).to(DEVICE)
    hessian_CC = x_TC.mT @ x_TC
    found = grams.gram(shift_RGN, grams.halved(hessian_CC))
    assert found is not None and launched == ["kernel"]
    wanted = refine_room._gram(shift_RGN, hessian_CC)
    assert torch.allclose(found.tril(), wanted.tril(), rtol=1e-4, atol=1e-4 * float(wanted.tril().abs().max()))
    assert not grams.usable(shift_RGN, 24)  # of a width that no program has


SEARCHES = [
    Grid(4, 32), Grid(3, 16, symmetric=False, scale_dtype=torch.bfloat16), Grid(1.58, 32), Grid(2, 48, symmetric=False),
    Grid(4, 32, mirror=False, scale_dtype=torch.float32),
]  # fmt: skip


def _weighted_error(
    grid: Grid, weight_RGN: torch.Tensor, price_GN: torch.Tensor, scale_RG: torch.Tensor, zero_RG: torch.Tensor
) -> torch.Tensor:
    step_RGN, zero_RG1 = scale_RG.float().unsqueeze(-1), zero_RG.float().unsqueeze(-1)
    values_RGN = (grid.encode(weight_RGN, step_RGN, zero_RG1) - zero_RG1) * step_RGN
    return ((weight_RGN - values_RGN).square() * price_GN).sum(-1)


@pytest.mark.parametrize("grid", SEARCHES, ids=str)
def test_searches_find_scales_as_good(grid: Grid, launched: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    width = grid.width(96)
    weight_RGN = torch.randn(3, 96 // width, width, generator=generator).to(DEVICE)
    weight_RGN[0, 0] = 0.0  # nothing in a group
    price_GN = torch.rand(96 // width, width, generator=generator).to(DEVICE)
    fast = scales.fit(grid, weight_RGN, price_GN, 1)
    assert launched == ["kernel"]
    fused._failed.append("on purpose")
    slow = scales.fit(grid, weight_RGN, price_GN, 1)
    costs = [_weighted_error(grid, weight_RGN, price_GN, *found) for found in (fast, slow)]
    assert torch.allclose(*costs, rtol=1e-4, atol=1e-7)
    assert fast[0].dtype == grid.scale_dtype and fast[1].dtype == torch.uint8
    assert float((fast[0] == slow[0]).float().mean()) > 0.8


def test_searches_of_layers_have_their_own_prices(launched: list[str]) -> None:
    generator, grid = torch.Generator().manual_seed(0), Grid(3, 16)
    weight_ERGN = torch.randn(2, 2, 2, 16, generator=generator).to(DEVICE)
    price_EGN = torch.rand(2, 2, 16, generator=generator).square().to(DEVICE)
    together = scales.fit(grid, weight_ERGN, price_EGN)[0]
    assert launched
    for layer in range(2):
        assert torch.equal(together[layer], scales.fit(grid, weight_ERGN[layer], price_EGN[layer])[0])


@pytest.mark.parametrize(("columns", "layers"), [(20, None), (40, 2)])
def test_triangles_in_blocks(
    columns: int, layers: int | None, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that do not divide the columns, laid out as a Cholesky factor comes."""
    monkeypatch.setattr(fused, "invert_diagonal", INVERT)
    for name in ("TRIANGLE", "STRIP"):
        monkeypatch.setattr(fused, name, 16)
    given = problem(1, columns, layers)
    lower_CC = torch.linalg.cholesky(given.damped()) + torch.ones_like(given.hessian_CC).triu(1)  # nobody's
    found_CC = inverse_lower(lower_CC)
    assert launched == ["kernel"]
    torch.testing.assert_close(found_CC, torch.linalg.inv(lower_CC.tril()), rtol=1e-4, atol=1e-5)
    assert torch.equal(found_CC, found_CC.tril())


@pytest.mark.parametrize("shape", [(40, 70), (2, 33, 5)])
@pytest.mark.parametrize("turned", [False, True])
def test_numbers_taken_apart(shape: tuple[int, ...], turned: bool, launched: list[str]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    matrix = matrix.mT if turned else matrix
    first = matrix.half()
    second = (matrix - first).half()
    for planes, wanted in (
        ("left", torch.cat([first, first, second], -1)),
        ("right", torch.cat([first, second, first], -2)),
        ("apart", torch.stack([first, second])),
    ):
        found = fused.halves(matrix, planes, torch.float16)  # type: ignore[arg-type]
        assert found is not None and torch.equal(found, wanted)
    assert len(launched) == 3


@pytest.mark.parametrize("layers", [1, 2])
def test_rows_taken_apart_in_their_place(layers: int, launched: list[str]) -> None:
    """As a descent brings the halves of what it has changed up to date: whole pieces of 16 and others."""
    draw = torch.Generator().manual_seed(0)
    for rows, columns, at in ((48, 32, slice(16, 32)), (37, 5, slice(30, 37))):
        matrix = torch.randn(layers, rows, columns, generator=draw).to(DEVICE)
        found = fused.halves(matrix, "right", torch.bfloat16)
        matrix[:, at] *= 3
        assert found is not None and fused.halve_rows(matrix[:, at], found, at.start)
        wanted = fused.halves(matrix, "right", torch.bfloat16)
        assert wanted is not None and torch.equal(found, wanted)
    assert len(launched) == 6


COMPILED = {
    "solvers": [
        "sweep_slab",
        "descend_slab",
        "symmetric_search",
        "asymmetric_search",
        "gram",
        "invert_diagonal",
        "take_apart",
        "turn",
    ],
    "training": ["grid_values", "grid_step", "packed_values", "group_sums"],
    "passes": ["rms_norm", "rotate", "gate", "join"],
}


@pytest.mark.parametrize(
    "which", ["solvers", *(pytest.param(which, marks=pytest.mark.slow) for which in ("training", "passes"))]
)
@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_the_kernels_compile_without_a_gpu(arch: int, which: str, tmp_path: Path) -> None:
    """By Triton itself, in a process of its own: here it may be interpreting."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    code = (Path(__file__).parent / "compile_triton.py").read_text()
    command = [sys.executable, "-c", code, str(arch), which]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = dict(line.split() for line in ran.stdout.splitlines())
    assert list(found) == COMPILED[which]
    assert max(map(int, found.values())) <= 101376, "what GPUs for games have of shared memory"
