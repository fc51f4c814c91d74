"""Compiles the solvers' Triton kernels to machine code for sm_ARGV[1] and prints their names; needs no GPU."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from featherweight.core import triton_gram, triton_scales, triton_slabs

FLOATS = {"low", "high", "levels", "least", "most", "top", "lowest_zero"}
CONSTANTS = {
    "TILE": 128,
    "ROWS": 16,
    "GROUPS": 16,
    "FINE": 4,
    "KIND": 17,
    "MIRROR": True,
    "HAS_KEEP": True,
    "HAS_FREE": True,
    "SPAN": 128,
    "HALVES": True,
}


def kind(name: str, kernel: str) -> str:
    if name in CONSTANTS:
        return "constexpr"
    if name.endswith("_ptr"):
        if name in {"group_ptr", "shift_ptr"}:
            return "*i64" if name == "group_ptr" else "*bf16"
        return "*u8" if name == "code_ptr" or (name, kernel) == ("zero_ptr", "asymmetric_search") else "*fp32"
    return "fp32" if name in FLOATS and kernel.endswith("search") else "i32"


for kernel, warps in (
    (triton_slabs.sweep_slab, 1),
    (triton_slabs.descend_slab, 1),
    (triton_scales.symmetric_search, 4),
    (triton_scales.asymmetric_search, 4),
    (triton_gram.gram, 4),
):
    signature = {name: kind(name, kernel.__name__) for name in kernel.arg_names}
    constants = {name: value for name, value in CONSTANTS.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": warps})
    print(kernel.__name__)
