"""csrc/slabs.cu compiled by a C++ compiler and run on a CPU, thread by thread (slabs_emulation.h): the same source, the
same launches, arithmetic to the last bit."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from torch import Tensor

from featherweight.core import cuda_slabs
from featherweight.native import nvrtc

KERNELS = ("sweep_slab", "descend_slab", "descend_slab_priced")
FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-w")
TAIL = """
alignas(128) float memory[1 << 18];
extern "C" int shared_bytes(int columns) { return (AT_FOUND + (columns + TILE - 1) / TILE * (WEIGHTS + TILE)) * 4; }
extern "C" int run(int kernel, const Params* p, int blocks, int bytes, int order) {
    void (*const kernels[])(const Params) = {sweep_slab, descend_slab, descend_slab_priced};
    emulation::body = [=] { kernels[kernel](*p); };
    for (int b = 0; b < blocks; b++) {
        blockIdx.x = b;
        for (float& f : memory) f = NAN;
        if (!emulation::run_block(WARPS * 32, order)) return 1;
        for (int i = bytes / 4; i < 1 << 18; i++) if (!std::isnan(memory[i])) return 2;
    }
    return 0;
}
"""


def compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@cache
def library(rows: int, warps: int) -> ctypes.CDLL:
    """slabs.cu for CTAs of so many rows and warps."""
    folder = Path(mkdtemp(prefix="slabs-"))
    own = (Path(nvrtc.__file__).parent.parent / "core" / "csrc" / "async.cuh").read_text()
    shim = (Path(__file__).parent / "slabs_emulation.h").read_text()
    text = nvrtc.source("core/slabs")
    assert own in text
    (folder / "slabs.cpp").write_text(shim + text.replace(own, "") + TAIL)
    command = [compiler() or "c++", *FLAGS, f"-DROWS={rows}", f"-DWARPS={warps}", str(folder / "slabs.cpp")]
    subprocess.run([*command, "-o", str(folder / "slabs.so")], check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(folder / "slabs.so"))


def launch(
    name: str, tensors: dict[str, Tensor | None], sizes: tuple[int, ...], plan: cuda_slabs.Plan, order: int = 0
) -> None:
    """`cuda_slabs.launch` on a CPU."""
    given = tensors["given"]
    assert given is not None
    code = library(plan.rows, plan.warps)
    assert code.shared_bytes(sizes[4]) == plan.bytes
    params = cuda_slabs.params(tensors, sizes, plan)
    done = code.run(KERNELS.index(name), ctypes.byref(params), plan.blocks * len(given), plan.bytes, order)
    assert done == 0, ("", "threads wait for each other", "shared memory is written past its end")[done]
