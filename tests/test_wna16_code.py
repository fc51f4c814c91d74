"""What csrc/wna16.cu compiles to, without a GPU: registers, spills, opcodes, instructions a weight."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from cuda.pathfinder import find_nvidia_binary_utility

from featherweight.kernels import wna16
from featherweight.kernels.wna16_layout import COLUMNS, ROWS, Layout
from featherweight.native import nvrtc
from wna16_cases import BFLOAT, FLOAT, HALF

NAMES = {"wna16_8", "wna16_16", "wna16_24", "wna16_32", "wna16_dequantize"}
HOPPER = {
    4: Layout(4, 128, HALF, False),
    2: Layout(2, 64, HALF, True),
    3: Layout(3, 128, HALF, False),
    8: Layout(8, 128, HALF, False),
}


@cache
def compiled(arch: str, dtype: torch.dtype, layout: Layout) -> tuple[bytes, dict[str, int], str]:
    """The code, registers of each kernel, and the log."""
    made = nvrtc.compile_source(nvrtc.source("kernels/wna16"), wna16.macros(dtype, layout), arch)
    found = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", made.log, re.S)
    return made.code, {name: int(count) for name, count in found}, made.log


@pytest.mark.parametrize(
    ("arch", "dtype", "layout"),
    [
        ("sm_90a", HALF, HOPPER[4]),
        ("sm_80", BFLOAT, Layout(2, 64, BFLOAT, True)),
        *(pytest.param("sm_90a", HALF, HOPPER[bits], marks=pytest.mark.slow) for bits in (2, 3, 8)),
        *(pytest.param("sm_80", HALF, HOPPER[bits], marks=pytest.mark.slow) for bits in (3, 4, 8)),
        *(pytest.param("sm_90a", BFLOAT, Layout(b, 32, FLOAT, True), marks=pytest.mark.slow) for b in (2, 3, 4, 8)),
    ],
    ids=str,
)
def test_kernels_compile_without_spilling(arch: str, dtype: torch.dtype, layout: Layout) -> None:
    code, registers, log = compiled(arch, dtype, layout)
    assert code[:4] == b"\x7fELF" and "warning" not in log and set(registers) == NAMES
    assert set(re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log)) == {("0",) * 3}
    assert registers["wna16_8"] <= 128 and registers["wna16_16"] <= 128, "16 warps have to fit on a multiprocessor"


def disassembled(bits: int, folder: Path) -> dict[str, list[str]]:
    """The instructions of each kernel for sm_90a, labels between them."""
    nvdisasm = find_nvidia_binary_utility("nvdisasm")
    assert nvdisasm is not None, "nvidia-cuda-nvdisasm is one of the development requirements"
    path = folder / "wna16.cubin"
    path.write_bytes(compiled("sm_90a", HALF, HOPPER[bits])[0])
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


@pytest.mark.parametrize(
    ("bits", "ceilings"),
    [
        (4, (1.05, 1.3, 1.55, 1.8)),
        pytest.param(2, (1.5, 1.95, 2.45, 2.85), marks=pytest.mark.slow),  # groups of 64 with zeros
        pytest.param(3, (1.3, 1.6, 1.8, 2.1), marks=pytest.mark.slow),
        pytest.param(8, (1.2, 1.45, 1.7, 1.95), marks=pytest.mark.slow),
    ],
)
def test_the_inner_loop_stays_within_its_instructions(bits: int, ceilings: tuple[float, ...], tmp_path: Path) -> None:
    """A block a turn: a product for each 16 x 16 codes and 8 tokens, and few instructions for each weight of a lane."""
    kernels = disassembled(bits, tmp_path)
    for width, ceiling in zip((8, 16, 24, 32), ceilings, strict=True):
        body = loop_with(2 * width, kernels[f"wna16_{width}"])
        assert len(body) <= ceiling * ROWS * COLUMNS / 32
        assert not any(op.startswith(("LDL", "STL", "LDG", "BAR")) for op in body)
    opcodes = {each.split(" ")[0].split(".")[0] for each in kernels["wna16_8"]}
    assert {"UBLKCP", "SYNCS", "PREEXIT", "ACQBULK", "UCGABAR_ARV"} <= opcodes, "bulk copies, early starts, clusters"
