// Blocks of 4-bit weights as operands of warpgroup products, for w4a16_hopper.cu: which says what a block is. After numbers.cuh.

__device__ __forceinline__ u32 bytes_of(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

__device__ __forceinline__ u32 times(u32 a, u32 b) {
    u32 c;
#if BF16
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#endif
    return c;
}

__device__ __forceinline__ void load_words(u32 (&words)[4], const u8* from) {
    uint4 v = *(const uint4*)from;
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

__device__ __forceinline__ u32 halves_of(float a, float b) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
    return v;
}

// What a lane's rows g and g + 8 share over a group.
struct Scales {
    float of[2];
    u32 pairs[2];  // SUMS 0
    u32 zeros[2];  // what is taken from a code's magic number; RAISED: what is added to its product with the scale
};

// RAISED: a code in the last bits of a half is code * 2^-24 (in the next four, 2^-20): a number below the normal ones, which is exact
// and costs no more. Times the scale and less the middle's product it is the weight in one rounding, if the scale has been
// raised by the power of two that its row bears; what leaves a row's sums is lowered again. Of row g and, of g + 8, a 16th.
__device__ __forceinline__ void load_raises(float (&raises)[2], const u8* powers, int row, int rows) {
#pragma unroll
    for (int i = 0; i < 2; i++)
        raises[i] = __uint_as_float((127 - 4 * i + (row + 8 * i < rows ? powers[row + 8 * i] : 0)) << 23);
}
__device__ __forceinline__ float lowered_by(const float (&raises)[2], int i) {
    return __uint_as_float((2 * 127 + 24 - 4 * i << 23) - __float_as_uint(raises[i]));
}

__device__ __forceinline__ Scales load_scales(const u8* block, int part, int g, int half, const float (&raises)[2]) {
    Scales s;
    const int at = (part * 8 + g) * 4 + half * 2;
    if (RAISED) {
        u32 v = *(const u32*)(block + CODES + at * 2);
        const float a = half_to_float((u16)v) * raises[0], b = half_to_float((u16)(v >> 16)) * raises[1];
        const u32 middle = halves_of(a * -0x1p-21f, b * -0x1p-17f);
        v = halves_of(a, b);
        s.pairs[0] = bytes_of(v, 0, 0x1010), s.pairs[1] = bytes_of(v, 0, 0x3232);
        s.zeros[0] = bytes_of(middle, 0, 0x1010), s.zeros[1] = bytes_of(middle, 0, 0x3232);
        return s;
    }
    if (SCALE == 2) {
        float2 v = *(const float2*)(block + CODES + at * 4);
        s.of[0] = v.x, s.of[1] = v.y;
    } else {
        u32 v = *(const u32*)(block + CODES + at * 2);
        s.of[0] = SCALE ? bfloat_to_float((u16)v) : half_to_float((u16)v);
        s.of[1] = SCALE ? bfloat_to_float((u16)(v >> 16)) : half_to_float((u16)(v >> 16));
        s.pairs[0] = bytes_of(v, 0, 0x1010), s.pairs[1] = bytes_of(v, 0, 0x3232);
    }
    u32 z = ZEROS ? *(const u16*)(block + CODES + SCALE_BYTES + at) : 0x0808;
    zeros_of(s.zeros, z & 255, z >> 8);
    return s;
}

// One word as the operand of a product: rows g, g + 8 of the first eight columns, then of the second.
__device__ __forceinline__ void to_floats(u32 (&a)[4], u32 w, const Scales& s) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (RAISED) {
            const u32 v = w >> 8 * i;
            a[2 * i] = times_plus(v & 0x000f000fu, s.pairs[0], s.zeros[0]);
            a[2 * i + 1] = times_plus(v & 0x00f000f0u, s.pairs[1], s.zeros[1]);
            continue;
        }
        code_minus_zero(a[2 * i], a[2 * i + 1], w >> 8 * i, s.zeros);
        if (!SUMS) {
            a[2 * i] = times(a[2 * i], s.pairs[0]);
            a[2 * i + 1] = times(a[2 * i + 1], s.pairs[1]);
        }
    }
}
