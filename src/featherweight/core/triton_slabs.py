"""The two column loops of the solvers as one Triton kernel each: a program holds a slab's columns of some rows.

A column is taken out of the tile by a masked sum, decided, and what it owes to the columns after it is subtracted from
the whole tile at once (right-looking, where `sweep` and `refine` look left): nothing of the slab is written back but
results. Decided values are integers within bounds, so clamping first and rounding by adding and subtracting 1.5 * 2^23
is rounding half to even, as torch does it.

Imported by `fused` alone, and only where there is a GPU: Triton is no dependency of this room.
Shapes: E layers, N columns of the slab (in a tile: the next power of two), R rows. All tensors are contiguous,
E x N x R, and U and H of the slab E x N x N.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)


@triton.jit
def nearest(value_R, low_R, high_R):
    """The integer between low and high nearest to a value, of two equally near the even one."""
    return (tl.minimum(tl.maximum(value_R, low_R), high_R) + MAGIC) - MAGIC


@triton.jit
def sweep_slab(
    weight_ptr,
    upper_ptr,
    scale_ptr,
    zero_ptr,
    keep_ptr,
    error_ptr,
    code_ptr,
    rows,
    columns,
    bottom,
    top,
    HAS_KEEP: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_N = tl.arange(0, TILE)
    inside_R = row_R < rows
    base = layer * columns * rows
    at_NR = base + column_N[:, None] * rows + row_R[None, :]
    both_NR = (column_N < columns)[:, None] & inside_R[None, :]
    tile_NR = tl.load(weight_ptr + at_NR, mask=both_NR, other=0.0)
    upper_row = upper_ptr + layer * columns * columns + column_N
    # What a column needs is asked for a column ahead, or every step would wait for memory.
    scale_next_R = tl.load(scale_ptr + base + row_R, mask=inside_R, other=1.0)
    zero_next_R = tl.load(zero_ptr + base + row_R, mask=inside_R, other=0.0)
    upper_next_N = tl.load(upper_row, mask=column_N < columns, other=0.0)
    for j in range(0, columns):
        scale_R, zero_R, upper_N = scale_next_R, zero_next_R, upper_next_N
        at_R = base + j * rows + row_R
        ahead = tl.minimum(j + 1, columns - 1)
        next_R = base + ahead * rows + row_R
        scale_next_R = tl.load(scale_ptr + next_R, mask=inside_R, other=1.0)
        zero_next_R = tl.load(zero_ptr + next_R, mask=inside_R, other=0.0)
        upper_next_N = tl.load(upper_row + ahead * columns, mask=column_N < columns, other=0.0)
        now_R = tl.sum(tl.where(column_N[:, None] == j, tile_NR, 0.0), axis=0)
        pivot = tl.sum(tl.where(column_N == j, upper_N, 0.0), axis=0)
        low_R, high_R = bottom - zero_R, top - zero_R
        if HAS_KEEP:
            keep_R = tl.load(keep_ptr + at_R, mask=inside_R, other=0.0)
            low_R, high_R = low_R * keep_R, high_R * keep_R
        step_R = nearest(now_R * (1.0 / scale_R), low_R, high_R)
        error_R = (now_R - step_R * scale_R) * (1.0 / pivot)
        tl.store(error_ptr + at_R, error_R, mask=inside_R)
        tl.store(code_ptr + at_R, (step_R + zero_R).to(tl.uint8), mask=inside_R)
        after_N = tl.where(column_N > j, upper_N, 0.0)
        tile_NR -= after_N[:, None] * error_R[None, :]


@triton.jit
def descend_slab(
    pull_ptr,
    hessian_ptr,
    value_ptr,
    scale_ptr,
    zero_ptr,
    free_ptr,
    moved_ptr,
    code_ptr,
    rows,
    columns,
    bottom,
    top,
    HAS_FREE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_N = tl.arange(0, TILE)
    inside_R = row_R < rows
    base = layer * columns * rows
    at_NR = base + column_N[:, None] * rows + row_R[None, :]
    both_NR = (column_N < columns)[:, None] & inside_R[None, :]
    tile_NR = tl.load(pull_ptr + at_NR, mask=both_NR, other=0.0)
    hessian_row = hessian_ptr + layer * columns * columns + column_N
    scale_next_R = tl.load(scale_ptr + base + row_R, mask=inside_R, other=1.0)
    zero_next_R = tl.load(zero_ptr + base + row_R, mask=inside_R, other=0.0)
    value_next_R = tl.load(value_ptr + base + row_R, mask=inside_R, other=0.0)
    hessian_next_N = tl.load(hessian_row, mask=column_N < columns, other=0.0)
    for j in range(0, columns):
        scale_R, zero_R, value_R, hessian_N = scale_next_R, zero_next_R, value_next_R, hessian_next_N
        at_R = base + j * rows + row_R
        ahead = tl.minimum(j + 1, columns - 1)
        next_R = base + ahead * rows + row_R
        scale_next_R = tl.load(scale_ptr + next_R, mask=inside_R, other=1.0)
        zero_next_R = tl.load(zero_ptr + next_R, mask=inside_R, other=0.0)
        value_next_R = tl.load(value_ptr + next_R, mask=inside_R, other=0.0)
        hessian_next_N = tl.load(hessian_row + ahead * columns, mask=column_N < columns, other=0.0)
        pull_R = tl.sum(tl.where(column_N[:, None] == j, tile_NR, 0.0), axis=0)
        curve = tl.sum(tl.where(column_N == j, hessian_N, 0.0), axis=0)
        low_R, high_R = bottom - zero_R, top - zero_R
        if HAS_FREE:
            free_R = tl.load(free_ptr + at_R, mask=inside_R, other=0.0)
            low_R, high_R = low_R * free_R, high_R * free_R
        goal_R = value_R + pull_R * (1.0 / curve)
        step_R = nearest(goal_R * (1.0 / scale_R), low_R, high_R)
        moved_R = step_R * scale_R - value_R
        tl.store(moved_ptr + at_R, moved_R, mask=inside_R)
        tl.store(code_ptr + at_R, (step_R + zero_R).to(tl.uint8), mask=inside_R)
        after_N = tl.where(column_N > j, hessian_N, 0.0)
        tile_NR -= after_N[:, None] * moved_R[None, :]
