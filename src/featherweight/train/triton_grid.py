"""What a matrix in training is, and one step of it, in one pass over its weights each.

A weight is read, rounded, and let go of: of the size of the matrix there are its latent weights, Adam's two averages,
the values the block runs with and their gradient, and nothing else. A program has some groups of a row and goes through
their weights a tile at a time; when it has seen all of them it knows the gradients of their scales and zeros.

Imported by `fused` alone, and only where there is a GPU.
Shapes: J groups of a program, N weights of a group (in a tile: a power of two). Latent weights, averages, codes and
masks lie row by row; values and gradients lie as the module has them, by strides. `pace` is `adam.PACE` numbers.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and subtracted, it rounds half to even
FARTHEST = tl.constexpr(65536.0)  # no code is so far from another, and MAGIC takes it
STEPS, ABSOLUTE, ROUNDING = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what a latent weight is


@triton.jit
def between(value, low, high):
    """A number brought between two others; what is no number stays none, or a loss that is none would go unseen."""
    raised = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(raised, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def nearest(value):
    """The nearest whole number, of two equally near the even one."""
    return (between(value, -FARTHEST, FARTHEST) + MAGIC) - MAGIC


@triton.jit
def kept_scale(scale_J, unit_J, KIND: tl.constexpr):
    """A scale as the file has it (`KIND`: 16 float16, 17 bfloat16, 32 float32)."""
    product_J = scale_J * unit_J
    if KIND == 16:
        return product_J.to(tl.float16).to(tl.float32)
    if KIND == 17:
        bits_J = product_J.to(tl.uint32, bitcast=True)  # half to even: the interpreter's own cast cuts off
        bits_J = (bits_J + 0x7FFF + ((bits_J >> 16) & 1)) & 0xFFFF0000
        return bits_J.to(tl.float32, bitcast=True)
    return product_J


@triton.jit
def kept_zero(zero_J, lowest_zero, top, ASYMMETRIC: tl.constexpr):
    """A zero as the file has it; a symmetric grid's is whole already."""
    if ASYMMETRIC:
        return between(nearest(zero_J), lowest_zero, top)
    return zero_J


@triton.jit
def levels(latent_JN, code_JN, scale_J1, zero_J1, pace_ptr, LATENT: tl.constexpr):
    """The code each weight would have without bounds, what it rounds, and the slope of that."""
    if LATENT == ROUNDING:
        hardness, share, whole = tl.load(pace_ptr + 3), tl.load(pace_ptr + 4), tl.load(pace_ptr + 5)
        middle_JN = tl.floor(latent_JN) + 0.5
        power_JN = tl.exp(2.0 * hardness * (latent_JN - middle_JN))
        soft_JN = middle_JN + (power_JN - 1.0) / (power_JN + 1.0) * share
        slope_JN = 4.0 * power_JN / ((power_JN + 1.0) * (power_JN + 1.0)) * hardness * share
        moved_JN = tl.where(whole > 0.0, nearest(latent_JN), soft_JN)
        return code_JN + moved_JN, moved_JN, slope_JN
    ratio_JN = latent_JN
    if LATENT == ABSOLUTE:
        ratio_JN = tl.div_rn(latent_JN, scale_J1)  # as torch divides: codes are found again by torch
    return nearest(ratio_JN) + zero_J1, ratio_JN, ratio_JN


@triton.jit
def adam(value, gradient, mean_ptr, square_ptr, at, inside, rate, inverse):
    """One step of Adam; brings the averages up to date and returns the new value."""
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    square = tl.load(square_ptr + at, mask=inside, other=0.0)
    mean += 0.1 * (gradient - mean)
    square = 0.999 * square + 0.001 * gradient * gradient
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    return value - rate * mean / (tl.sqrt(square) * inverse + 1e-8)


@triton.jit
def grid_values(
    latent_ptr,
    code_ptr,  # uint8, where roundings are trained
    scale_ptr,
    unit_ptr,
    zero_ptr,
    keep_ptr,  # uint8
    value_ptr,  # written
    pace_ptr,
    groups,
    groups_in_row,
    width,
    row_stride,
    column_stride,
    bottom,
    top,
    lowest_zero,
    LATENT: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Every value, (clamped code - zero) * scale, in the dtype of `value_ptr`."""
    group_J = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside_J = group_J < groups
    scale_J = tl.load(scale_ptr + group_J, mask=inside_J, other=1.0)
    scale_J1 = kept_scale(scale_J, tl.load(unit_ptr + group_J, mask=inside_J, other=1.0), KIND)[:, None]
    zero_J1 = kept_zero(tl.load(zero_ptr + group_J, mask=inside_J, other=0.0), lowest_zero, top, ASYMMETRIC)[:, None]
    row_J, first_J = group_J // groups_in_row, (group_J % groups_in_row) * width
    for start in range(0, width, TILE):
        column_N = start + tl.arange(0, TILE)
        inside_JN = inside_J[:, None] & (column_N < width)[None, :]
        at_JN = group_J[:, None] * width + column_N[None, :]
        latent_JN = tl.load(latent_ptr + at_JN, mask=inside_JN, other=0.0)
        code_JN = latent_JN
        if LATENT == ROUNDING:
            code_JN = tl.load(code_ptr + at_JN, mask=inside_JN, other=0).to(tl.float32)
        level_JN, _, _ = levels(latent_JN, code_JN, scale_J1, zero_J1, pace_ptr, LATENT)
        value_JN = (between(level_JN, bottom, top) - zero_J1) * scale_J1
        if HAS_KEEP:
            value_JN *= tl.load(keep_ptr + at_JN, mask=inside_JN, other=0).to(tl.float32)
        place_JN = row_J[:, None] * row_stride + (first_J[:, None] + column_N[None, :]) * column_stride
        tl.store(value_ptr + place_JN, value_JN.to(value_ptr.dtype.element_ty), mask=inside_JN)


@triton.jit
def grid_step(
    latent_ptr,  # brought up to date, as are the averages of all three
    latent_mean_ptr,
    latent_square_ptr,
    code_ptr,
    scale_ptr,
    scale_mean_ptr,
    scale_square_ptr,
    unit_ptr,
    zero_ptr,
    zero_mean_ptr,
    zero_square_ptr,
    keep_ptr,
    gradient_ptr,  # of the values
    pace_ptr,
    groups,
    groups_in_row,
    width,
    row_stride,
    column_stride,
    bottom,
    top,
    lowest_zero,
    least_scale,
    LATENT: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The gradients of latent weights, scales and zeros (`fake_quant` has the rules) and one step of Adam down them."""
    weight_rate, scale_rate, inverse = tl.load(pace_ptr), tl.load(pace_ptr + 1), tl.load(pace_ptr + 2)
    group_J = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside_J = group_J < groups
    raw_scale_J = tl.load(scale_ptr + group_J, mask=inside_J, other=1.0)
    unit_J = tl.load(unit_ptr + group_J, mask=inside_J, other=1.0)
    raw_zero_J = tl.load(zero_ptr + group_J, mask=inside_J, other=0.0)
    scale_J1 = kept_scale(raw_scale_J, unit_J, KIND)[:, None]
    zero_J1 = kept_zero(raw_zero_J, lowest_zero, top, ASYMMETRIC)[:, None]
    row_J, first_J = group_J // groups_in_row, (group_J % groups_in_row) * width
    to_scale_J = tl.zeros((GROUPS,), tl.float32)
    to_zero_J = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, width, TILE):
        column_N = start + tl.arange(0, TILE)
        inside_JN = inside_J[:, None] & (column_N < width)[None, :]
        at_JN = group_J[:, None] * width + column_N[None, :]
        place_JN = row_J[:, None] * row_stride + (first_J[:, None] + column_N[None, :]) * column_stride
        gradient_JN = tl.load(gradient_ptr + place_JN, mask=inside_JN, other=0.0).to(tl.float32)
        if HAS_KEEP:
            gradient_JN *= tl.load(keep_ptr + at_JN, mask=inside_JN, other=0).to(tl.float32)
        latent_JN = tl.load(latent_ptr + at_JN, mask=inside_JN, other=0.0)
        code_JN = latent_JN
        if LATENT == ROUNDING:
            code_JN = tl.load(code_ptr + at_JN, mask=inside_JN, other=0).to(tl.float32)
        level_JN, ratio_JN, slope_JN = levels(latent_JN, code_JN, scale_J1, zero_J1, pace_ptr, LATENT)
        clamped_JN = between(level_JN, bottom, top)
        within_JN = tl.where(clamped_JN == level_JN, gradient_JN, 0.0)
        to_scale_JN = gradient_JN * (clamped_JN - zero_J1)
        to_latent_JN = within_JN
        if LATENT == ABSOLUTE:
            to_scale_JN -= within_JN * ratio_JN
        else:
            to_latent_JN *= scale_J1
        if LATENT == ROUNDING:
            to_latent_JN *= slope_JN
        to_scale_J += tl.sum(to_scale_JN, axis=1)
        to_zero_J += tl.sum(within_JN - gradient_JN, axis=1)
        rate, mean_ptr, square_ptr = weight_rate, latent_mean_ptr, latent_square_ptr
        latent_JN = adam(latent_JN, to_latent_JN, mean_ptr, square_ptr, at_JN, inside_JN, rate, inverse)
        if LATENT == ROUNDING:
            latent_JN = between(latent_JN, -1.0, 1.0)
        tl.store(latent_ptr + at_JN, latent_JN, mask=inside_JN)
    to_scale_J *= unit_J
    mean_ptr, square_ptr = scale_mean_ptr, scale_square_ptr
    scale_J = adam(raw_scale_J, to_scale_J, mean_ptr, square_ptr, group_J, inside_J, scale_rate, inverse)
    tl.store(scale_ptr + group_J, between(scale_J, least_scale, float("inf")), mask=inside_J)
    if ASYMMETRIC:
        to_zero_J *= tl.sum(scale_J1, axis=1)
        mean_ptr, square_ptr = zero_mean_ptr, zero_square_ptr
        zero_J = adam(raw_zero_J, to_zero_J, mean_ptr, square_ptr, group_J, inside_J, scale_rate, inverse)
        tl.store(zero_ptr + group_J, zero_J, mask=inside_J)
