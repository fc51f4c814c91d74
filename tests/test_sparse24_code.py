"""What the kernels for 2:4 sparse weights compile to, without a GPU: registers, spills, opcodes, instructions, and
whether the places that a product has yet to read are left alone."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from cuda.pathfinder import find_nvidia_binary_utility

from featherweight.kernels import w4a16_hopper, wna16
from featherweight.kernels.sparse24 import COMPILERS, layout_of
from featherweight.kernels.w4a16_hopper_plan import Tile, tiles
from featherweight.kernels.wna16_layout import Layout
from featherweight.native import nvrtc
from wna16_cases import BFLOAT, FLOAT, HALF

LAYOUTS = [layout_of(*each) for each in [(128, HALF, False), (64, BFLOAT, True), (32, FLOAT, True)]]
NAMES = {"wna16_8", "wna16_16", "wna16_24", "wna16_32", "wna16_dequantize"}
SPILLS = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill"


@cache
def compiled(arch: str, dtype: torch.dtype, layout: Layout, tile: Tile | None = None) -> nvrtc.Cubin:
    """The kernel for few tokens, or with a tile that for many."""
    if tile is None:
        return nvrtc.compile_source(nvrtc.source("kernels/wna16"), wna16.macros(dtype, layout), arch)
    return nvrtc.compile_source(nvrtc.source("kernels/w4a16_hopper"), w4a16_hopper.macros(dtype, layout, tile), arch)


@pytest.mark.parametrize(
    ("arch", "dtype", "layout"),
    [
        ("sm_90a", HALF, LAYOUTS[0]),
        *(pytest.param("sm_90a", *each, marks=pytest.mark.slow) for each in product((HALF, BFLOAT), LAYOUTS[1:])),
        *(pytest.param("sm_80", *each, marks=pytest.mark.slow) for each in product((HALF, BFLOAT), LAYOUTS)),
    ],
    ids=str,
)
def test_kernels_compile_without_spilling(arch: str, dtype: torch.dtype, layout: Layout) -> None:
    made = compiled(arch, dtype, layout)
    found = dict(re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", made.log, re.S))
    assert made.code[:4] == b"\x7fELF" and "warning" not in made.log and set(found) == NAMES
    # One word at 9 to 16 tokens in the widest blocks, beside wna16's present way of sending sums; nothing elsewhere.
    most = 4 if (dtype, layout) == (BFLOAT, LAYOUTS[-1]) else 0
    assert all(int(stored) <= most for _, stored, _ in re.findall(SPILLS, made.log))
    assert int(found["wna16_8"]) <= 128 and int(found["wna16_16"]) <= 128, "16 warps have to fit on a multiprocessor"


def instructions(made: nvrtc.Cubin, folder: Path) -> dict[str, list[str]]:
    """Of each kernel, labels between them."""
    nvdisasm = find_nvidia_binary_utility("nvdisasm")
    assert nvdisasm is not None, "nvidia-cuda-nvdisasm is one of the development requirements"
    path = folder / "sparse24.cubin"
    path.write_bytes(made.code)
    text = subprocess.run([nvdisasm, "-c", str(path)], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"\.section\s+\.text\.(\w+)", text)
    line = re.compile(r"^\s*(?:/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.+?)\s*;|(\.L_x_\d+):)", re.M)
    kernels = zip(sections[1::2], sections[2::2], strict=True)
    return {name: [found[1] or found[2] for found in line.finditer(body)] for name, body in kernels}


def loop_with(count: int, product: str, lines: list[str]) -> list[str]:
    """The opcodes of the shortest loop with so many products."""
    loops = []
    for end, each in enumerate(lines):
        target = re.match(r"BRA `\((\.L_x_\d+)\)", each)
        if target and target[1] in lines[:end]:
            loops.append([op for op in lines[lines.index(target[1]) : end + 1] if not op.startswith(".L")])
    return min((body for body in loops if sum(product in op for op in body) == count), key=len)


def test_few_tokens_meet_the_sparse_tensor_cores(tmp_path: Path) -> None:
    """A block of 32 x 128 a turn: a sparse product for each 16 x 32 weights and 8 tokens, few instructions a weight."""
    kernels = instructions(compiled("sm_90a", HALF, LAYOUTS[0]), tmp_path)
    for width, ceiling in ((8, 0.9), (16, 1.15), (24, 1.35), (32, 1.55)):
        body = loop_with(width, "HMMA.SP.16832", kernels[f"wna16_{width}"])
        assert len(body) <= ceiling * 32 * 128 / 32
        assert not any(op.startswith(("LDL", "STL", "LDG", "BAR", "HMMA.16816")) for op in body)
    opcodes = {each.split(" ")[0].split(".")[0] for each in kernels["wna16_8"]}
    assert {"UBLKCP", "SYNCS", "PREEXIT", "ACQBULK", "LDSM"} <= opcodes


def registers_written(line: str) -> range:
    """Of an instruction in the loop of sparse warpgroup products."""
    op, _, operands = line.partition(" ")
    found = re.match(r"(?:!?U?P\w+, )*R(\d+)\b", operands)
    if found is None or op.startswith(("ST", "R2UR", "SYNCS", "BRA", "HGMMA", "ISETP")):
        return range(0)
    return range(int(found[1]), int(found[1]) + (4 if ".128" in op else 2 if ".64" in op or ".WIDE" in op else 1))


def overwritten(body: list[str]) -> list[tuple[str, str]]:
    """Sparse products of a loop whose places something overwrites before they have ended, and what does.

    The compiler believes that a product has read them when it is issued; wrong results say that it has not.
    """
    found = []
    for start, multiply in enumerate(body):
        places = re.match(r"HGMMA\.SP.*, R(\d+), 0x0(, gsb0)?$", multiply)
        if places is None:
            continue
        committed, behind = bool(places[2]), 0  # groups of products committed since its own
        for line in (body + body)[start + 1 :]:
            if line.startswith("HGMMA") and line.endswith("gsb0"):
                behind, committed = behind + committed, True
            waits = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", line)
            if waits is not None and committed and behind >= int(waits[1]):
                break
            if int(places[1]) in registers_written(line):
                found.append((multiply, line))
    return found


def test_overwritten_places_are_found() -> None:
    multiply, load = "HGMMA.SP.64x256x32.F32 R24, R156, gdesc[UR8], R24, R154, 0x0, gsb0", "LDS.128 R152, [R4]"
    waits = [f"WARPGROUP.DEPBAR.LE gsb0, 0x{left}" for left in (0, 1)]
    assert overwritten([load, multiply, waits[0]]) == [] == overwritten([multiply, "LDS.64 R152, [R4]", waits[0]])
    assert overwritten([multiply, load, waits[0]]) == overwritten([load, multiply, waits[1]]) == [(multiply, load)]


@pytest.mark.slow
def test_the_compiler_here_is_one_that_is_vouched_for() -> None:
    assert nvrtc.nvrtc_version() in COMPILERS, "run the slow tests of this file, and add it to sparse24.COMPILERS"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "layout", "tile"),
    [(dtype, layout, tile) for dtype, layout in product((HALF, BFLOAT), LAYOUTS) for tile in tiles(dtype, layout)],
    ids=str,
)
def test_many_tokens_meet_the_sparse_warpgroup_products(
    dtype: torch.dtype, layout: Layout, tile: Tile, tmp_path: Path
) -> None:
    made = compiled("sm_90a", dtype, layout, tile)
    assert "warning" not in made.log.lower(), "products one by one, say"
    assert re.findall(SPILLS, made.log) == [("0",) * 3]
    (lines,) = instructions(made, tmp_path).values()
    body = loop_with(4, "HGMMA.SP", lines)
    assert len(body) <= (440 if layout.group == 32 else 280 if tile.sums else 180), (
        "of a block, of which each lane has 64 weights"
    )
    assert not any(op.startswith(("LDL", "STL")) for op in body)
    assert sum(op.startswith("SHFL") for op in body) == (layout.group != 32), "of the address of x, and none of codes"
    assert overwritten(body) == []
