// Blocks of 4-bit weights as operands of warpgroup products, for w4a16_hopper.cu: which says what a block is.

__device__ __forceinline__ u32 bytes_of(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

// Lane t's words hold, of 32 columns 8s + 4j + .., the eight of s = t; afterwards word j holds, of the eights s = 2j (bytes
// 0, 2) and 2j + 1 (bytes 1, 3), the columns 2t and 2t + 1. A 4 x 4 transposition: s's upper bit changes places with the
// word, its lower with the bytes.
__device__ __forceinline__ void exchange(u32& w0, u32& w1, int lane) {
    const bool upper = lane & 2, lower = lane & 1;
    u32 got = __shfl_xor_sync(0xffffffffu, upper ? w0 : w1, 2);
    u32 v0 = upper ? got : w0, v1 = upper ? w1 : got;
    u32 give = bytes_of(v0, v1, lower ? 0x6420 : 0x7531);
    got = __shfl_xor_sync(0xffffffffu, give, 1);
    // Bytes 0, 1 of what comes belong to word 0 and 2, 3 to word 1.
    w0 = bytes_of(v0, got, lower ? 0x3514 : 0x5240);
    w1 = bytes_of(v1, got, lower ? 0x3716 : 0x7260);
}

__device__ __forceinline__ u32 masked_or(u32 v, u32 mask, u32 bits) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(v), "r"(mask), "r"(bits));
    return r;
}
__device__ __forceinline__ u32 pair_of(u16 v) { return (u32)v << 16 | v; }
__device__ __forceinline__ u32 minus(u32 a, u32 b) {
    u32 c;
#if BF16
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#else
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#endif
    return c;
}
__device__ __forceinline__ u32 times(u32 a, u32 b) {
    u32 c;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
__device__ __forceinline__ u32 times_plus(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
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
    u32 z0 = z & 255, z1 = z >> 8;
    if (BF16)
        s.zeros[0] = pair_of(0x4300 | z0), s.zeros[1] = pair_of(0x4300 | z1);       // 128 + z
    else
        s.zeros[0] = pair_of(0x6400 | z0), s.zeros[1] = pair_of(0xd400 | z1 << 4);  // 1024 + z; -(64 + z)
    return s;
}

// One word, after `exchange`, as the operand of a product: rows g, g + 8 of the eight 2j, then of 2j + 1.
__device__ __forceinline__ void to_floats(u32 (&a)[4], u32 w, const Scales& s) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 v = w >> 8 * i;
        if (BF16) {
            a[2 * i] = minus(masked_or(v, 0x000f000fu, 0x43004300u), s.zeros[0]);
            a[2 * i + 1] = minus(masked_or(v >> 4, 0x000f000fu, 0x43004300u), s.zeros[1]);
        } else {
            a[2 * i] = minus(masked_or(v, 0x000f000fu, 0x64006400u), s.zeros[0]);
            a[2 * i + 1] = times_plus(masked_or(v, 0x00f000f0u, 0x64006400u), 0x2c002c00u, s.zeros[1]);  // 1/16: exact
            if (!SUMS) {
                a[2 * i] = times(a[2 * i], s.pairs[0]);
                a[2 * i + 1] = times(a[2 * i + 1], s.pairs[1]);
            }
        }
    }
}
