"""Compiles the Triton kernels of ARGV[2], solvers, training or passes, to machine code for sm_ARGV[1] and prints their
names and the shared memory of a program; needs no GPU."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from featherweight.core import triton_gram, triton_passes, triton_scales, triton_slabs
from featherweight.stream import triton_pieces
from featherweight.train import triton_grid, triton_packed

WHICH = sys.argv[2]
FLOATS = {"low", "high", "levels", "least", "most", "top", "lowest_zero", "bottom", "least_scale"}
CONSTANTS = {
    "TILE": 32,
    "ROWS": 16,
    "GROUPS": 16,
    "FINE": 4,
    "KIND": 17,
    "MIRROR": True,
    "HAS_KEEP": True,
    "HAS_FREE": True,
    "HAS_PRICE": True,
    "LATENT": 2,
    "ASYMMETRIC": True,
    "BITS": 3,
    "SPAN": 128,
    "STRIP": 8,
    "BACK": True,
    "HALVES": True,
    "PLUS_ONE": True,
    "EARLY": True,
    "HALF": 64,
    "PAIRS": 64,
    "HEADS": 32,
    "CHOICES": 8,
}
POINTERS = {
    "group_ptr": "*i64",
    "code_ptr": "*u8",
    "word_ptr": "*i32",
    "shift_ptr": "*bf16",
    "first_ptr": "*bf16",
    "second_ptr": "*bf16",
    "half_ptr": "*bf16",
    "place_ptr": "*i64",
}
TRAINED = {"keep_ptr": "*u8", "value_ptr": "*bf16", "gradient_ptr": "*bf16"}
SEARCHES_AND_GRIDS = ("search", "grid_values", "grid_step")  # whose bounds are floats


def kind(name: str, kernel: str) -> str:
    if name in CONSTANTS:
        return "constexpr"
    if name.endswith("_ptr"):
        if (name, kernel) == ("zero_ptr", "asymmetric_search"):
            return "*u8"
        if WHICH == "passes":
            return "*i64" if name in ("expert_ptr", "place_ptr") else "*bf16"
        return (POINTERS | (TRAINED if WHICH == "training" else {})).get(name, "*fp32")
    return "fp32" if name == "eps" or (name in FLOATS and kernel.endswith(SEARCHES_AND_GRIDS)) else "i32"


KERNELS = {
    "solvers": (
        (triton_slabs.sweep_slab, 1),
        (triton_slabs.descend_slab, 1),
        (triton_scales.symmetric_search, 4),
        (triton_scales.asymmetric_search, 4),
        (triton_gram.gram, 4, {"ROWS": 128}),
        (triton_passes.invert_diagonal, 1),
        (triton_passes.take_apart, 4),
        (triton_passes.turn, 4),
    ),
    "training": (
        (triton_grid.grid_values, 4),
        (triton_grid.grid_step, 4),
        (triton_packed.packed_values, 4),
        (triton_packed.group_sums, 4),
    ),
    "passes": (
        (triton_pieces.rms_norm, 4),
        (triton_pieces.rotate, 4),
        (triton_pieces.gate, 4),
        (triton_pieces.join, 4),
    ),
}

for kernel, warps, *own in KERNELS[WHICH]:
    signature = {name: kind(name, kernel.__name__) for name in kernel.arg_names}
    constants = {name: value for name, value in CONSTANTS.items() if name in kernel.arg_names} | (own[0] if own else {})
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": warps, "num_stages": 1} if own else {"num_warps": warps}
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    print(kernel.__name__, made.metadata.shared)
