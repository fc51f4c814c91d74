"""K H K^T of many rows at once, K being a row's codes less their zeros, each group of columns apart.

Codes are whole numbers that bfloat16 holds exactly, so two products on tensor cores (H in two bfloat16 halves) give
what float32 would, but for H's last 8 bits, and nothing as large as the weights is written. Imported by `grams` alone.

Shapes: E layers, R rows, C columns, G groups of N columns (N a power of two, 16 or more); M rows of a program.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["groups"])  # one kernel whatever the number of groups
def gram(
    shift_ptr,  # E x R x C, bfloat16 (or, with nothing to be gained from halves, float32)
    first_ptr,  # E x C x C, H's upper bits in bfloat16 (or all of it)
    second_ptr,  # E x C x C, what they leave; read with HALVES alone
    gram_ptr,  # E x R x G x G, the lower triangle written
    rows,
    all_columns,
    groups,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
):
    layer = tl.program_id(2).to(tl.int64)
    group = groups - 1 - tl.program_id(1)  # the longest first
    row_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place_N = tl.arange(0, SPAN)
    inside_M = row_M < rows
    shift_row = shift_ptr + (layer * rows + row_M)[:, None] * all_columns + place_N[None, :]
    hessian_NN = (layer * all_columns + group * SPAN + place_N)[:, None] * all_columns + place_N[None, :]
    own_MN = tl.load(shift_row + group * SPAN, mask=inside_M[:, None], other=0.0)
    gram_M = gram_ptr + ((layer * rows + row_M) * groups + group) * groups
    for other in range(0, group + 1):
        first_NN = tl.load(first_ptr + hessian_NN + other * SPAN)
        if HALVES:
            second_NN = tl.load(second_ptr + hessian_NN + other * SPAN)
            sum_MN = tl.dot(own_MN, second_NN)
            sum_MN = tl.dot(own_MN, first_NN, sum_MN)
        else:
            sum_MN = tl.dot(own_MN, first_NN, input_precision="ieee")
        other_MN = tl.load(shift_row + other * SPAN, mask=inside_M[:, None], other=0.0)
        tl.store(gram_M + other, tl.sum(sum_MN * other_MN.to(tl.float32), axis=1), mask=inside_M)
