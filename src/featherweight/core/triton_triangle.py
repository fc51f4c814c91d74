"""Two kernels of the factor: blocks on the diagonal of a triangular matrix inverted, all at once, and float32 numbers
taken apart into two halves of 16 bits.

Imported by `fused` alone. Shapes: E layers, C columns, N columns of a block, M of them to a program; A x B any matrix.
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


@triton.jit(do_not_specialize=["rows", "columns"])
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
