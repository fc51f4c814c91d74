"""The search for scales (and zeros) as one Triton kernel: a program holds some groups and tries every candidate.

What is tried, and in which order, is `scales`' own; the first of equal candidates wins here as there, but sums are
taken in another order, so of two that are level to rounding either may win. Imported by `fused` alone.
Shapes: M groups of a program, N inputs of a group (in a tile: the next power of two), A columns of groups.
"""

import triton
import triton.language as tl

from featherweight.core.triton_slabs import nearest


@triton.jit
def stored(scale_M, least, most, KIND: tl.constexpr):
    """`scales.store`: what a file of 16 or 32 bits makes of a scale, never zero nor infinite."""
    size_M = tl.minimum(tl.maximum(tl.abs(scale_M), least), most)
    scale_M = tl.where(scale_M < 0, -size_M, size_M)
    if KIND == 16:
        scale_M = scale_M.to(tl.float16).to(tl.float32)
    if KIND == 17:
        bits_M = scale_M.to(tl.uint32, bitcast=True)  # half to even: the interpreter's own cast cuts off
        bits_M = (bits_M + 0x7FFF + ((bits_M >> 16) & 1)) & 0xFFFF0000
        scale_M = bits_M.to(tl.float32, bitcast=True)
    return scale_M


@triton.jit
def cost(weight_MN, price_MN, scale_M, low_M, high_M):
    """The sum of error^2 x price of each group on the grid of a scale, with levels from low to high times it."""
    step_MN = nearest(weight_MN * (1.0 / scale_M)[:, None], low_M[:, None], high_M[:, None])
    error_MN = weight_MN - step_MN * scale_M[:, None]
    return tl.sum(error_MN * error_MN * price_MN, axis=1)


@triton.jit
def load_groups(weight_ptr, price_ptr, groups, per_layer, across, WIDTH, TILE: tl.constexpr, GROUPS: tl.constexpr):
    """Weights, and the price of each place, of this program's groups; the numbers of the groups and which there are."""
    group_M = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    place_N = tl.arange(0, TILE)
    inside_M = group_M < groups
    inside_MN = inside_M[:, None] & (place_N < WIDTH)[None, :]
    weight_MN = tl.load(weight_ptr + group_M[:, None] * WIDTH + place_N[None, :], mask=inside_MN, other=0.0)
    price_M = (group_M // per_layer) * across + group_M % across
    price_MN = tl.load(price_ptr + price_M[:, None] * WIDTH + place_N[None, :], mask=inside_MN, other=0.0)
    return weight_MN, price_MN, group_M, inside_M


@triton.jit(do_not_specialize=["groups", "per_layer", "across", "coarse"])
def symmetric_search(
    weight_ptr,
    price_ptr,
    ladder_ptr,
    scale_ptr,
    groups,
    per_layer,
    across,
    WIDTH,
    coarse,
    low,
    high,
    levels,
    least,
    most,
    MIRROR: tl.constexpr,
    FINE: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    weight_MN, price_MN, group_M, inside_M = load_groups(
        weight_ptr, price_ptr, groups, per_layer, across, WIDTH, TILE, GROUPS
    )
    extreme_M = tl.max(tl.abs(weight_MN), axis=1)
    extreme_M = tl.where(extreme_M == 0, 1.0, extreme_M)
    low_M, high_M = tl.zeros_like(extreme_M) + low, tl.zeros_like(extreme_M) + high
    best_M, cost_M = tl.zeros_like(extreme_M), tl.zeros_like(extreme_M) + float("inf")
    for i in range(0, coarse):
        scale_M = stored(extreme_M * tl.load(ladder_ptr + i) / levels, least, most, KIND)
        found_M = cost(weight_MN, price_MN, scale_M, low_M, high_M)
        best_M = tl.where(found_M < cost_M, scale_M, best_M)
        cost_M = tl.minimum(found_M, cost_M)
        if MIRROR:
            found_M = cost(weight_MN, price_MN, -scale_M, low_M, high_M)
            best_M = tl.where(found_M < cost_M, -scale_M, best_M)
            cost_M = tl.minimum(found_M, cost_M)
    centre_M = best_M
    for i in range(0, FINE):
        shift_M = tl.load(ladder_ptr + coarse + i) * extreme_M / levels
        shift_M = tl.where(centre_M < 0, -shift_M, shift_M)
        scale_M = stored(centre_M + shift_M, least, most, KIND)
        found_M = cost(weight_MN, price_MN, scale_M, low_M, high_M)
        best_M = tl.where(found_M < cost_M, scale_M, best_M)
        cost_M = tl.minimum(found_M, cost_M)
    tl.store(scale_ptr + group_M, best_M, mask=inside_M)


@triton.jit(do_not_specialize=["groups", "per_layer", "across", "coarse"])
def asymmetric_search(
    weight_ptr,
    price_ptr,
    ladder_ptr,
    scale_ptr,
    zero_ptr,
    groups,
    per_layer,
    across,
    WIDTH,
    coarse,
    top,
    lowest_zero,
    least,
    most,
    FINE: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    weight_MN, price_MN, group_M, inside_M = load_groups(
        weight_ptr, price_ptr, groups, per_layer, across, WIDTH, TILE, GROUPS
    )
    bottom_M = tl.minimum(tl.min(weight_MN, axis=1), 0.0)
    ceiling_M = tl.maximum(tl.max(weight_MN, axis=1), 0.0)
    empty_M = bottom_M == ceiling_M
    bottom_M, ceiling_M = tl.where(empty_M, -1.0, bottom_M), tl.where(empty_M, 1.0, ceiling_M)
    full_M = (ceiling_M - bottom_M) / top
    best_M, zero_M = tl.zeros_like(full_M), tl.zeros_like(full_M)
    centre_M, cost_M = tl.zeros_like(full_M), tl.zeros_like(full_M) + float("inf")
    for i in range(0, coarse + FINE):
        factor = tl.load(ladder_ptr + i)
        scale_M = tl.where(i < coarse, full_M * factor, centre_M + factor * full_M)
        scale_M = stored(tl.maximum(scale_M, 0.0), least, most, KIND)
        middle_M = nearest((top - (bottom_M + ceiling_M) / scale_M) / 2, -1048576.0, 1048576.0)
        for shift in tl.static_range(3):
            try_M = middle_M + (0 if shift == 0 else (-1 if shift == 1 else 1))
            try_M = tl.minimum(tl.maximum(try_M, lowest_zero), top)
            found_M = cost(weight_MN, price_MN, scale_M, -try_M, top - try_M)
            better_M = found_M < cost_M
            best_M, zero_M = tl.where(better_M, scale_M, best_M), tl.where(better_M, try_M, zero_M)
            cost_M = tl.minimum(found_M, cost_M)
        centre_M = tl.where(i < coarse, best_M, centre_M)
    tl.store(scale_ptr + group_M, best_M, mask=inside_M)
    tl.store(zero_ptr + group_M, zero_M.to(tl.uint8), mask=inside_M)
