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

// What a lane's rows g and g + 8 share over a group.
struct Scales {
    float of[2];
    u32 pairs[2];  // SUMS 0
    u32 zeros[2];  // what is taken from a code's magic number
};

__device__ __forceinline__ Scales load_scales(const u8* block, int part, int g, int half) {
    Scales s;
    const int at = (part * 8 + g) * 4 + half * 2;
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
        code_minus_zero(a[2 * i], a[2 * i + 1], w >> 8 * i, s.zeros);
        if (!SUMS) {
            a[2 * i] = times(a[2 * i], s.pairs[0]);
            a[2 * i + 1] = times(a[2 * i + 1], s.pairs[1]);
        }
    }
}
