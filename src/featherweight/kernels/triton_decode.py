"""What lies between the products of one token, as Triton kernels: residuals and norms, gates, attention.

Few and small: a token of a model is about ten launches a block with them and forty without. Where the GPU can (PDL,
Hopper and later) each lets the kernel behind it start at once, so that a product fetches its weights while these run,
and waits for the one in front before it reads what that one wrote. What no kernel of the step writes (gains, keys and
values of earlier tokens, the position) is read before that wait.

Imported only where there is a GPU or Triton's interpreter.
Shapes: T tokens, D width (of a row or a head), G query heads that share a key head, N keys of a tile, S splits.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def join(
    x_ptr,  # T x WIDTH
    delta_ptr,  # T x WIDTH, what a layer adds to x; not read without HAS_DELTA
    post_ptr,  # WIDTH, float32, the gain of a norm of delta; not read without HAS_POST
    gain_ptr,  # WIDTH, float32, of the norm of the sum; not read without HAS_GAIN
    sum_ptr,  # T x WIDTH, written with HAS_DELTA
    out_ptr,  # T x WIDTH, written with HAS_GAIN
    post_eps,
    eps,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_POST: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    PDL: tl.constexpr,
):
    """sum = x + norm(delta), out = norm(sum): each rounded as its own module would."""
    if PDL:
        gdc_launch_dependents()
    column_D = tl.arange(0, TILE)
    inside_D = column_D < WIDTH
    at_D = tl.program_id(0) * WIDTH + column_D
    gain_D = tl.zeros((TILE,), dtype=tl.float32)
    post_D = gain_D
    if HAS_GAIN:
        gain_D = tl.load(gain_ptr + column_D, mask=inside_D, other=0.0)
    if HAS_POST:
        post_D = tl.load(post_ptr + column_D, mask=inside_D, other=0.0)
    if PDL:
        gdc_wait()
    sum_D = tl.load(x_ptr + at_D, mask=inside_D, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta_D = tl.load(delta_ptr + at_D, mask=inside_D, other=0.0).to(tl.float32)
        if HAS_POST:
            delta_D = delta_D * (tl.rsqrt(tl.sum(delta_D * delta_D, 0) / WIDTH + post_eps) * post_D)
            delta_D = delta_D.to(sum_ptr.dtype.element_ty).to(tl.float32)
        rounded_D = (sum_D + delta_D).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at_D, rounded_D, mask=inside_D)
        sum_D = rounded_D.to(tl.float32)
    if HAS_GAIN:
        out_D = sum_D * tl.rsqrt(tl.sum(sum_D * sum_D, 0) / WIDTH + eps) * gain_D
        tl.store(out_ptr + at_D, out_D.to(out_ptr.dtype.element_ty), mask=inside_D)


@triton.jit
def tanh(x):
    return 1 - 2 / (1 + tl.exp(2 * tl.minimum(x, 20.0)))


@triton.jit
def gate(
    y_ptr,  # T x (2 WIDTH): gates, then what they let through
    out_ptr,  # T x WIDTH
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = activation(gate) * up."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    column_D = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside_D = column_D < WIDTH
    at_D = y_ptr + token * (2 * WIDTH) + column_D
    x_D = tl.load(at_D, mask=inside_D, other=0.0).to(tl.float32)
    up_D = tl.load(at_D + WIDTH, mask=inside_D, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        x_D = x_D * tl.sigmoid(x_D)
    elif ACTIVATION == "gelu":
        x_D = 0.5 * x_D * (1 + tl.erf(x_D * 0.7071067811865476))
    else:
        x_D = 0.5 * x_D * (1 + tanh(0.7978845608028654 * (x_D + 0.044715 * x_D * x_D * x_D)))
    x_D = x_D.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + token * WIDTH + column_D, (x_D * up_D).to(out_ptr.dtype.element_ty), mask=inside_D)


@triton.jit
def turned(x, partner, weight, partner_weight, cos, sin, eps, DIM: tl.constexpr, NORM: tl.constexpr):
    """Heads (their last axis) after their norm and the rotary embedding, in float32. `sin` bears the partner's sign."""
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / DIM + eps)
        x = x * scale * weight
        partner = partner * scale * partner_weight
    return x * cos + partner * sin


@triton.jit
def attend(
    qkv_ptr,  # query heads, key heads, value heads of one token, DIM each
    cos_ptr,  # positions x ROTARY
    sin_ptr,
    q_gain_ptr,  # DIM, float32; not read without NORM
    k_gain_ptr,
    keys_ptr,  # key heads x capacity x DIM, of earlier tokens; this one's is written
    values_ptr,
    position_ptr,  # int64: how many tokens came before this one
    part_ptr,  # float32, key heads x SPLITS x GROUP x PAD
    most_ptr,  # float32, key heads x SPLITS x GROUP: the greatest score of a part, then (after all these) the sums
    count_ptr,  # int32, key heads: zero, and zero again afterwards
    out_ptr,  # query heads x DIM
    scale,
    q_eps,
    k_eps,
    capacity,
    window,  # tokens that are seen, this one among them
    HEADS: tl.constexpr,  # key heads
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # GROUP, padded to what a product takes
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    WIDE: tl.constexpr,  # PAD for each of GROUP, padded to a power of two
    ROTARY: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token's attention for one key head and a share of the keys; the last share to end adds all of them up."""
    head = tl.program_id(0)
    split = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    position = tl.load(position_ptr).to(tl.int32)
    oldest = tl.maximum(position + 1 - window, 0)
    first = oldest // BLOCK
    blocks = (position + BLOCK - 1) // BLOCK
    used = tl.minimum(tl.maximum(blocks - first, 1), SPLITS)
    if split < used:
        column_D = tl.arange(0, PAD)
        inside_D = column_D < DIM
        key_N = (first + split) * BLOCK + tl.arange(0, BLOCK)
        cached_D = head.to(tl.int64) * capacity * DIM + column_D
        inside_ND = ((key_N >= oldest) & (key_N < position))[:, None] & inside_D[None, :]
        keys_ND = tl.load(keys_ptr + cached_D[None, :] + key_N[:, None] * DIM, mask=inside_ND, other=0.0)
        values_ND = tl.load(values_ptr + cached_D[None, :] + key_N[:, None] * DIM, mask=inside_ND, other=0.0)

        HALF: tl.constexpr = ROTARY // 2
        partner_D = tl.where(column_D < HALF, column_D + HALF, tl.where(column_D < ROTARY, column_D - HALF, column_D))
        at_rotary = position * ROTARY + column_D
        cos_D = tl.load(cos_ptr + at_rotary, mask=column_D < ROTARY, other=1.0).to(tl.float32)
        sin_D = tl.load(sin_ptr + at_rotary, mask=column_D < ROTARY, other=0.0).to(tl.float32)
        sin_D = tl.where(column_D < HALF, -sin_D, sin_D)
        gain_D = tl.zeros((PAD,), dtype=tl.float32)
        partner_gain_D = gain_D
        k_gain_D = gain_D
        k_partner_gain_D = gain_D
        if NORM:
            gain_D = tl.load(q_gain_ptr + column_D, mask=inside_D, other=0.0)
            partner_gain_D = tl.load(q_gain_ptr + partner_D, mask=inside_D, other=0.0)
            k_gain_D = tl.load(k_gain_ptr + column_D, mask=inside_D, other=0.0)
            k_partner_gain_D = tl.load(k_gain_ptr + partner_D, mask=inside_D, other=0.0)
        if PDL:
            gdc_wait()

        row_G = tl.arange(0, ROWS)
        inside_GD = (row_G < GROUP)[:, None] & inside_D[None, :]
        query_G = qkv_ptr + (head * GROUP + row_G) * DIM
        q_GD = tl.load(query_G[:, None] + column_D[None, :], mask=inside_GD, other=0.0).to(tl.float32)
        partner_GD = tl.load(query_G[:, None] + partner_D[None, :], mask=inside_GD, other=0.0).to(tl.float32)
        q_GD = turned(
            q_GD, partner_GD, gain_D[None, :], partner_gain_D[None, :], cos_D[None, :], sin_D[None, :], q_eps, DIM, NORM
        ).to(keys_ND.dtype)

        best_G = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        total_G = tl.zeros((ROWS,), dtype=tl.float32)
        sum_GD = tl.zeros((ROWS, PAD), dtype=tl.float32)
        for _ in range(first + split, blocks, SPLITS):
            score_GN = tl.dot(q_GD, tl.trans(keys_ND), input_precision="ieee") * (scale * LOG2_E)
            score_GN = tl.where(((key_N >= oldest) & (key_N < position))[None, :], score_GN, float("-inf"))
            new_G = tl.maximum(best_G, tl.max(score_GN, 1))
            weight_GN = tl.exp2(score_GN - new_G[:, None])
            shrink_G = tl.exp2(best_G - new_G)
            total_G = total_G * shrink_G + tl.sum(weight_GN, 1)
            sum_GD = sum_GD * shrink_G[:, None]
            sum_GD = tl.dot(weight_GN.to(values_ND.dtype), values_ND, sum_GD, input_precision="ieee")
            best_G = new_G
            key_N += SPLITS * BLOCK
            inside_ND = (key_N < position)[:, None] & inside_D[None, :]
            keys_ND = tl.load(keys_ptr + cached_D[None, :] + key_N[:, None] * DIM, mask=inside_ND, other=0.0)
            values_ND = tl.load(values_ptr + cached_D[None, :] + key_N[:, None] * DIM, mask=inside_ND, other=0.0)

        if split == 0:  # this token's own key and value
            key_1D = qkv_ptr + (HEADS * GROUP + head) * DIM + tl.arange(0, 1)[:, None]
            k_1D = tl.load(key_1D + column_D[None, :], mask=inside_D[None, :], other=0.0).to(tl.float32)
            partner_1D = tl.load(key_1D + partner_D[None, :], mask=inside_D[None, :], other=0.0).to(tl.float32)
            own_1D = turned(
                k_1D, partner_1D, k_gain_D[None, :], k_partner_gain_D[None, :], cos_D[None, :], sin_D[None, :], k_eps,
                DIM, NORM,
            ).to(keys_ND.dtype)  # fmt: skip
            value_1D = tl.load(key_1D + HEADS * DIM + column_D[None, :], mask=inside_D[None, :], other=0.0)
            to_D = cached_D + position.to(tl.int64) * DIM
            tl.store(keys_ptr + to_D[None, :], own_1D, mask=inside_D[None, :])
            tl.store(values_ptr + to_D[None, :], value_1D, mask=inside_D[None, :])
            own_G = tl.sum(q_GD.to(tl.float32) * own_1D.to(tl.float32), 1) * (scale * LOG2_E)
            new_G = tl.maximum(best_G, own_G)
            weight_G = tl.exp2(own_G - new_G)
            shrink_G = tl.exp2(best_G - new_G)
            total_G = total_G * shrink_G + weight_G
            sum_GD = sum_GD * shrink_G[:, None] + weight_G[:, None] * value_1D.to(tl.float32)
            best_G = new_G

        part_G = (head * SPLITS + split) * GROUP + row_G
        totals = HEADS * SPLITS * GROUP
        tl.store(part_ptr + part_G[:, None] * PAD + column_D[None, :], sum_GD, mask=(row_G < GROUP)[:, None])
        tl.store(most_ptr + part_G, best_G, mask=row_G < GROUP)
        tl.store(most_ptr + totals + part_G, total_G, mask=row_G < GROUP)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        if tl.atomic_add(count_ptr + head, 1, sem="acq_rel") == used - 1:
            tl.debug_barrier()
            column_C = tl.arange(0, WIDE)  # of all heads of the group: none of the loads waits for another
            group_C = column_C // PAD
            inside_C = group_C < GROUP
            most_C = tl.full((WIDE,), float("-inf"), dtype=tl.float32)
            for each in tl.static_range(SPLITS):
                part_C = (head * SPLITS + each) * GROUP + group_C
                mine_C = group_C < tl.where(each < used, GROUP, 0)
                most_C = tl.maximum(
                    most_C, tl.load(most_ptr + part_C, mask=mine_C, other=float("-inf"), cache_modifier=".cg")
                )
            out_C = tl.zeros((WIDE,), dtype=tl.float32)
            total_C = tl.where(inside_C, 0.0, 1.0)
            for each in tl.static_range(SPLITS):
                part_C = (head * SPLITS + each) * GROUP + group_C
                mine_C = group_C < tl.where(each < used, GROUP, 0)
                most_part_C = tl.load(most_ptr + part_C, mask=mine_C, other=float("-inf"), cache_modifier=".cg")
                total_part_C = tl.load(most_ptr + totals + part_C, mask=mine_C, other=0.0, cache_modifier=".cg")
                at_C = part_ptr + (head * SPLITS + each) * GROUP * PAD + column_C
                sum_C = tl.load(at_C, mask=mine_C, other=0.0, cache_modifier=".cg")
                share_C = tl.exp2(most_part_C - tl.where(inside_C, most_C, 0.0))
                total_C += total_part_C * share_C
                out_C += sum_C * share_C
            to_C = out_ptr + (head * GROUP + group_C) * DIM + column_C % PAD
            tl.store(to_C, (out_C / total_C).to(out_ptr.dtype.element_ty), mask=inside_C & (column_C % PAD < DIM))
            tl.store(count_ptr + head, 0)


@triton.jit
def likeliest(
    logits_ptr,  # VOCAB
    most_ptr,  # float32, PARTS: the greatest of each
    at_ptr,  # int32, PARTS: and where it is
    count_ptr,  # int32: zero, and zero again afterwards
    token_ptr,  # int64, written
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,  # PARTS, to a power of two
    PDL: tl.constexpr,
):
    """token = argmax(logits), the first of equals; the last part to end looks at the others' greatest."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    part = tl.program_id(0)
    column_V = part * TILE + tl.arange(0, TILE)
    logits_V = tl.load(logits_ptr + column_V, mask=column_V < VOCAB, other=float("-inf")).to(tl.float32)
    most = tl.max(logits_V, 0)
    tl.store(most_ptr + part, most)
    tl.store(at_ptr + part, tl.min(tl.where(logits_V == most, column_V, VOCAB - 1), 0))
    tl.debug_barrier()
    if tl.atomic_add(count_ptr, 1, sem="acq_rel") == PARTS - 1:
        tl.debug_barrier()
        part_P = tl.arange(0, PADDED)
        most_P = tl.load(most_ptr + part_P, mask=part_P < PARTS, other=float("-inf"), cache_modifier=".cg")
        at_P = tl.load(at_ptr + part_P, mask=part_P < PARTS, other=VOCAB - 1, cache_modifier=".cg")
        tl.store(token_ptr, tl.min(tl.where(most_P == tl.max(most_P, 0), at_P, VOCAB - 1), 0).to(tl.int64))
        tl.store(count_ptr, 0)
