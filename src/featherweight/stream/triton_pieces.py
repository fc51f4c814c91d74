"""What lies between a block's products, one pass over memory each: norms, rotations and gates.

Each rounds where the operators of torch that it stands in for round, so results differ by the order of a sum or the
last bit of an exponential, and only where that tips a rounding. Imported by `fused` alone. All tensors are contiguous
but for heads and the halves of a gate, whose last axis is.

Shapes: N rows, D width; S sequences, T tokens, H heads of D / 2 pairs each.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def rms_norm(
    x_ptr,  # N x D
    weight_ptr,  # D
    out_ptr,  # N x D
    rows,
    width,
    eps,
    PLUS_ONE: tl.constexpr,  # the factor is 1 + weight
    EARLY: tl.constexpr,  # rounded before the factor too
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row_N = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place_D = tl.arange(0, TILE)
    inside_D = place_D < width
    at_ND = row_N[:, None] * width + place_D[None, :]
    mask_ND = (row_N < rows)[:, None] & inside_D[None, :]
    kind = out_ptr.dtype.element_ty
    x_ND = tl.load(x_ptr + at_ND, mask=mask_ND, other=0.0).to(tl.float32)
    factor_D = tl.load(weight_ptr + place_D, mask=inside_D, other=0.0).to(tl.float32)
    if PLUS_ONE:
        factor_D += 1.0
    mean_N = tl.sum(x_ND * x_ND, axis=1) / width
    x_ND = x_ND * tl.rsqrt(mean_N + eps)[:, None]
    if EARLY:
        x_ND = x_ND.to(kind).to(tl.float32)
    tl.store(out_ptr + at_ND, (x_ND * factor_D[None, :]).to(kind), mask=mask_ND)


@triton.jit(do_not_specialize=["tokens", "heads"])
def rotate(
    x_ptr,  # S x T x H x D
    out_ptr,  # laid out as x is
    cos_ptr,  # T x D or S x T x D
    sin_ptr,
    tokens,
    heads,
    sequence_stride,
    token_stride,
    head_stride,
    cos_sequence_stride,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
):
    sequence, token = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    pair_P, head_H = tl.arange(0, PAIRS), tl.arange(0, HEADS)
    inside_P = pair_P < HALF
    mask_HP = (head_H < heads)[:, None] & inside_P[None, :]
    kind = x_ptr.dtype.element_ty
    angle = sequence * cos_sequence_stride + token * (2 * HALF) + pair_P
    at_HP = sequence * sequence_stride + token * token_stride + head_H[:, None] * head_stride + pair_P[None, :]
    one_HP = tl.load(x_ptr + at_HP, mask=mask_HP, other=0.0).to(tl.float32)
    two_HP = tl.load(x_ptr + at_HP + HALF, mask=mask_HP, other=0.0).to(tl.float32)
    cos_1P = tl.load(cos_ptr + angle, mask=inside_P, other=0.0).to(tl.float32)[None, :]
    sin_1P = tl.load(sin_ptr + angle, mask=inside_P, other=0.0).to(tl.float32)[None, :]
    turned_HP = (one_HP * cos_1P).to(kind).to(tl.float32) + (-two_HP * sin_1P).to(kind).to(tl.float32)
    tl.store(out_ptr + at_HP, turned_HP.to(kind), mask=mask_HP)
    cos_1P = tl.load(cos_ptr + angle + HALF, mask=inside_P, other=0.0).to(tl.float32)[None, :]
    sin_1P = tl.load(sin_ptr + angle + HALF, mask=inside_P, other=0.0).to(tl.float32)[None, :]
    turned_HP = (two_HP * cos_1P).to(kind).to(tl.float32) + (one_HP * sin_1P).to(kind).to(tl.float32)
    tl.store(out_ptr + at_HP + HALF, turned_HP.to(kind), mask=mask_HP)


@triton.jit
def gate(
    gate_ptr,  # N x D each
    up_ptr,
    out_ptr,
    width,
    gate_stride,
    up_stride,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place_D = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside_D = place_D < width
    kind = out_ptr.dtype.element_ty
    gate_D = tl.load(gate_ptr + row * gate_stride + place_D, mask=inside_D, other=0.0).to(tl.float32)
    up_D = tl.load(up_ptr + row * up_stride + place_D, mask=inside_D, other=0.0).to(tl.float32)
    silu_D = (gate_D / (1.0 + tl.exp(-gate_D))).to(kind).to(tl.float32)
    tl.store(out_ptr + row * width + place_D, (silu_D * up_D).to(kind), mask=inside_D)


@triton.jit
def join(
    pair_ptr,  # N x D
    place_ptr,  # T x K, where a token's pairs lie
    expert_ptr,  # T x K, int64; `count` or more is nowhere
    share_ptr,  # T x K
    out_ptr,  # T x D
    width,
    count,
    CHOICES: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place_D = tl.arange(0, TILE)
    inside_D = place_D < width
    sum_D = tl.zeros([TILE], dtype=tl.float32)
    for choice in range(CHOICES):
        at = token * CHOICES + choice
        there = tl.where(tl.load(expert_ptr + at) < count, width, 0)
        row_D = pair_ptr + tl.load(place_ptr + at) * width + place_D
        pair_D = tl.load(row_D, mask=place_D < there, other=0.0).to(tl.float32)
        sum_D += pair_D * tl.load(share_ptr + at).to(tl.float32)
    tl.store(out_ptr + token * width + place_D, sum_D.to(out_ptr.dtype.element_ty), mask=inside_D)
