"""Compiles the products' Triton kernels for sm_ARGV[1] and prints what they became, as JSON; needs no GPU.

ARGV[2:] are variants, TOKENS-BITS-SPAN-PARTIAL ("16-4-128-1").
"""

import json
import sys

import torch  # noqa: F401  (before triton, which would import half of it)
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from featherweight.kernels import triton_products

POINTERS = {"words_ptr": "*i32", "zero_ptr": "*u8", "part_ptr": "*fp32"}
SHARED = {"PLANE": 16, "HAS_ZEROS": True, "HAS_BIAS": True, "ROWS": 64, "TILE": 512}


def compiled(kernel, constants):
    kinds = {name: POINTERS.get(name, "*bf16") if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    if kernel is triton_products.product and constants["PARTIAL"]:
        kinds["out_ptr"] = "*fp32"
    signature = {name: "constexpr" if name in constants else kinds[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {name: constants[name] for name in kernel.arg_names if name in constants})
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 4})
    return {"kernel": kernel.__name__, "shared": made.metadata.shared, "ptx": made.asm["ptx"].count("mma")}


for variant in sys.argv[2:]:
    tokens, bits, span, partial = map(int, variant.split("-"))
    constants = {**SHARED, "TOKENS": tokens, "BITS": bits, "SPAN": span, "PARTIAL": bool(partial)}
    for kernel in (triton_products.product, triton_products.floats, triton_products.combine):
        print(json.dumps(compiled(kernel, constants)))
