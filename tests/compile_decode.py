"""Compiles the Triton kernels of one token for sm_ARGV[1] and prints what they became, as JSON; needs no GPU."""

import json
import sys

import torch  # noqa: F401  (before triton, which would import half of it)
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from featherweight.kernels import triton_decode

ARCH = int(sys.argv[1])
FLOATS = {"scale", "q_eps", "k_eps", "eps", "post_eps"}
POINTERS = dict.fromkeys(("part_ptr", "most_ptr", "q_gain_ptr", "k_gain_ptr", "gain_ptr", "post_ptr"), "*fp32")
POINTERS |= {"count_ptr": "*i32", "at_ptr": "*i32", "position_ptr": "*i64", "token_ptr": "*i64"}
PDL = ARCH >= 90
HEADS = {"HEADS": 8, "GROUP": 4, "ROWS": 16, "WIDE": 512, "BLOCK": 128, "SPLITS": 32, "PDL": PDL}
JOIN = {"WIDTH": 4096, "TILE": 4096, "HAS_DELTA": True, "HAS_GAIN": True, "PDL": PDL}
GATE = {"WIDTH": 14336, "TILE": 1024, "PDL": PDL}
CASES = [
    *((triton_decode.join, {**JOIN, "HAS_POST": post}, 16) for post in (False, True)),
    *((triton_decode.gate, {**GATE, "ACTIVATION": name}, 4) for name in ("silu", "gelu", "gelu_tanh")),
    (triton_decode.attend, {**HEADS, "DIM": 128, "PAD": 128, "ROTARY": 128, "NORM": True}, 8),
    (triton_decode.likeliest, {"VOCAB": 128256, "TILE": 1024, "PARTS": 126, "PADDED": 128, "PDL": PDL}, 4),
    (triton_decode.attend, {**HEADS, "DIM": 80, "PAD": 128, "ROTARY": 40, "NORM": False}, 8),
]


def kind(name: str) -> str:
    return POINTERS.get(name, "*bf16") if name.endswith("_ptr") else "fp32" if name in FLOATS else "i32"


for kernel, constants, warps in CASES:
    signature = {name: "constexpr" if name in constants else kind(name) for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options={"num_warps": warps})
    ptx = made.asm["ptx"]
    counts = {"mma": ptx.count("mma"), "waits": ptx.count("griddepcontrol.wait")}
    print(json.dumps({"kernel": kernel.__name__, "shared": made.metadata.shared, **counts}))
