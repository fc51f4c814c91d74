"""What the solvers do beside products and column loops, one pass over memory each: blocks on the diagonal of a
triangular matrix inverted, float32 numbers taken apart into two halves of 16 bits, and columns put into another order.

Imported by `fused` alone. Kernels that move numbers are compiled for rows and columns that are multiples of 16 apart
from others: there a mask may end anywhere, and each load and store is one number.
Shapes: E layers, R rows, C columns, N columns of a block, M of them to a program; A x B any matrix.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["columns"])
def invert_diagonal(
    lower_ptr,  # E x C x C, with strides; its lower triangle is read
    inverse_ptr,  # E x C x C, contiguous; the blocks' lower triangles are written, zeros above them in part
    columns,
    layer_stride,
    row_stride,
    column_stride,
    SPAN: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Solves L X = I for STRIP columns of a block: row by row, what is found is taken off all rows below it."""
    layer = tl.program_id(2).to(tl.int64)
    begin, first = tl.program_id(0) * STRIP, tl.program_id(1) * SPAN  # rows above `begin` are zeros in these columns
    row_N, column_M = tl.arange(0, SPAN), begin + tl.arange(0, STRIP)
    stop = tl.minimum(SPAN, columns - first)
    tile_NM = tl.where(row_N[:, None] == column_M[None, :], 1.0, 0.0)
    lower_N = lower_ptr + layer * layer_stride + (first + row_N).to(tl.int64) * row_stride
    at = (first + tl.minimum(begin, stop - 1)).to(tl.int64)
    next_N = tl.load(lower_N + at * column_stride, mask=row_N < stop, other=0.0)
    for j in range(begin, stop):
        now_N = next_N  # the next column is asked for while this one is worked on
        at = (first + tl.minimum(j + 1, stop - 1)).to(tl.int64)
        next_N = tl.load(lower_N + at * column_stride, mask=row_N < stop, other=0.0)
        pivot = tl.sum(tl.where(row_N == j, now_N, 0.0), axis=0)
        found_M = tl.sum(tl.where((row_N == j)[:, None], tile_NM, 0.0), axis=0) / pivot
        to_M = inverse_ptr + (layer * columns + first + j) * columns + first + column_M
        tl.store(to_M, found_M, mask=column_M < stop)
        tile_NM -= tl.where(row_N > j, now_N, 0.0)[:, None] * found_M[None, :]


@triton.jit
def take_apart(
    matrix_ptr,  # E x A x B, with strides
    half_ptr,  # float16 or bfloat16: `first` at 0 and at `again`, `second` at `beyond`; rows of B contiguous
    rows,
    columns,
    layer_stride,
    row_stride,
    column_stride,
    half_layer_stride,
    half_row_stride,
    again,
    beyond,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """number = first + second, but for what 16 bits of it do not hold."""
    layer = tl.program_id(2).to(tl.int64)
    row_A = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column_B = (tl.program_id(1) * SPAN + tl.arange(0, SPAN)).to(tl.int64)
    inside_AB = (row_A < rows)[:, None] & (column_B < columns)[None, :]
    from_AB = matrix_ptr + layer * layer_stride + row_A[:, None] * row_stride + column_B[None, :] * column_stride
    number_AB = tl.load(from_AB, mask=inside_AB, other=0.0)
    first_AB = number_AB.to(half_ptr.dtype.element_ty)
    second_AB = (number_AB - first_AB.to(tl.float32)).to(half_ptr.dtype.element_ty)
    to_AB = half_ptr + layer * half_layer_stride + row_A[:, None] * half_row_stride + column_B[None, :]
    tl.store(to_AB, first_AB, mask=inside_AB)
    tl.store(to_AB + again, first_AB, mask=inside_AB)
    tl.store(to_AB + beyond, second_AB, mask=inside_AB)


@triton.jit
def turn(
    natural_ptr,  # E x R x C
    ordered_ptr,  # E x C x R
    place_ptr,  # E x C, int64: where a column lies in `ordered`
    rows,
    columns,
    BACK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Writes `ordered`, column by column in its order, from `natural`; or BACK."""
    layer = tl.program_id(2).to(tl.int64)
    row_R = (tl.program_id(1) * SPAN + tl.arange(0, SPAN)).to(tl.int64)
    column_N = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    inside_NR = (column_N < columns)[:, None] & (row_R < rows)[None, :]
    place_N = tl.load(place_ptr + layer * columns + column_N, mask=column_N < columns, other=0)
    natural_NR = natural_ptr + (layer * rows + row_R)[None, :] * columns + column_N[:, None]
    ordered_NR = ordered_ptr + (layer * columns + place_N)[:, None] * rows + row_R[None, :]
    if BACK:
        tl.store(natural_NR, tl.load(ordered_NR, mask=inside_NR), mask=inside_NR)
    else:
        tl.store(ordered_NR, tl.load(natural_NR, mask=inside_NR), mask=inside_NR)
