"""The two column loops of the solvers as one Triton kernel each: a program goes through a slab's columns of some rows.

It holds a tile of columns at a time. A column is taken out of the tile by a masked sum, decided, and what it owes to
the columns after it is subtracted from the whole tile at once (right-looking, where `sweep` and `refine` look left);
what the tiles before it owe to a tile is one small product when its turn comes. What a column needs is asked for two
columns ahead, or every step would wait for memory. Decided values are integers within bounds, so clamping first and
rounding by adding and subtracting 1.5 * 2^23 is rounding half to even, as torch does it.

Imported by `fused` alone, and only where there is a GPU: Triton is no dependency of this room.
Shapes: E layers, C columns of the layer, S columns of the slab from `start` on, N columns of a tile, K of one before
it, G groups of columns, R rows. All tensors are contiguous.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)


@triton.jit
def nearest(value_R, low_R, high_R):
    """The integer between low and high nearest to a value, of two equally near the even one."""
    return (tl.minimum(tl.maximum(value_R, low_R), high_R) + MAGIC) - MAGIC


@triton.jit
def load_row(base, at, rows, row_R, inside_R, other):
    """Numbers of these rows at place `at` of a tensor that ends in R."""
    return tl.load(base + at * rows + row_R, mask=inside_R, other=other)


@triton.jit
def owed(matrix_ptr, moved_ptr, begin, all_columns, rows, row_R, inside_R, inside_N, TILE: tl.constexpr):
    """M[:begin, tile]^T @ moved[:begin], of the slab's own block of a matrix C x C and what its columns moved by."""
    place_K = tl.arange(0, TILE)
    owed_NR = tl.zeros((TILE, row_R.shape[0]), tl.float32)
    for done in range(0, begin, TILE):
        place = (done + place_K).to(tl.int64)
        matrix_NK = tl.load(  # read across: M^T
            matrix_ptr + place[None, :] * all_columns + (begin + place_K)[:, None], mask=inside_N[:, None], other=0.0
        )
        moved_KR = tl.load(moved_ptr + place[:, None] * rows + row_R[None, :], mask=inside_R[None, :], other=0.0)
        owed_NR = tl.dot(matrix_NK, moved_KR, owed_NR, input_precision="tf32x3")
    return owed_NR


@triton.jit(do_not_specialize=["groups"])  # one kernel whatever the number of groups
def sweep_slab(
    pull_ptr,  # E x S x R
    root_ptr,  # E x C x C
    weight_ptr,  # E x C x R
    scale_ptr,  # E x G x R
    zero_ptr,  # E x G x R
    group_ptr,  # E x C, int64
    keep_ptr,  # E x C x R
    moved_ptr,  # E x S x R, written
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
    inside_R, place_N = row_R < rows, tl.arange(0, TILE)
    first = layer * all_columns + start
    slab_ptr, slab_moved_ptr = root_ptr + first * all_columns + start, moved_ptr + layer * columns * rows
    loss_R = load_row(loss_ptr, layer, rows, row_R, inside_R, 0.0)
    for begin in range(0, columns, TILE):
        inside_N, last = begin + place_N < columns, tl.minimum(begin + TILE, columns) - 1
        tile_NR = tl.load(
            pull_ptr + (layer * columns + begin + place_N)[:, None] * rows + row_R[None, :],
            mask=inside_N[:, None] & inside_R[None, :],
            other=0.0,
        )
        tile_NR -= owed(slab_ptr, slab_moved_ptr, begin, all_columns, rows, row_R, inside_R, inside_N, TILE)
        root_row = root_ptr + start + begin + place_N
        group_0 = layer * groups + tl.load(group_ptr + first + begin)
        group_1 = layer * groups + tl.load(group_ptr + first + tl.minimum(begin + 1, last))
        group_2 = layer * groups + tl.load(group_ptr + first + tl.minimum(begin + 2, last))
        scale_0R = load_row(scale_ptr, group_0, rows, row_R, inside_R, 1.0)
        scale_1R = load_row(scale_ptr, group_1, rows, row_R, inside_R, 1.0)
        zero_0R = load_row(zero_ptr, group_0, rows, row_R, inside_R, 0.0)
        zero_1R = load_row(zero_ptr, group_1, rows, row_R, inside_R, 0.0)
        next_1 = tl.minimum(begin + 1, last)
        weight_0R = load_row(weight_ptr, first + begin, rows, row_R, inside_R, 0.0)
        weight_1R = load_row(weight_ptr, first + next_1, rows, row_R, inside_R, 0.0)
        root_0N = tl.load(root_row + (first + begin) * all_columns, mask=inside_N, other=0.0)
        root_1N = tl.load(root_row + (first + next_1) * all_columns, mask=inside_N, other=0.0)
        for j in range(begin, last + 1):
            scale_R, zero_R, weight_R, root_N = scale_0R, zero_0R, weight_0R, root_0N
            scale_0R, zero_0R, weight_0R, root_0N = scale_1R, zero_1R, weight_1R, root_1N
            ahead = tl.minimum(j + 2, last)
            scale_1R = load_row(scale_ptr, group_2, rows, row_R, inside_R, 1.0)
            zero_1R = load_row(zero_ptr, group_2, rows, row_R, inside_R, 0.0)
            weight_1R = load_row(weight_ptr, first + ahead, rows, row_R, inside_R, 0.0)
            root_1N = tl.load(root_row + (first + ahead) * all_columns, mask=inside_N, other=0.0)
            group_2 = layer * groups + tl.load(group_ptr + first + tl.minimum(j + 3, last))
            own_N = begin + place_N == j
            pull_R = tl.sum(tl.where(own_N[:, None], tile_NR, 0.0), axis=0)
            pivot = tl.sum(tl.where(own_N, root_N, 0.0), axis=0)
            low_R, high_R = bottom - zero_R, top - zero_R
            at_R = (first + j) * rows + row_R
            if HAS_KEEP:
                keep_R = tl.load(keep_ptr + at_R, mask=inside_R, other=0.0)
                low_R, high_R = low_R * keep_R, high_R * keep_R
            goal_R = weight_R + pull_R * (1.0 / pivot)
            step_R = nearest(goal_R * (1.0 / scale_R), low_R, high_R)
            moved_R = step_R * scale_R - weight_R
            left_R = pull_R - moved_R * pivot
            loss_R += left_R * left_R
            tl.store(moved_ptr + (layer * columns + j) * rows + row_R, moved_R, mask=inside_R)
            tl.store(code_ptr + at_R, (step_R + zero_R).to(tl.uint8), mask=inside_R)
            tile_NR -= tl.where(begin + place_N > j, root_N, 0.0)[:, None] * moved_R[None, :]
        tl.debug_barrier()  # what this tile moved by is read by the next
    tl.store(loss_ptr + layer * rows + row_R, loss_R, mask=inside_R)


@triton.jit(do_not_specialize=["groups"])
def descend_slab(
    pull_ptr,  # E x S x R; what the columns moved by is left in it
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
    inside_R, place_N = row_R < rows, tl.arange(0, TILE)
    first, width = layer * all_columns + start, all_columns // groups
    slab_ptr, slab_pull_ptr = hessian_ptr + first * all_columns + start, pull_ptr + layer * columns * rows
    price = 0.0
    if HAS_PRICE:
        price = tl.load(price_ptr + layer)
    gain_R = load_row(gain_ptr, layer, rows, row_R, inside_R, 0.0)
    for begin in range(0, columns, TILE):
        inside_N, last = begin + place_N < columns, tl.minimum(begin + TILE, columns) - 1
        tile_NR = tl.load(
            pull_ptr + (layer * columns + begin + place_N)[:, None] * rows + row_R[None, :],
            mask=inside_N[:, None] & inside_R[None, :],
            other=0.0,
        )
        tile_NR -= owed(slab_ptr, slab_pull_ptr, begin, all_columns, rows, row_R, inside_R, inside_N, TILE)
        hessian_row = hessian_ptr + start + begin + place_N
        next_1 = tl.minimum(begin + 1, last)
        group_0, group_1 = layer * groups + (start + begin) // width, layer * groups + (start + next_1) // width
        scale_0R = load_row(scale_ptr, group_0, rows, row_R, inside_R, 1.0)
        scale_1R = load_row(scale_ptr, group_1, rows, row_R, inside_R, 1.0)
        zero_0R = load_row(zero_ptr, group_0, rows, row_R, inside_R, 0.0)
        zero_1R = load_row(zero_ptr, group_1, rows, row_R, inside_R, 0.0)
        value_0R = load_row(value_ptr, first + begin, rows, row_R, inside_R, 0.0)
        value_1R = load_row(value_ptr, first + next_1, rows, row_R, inside_R, 0.0)
        delta_0R = load_row(delta_ptr, first + begin, rows, row_R, inside_R, 0.0)
        delta_1R = load_row(delta_ptr, first + next_1, rows, row_R, inside_R, 0.0)
        hessian_0N = tl.load(hessian_row + (first + begin) * all_columns, mask=inside_N, other=0.0)
        hessian_1N = tl.load(hessian_row + (first + next_1) * all_columns, mask=inside_N, other=0.0)
        for j in range(begin, last + 1):
            scale_R, zero_R, value_R, delta_R, hessian_N = scale_0R, zero_0R, value_0R, delta_0R, hessian_0N
            scale_0R, zero_0R, value_0R, delta_0R, hessian_0N = scale_1R, zero_1R, value_1R, delta_1R, hessian_1N
            ahead = tl.minimum(j + 2, last)
            group_1 = layer * groups + (start + ahead) // width
            scale_1R = load_row(scale_ptr, group_1, rows, row_R, inside_R, 1.0)
            zero_1R = load_row(zero_ptr, group_1, rows, row_R, inside_R, 0.0)
            value_1R = load_row(value_ptr, first + ahead, rows, row_R, inside_R, 0.0)
            delta_1R = load_row(delta_ptr, first + ahead, rows, row_R, inside_R, 0.0)
            hessian_1N = tl.load(hessian_row + (first + ahead) * all_columns, mask=inside_N, other=0.0)
            own_N = begin + place_N == j
            pull_R = tl.sum(tl.where(own_N[:, None], tile_NR, 0.0), axis=0)
            curve = tl.sum(tl.where(own_N, hessian_N, 0.0), axis=0)
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
            tl.store(pull_ptr + (layer * columns + j) * rows + row_R, moved_R, mask=inside_R)
            tl.store(delta_ptr + at_R, delta_R - moved_R, mask=inside_R)
            tl.store(code_ptr + at_R, (step_R + zero_R).to(tl.uint8), mask=inside_R)
            tile_NR -= tl.where(begin + place_N > j, hessian_N, 0.0)[:, None] * moved_R[None, :]
        tl.debug_barrier()  # what this tile moved by is read by the next
    tl.store(gain_ptr + layer * rows + row_R, gain_R, mask=inside_R)
