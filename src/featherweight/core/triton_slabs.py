"""The two column loops of the solvers as one Triton kernel each: a program holds a slab's columns of some rows.

A column is taken out of the tile by a masked sum, decided, and what it owes to the columns after it is subtracted from
the whole tile at once (right-looking, where `sweep` and `refine` look left). What the next column needs is asked for a
column ahead, or every step would wait for memory. Decided values are integers within bounds, so clamping first and
rounding by adding and subtracting 1.5 * 2^23 is rounding half to even, as torch does it.

Imported by `fused` alone, and only where there is a GPU: Triton is no dependency of this room.
Shapes: E layers, C columns of the layer, N columns of the slab from `start` on (in a tile: a power of two), G groups of
columns, R rows. All tensors are contiguous.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)


@triton.jit
def nearest(value_R, low_R, high_R):
    """The integer between low and high nearest to a value, of two equally near the even one."""
    return (tl.minimum(tl.maximum(value_R, low_R), high_R) + MAGIC) - MAGIC


@triton.jit(do_not_specialize=["groups"])  # one kernel whatever the number of groups
def sweep_slab(
    weight_ptr,  # E x C x R
    upper_ptr,  # E x C x C
    scale_ptr,  # E x G x R
    zero_ptr,  # E x G x R
    group_ptr,  # E x C, int64
    keep_ptr,  # E x C x R
    error_ptr,  # E x N x R, written
    code_ptr,  # E x C x R, uint8, written
    loss_ptr,  # E x R, added to
    rows,
    all_columns,
    groups,
    start,
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
    inside_R, inside_N = row_R < rows, column_N < columns
    first = layer * all_columns + start
    tile_NR = tl.load(
        weight_ptr + (first + column_N)[:, None] * rows + row_R[None, :],
        mask=inside_N[:, None] & inside_R[None, :],
        other=0.0,
    )
    upper_row = upper_ptr + first * all_columns + start + column_N
    group_next = layer * groups + tl.load(group_ptr + first)
    scale_next_R = tl.load(scale_ptr + group_next * rows + row_R, mask=inside_R, other=1.0)
    zero_next_R = tl.load(zero_ptr + group_next * rows + row_R, mask=inside_R, other=0.0)
    group_next = layer * groups + tl.load(group_ptr + first + tl.minimum(1, columns - 1))
    upper_next_N = tl.load(upper_row, mask=inside_N, other=0.0)
    loss_R = tl.load(loss_ptr + layer * rows + row_R, mask=inside_R, other=0.0)
    for j in range(0, columns):
        scale_R, zero_R, upper_N = scale_next_R, zero_next_R, upper_next_N
        ahead = tl.minimum(j + 1, columns - 1)
        scale_next_R = tl.load(scale_ptr + group_next * rows + row_R, mask=inside_R, other=1.0)
        zero_next_R = tl.load(zero_ptr + group_next * rows + row_R, mask=inside_R, other=0.0)
        group_next = layer * groups + tl.load(group_ptr + first + tl.minimum(j + 2, columns - 1))
        upper_next_N = tl.load(upper_row + ahead.to(tl.int64) * all_columns, mask=inside_N, other=0.0)
        now_R = tl.sum(tl.where(column_N[:, None] == j, tile_NR, 0.0), axis=0)
        pivot = tl.sum(tl.where(column_N == j, upper_N, 0.0), axis=0)
        low_R, high_R = bottom - zero_R, top - zero_R
        at_R = (first + j) * rows + row_R
        if HAS_KEEP:
            keep_R = tl.load(keep_ptr + at_R, mask=inside_R, other=0.0)
            low_R, high_R = low_R * keep_R, high_R * keep_R
        step_R = nearest(now_R * (1.0 / scale_R), low_R, high_R)
        error_R = (now_R - step_R * scale_R) * (1.0 / pivot)
        loss_R += error_R * error_R
        tl.store(error_ptr + (layer * columns + j) * rows + row_R, error_R, mask=inside_R)
        tl.store(code_ptr + at_R, (step_R + zero_R).to(tl.uint8), mask=inside_R)
        after_N = tl.where(column_N > j, upper_N, 0.0)
        tile_NR -= after_N[:, None] * error_R[None, :]
    tl.store(loss_ptr + layer * rows + row_R, loss_R, mask=inside_R)


@triton.jit(do_not_specialize=["groups"])
def descend_slab(
    pull_ptr,  # E x N x R
    hessian_ptr,  # E x C x C
    value_ptr,  # E x C x R
    scale_ptr,  # E x G x R
    zero_ptr,  # E x G x R
    free_ptr,  # E x C x R
    price_ptr,  # E, of a weight that is not zero
    delta_ptr,  # E x C x R, brought up to date
    code_ptr,  # E x C x R, uint8, written
    gain_ptr,  # E x R, what the loss falls by, added to
    rows,
    all_columns,
    groups,
    start,
    columns,
    bottom,
    top,
    HAS_FREE: tl.constexpr,
    HAS_PRICE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_N = tl.arange(0, TILE)
    inside_R, inside_N = row_R < rows, column_N < columns
    first = layer * all_columns + start
    width = all_columns // groups
    tile_NR = tl.load(
        pull_ptr + (layer * columns + column_N)[:, None] * rows + row_R[None, :],
        mask=inside_N[:, None] & inside_R[None, :],
        other=0.0,
    )
    price = 0.0
    if HAS_PRICE:
        price = tl.load(price_ptr + layer)
    hessian_row = hessian_ptr + first * all_columns + start + column_N
    group_R = (layer * groups + start // width) * rows + row_R
    scale_next_R = tl.load(scale_ptr + group_R, mask=inside_R, other=1.0)
    zero_next_R = tl.load(zero_ptr + group_R, mask=inside_R, other=0.0)
    value_next_R = tl.load(value_ptr + first * rows + row_R, mask=inside_R, other=0.0)
    delta_next_R = tl.load(delta_ptr + first * rows + row_R, mask=inside_R, other=0.0)
    hessian_next_N = tl.load(hessian_row, mask=inside_N, other=0.0)
    gain_R = tl.load(gain_ptr + layer * rows + row_R, mask=inside_R, other=0.0)
    for j in range(0, columns):
        scale_R, zero_R, value_R, delta_R = scale_next_R, zero_next_R, value_next_R, delta_next_R
        hessian_N = hessian_next_N
        ahead = tl.minimum(j + 1, columns - 1)
        group_R = (layer * groups + (start + ahead) // width) * rows + row_R
        scale_next_R = tl.load(scale_ptr + group_R, mask=inside_R, other=1.0)
        zero_next_R = tl.load(zero_ptr + group_R, mask=inside_R, other=0.0)
        value_next_R = tl.load(value_ptr + (first + ahead) * rows + row_R, mask=inside_R, other=0.0)
        delta_next_R = tl.load(delta_ptr + (first + ahead) * rows + row_R, mask=inside_R, other=0.0)
        hessian_next_N = tl.load(hessian_row + ahead.to(tl.int64) * all_columns, mask=inside_N, other=0.0)
        pull_R = tl.sum(tl.where(column_N[:, None] == j, tile_NR, 0.0), axis=0)
        curve = tl.sum(tl.where(column_N == j, hessian_N, 0.0), axis=0)
        low_R, high_R = bottom - zero_R, top - zero_R
        at_R = (first + j) * rows + row_R
        if HAS_FREE:
            free_R = tl.load(free_ptr + at_R, mask=inside_R, other=0.0)
            low_R, high_R = low_R * free_R, high_R * free_R
        goal_R = value_R + pull_R * (1.0 / curve)
        step_R = nearest(goal_R * (1.0 / scale_R), low_R, high_R)
        if HAS_PRICE:
            new_R = step_R * scale_R
            step_R = tl.where((2.0 * goal_R - new_R) * new_R > price * (1.0 / curve), step_R, 0.0)
        moved_R = step_R * scale_R - value_R
        gain_R += moved_R * (2.0 * pull_R - moved_R * curve)
        tl.store(delta_ptr + at_R, delta_R - moved_R, mask=inside_R)
        tl.store(code_ptr + at_R, (step_R + zero_R).to(tl.uint8), mask=inside_R)
        after_N = tl.where(column_N > j, hessian_N, 0.0)
        tile_NR -= after_N[:, None] * moved_R[None, :]
    tl.store(gain_ptr + layer * rows + row_R, gain_R, mask=inside_R)
