"""Packed codes as values, and what a gradient of values is for scales and zeros, in one pass each.

Imported by `packed` alone, and only where there is a GPU.
Shapes: R outputs, C inputs, G groups, W words; of a program J rows or groups, N columns or weights of a group.
"""

import triton
import triton.language as tl


@triton.jit
def code_at(word_ptr, row_JN, column_JN, row_stride, word_stride, inside_JN, BITS: tl.constexpr):
    """The code of a column, float32, from a stream without gaps (`codec.bits`); it may lie in two words."""
    first_JN = column_JN * BITS
    place_JN = row_JN * row_stride + (first_JN >> 5).to(tl.int64) * word_stride
    shift_JN = (first_JN & 31).to(tl.uint32)
    code_JN = tl.load(word_ptr + place_JN, mask=inside_JN, other=0).to(tl.uint32, bitcast=True) >> shift_JN
    if 32 % BITS != 0:
        split_JN = shift_JN + BITS > 32
        more_JN = tl.load(word_ptr + place_JN + word_stride, mask=inside_JN & split_JN, other=0)
        up_JN = tl.where(split_JN, 32 - shift_JN, 0)
        code_JN = tl.where(split_JN, code_JN | (more_JN.to(tl.uint32, bitcast=True) << up_JN), code_JN)
    return (code_JN & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def packed_values(
    word_ptr,  # R x W int32, of any strides
    scale_ptr,  # R x G
    zero_ptr,  # R x G
    value_ptr,  # R x C, written
    rows,
    columns,
    groups,
    width,
    row_stride,
    word_stride,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """(code - zero) * scale, rounded once to the dtype of `value_ptr`."""
    row_J = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column_N = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside_JN = (row_J < rows)[:, None] & (column_N < columns)[None, :]
    column_JN = column_N[None, :] + tl.zeros((ROWS, TILE), tl.int32)
    code_JN = code_at(word_ptr, row_J[:, None], column_JN, row_stride, word_stride, inside_JN, BITS)
    group_JN = row_J[:, None] * groups + (column_N // width)[None, :]
    zero_JN = tl.load(zero_ptr + group_JN, mask=inside_JN, other=0.0)
    scale_JN = tl.load(scale_ptr + group_JN, mask=inside_JN, other=0.0)
    value_JN = (code_JN - zero_JN) * scale_JN
    place_JN = row_J[:, None] * columns + column_N[None, :]
    tl.store(value_ptr + place_JN, value_JN.to(value_ptr.dtype.element_ty), mask=inside_JN)


@triton.jit
def group_sums(
    gradient_ptr,  # R x C, of the values
    word_ptr,
    zero_ptr,
    to_scale_ptr,  # R x G, written
    total_ptr,  # R x G, written: the gradient's own sum
    all_groups,
    groups,
    columns,
    width,
    row_stride,
    word_stride,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Of every group the sums of gradient * (code - zero), and of the gradient."""
    group_J = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside_J = group_J < all_groups
    row_J, first_J = group_J // groups, (group_J % groups).to(tl.int32) * width
    zero_J = tl.load(zero_ptr + group_J, mask=inside_J, other=0.0)
    to_scale_J = tl.zeros((GROUPS,), tl.float32)
    total_J = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, width, TILE):
        place_N = start + tl.arange(0, TILE)
        inside_JN = inside_J[:, None] & (place_N < width)[None, :]
        column_JN = first_J[:, None] + place_N[None, :]
        code_JN = code_at(word_ptr, row_J[:, None], column_JN, row_stride, word_stride, inside_JN, BITS)
        at_JN = row_J[:, None] * columns + column_JN
        gradient_JN = tl.load(gradient_ptr + at_JN, mask=inside_JN, other=0.0).to(tl.float32)
        to_scale_J += tl.sum(gradient_JN * (code_JN - zero_J[:, None]), axis=1)
        total_J += tl.sum(gradient_JN, axis=1)
    tl.store(to_scale_ptr + group_J, to_scale_J, mask=inside_J)
    tl.store(total_ptr + group_J, total_J, mask=inside_J)
