"""csrc/slabs.cu: the same source run thread by thread on a CPU against the torch loops, what it compiles to, and who
does its work where it cannot run."""

from __future__ import annotations

import re
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.pathfinder import find_nvidia_binary_utility
from torch import Tensor

import slabs_emulation
from featherweight.core import columns, cuda_slabs, fused, grams
from featherweight.core import refine as refine_room
from featherweight.core import sweep as sweep_room
from featherweight.core.cuda_slabs import Plan
from featherweight.core.problem import LayerProblem
from featherweight.core.refine import descend, refine
from featherweight.core.rules import Grid
from featherweight.core.solution import Solution
from featherweight.core.sweep import sweep
from featherweight.errors import FallbackWarning
from featherweight.native import nvrtc

emulated = pytest.mark.skipif(slabs_emulation.compiler() is None, reason="there is no C++ compiler")
HOPPER = (132, 232448)  # multiprocessors, and bytes that a CTA can have


def plan_of(rows: int, warps: int, layers_rows: int, count: int) -> Plan:
    return Plan(rows, warps, cuda_slabs.shared_bytes(rows, warps, count), -(-layers_rows // rows))


@dataclass
class Slab:
    """A random slab of `count` columns from `start` on, and what the torch loops make of it."""

    layers: int
    all_columns: int
    rows: int
    start: int
    count: int
    groups: int
    masked: bool = False
    priced: bool = False
    bits: int = 4

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.rows + self.count)
        shape = (self.layers, self.all_columns, self.rows)
        self.at, self.top = slice(self.start, self.start + self.count), 2**self.bits - 1
        self.weight_ECR = torch.randn(shape, generator=draw)
        x = torch.randn(self.layers, 4 * self.all_columns, self.all_columns, generator=draw)
        x[..., 1:] += 0.5 * x[..., :-1].clone()
        self.hessian_ECC = (x.mT @ x / x.shape[1] + 0.05 * torch.eye(self.all_columns)).contiguous()
        lower_ECC = torch.linalg.cholesky(self.hessian_ECC.double().flip(-2, -1))
        self.root_ECC = lower_ECC.flip(-2, -1).float().contiguous()
        self.owed_ENR = 0.2 * torch.randn(self.layers, self.count, self.rows, generator=draw)
        self.scale_EGR = 0.2 + 0.4 * torch.rand(self.layers, self.groups, self.rows, generator=draw)
        self.zero_EGR = torch.randint(0, self.top + 1, self.scale_EGR.shape, generator=draw).float()
        width, layers = self.all_columns // self.groups, range(self.layers)
        self.group_EC = torch.stack([torch.randperm(self.all_columns, generator=draw) // width for _ in layers])
        self.natural_EC = (torch.arange(self.all_columns) // width).expand(self.layers, -1)
        self.keep_ECR = (torch.rand(shape, generator=draw) < 0.6).float() if self.masked else None
        self.price_E = 0.3 * torch.rand(self.layers, generator=draw) if self.priced else None
        each = torch.arange(self.layers).unsqueeze(1)
        scale, zero = self.scale_EGR[each, self.natural_EC], self.zero_EGR[each, self.natural_EC]
        near = (self.weight_ECR / scale + torch.randint(-1, 2, shape, generator=draw)).round() + zero
        self.value_ECR = (near.clamp(0, self.top) - zero) * scale
        self.delta_ECR = self.weight_ECR - self.value_ECR
        self.pull_ENR = self.hessian_ECC[:, self.at] @ self.delta_ECR
        self.levels = columns.Levels.of(self.scale_EGR, self.zero_EGR, 0, self.top)
        self.sizes = (self.rows, self.all_columns, self.groups, self.start, self.count, 0, self.top)

    def __str__(self) -> str:
        words = (self.layers, self.all_columns, self.rows, f"{self.start}+{self.count}", self.groups, self.bits)
        return "-".join(map(str, words)) + "-masked" * self.masked + "-priced" * self.priced

    def swept(self, run: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What was moved, codes of all columns and losses, by a kernel."""
        device = self.weight_ECR.device
        moved_ENR = torch.full((self.layers, self.count, self.rows), torch.nan, device=device)
        codes_ECR = torch.full_like(self.weight_ECR, 99, dtype=torch.uint8)
        loss_ER = torch.ones(self.layers, self.rows, device=device)
        tensors = {"given": self.owed_ENR, "matrix": self.root_ECC, "scale": self.scale_EGR, "zero": self.zero_EGR}
        read = {"group": self.group_EC, "keep": self.keep_ECR, "value": self.weight_ECR}
        written = {"found": moved_ENR, "codes": codes_ECR, "total": loss_ER}
        run("sweep_slab", {**tensors, **read, **written}, self.sizes)
        return moved_ENR, codes_ECR, loss_ER

    def descended(self, run: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What was moved, codes of all columns, gains and what is left, by a kernel."""
        moved_ENR, delta_ECR = self.pull_ENR.clone(), self.delta_ECR.clone()
        codes_ECR = torch.full_like(self.weight_ECR, 99, dtype=torch.uint8)
        gain_ER = torch.ones(self.layers, self.rows, device=moved_ENR.device)
        tensors = {"given": moved_ENR, "matrix": self.hessian_ECC, "scale": self.scale_EGR, "zero": self.zero_EGR}
        read = {"keep": self.keep_ECR, "value": self.value_ECR, "price": self.price_E}
        written = {"delta": delta_ECR, "found": moved_ENR, "codes": codes_ECR, "total": gain_ER}
        name = "descend_slab_priced" if self.priced else "descend_slab"
        run(name, {**tensors, **read, **written}, self.sizes)
        return moved_ENR, codes_ECR, gain_ER, delta_ECR

    def checked(self, run: Any) -> None:
        """A kernel against the loops; sums are taken in another order, so a tie may go the other way."""
        at, keep_ENR = self.at, None if self.keep_ECR is None else self.keep_ECR[:, self.at]
        moved_ENR, codes_ECR, loss_ER = self.swept(run)
        wanted, codes, loss = columns.sweep_slab(
            self.owed_ENR.clone(), self.root_ECC[:, at, at], self.weight_ECR[:, at], self.levels,
            self.group_EC[:, at], keep_ENR,
        )  # fmt: skip
        same_ER = (codes_ECR[:, at] == codes).all(1)
        self._same(same_ER, moved_ENR, wanted, codes_ECR)
        torch.testing.assert_close(loss_ER[same_ER], 1 + loss[same_ER], rtol=1e-4, atol=1e-4)

        moved_ENR, codes_ECR, gain_ER, delta_ECR = self.descended(run)
        wanted, codes, gain = columns.descend_slab(
            self.pull_ENR.clone(), self.hessian_ECC[:, at, at], self.value_ECR[:, at], self.levels,
            self.natural_EC[:, at], keep_ENR, self.price_E,
        )  # fmt: skip
        same_ER = (codes_ECR[:, at] == codes).all(1)
        self._same(same_ER, moved_ENR, wanted, codes_ECR)
        torch.testing.assert_close(gain_ER[same_ER], 1 + gain[same_ER], rtol=1e-4, atol=1e-3)
        assert torch.equal(delta_ECR[:, at], self.delta_ECR[:, at] - moved_ENR)

    def _same(self, same_ER: Tensor, found_ENR: Tensor, wanted_ENR: Tensor, codes_ECR: Tensor) -> None:
        assert float(same_ER.float().mean()) > 0.99
        kept_ENR = same_ER.unsqueeze(1).expand_as(found_ENR)
        torch.testing.assert_close(found_ENR[kept_ENR], wanted_ENR[kept_ENR], rtol=1e-4, atol=1e-5)
        others = torch.ones(self.all_columns, dtype=torch.bool)
        others[self.at] = False
        assert bool((codes_ECR[:, others] == 99).all())

    def on(self, device: str) -> Slab:
        moved = replace(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        moved.levels = columns.Levels.of(moved.scale_EGR, moved.zero_EGR, 0, self.top)
        return moved


SLABS = [
    Slab(1, 160, 40, 0, 128, 5),
    Slab(2, 150, 21, 10, 77, 5, masked=True, priced=True),  # rows of the matrix that are not aligned, ragged tiles
    Slab(2, 40, 5, 20, 20, 5, masked=True, bits=2),
    Slab(1, 96, 33, 64, 1, 3, priced=True, bits=8),
    pytest.param(Slab(1, 544, 100, 32, 512, 17, priced=True, bits=3), marks=pytest.mark.slow),
]


@emulated
@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("slab", SLABS, ids=str)
def test_the_kernels_are_the_loops(slab: Slab, rows: int) -> None:
    """Whoever goes first, with equal bits: nothing is read before it is there, or after it is written over."""
    warps = cuda_slabs.FEW_WARPS if slab.bits == 2 else cuda_slabs.WARPS
    chosen, found = plan_of(rows, warps, slab.rows, slab.count), []
    for order in (0, 1):

        def run(name: str, tensors: dict[str, Any], sizes: tuple[int, ...], order: int = order) -> None:
            slabs_emulation.launch(name, tensors, sizes, chosen, order)

        slab.checked(run)
        found.append((*slab.swept(run), *slab.descended(run)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def problem(rows: int, count: int, layers: int | None = None) -> LayerProblem:
    draw, lead = torch.Generator().manual_seed(0), () if layers is None else (layers,)
    x_TC = torch.randn(*lead, 4 * count, count, generator=draw) * torch.linspace(0.2, 2, count)
    weight_RC = torch.randn(*lead, rows, count, generator=draw)
    return LayerProblem(weight_RC, x_TC.mT @ x_TC / x_TC.shape[-2], x_TC.shape[-2], 0.01, "layer")


def same(one: Solution, other: Solution) -> None:
    apart = (one.codes_RC.int() - other.codes_RC.int()).abs()
    assert int(apart.max()) <= 1 and float(apart.float().mean()) < 0.01
    assert torch.allclose(one.loss_R, other.loss_R, rtol=1e-3)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Slabs of solvers go to the emulation, everything else to torch; returns the names of the kernels launched."""
    ran: list[str] = []

    def run(name: str, tensors: dict[str, Any], sizes: tuple[int, ...]) -> bool:
        chosen = cuda_slabs.plan(len(tensors["given"]), sizes[0], sizes[4], *HOPPER)
        assert chosen is not None
        slabs_emulation.launch(name, tensors, sizes, chosen)
        ran.append(name)
        return True

    monkeypatch.setattr(fused, "_cuda", run)
    for name in ("search", "turn", "invert_diagonal", "halves"):
        monkeypatch.setattr(fused, name, lambda *given, **also: None)
    monkeypatch.setattr(grams, "usable", lambda *given: False)
    monkeypatch.setattr(fused, "usable", lambda tensor: True)
    for room in (sweep_room, refine_room):
        monkeypatch.setattr(room, "WIDE_SLAB", 40)
    return ran


@emulated
@pytest.mark.parametrize("masked", [False, True])
def test_solvers_launch_them(masked: bool, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given, grid = problem(18, 72, layers=2), Grid(3, 8, symmetric=False)
    keep_RC = torch.rand(2, 18, 72, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None

    def solve() -> list[Solution]:
        swept = replace(sweep(given, grid, keep_RC=keep_RC), keep_RC=keep_RC)
        price_E = torch.tensor([0.5, 0.0]) * swept.loss_R.mean(-1) / 4
        return [refine(given, swept, 1), descend(given.weight_RC, given.damped(), swept, price_E)]

    fast = solve()
    assert launched == ["sweep_slab"] * 2 + ["descend_slab"] * 2 + ["descend_slab_priced"] * 2
    monkeypatch.setattr(fused, "usable", lambda tensor: False)
    for one, other in zip(fast, solve(), strict=True):
        same(one, other)
    assert len(launched) == 6


def test_a_plan_has_few_rows_where_all_multiprocessors_have_some() -> None:
    def rows_of(*given: int) -> int | None:
        found = cuda_slabs.plan(*given)
        return found and found.rows

    processors, limit = HOPPER
    assert rows_of(1, 2048, 512, processors, limit) == 16
    assert rows_of(1, 4096, 512, processors, limit) == rows_of(4, 1024, 512, processors, limit) == 32
    assert rows_of(1, 22016, 1024, processors, limit) == 16  # errors of 32 rows do not fit
    assert rows_of(1, 22016, 8192, processors, limit) is None
    assert cuda_slabs.plan(1, 2048, 512, 82, 101376) == plan_of(16, cuda_slabs.FEW_WARPS, 2048, 512)


class OnGpu(SimpleNamespace):
    """As much of a tensor on a GPU as is looked at before a launch."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __len__(self) -> int:
        return 1

    def is_contiguous(self) -> bool:
        return True


def test_where_cuda_cannot_run_that_is_told_once_and_triton_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> tuple[int, int]:
        raise nvrtc.CompileError("no NVRTC here")

    monkeypatch.setattr(cuda_slabs, "limits", refuse)
    monkeypatch.setattr(fused, "_cuda_failed", [])
    tensors: Any = {"given": OnGpu(), "matrix": OnGpu()}
    with pytest.warns(FallbackWarning, match=r"CUDA C\+\+ cannot run here \(no NVRTC here\): .* Triton") as told:
        assert not fused._cuda("sweep_slab", tensors, (8, 32, 1, 0, 32, 0, 15))
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fused._cuda("sweep_slab", tensors, (8, 32, 1, 0, 32, 0, 15))
    fused.try_again()
    assert not fused._cuda_failed


def test_threads_that_want_the_same_kernel_compile_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def cubin(name: str, macros: tuple[str, ...], arch: str) -> bytes:
        made.append(macros)
        sleep(0.05)
        return b""

    properties = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(cuda_slabs, "limits", lambda device: HOPPER)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(nvrtc, "cubin", cubin)
    monkeypatch.setattr(cuda_slabs, "Module", lambda device, code: SimpleNamespace(function=lambda *given: None))
    monkeypatch.setattr(fused, "_cuda_failed", [])
    gpu = torch.device("cuda", 0)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda rows: fused.compile_slabs(gpu, rows, 512), (64, 64, 1 << 16, 1 << 16)))
    finally:
        cuda_slabs._module_of.cache_clear()
    assert sorted(made) == [("ROWS=16", "WARPS=8"), ("ROWS=32", "WARPS=8")] and not fused._cuda_failed


def test_a_slab_too_wide_is_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_slabs, "limits", lambda device: HOPPER)
    monkeypatch.setattr(fused, "_cuda_failed", [])
    tensors: Any = {"given": OnGpu(), "matrix": OnGpu()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fused._cuda("sweep_slab", tensors, (8, 8192, 1, 0, 8192, 0, 15))
    assert not fused._cuda_failed


@cache
def compiled(arch: str, rows: int) -> nvrtc.Cubin:
    macros = (f"ROWS={rows}", f"WARPS={cuda_slabs.WARPS}")
    return nvrtc.compile_source(nvrtc.source("core/slabs"), macros, arch)


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_kernels_compile_without_spilling(arch: str, rows: int) -> None:
    made = compiled(arch, rows)
    found = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", made.log, re.S)
    assert {name for name, _ in found} == set(slabs_emulation.KERNELS) and "warning" not in made.log
    assert set(re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", made.log)) == {
        ("0",) * 3
    }
    most = (1 << 16) // (32 * cuda_slabs.WARPS)
    assert all(int(count) <= most - 16 for _, count in found), "a CTA has to fit on a multiprocessor"


@pytest.mark.parametrize("rows", [16, 32])
def test_a_column_is_few_instructions_and_no_memory(rows: int, tmp_path: Path) -> None:
    """From the first to the last decision of a tile: 32 times two bounds, and 15.5 weights on average told of each."""
    nvdisasm, path = find_nvidia_binary_utility("nvdisasm"), tmp_path / "slabs.cubin"
    assert nvdisasm is not None, "nvidia-cuda-nvdisasm is one of the development requirements"
    path.write_bytes(compiled("sm_90a", rows).code)
    text = subprocess.run([nvdisasm, "-c", str(path)], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"\.section\s+\.text\.(\w+)", text)
    ceilings = {"sweep_slab": 35.0, "descend_slab": 39.0, "descend_slab_priced": 44.0}
    for name, section in zip(sections[1::2], sections[2::2], strict=True):
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)", section)
        bounds = [n for n, op in enumerate(opcodes) if op == "FMNMX"]
        assert len(bounds) == 64
        loop = opcodes[bounds[0] : bounds[-1]]
        assert len(loop) <= ceilings[name] * 32
        assert not any(op.startswith(("LDG", "STG", "LDL", "STL", "BAR", "SHFL", "BRA", "MUFU")) for op in loop)


@pytest.mark.gpu
@pytest.mark.parametrize("slab", [*SLABS[:4], Slab(1, 544, 100, 32, 512, 17, priced=True, bits=3)], ids=str)
def test_on_a_gpu_they_are_the_loops_and_tritons(slab: Slab, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = slab.on("cuda")
    for rows in (16, 32):
        chosen = plan_of(rows, cuda_slabs.WARPS, slab.rows, slab.count)

        def run(name: str, tensors: dict[str, Any], sizes: tuple[int, ...], chosen: Plan = chosen) -> None:
            moved = {key: None if t is None else t.to("cuda") for key, t in tensors.items()}
            cuda_slabs.launch(name, moved, sizes, chosen)
            for key in ("found", "codes", "total", "delta"):
                if key in tensors:
                    tensors[key].copy_(moved[key])

        slab.checked(run)
    monkeypatch.setattr(fused, "_cuda_failed", ["on purpose"])
    levels = (0, slab.top)
    moved_ENR, codes_ECR = torch.empty_like(on_gpu.pull_ENR), torch.zeros_like(on_gpu.weight_ECR, dtype=torch.uint8)
    loss_ER = torch.ones(slab.layers, slab.rows, device="cuda")
    given = (on_gpu.owed_ENR, on_gpu.root_ECC, on_gpu.weight_ECR, on_gpu.scale_EGR, on_gpu.zero_EGR, on_gpu.group_EC)
    written = (moved_ENR, codes_ECR, loss_ER)
    assert fused.sweep_slab(*given, on_gpu.keep_ECR, *written, slab.at, levels) and not fused._failed
    ours = on_gpu.swept(lambda name, tensors, sizes: cuda_slabs.launch(name, tensors, sizes, chosen))
    assert float((ours[1][:, slab.at] == codes_ECR[:, slab.at]).float().mean()) > 0.999
